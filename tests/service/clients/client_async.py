"""The same as `client.py` through the asyncio half of RunPod's Python client."""
import asyncio
import hashlib
import json
import sys

import aiohttp
import runpod
from runpod import AsyncioEndpoint, http_client

BASE, KEY = sys.argv[1:3]
JOBS = json.load(sys.stdin)
ENDPOINT = "talkie"

runpod.endpoint_url_base = BASE


async def step(name, action):
    """Awaits `action` and prints what it returned or raised; returns it too."""
    try:
        value = await action
        print(json.dumps({"step": name, "value": value}), flush=True)
        return value
    except Exception as error:
        print(json.dumps({"step": name, "error": type(error).__name__, "message": str(error)}), flush=True)


async def video(session, job):
    """What lies behind the link of a job's output, beside what the output says of it."""
    output = await job.output(timeout=60)
    async with session.get(output["video_url"]) as response:
        content = await response.read()
    return {
        "type": response.headers["Content-Type"], "brand": content[4:8].decode(),
        "size": [len(content), output["size_bytes"]],
        "sha256": [hashlib.sha256(content).hexdigest(), output["sha256"]],
    }


async def until_running(job):
    """Asks until a worker has the job."""
    while True:
        status = await job.status()
        if status != "IN_QUEUE":
            return status


async def collect(job):
    return [chunk async for chunk in job.stream()]


async def main():
    # The videos are fetched by a session of their own, since the client's sends its key along.
    async with http_client.AsyncClientSession() as session, aiohttp.ClientSession() as plain:
        endpoint = AsyncioEndpoint(ENDPOINT, session, api_key=KEY)
        await step("health", endpoint.health())

        job = await endpoint.run(JOBS["quick"])
        await step("video", video(plain, job))
        await step("status at the end", job.status())
        streamed = await endpoint.run(JOBS["quick"])
        await step("stream", collect(streamed))

        waits = await endpoint.run(JOBS["waits"])
        await step("running", until_running(waits))
        await step("timeout", waits.output(timeout=1))
        queued = [await endpoint.run(JOBS["waits"]) for _ in range(2)]
        await step("purge_queue", endpoint.purge_queue())
        await step("purged", asyncio.gather(*[job.status() for job in queued]))
        await step("cancel", waits.cancel())
        await step("cancelled", waits.status())

        # This client looks at no status code: it stumbles over the missing `status`.
        unknown = runpod.endpoint.asyncio.asyncio_runner.Job(ENDPOINT, "no-such-job", session, endpoint.headers)
        await step("unknown job", unknown.status())


asyncio.run(main())
