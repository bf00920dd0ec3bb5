#!/usr/bin/env python3
"""Copies a full golden folder to a lean one: fewer cases, the same layout, an index of its own.

usage: make-lean-goldens.py FULL_FOLDER [LEAN_FOLDER = tests/golden]

Cases are dropped whole, in the tensors and in the configs that name them, so that whoever reads the lean folder
finds it complete.  Standard library only.
"""
import json
import re
import shutil
import struct
import sys
from pathlib import Path

# Pipeline runs that stay: one without guidance, whose second pass the product leaves out, and one with two persons
# in boxes, guidance, motion frames and colour matching.
RUNS = {"c_no_cfg", "i_two_person_bbox"}

# Tensors that go, by file (regular expressions over names).
DROP = {
    "audio/audio.safetensors": r"(gated_quiet_tail|tone_997hz|all_below_gate|peaky_clips|silence|decode)\.|multi\.(para_none_b|para_a_none|add_none_b)\.|resample\.(24000|48000)\.",
    "clip/io.safetensors": r"downscale_256x232\.|.*\.pixel_values",
    "dit/teacache.safetensors": r"step[05]\.pass",
    "image/resize.safetensors": r".*\.200x144\.|photo_180x140\.|noise_50x70\.",
    "samplers/guidance.safetensors": r"apg\.thr20\.",
    "samplers/samplers.safetensors": r"(unipc|dpmpp)\.",
    "umt5/io.safetensors": r"long512\.",
    "vae/io.safetensors": r"(enc_t5_32x40|dec_t2_4x5|enc_t9_24x16|enc_t17_16x24|dec_t5_2x3)\.",
    "wav2vec2/io.safetensors": r"(speech_2s|odd_length)\.",
}

# Entries of lists in the configs that go with them.
LISTED = {
    "audio": [24000, 48000],
    "dit": [0, 5],
    "image": [[200, 144]],
    "samplers": [20],
}


def read(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, data, drop):
    kept, out = {}, bytearray()
    if "__metadata__" in header:
        kept["__metadata__"] = header["__metadata__"]
    for name, entry in sorted(header.items()):
        if name == "__metadata__" or (drop and re.match(drop, name)):
            continue
        start, end = entry["data_offsets"]
        kept[name] = {**entry, "data_offsets": [len(out), len(out) + end - start]}
        out += data[start:end]
    head = json.dumps(kept, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(out))
    return kept


def prune(value, drop, listed):
    """Drops object entries whose key, followed by a dot, a dropped tensor name would start with, and list entries."""
    if isinstance(value, dict):
        return {k: prune(v, drop, listed) for k, v in value.items() if not re.match(drop, k + ".")}
    if isinstance(value, list):
        return [v for v in value if v not in listed]
    return value


def main():
    full = Path(sys.argv[1])
    lean = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "tests/golden")
    index = {}
    for file in json.loads((full / "INDEX.json").read_text()):
        component, name = file.split("/", 1)
        if component in ("manifest", "runpod"):
            continue
        run = name.rsplit(".", 1)[0]
        if component == "pipeline" and run != "config" and run not in RUNS:
            continue
        target = lean / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".safetensors"):
            header = write(target, *read(full / file), DROP.get(file))
            tensors = {k: [v["dtype"], v["shape"]] for k, v in header.items() if k != "__metadata__"}
            index[file] = {"bytes": target.stat().st_size, "metadata": header.get("__metadata__", {}), "tensors": tensors}
        else:
            shutil.copyfile(full / file, target)
            index[file] = {"bytes": target.stat().st_size}
    for component in {f.split("/")[0] for f in index}:
        source = full / component / "config.json"
        config = json.loads(source.read_text())
        for file, drop in DROP.items():
            if file.startswith(component + "/"):
                config = prune(config, drop, LISTED.get(component, []))
        if component == "pipeline":
            config["runs"] = {k: v for k, v in config["runs"].items() if k in RUNS}
        target = lean / component / "config.json"
        target.write_text(json.dumps(config, indent=1) + "\n")
        if f"{component}/config.json" in index:
            index[f"{component}/config.json"]["bytes"] = target.stat().st_size
    (lean / "INDEX.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    size = sum(p.stat().st_size for p in lean.rglob("*") if p.is_file())
    print(f"{lean}: {len(index)} files, {size / 1e6:.1f} MB")


main()
