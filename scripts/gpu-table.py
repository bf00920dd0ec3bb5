#!/usr/bin/env python3
"""Makes the Markdown of scripts/gpu-check.sh from what its runs left in a folder."""
import argparse, datetime, json, pathlib


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder", type=pathlib.Path)
    args.add_argument("--card", required=True)
    args.add_argument("--command", required=True)
    args = args.parse_args()
    measured = lines(args.folder / "ours.jsonl")
    ours = [line for line in measured if "dtype" in line]
    peer = {line["stage"]: line["median_ms"] for line in lines(args.folder / "peer.jsonl")}
    description = (args.folder / "description.json").read_text()
    shapes = {stage["name"]: stage["shape_text"] for stage in json.loads(description)["stages"]} if description else {}

    print(f"{args.card or 'unknown card'}, {datetime.date.today().isoformat()}, `{args.command}`\n")
    for missing in filter(None, (args.folder / "missing.txt").read_text().splitlines()):
        print(f"* missing: {missing}")
    if ours:
        print("\n| stage | shape | dtype | Talkie ms | PyTorch ms | ratio | TFLOP/s | GB/s | roofline |")
        print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for stage in ours:
        name, ms = stage["stage"], stage["median_ms"]
        theirs = f"{peer[name]:.2f}" if name in peer else "–"
        ratio = f"{ms / peer[name]:.2f}" if name in peer else "–"
        print(f"| {name} | {shapes.get(name, '')} | {stage['dtype']} | {ms:.2f} | {theirs} | {ratio} "
              f"| {stage['tflops']:.3f} | {stage['gbps']:.1f} | {100 * stage['roofline_share']:.0f} % |")
    for line in measured:
        if "peak_tflops" in line:
            print(f"\nThe card in the same run: {line['peak_tflops']:.1f} TFLOP/s (matrix product), {line['peak_gbps']:.0f} GB/s (copy).")
        if line.get("stage") == "estimate":
            print(f"\nA window of four steps of one pass: {line['window_s']:.2f} s for {line['video_s']:.2f} s of new video, "
                  f"{line['ratio']:.2f} s per second of video (an estimate from the stages; layers scaled up).")
    parity = (args.folder / "parity.txt").read_text().rstrip()
    if parity:
        print(f"\nParity:\n\n```text\n{parity}\n```")


if __name__ == "__main__":
    main()
