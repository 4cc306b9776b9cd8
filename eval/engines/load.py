"""Served speed: several servers under the same load, by vLLM's own benchmark client.

Continuous batching and the paged cache are the engines'; what a client sees of them is measured. Requests
of one size, so many at a time as ``concurrency`` says, as fast as they are answered: random tokens, no early
end. Servers take turns, load by load, so that a ratio compares what ran next to each other; while one
answers the others wait. TTFT is from the request to its first token, ITL the mean gap between the
tokens after it, both as the client sees them.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from compress.engines import LLAMA_CPP
from eval.engines.servers import NAME, Server

SCRIPT = Path(__file__).with_name("vllm_load.py")
PERCENTILES = (50, 90, 99)
# Requests from which on the 99th percentile is one.
ENOUGH = 100
TIMES = ("ttft_ms", "itl_ms", "e2e_ms")


@dataclass(frozen=True)
class Load:
    """concurrency: requests at a time at most; requests: of a round, of so many tokens in and out each"""

    concurrency: int
    requests: int
    input_length: int
    output_length: int
    rounds: int = 1


class Client:
    """The benchmark client, as a process of its own: ``with Client(python) as client``.

    python: of vLLM's environment
    """

    def __init__(self, python: str, log: Path):
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        pipe = subprocess.PIPE
        with log.open("w", encoding="utf-8") as err:
            self._process = subprocess.Popen(
                [python, str(SCRIPT)],
                stdin=pipe,
                stdout=pipe,
                stderr=err,
                text=True,
                env={**os.environ, **settings},
            )
        self.version = str(self._answer()["version"])

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        # The script reads the end of its input, and ends.
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, server: Server, tokenizer: Path, load: Load, seed: int) -> dict[str, Any]:
        """Everything the client saw: ``ttfts``, ``latencies`` in seconds and ``output_lens`` by request, ...

        tokenizer: a folder; prompts are as many of its tokens
        """
        words = ["--backend", "openai", "--base-url", server.url, "--model", NAME]
        words += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", str(seed)]
        words += ["--random-input-len", str(load.input_length)]
        words += ["--random-output-len", str(load.output_length)]
        words += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)]
        words += ["--temperature", "0", "--disable-tqdm", "--save-detailed"]
        if server.engine == LLAMA_CPP:
            # It would begin where an earlier prompt was alike.
            words += ["--extra-body", json.dumps({"cache_prompt": False})]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load client ended with exit code {self._process.wait()}")
        return json.loads(line)


def in_turns(
    client: Client,
    servers: Mapping[str, Server],
    tokenizer: Path,
    loads: Iterable[Load],
) -> dict[str, list[dict[str, Any]]]:
    """Every server under every load, one after the other, round by round. Returns the points of each."""
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    # No server sees a prompt twice, not even its beginning; all see the same ones.
    seeds = itertools.count()
    for load in loads:
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for _ in range(load.rounds):
            seed = next(seeds)
            for name, server in servers.items():
                seen[name].append(client(server, tokenizer, load, seed))
        for name, found in seen.items():
            points[name].append(point_of(load, found))
    return points


def point_of(load: Load, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A load as the client saw it: requests lost, rates as medians of the rounds, percentiles of times over
    the requests of all rounds.

    A request is lost if it ended in an error, or with fewer tokens than it asked for.
    """
    times: dict[str, list[float]] = {key: [] for key in TIMES}
    rates: dict[str, list[float]] = {"tokens_per_s": [], "requests_per_s": []}
    answered, errors = 0, list[str]()
    for found in rounds:
        tokens = 0
        errors += [error for error in found["errors"] if error]
        for ttft, latency, out, error in zip(
            found["ttfts"], found["latencies"], found["output_lens"], found["errors"], strict=True
        ):
            if error or out != load.output_length:
                continue
            tokens += out
            times["ttft_ms"].append(1e3 * ttft)
            times["e2e_ms"].append(1e3 * latency)
            times["itl_ms"].append(1e3 * (latency - ttft) / max(out - 1, 1))
        whole = tokens // load.output_length
        answered += whole
        rates["tokens_per_s"].append(tokens / found["duration"])
        rates["requests_per_s"].append(whole / found["duration"])
    point: dict[str, Any] = {
        "concurrency": load.concurrency,
        "input_length": load.input_length,
        "output_length": load.output_length,
        "requests": len(rounds) * load.requests,
        "lost": len(rounds) * load.requests - answered,
        "rounds": rates,
        **{key: statistics.median(values) for key, values in rates.items()},
    }
    if errors:
        point["first_error"] = errors[0].strip().splitlines()[-1][:200]
    for key, values in times.items():
        point[key] = {
            f"p{share}": float(np.percentile(values, share)) if values else None
            for share in PERCENTILES
        }
        if len(values) < ENOUGH:
            point[key]["p99"] = None
    return point
