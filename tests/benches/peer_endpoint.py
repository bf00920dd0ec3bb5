"""The peer of scripts/bench-gateway.py: RunPod's own local server, with a handler that does nothing.

    peer_endpoint.py --rp_serve_api --rp_api_port PORT
"""
import runpod

runpod.serverless.start({"handler": lambda job: {"done": True}})
