"""A worker made with RunPod's SDK, whose handler does what its input says. MODE=generator makes it stream.

Prints `cancelled` when a job is stopped from outside.
"""
import asyncio
import os

import runpod


async def answer(job):
    wish = job["input"]
    if wish.get("fail"):
        raise ValueError(wish["fail"])
    if wish.get("report"):
        runpod.serverless.progress_update(job, wish["report"])
    if wish.get("wait"):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise
    return {"echo": wish}


async def count(job):
    for n in range(job["input"]["to"]):
        yield {"n": n}


runpod.serverless.start({"handler": count, "return_aggregate_stream": True}
                        if os.environ.get("MODE") == "generator" else {"handler": answer})
