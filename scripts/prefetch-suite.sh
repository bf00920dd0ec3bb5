#!/bin/sh
# Kills downloads and preparations a hundred times each, at named points and at any moment, and checks that each one ends
# complete and verified, with little fetched twice. TALKIE_SEED=<number> chooses other moments.
set -eu
cd "$(dirname "$0")/.."
TALKIE_LONG=1 exec cargo test --test service -- hub::kills:: prepare::fault_38 --nocapture "$@"
