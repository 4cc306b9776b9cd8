"""Load for a server, by vLLM's own benchmark. Runs in vLLM's environment, alone, as long as its input lasts.

    python vllm_load.py

A line of standard input is a job: a JSON list, the words of ``vllm bench serve``. A line of standard output
is its result, as ``--save-detailed`` would keep it. One process for all jobs: its imports take longer than a
short job does.
"""

import argparse
import json
import os
import sys

from vllm import __version__ as version
from vllm.benchmarks.lib import endpoint_request_func
from vllm.benchmarks.lib.endpoint_request_func import StreamedResponseHandler
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench


class Counted(StreamedResponseHandler):
    """Takes a server's count of tokens that comes together with text apart from it: llama.cpp sends it with
    the last piece, where the benchmark does not look, and counts the text anew, which comes out otherwise."""

    def add_chunk(self, chunk_bytes: bytes) -> list[str]:
        return [part for m in super().add_chunk(chunk_bytes) for part in _apart(m)]


def _apart(message: str) -> list[str]:
    body = message.removeprefix("data: ")
    found = json.loads(body) if body.startswith("{") else {}
    if not (found.get("choices") and found.get("usage")):
        return [message]
    usage = {"usage": found.pop("usage")}
    return [f"data: {json.dumps(found)}", f"data: {json.dumps(usage)}"]


endpoint_request_func.StreamedResponseHandler = Counted

# The benchmark reports to standard output, which is for results here.
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = parser.parse_args(json.loads(line))
        print(json.dumps(bench(asked), default=float), file=answers, flush=True)


if __name__ == "__main__":
    main()
