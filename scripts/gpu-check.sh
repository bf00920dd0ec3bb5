#!/usr/bin/env bash
# Everything that only a GPU can show, by one command on a machine that has one:
#
#     scripts/gpu-check.sh HANDLER [OUT] [--device cuda|cpu] [--tiny]
#
# HANDLER is a binary of scripts/build-cuda.sh, plain or as .xz, built elsewhere; beside it this needs only the
# repository's files. OUT (gpu-check.md) becomes the table for docs/BENCHMARKS.md. First the device is compared with the
# processor and with the reference (`handler bench --parity`), then its speed is measured next to PyTorch's on the same
# shapes in the same run (tests/benches/peer.py), where there is a python3 with torch. What is missing is said, and the
# exit code is 0 only if every comparison held. --device cpu and --tiny show the script itself where there is no GPU.
#
# A whole DiT takes minutes to draw at random, so it is measured with LAYERS (8) of its 40 layers.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
handler="" out=gpu-check.md device=cuda tiny=""
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=${2:?}; shift ;;
    --tiny) tiny=yes ;;
    -*) usage ;;
    *) if [ -z "$handler" ]; then handler=$1; else out=$1; fi ;;
    esac
    shift
done
[ -n "$handler" ] || usage
layers=${LAYERS:-8} runs=${RUNS:-3} python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ $handler == *.xz ]]; then
    "$python" -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$handler" > "$work/handler"
    chmod +x "$work/handler"
    handler=$work/handler
fi

# Where PyTorch's wheels bring CUDA's libraries, they serve us as well.
folders='import glob, site; print(":".join(d for p in site.getsitepackages() for d in glob.glob(f"{p}/nvidia/*/lib")))'
libraries=$("$python" -c "$folders" 2>/dev/null || true)
export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH:-}
# Compiled PTX is kept for the runs that follow.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$work/ptx} CUDA_CACHE_MAXSIZE=${CUDA_CACHE_MAXSIZE:-4294967296}

missing=()
if [ "$device" = cuda ] && ! command -v nvidia-smi > /dev/null; then missing+=("nvidia-smi: the card is not named"); fi
card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [ "$device" = cpu ]; then card="processor: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"; fi
with_torch=yes
if ! "$python" -c 'import torch' 2>/dev/null; then
    with_torch="" missing+=("torch: there is no PyTorch to compare with ($python)")
elif [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    with_torch="" missing+=("torch: this PyTorch sees no GPU")
fi

if [ -n "$tiny" ]; then
    model=(--model tiny --layers 1 --frames 5)
    stages=(attention dit_forward vae_encode vae_decode)
else
    model=(--model infinitetalk --layers "$layers")
    stages=(umt5 clip vae_encode attention dit_forward vae_decode)
fi

failed=0
note() { echo "gpu-check: $*" >&2; }
note "comparing"
if ! "$handler" bench --parity --device "$device" --goldens tests/golden > "$work/parity.txt" 2> "$work/parity.err"; then
    failed=1
    cat "$work/parity.txt" "$work/parity.err" >&2
fi
if [ -s "$work/parity.txt" ]; then
    note "measuring"
    bench=("$handler" bench "${model[@]}" --device "$device" --weights random)
    for stage in "${stages[@]}"; do bench+=(--stage "$stage"); done
    "${bench[@]}" --describe > "$work/description.json"
    "${bench[@]}" --json --runs "$runs" > "$work/ours.jsonl" || missing+=("speed: handler bench failed on a stage")
    if [ -n "$with_torch" ]; then
        "$python" tests/benches/peer.py "$work/description.json" --runs "$runs" > "$work/peer.jsonl" ||
            missing+=("speed: PyTorch failed on a stage")
    fi
else
    missing+=("speed: the device could not be opened")
fi
touch "$work/ours.jsonl" "$work/peer.jsonl" "$work/parity.txt" "$work/description.json"
printf '%s\n' "${missing[@]+"${missing[@]}"}" > "$work/missing.txt"
"$python" scripts/gpu-table.py "$work" --card "$card" --command "scripts/gpu-check.sh${tiny:+ --tiny} --device $device (LAYERS=$layers RUNS=$runs)" > "$out"
cat "$out"
exit "$failed"
