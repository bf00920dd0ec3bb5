#!/usr/bin/env python3
"""Loads `handler serve`, and RunPod's own local server on the same machine in the same run, with wrk.

    cargo build --release && scripts/install-clients.sh
    scripts/bench-gateway.py target/release/handler

Prints a Markdown table each: `/run` from empty to 100 000 held jobs, `/status`, an unknown id, and how long starts and
restarts take and how much memory is held. The gateway has no workers (--max-workers 0), so that every job is held. Its
jobs are on disk before they are answered; the peer's are in memory. Read the numbers together with the cost of one
synchronous write there, which is printed first.
"""
import argparse
import http.client
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHES = ROOT / "tests" / "benches"
CLIENTS = pathlib.Path(os.environ.get("TALKIE_CLIENTS", ROOT / "target" / "clients"))
# Addresses are not fetched before a worker has the job, so that the load is the gateway's own work.
JOB = json.dumps({"input": {
    "image": "https://example.com/portrait.png", "audio": "https://example.com/voice.wav", "prompt": "hello",
}})
CONNECTIONS = 32


def wrk(base, seconds, method, paths, body=""):
    """Load for some seconds; what wrk tells of it."""
    done = subprocess.run(
        ["wrk", "-t2", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s", "-s", BENCHES / "load.lua", base, "--",
         method, body, *paths], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stderr.splitlines()[-1])
    return result | {"rate": result["answers"] / result["seconds"]}


def ask(base, method, path, body=None):
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


class Gateway:
    """`handler serve` on `folder`, with no workers."""

    def __init__(self, binary, folder):
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "MAX_QUEUED": "1000000"}
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [binary, "serve", "--addr", "127.0.0.1:0", "--model", "tiny", "--max-workers", "0", "--data-dir", folder],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit("the gateway does not start")
        self.base = line.split()[-1]

    def accept(self):
        """Sends a job; seconds from the start of the process to its acceptance."""
        status, answer = ask(self.base, "POST", "/run", JOB)
        assert status == 200, answer
        return time.perf_counter() - self.began

    def held(self):
        return ask(self.base, "GET", "/health")[1]["jobs"]["inQueue"]

    def rss_mb(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024

    def kill(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait()


class Peer:
    """RunPod's `--rp_serve_api`."""

    def __init__(self, python):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [python, BENCHES / "peer_endpoint.py", "--rp_serve_api", "--rp_api_port", str(port)],
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "UVICORN_LOG_LEVEL": "error"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                ask(self.base, "POST", "/status/none")
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("the peer does not start")
                time.sleep(0.05)

    def kill(self):
        self.process.terminate()
        self.process.wait()


def fsync_ms(folder):
    """The median time of one small write that is on disk."""
    times = []
    with open(pathlib.Path(folder) / "probe", "wb") as file:
        for _ in range(200):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def row(*cells):
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:,.1f}" for cell in cells) + " |", flush=True)


def load(gateway, peer, options):
    """`/run` until as many jobs are held as asked for, on both in turn; then `/status` and an unknown id."""
    print("\n| server | jobs held | /run per second | p50 ms | p99 ms | not 200 |\n|---|---:|---:|---:|---:|---:|")
    gateway_held = peer_held = 0
    while gateway_held < options.jobs:
        result = wrk(gateway.base, options.seconds, "POST", ["/run"], JOB)
        row("Talkie", f"{gateway_held:,}", result["rate"], result["p50_ms"], result["p99_ms"],
            str(result["other_status"] + result["broken"]))
        gateway_held = gateway.held()
        if peer_held < options.peer_jobs:
            result = wrk(peer.base, options.seconds, "POST", ["/run"], JOB)
            row("rp_serve_api", f"{peer_held:,}", result["rate"], result["p50_ms"], result["p99_ms"],
                str(result["other_status"] + result["broken"]))
            peer_held += result["answers"]

    print("\n| server | route | per second | p50 ms | p99 ms | not 200 |\n|---|---|---:|---:|---:|---:|")
    ids = [job["id"] for job in ask(gateway.base, "GET", "/requests")[1]["requests"]]
    for server, base, method, route, paths in [
        ("Talkie", gateway.base, "GET", "/status", [f"/status/{id}" for id in ids]),
        ("Talkie", gateway.base, "GET", "/status, unknown id", ["/status/no-such-job"]),
        ("rp_serve_api", peer.base, "POST", "/status, unknown id", ["/status/no-such-job"]),
    ]:
        result = wrk(base, options.seconds, method, paths)
        share = f"{100 * (result['other_status'] + result['broken']) / result['answers']:.0f} %"
        row(server, route, result["rate"], result["p50_ms"], result["p99_ms"], share)


def starts(binary, folder, full_folder, options):
    """How long starts take, empty and with jobs held, and how much memory is held."""
    firsts, memory = [], []
    for n in range(options.rounds):
        gateway = Gateway(binary, pathlib.Path(folder) / f"empty-{n}")
        memory.append(gateway.rss_mb())
        firsts.append(1000 * gateway.accept())
        gateway.kill()
    restarts = []
    for how in [signal.SIGTERM, signal.SIGKILL] * 2:
        gateway = Gateway(binary, full_folder)
        restarts.append(gateway.accept())
        held, full_memory = gateway.held(), gateway.rss_mb()
        gateway.kill(how)
    print("\n| measure | value |\n|---|---:|")
    row("start of the process to first accepted job, ms, median", statistics.median(firsts))
    row("memory at rest, MB", statistics.median(memory))
    row(f"restart with {held:,} jobs held to first accepted job, s, most", f"{max(restarts):.2f}")
    row(f"memory after a restart with {held:,} jobs held, MB", full_memory)


def fill(binary, folder, jobs):
    """A folder with at least so many jobs."""
    gateway = Gateway(binary, folder)
    while gateway.held() < jobs:
        wrk(gateway.base, 1, "POST", ["/run"], JOB)
    gateway.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("handler", help="the binary, built with --release")
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs that the gateway holds at the end")
    parser.add_argument("--peer-jobs", type=int, default=20_000, help="jobs that the peer holds at the end")
    parser.add_argument("--seconds", type=int, default=5, help="how long each load lasts")
    parser.add_argument("--rounds", type=int, default=5, help="starts that are timed")
    parser.add_argument("--dir", help="where jobs are stored: the disk matters")
    options = parser.parse_args()
    python = CLIENTS / "python" / "bin" / "python"
    if not python.exists():
        raise SystemExit("RunPod's Python SDK is not installed: scripts/install-clients.sh installs it")
    binary = str(pathlib.Path(options.handler).resolve())
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        print(f"{len(os.sched_getaffinity(0))} cores, wrk with {CONNECTIONS} connections, "
              f"one synchronous write of 4 KiB: {fsync_ms(folder):.2f} ms")
        gateway, peer = Gateway(binary, pathlib.Path(folder) / "load"), Peer(python)
        try:
            load(gateway, peer, options)
        finally:
            gateway.kill()
            peer.kill()
        fill(binary, pathlib.Path(folder) / "held", 10_000)
        starts(binary, folder, pathlib.Path(folder) / "held", options)


if __name__ == "__main__":
    main()
