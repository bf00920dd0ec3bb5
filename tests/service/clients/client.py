"""Uses a gateway through RunPod's Python client, as its users do, and prints what came of each step as a JSON line.

    client.py BASE_URL KEY < jobs.json

BASE_URL ends in `/v2`. `jobs.json` holds the inputs `quick`, whose video is made at once, and `waits`, which runs
until it is cancelled. Every line is {"step", "value"} or {"step", "error", "message"}.
"""
import hashlib
import json
import sys
import urllib.request

import runpod

BASE, KEY = sys.argv[1:3]
JOBS = json.load(sys.stdin)
ENDPOINT = "talkie"

runpod.endpoint_url_base = BASE


def step(name, action):
    """Runs `action` and prints what it returned or raised; returns it too."""
    try:
        value = action()
        print(json.dumps({"step": name, "value": value}), flush=True)
        return value
    except Exception as error:
        print(json.dumps({"step": name, "error": type(error).__name__, "message": str(error)}), flush=True)


def video(output):
    """What lies behind the link of an output, beside what the output says of it."""
    with urllib.request.urlopen(output["video_url"], timeout=30) as response:
        content = response.read()
    return {
        "type": response.headers["Content-Type"], "brand": content[4:8].decode(),
        "size": [len(content), output["size_bytes"]],
        "sha256": [hashlib.sha256(content).hexdigest(), output["sha256"]],
    }


def until_running(job):
    """Asks until a worker has the job."""
    while True:
        status = job.status()
        if status != "IN_QUEUE":
            return status


def main():
    endpoint = runpod.Endpoint(ENDPOINT, api_key=KEY)
    step("health", endpoint.health)

    job = endpoint.run(JOBS["quick"])
    step("status", lambda: job.status())
    step("video", lambda: video(job.output(timeout=60)))
    step("status at the end", lambda: job.status())
    step("run_sync", lambda: video(endpoint.run_sync(JOBS["quick"], timeout=60)))
    streamed = endpoint.run(JOBS["quick"])
    step("stream", lambda: list(streamed.stream()))

    waits = endpoint.run(JOBS["waits"])
    step("running", lambda: until_running(waits))
    step("timeout", lambda: waits.output(timeout=1))
    step("progress", lambda: waits.output()["stage"])
    queued = [endpoint.run(JOBS["waits"]) for _ in range(2)]
    step("purge_queue", endpoint.purge_queue)
    step("purged", lambda: [job.status() for job in queued])
    step("cancel", lambda: waits.cancel()["status"])
    step("cancelled", lambda: waits.status())

    step("unknown job", lambda: runpod.endpoint.Job(ENDPOINT, "no-such-job", endpoint.rp_client).status())
    step("empty input", lambda: endpoint.run({"input": {}}).status())
    step("bad key", lambda: runpod.Endpoint(ENDPOINT, api_key="not-a-key").health())


main()
