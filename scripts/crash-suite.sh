#!/bin/sh
# The loops in full: a thousand kills of gateways and workers, at named points and at any moment, after which every
# accepted job has ended once; power cuts, kills and random operations of the store; two hundred signals in each phase of
# a worker; and the outages of a platform in real seconds. TALKIE_SEED=<number> chooses other moments, and names of
# tests a part of it, as in `scripts/crash-suite.sh crash::`.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- crash:: store:: worker::faults::fault_ worker::process::fault_
TALKIE_LONG=1 exec cargo test --test service -- --nocapture --test-threads=1 "$@"
