#!/usr/bin/env bash
# Installs what the tests in tests/service/clients and the load benchmark drive the gateway with: RunPod's Python and
# JavaScript SDKs into target/clients (or the folder in TALKIE_CLIENTS), Chromium and wrk from Debian, and
# Python and Node where they are missing. What is there already stays. Needs apt-get.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${TALKIE_CLIENTS:-target/clients}
runpod_python=1.12.0
runpod_js=1.1.2

missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
command -v wrk >/dev/null || missing+=(wrk)
command -v npm >/dev/null || missing+=(nodejs npm)
python3 -c "import ensurepip" 2>/dev/null || missing+=(python3 python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update
  $sudo apt-get install -y --no-install-recommends "${missing[@]}"
fi

if ! "$folder/python/bin/python" -c "import importlib.metadata as m; assert m.version('runpod') == '$runpod_python'" 2>/dev/null; then
  python3 -m venv --clear "$folder/python"
  "$folder/python/bin/pip" install --quiet --disable-pip-version-check "runpod==$runpod_python"
fi

if ! grep -qs "\"version\": \"$runpod_js\"" "$folder/node/node_modules/runpod-sdk/package.json"; then
  mkdir -p "$folder/node"
  npm install --prefix "$folder/node" --no-save --no-audit --no-fund --loglevel=error "runpod-sdk@$runpod_js"
fi
