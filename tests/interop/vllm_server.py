"""Run by vLLM's own Python: its server, with a router for the CPU that knows sigmoid scores.

    python vllm_server.py --model FOLDER ...

Processes that vLLM starts import this file again, so the change is made at its top level.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peer_worker import route_by_sigmoid

route_by_sigmoid()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
