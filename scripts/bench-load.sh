#!/usr/bin/env bash
# How fast weight files become tensors, beside dd and PyTorch on the same files, from a disk whose cache was dropped.
#
#     python3 -m venv target/load-peer && target/load-peer/bin/pip install torch safetensors numpy
#     scripts/bench-load.sh FOLDER [ROUNDS] [PYTHON]
#
# FOLDER is on the disk that is measured and has 15 GB free; what is written there is deleted again. Prints a Markdown
# table of medians; fails when a load takes more than 512 MB beside the network.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath "${1:?the folder to write to}")
rounds=${2:-3}
python=$(realpath -s "${3:-target/load-peer/bin/python}")
"$python" -c "import safetensors, torch"
exec cargo bench -q -p talkie --bench load -- --dir "$folder" --rounds "$rounds" --python "$python"
