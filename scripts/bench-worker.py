#!/usr/bin/env python3
"""Times `handler worker` against a platform on loopback: start to first take, time per instant job, and time from
SIGTERM to exit while it is idle. The jobs are ones that are refused at once, so that nothing is computed.

    scripts/bench-worker.py target/release/handler [rounds]

RunPod's Python worker (runpod 1.12.0) was measured in the same way: 2-5 s, 1.002 s and 28.6 s.
"""

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

JOBS = 50


class Platform:
    """Hands over jobs, and holds every other poll open."""

    def __init__(self):
        self.left = 0
        self.first_take = None
        self.idle = asyncio.Event()
        self.ends = []

    async def serve(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: (\d+)", head, re.I)
                await reader.readexactly(int(length[1]) if length else 0)
                body = await self.answer(head.split()[1].decode())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, target):
        if "/job-take/" in target:
            self.first_take = self.first_take or time.perf_counter()
            if self.left:
                self.left -= 1
                return b'{"id":"job-%d","input":{}}' % self.left
            self.idle.set()
            await asyncio.sleep(3600)
        if "/job-stop/" in target:
            await asyncio.sleep(3600)
        if "/job-done/" in target:
            self.ends.append(time.perf_counter())
        return b"{}"


async def once(binary):
    platform = Platform()
    server = await asyncio.start_server(platform.serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v2/ep"
    platform.left = JOBS
    with tempfile.TemporaryDirectory() as spool:
        env = {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_POD_ID": "bench",
            "SPOOL_PATH": spool,
            "HOME": "/nonexistent",
        }
        began = time.perf_counter()
        command = [binary, "worker", "--model", "tiny", "--device", "cpu", "--min-free-bytes", "1"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        await asyncio.wait_for(platform.idle.wait(), 60)
        while len(platform.ends) < JOBS:
            await asyncio.sleep(0.01)
        signalled = time.perf_counter()
        os.kill(process.pid, signal.SIGTERM)
        code = await asyncio.get_running_loop().run_in_executor(None, process.wait)
        exited = time.perf_counter()
        assert code == 0, code
    server.close()
    per_job = (platform.ends[-1] - platform.ends[0]) / (JOBS - 1)
    return platform.first_take - began, per_job, exited - signalled


def main():
    rounds = [asyncio.run(once(sys.argv[1])) for _ in range(int((sys.argv[2:] or ["5"])[0]))]
    for name, values in zip(["start to first take", "per instant job", "SIGTERM to exit, idle"], zip(*rounds)):
        ms = [1000 * value for value in values]
        print(f"{name}: {statistics.median(ms):.1f} ms (median of {len(ms)}, most {max(ms):.1f})")


main()
