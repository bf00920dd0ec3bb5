#!/usr/bin/env bash
# Writes docs/PARITY.md: runs the parity tests and tabulates the largest error of each network.
# TALKIE_GOLDENS chooses the golden folder; without it the lean copy in tests/golden is used.
set -euo pipefail
cd "$(dirname "$0")/.."
TALKIE_PARITY_REPORT="$PWD/docs/PARITY.md" cargo test --test models -- --test-threads=1
echo "wrote docs/PARITY.md"
