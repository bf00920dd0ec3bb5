#!/usr/bin/env bash
# Runs the kernels of kernels/fused.cu on the processor and holds them to their formulas (tests/kernels). Needs g++ 11 or
# newer, no CUDA. What a GPU alone does wrong, and the kernels made of CUTLASS and FlashAttention, are left to
# scripts/gpu-check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A launch becomes a call of the emulator; the headers of CUDA are the emulator's.
sed -e 's/\([a-z_]*<[^<>]*>\)<<<\(.*\), THREADS, 0, stream>>>(\(.*\));/emulate(\2, THREADS, [\&] { \1(\3); });/' \
    -e '/#include <cuda/d' kernels/fused.cu > "$work/fused.inc"
sed -e '/#include <cuda/d' kernels/talkie.h > "$work/talkie.h"
if grep -q '<<<' "$work/fused.inc"; then echo "check-kernels.sh: a launch was not understood" >&2; exit 1; fi
g++ -std=c++20 -O1 -Wall -Wno-unknown-pragmas -pthread -DFUSED="\"$work/fused.inc\"" -I"$work" -Itests/kernels \
    tests/kernels/fused.cpp -o "$work/fused"
"$work/fused"
