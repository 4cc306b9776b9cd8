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
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench

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
