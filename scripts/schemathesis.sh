#!/usr/bin/env bash
# Sends a gateway at least 10 000 requests that are made from its own description, right and wrong ones, and fails at
# the first server error or answer that the description does not have.
#
#   scripts/schemathesis.sh [URL]
#
# Without a URL it builds and starts a gateway without workers. Needs Python 3.10 or later; schemathesis is installed
# into target/schemathesis at its first run.
set -euo pipefail
cd "$(dirname "$0")/.."

EXAMPLES="${EXAMPLES:-300}"
LEAST_CASES="${LEAST_CASES:-10000}"
venv="$PWD/target/schemathesis"
if [ ! -x "$venv/bin/schemathesis" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet 'schemathesis==4.32.5'
fi

work="$(mktemp -d)"
gateway=""
cleanup() {
  [ -z "$gateway" ] || kill "$gateway" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

url="${1:-}"
if [ -z "$url" ]; then
  cargo build --quiet
  # Sent jobs wait for ever, and are purged by the requests themselves.
  MAX_WORKERS=0 MIN_FREE_BYTES=0 target/debug/handler serve --addr 127.0.0.1:0 --data-dir "$work/data" \
    >"$work/out" 2>"$work/log" &
  gateway=$!
  until url="$(sed -n 's/^listening on //p' "$work/out")" && [ -n "$url" ]; do
    kill -0 "$gateway" || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
  done
fi

# Otherwise most of the time would be spent with waiting for jobs that nobody runs.
cat >"$work/schemathesis.toml" <<'TOML'
[parameters]
"query.wait" = 1
TOML

# It keeps notes in the folder that it runs in.
cd "$work"
"$venv/bin/schemathesis" --config-file "$work/schemathesis.toml" run "$url/openapi.json" --url "$url" \
  --max-examples "$EXAMPLES" --seed 1 --request-timeout 30 \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance,unsupported_method \
  --report ndjson --report-ndjson-path "$work/report.ndjson" | tee "$work/said"

cases="$(grep -Eo '[0-9]+ generated' "$work/said" | tail -1 | grep -Eo '[0-9]+' || true)"
if [ "${cases:-0}" -lt "$LEAST_CASES" ]; then
  echo "only ${cases:-no} cases were sent, expected at least $LEAST_CASES: raise EXAMPLES" >&2
  exit 1
fi
if [ -n "$gateway" ] && grep -E 'panicked|incident' "$work/log"; then
  echo "the gateway has panicked" >&2
  exit 1
fi
