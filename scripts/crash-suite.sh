#!/bin/sh
# Kills gateways and workers a thousand times, at named points and at any moment, and checks that every accepted job
# ended once. TALKIE_SEED=<number> chooses other moments.
set -eu
cd "$(dirname "$0")/.."
TALKIE_LONG=1 exec cargo test --test service crash:: -- --nocapture "$@"
