#!/usr/bin/env bash
# Builds `handler` for NVIDIA's GPUs on a machine that needs neither a GPU nor CUDA:
#
#     scripts/build-cuda.sh [TOOLCHAIN]
#
# TOOLCHAIN (target/cuda-toolchain) is assembled once, see scripts/cuda/toolchain.sh. Needs Rust, g++, python3 with pip
# and about 45 CPU minutes. Leaves target/cuda/handler, which runs from Ampere on (candle's own kernels are PTX for 8.0,
# ours machine code for 8.0, 8.9 and 9.0 and PTX for later cards), and beside it libraries.txt: the CUDA libraries that it
# opens when it finds a driver, each with the wheel on PyPI that has it.
set -euo pipefail
cd "$(dirname "$0")/.."
toolchain=${1:-target/cuda-toolchain}
most_bytes=$((64 << 20))

scripts/cuda/toolchain.sh "$toolchain"
CUDA_HOME=$(cd "$toolchain" && pwd)
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH" CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
cargo build --release --locked --features cuda --package handler --bin handler --target-dir target/cuda-build

mkdir -p target/cuda
strip -o target/cuda/handler target/cuda-build/release/handler
cp scripts/cuda/libraries.txt target/cuda/

# What was built, and that it starts where there is no GPU.
handler=target/cuda/handler
fail() { echo "build-cuda.sh: $*" >&2; exit 1; }
echo "$handler: $(stat -c %s "$handler") bytes"
needed=$(readelf -d "$handler" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort)
echo "needed to start:" $needed
if grep -Eq 'cuda|cublas|curand|nvrtc' <<< "$needed"; then fail "it does not start without CUDA's libraries"; fi
payload=$(python3 -c 'import lzma, sys; print(len(lzma.compress(sys.stdin.buffer.read())))' < "$handler")
echo "as xz: $payload bytes"
[ "$payload" -le "$most_bytes" ] || fail "its payload is larger than $most_bytes bytes"
"$handler" --version

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$handler" generate --model tiny --steps 1 --frames-per-window 17 --motion-frames 5 --max-seconds 1 --device cpu --quiet \
    -o "$work/out.mp4" > "$work/output.json"
[ -s "$work/out.mp4" ] || fail "it makes no video on the processor"
if [ -e /dev/nvidiactl ]; then echo "there is a GPU: scripts/gpu-check.sh compares and measures"; exit 0; fi
if "$handler" generate --model tiny --device cuda --quiet -o "$work/none.mp4" 2> "$work/error.json"; then
    fail "it claims a GPU where there is none"
fi
grep -q '"GPU_UNAVAILABLE"' "$work/error.json" || fail "without a GPU it fails otherwise: $(cat "$work/error.json")"
tail -n 1 "$work/error.json"
echo "it starts without a GPU, computes on the processor, and says why it does not compute on a GPU"
