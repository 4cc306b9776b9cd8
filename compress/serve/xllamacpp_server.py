"""llama.cpp's own server from the Python wheel ``xllamacpp``, for machines without the program llama-server.

    python xllamacpp_server.py -m FILE.gguf [-c TOKENS] [-np N] [-a NAME] [--host HOST] [--port PORT]

The words are llama-server's, and so is what is taken where they are left out. Imports nothing of this
project: it is run as a file, by any Python that has the wheel (2026.10, which has no command of its own).
"""

from __future__ import annotations

import argparse
import signal
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    # As llama-server: 0 is what the model takes.
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument(
        "-np",
        "--parallel",
        type=int,
        default=-1,
        help="requests at a time, each with its part of the context; -1: 4 that share all of it",
    )
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-a", "--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    asked = parser.parse_args()
    serve(asked)


def serve(asked: argparse.Namespace) -> None:
    """Answers until SIGTERM or SIGINT."""
    import xllamacpp

    # Before its threads start: they inherit that these are waited for.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    settings: Any = xllamacpp.CommonParams()
    settings.model.path = asked.model
    settings.n_ctx = asked.ctx_size
    settings.n_parallel = asked.parallel
    if asked.threads is not None:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = asked.threads
    settings.hostnames = [asked.host]
    settings.port = asked.port
    if asked.alias:
        settings.model_alias = {asked.alias}
    server = xllamacpp.Server(settings)
    print(f"listening at {server.listening_address}", flush=True)
    signal.sigwait(ends)
    # Its destructor ends what is being answered.
    del server


if __name__ == "__main__":
    main()
