"""Sends a job and prints the chunks that RunPod's Python client receives of it, then its output, as JSON lines.

    stream.py BASE_URL ENDPOINT KEY < input.json
"""
import json
import sys

import runpod

BASE, ENDPOINT, KEY = sys.argv[1:4]
runpod.endpoint_url_base = BASE
job = runpod.Endpoint(ENDPOINT, api_key=KEY).run(json.load(sys.stdin))
for chunk in job.stream():
    print(json.dumps(chunk), flush=True)
print(json.dumps(job.output(timeout=30)), flush=True)
