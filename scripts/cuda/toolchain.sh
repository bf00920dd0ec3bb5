#!/usr/bin/env bash
# What a CUDA build of Talkie needs and a machine without CUDA lacks, assembled from package registries:
#
#     scripts/cuda/toolchain.sh FOLDER
#
# Compiler, headers and static run-time library come from NVIDIA's wheels on PyPI (wheels.txt), CUTLASS likewise; the
# headers of FlashAttention 2 and 3 from the sources of the crates candle-flash-attn and candle-flash-attn-v3, which are
# not built; the libraries to link with are stand-ins (lazy-libraries.py). FOLDER can then be the CUDA_HOME of a build.
# Does nothing where FOLDER is complete.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
workspace=$(cd "$here/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# Complete is a folder that was made by these very scripts, for this very cudarc.
cudarc=$(sed -n '/^name = "cudarc"$/{n;s/version = "\(.*\)"/\1/p}' "$workspace/Cargo.lock")
stamp=$( (cat "$here/wheels.txt" "$here/toolchain.sh" "$here/lazy-libraries.py"; echo "$cudarc") | sha256sum)
if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
rm -rf "${folder:?}"/*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes -d "$work/wheels" -r "$here/wheels.txt"
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/x"; done
cuda=$work/x/nvidia/cu13
cp -a "$cuda/bin" "$cuda/nvvm" "$cuda/include" "$folder/"
chmod -R u+x "$folder/bin" "$folder/nvvm/bin"
mkdir -p "$folder/lib64"
cp "$cuda"/lib/libcudadevrt.a "$cuda"/lib/libcudart_static.a "$folder/lib64/"
# candle asks for the run-time library by its short name; the static one opens the driver itself.
ln -s libcudart_static.a "$folder/lib64/libcudart.a"
cp -a "$work/x/cutlass_library/source/include" "$folder/cutlass"

# A crate's sources with nothing built: a package that only names it is fetched. The hashes are crates.io's.
mkdir "$work/fetch"
cat > "$work/fetch/Cargo.toml" <<'TOML'
[package]
name = "fetch"
version = "0.0.0"
[lib]
path = "lib.rs"
[dependencies]
candle-flash-attn = "=0.11.1"
candle-flash-attn-v3 = "=0.11.1"
[workspace]
TOML
touch "$work/fetch/lib.rs"
cargo fetch --quiet --manifest-path "$work/fetch/Cargo.toml"
cargo fetch --quiet --locked --manifest-path "$workspace/Cargo.toml"
registry=${CARGO_HOME:-$HOME/.cargo}/registry
headers() { # crate, sha256, folder of its kernels, name here
    local crate
    crate=$(echo "$registry"/cache/*/"$1.crate")
    echo "$2  $crate" | sha256sum --check --quiet
    mkdir "$folder/$4"
    tar -xzf "$crate" -C "$folder/$4" --strip-components 2 --wildcards "$1/$3/*.h" "$1/$3/*.hpp" "$1/$3/*.cuh" 2>/dev/null || true
    test -f "$folder/$4/flash_fwd_launch_template.h"
}
headers candle-flash-attn-0.11.1 e8f233a5d78ac84fac2b097330faae4a26eae4c4009c54fdb0ec8b7b3c23a15b kernels flash2
headers candle-flash-attn-v3-0.11.1 71644f2fd1a039568e4eeaa99251b2a19df476cfaaa1311074c4d1a8b1fd23af hkernel flash3
# Two names that CUTLASS has changed since FlashAttention 3 was written.
sed -i -e 's/TMA_LOAD_Unpack<\(SM90_TMA_LOAD[A-Z_]*\)>/TMA_LOAD_Unpack<\1, NumBitsPerTMA>/' \
    -e 's/make_counting_tensor(/make_coord_tensor(/' "$folder/flash3/copy_paged_sm90_tma_cutlass36.hpp"

python3 "$here/lazy-libraries.py" "$(echo "$registry"/src/*/cudarc-"$cudarc")" "$folder/lib64"
echo "$stamp" > "$folder/stamp"
