#!/usr/bin/env python3
"""How long each stage of `handler bench` takes, against the same stage in PyTorch (tests/benches/peer.py).

    scripts/bench-ratio.py target/release/handler --python /path/to/python-with-torch

Builds nothing. Stage by stage, runs the two in turn (ours, peer, ours, peer, …) with the same number of threads, and
prints a Markdown table of the medians over the rounds and of their ratio; below 1, ours is faster. A round's value
is the median of its runs. Stages without a counterpart in PyTorch are listed with our time only.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys

PEER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "benches" / "peer.py"


def one_line(command, description=None, threads=None):
    """Runs a command and returns the milliseconds of the one stage that it prints, or None."""
    env = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, input=description, env=env, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    times = [line["median_ms"] for line in lines if "median_ms" in line]
    return times[0] if times else None


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("handler", help="the binary, built with --release")
    args.add_argument("--python", default=sys.executable, help="a Python that has torch")
    args.add_argument("--model", default="tiny")
    args.add_argument("--stage", action="append", help="only this stage; may be repeated")
    args.add_argument("--conv2d", action="store_true", help="PyTorch's 3D convolutions as sums of 2D ones: see peer.py")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--runs", type=int, default=3, help="timed runs of a round")
    args.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = args.parse_args()

    bench = [args.handler, "bench", "--model", args.model, "--weights", "random"]
    env = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
    description = subprocess.check_output([*bench, "--describe"], env=env, text=True)
    print("| stage | shape | Talkie ms | PyTorch ms | ratio |\n|---|---|---:|---:|---:|")
    for stage in json.loads(description)["stages"]:
        if args.stage and stage["name"] not in args.stage:
            continue
        which = ["--stage", stage["name"], "--runs", str(args.runs)]
        peer_which = which + ["--conv2d"] * args.conv2d
        ours, peer = [], []
        for _ in range(args.rounds):
            ours.append(one_line([*bench, "--json", *which], threads=args.threads))
            if None not in peer:
                peer.append(one_line([args.python, str(PEER), *peer_which], description, args.threads))
        ms = statistics.median(ours)
        if None in peer:
            theirs, ratio = "–", "–"
        else:
            theirs = f"{statistics.median(peer):.2f}"
            ratio = f"{statistics.median(a / b for a, b in zip(ours, peer)):.2f}"
        print(f"| {stage['name']} | {stage['shape_text']} | {ms:.2f} | {theirs} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
