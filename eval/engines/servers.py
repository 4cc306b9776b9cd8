"""Serving engines as processes of their own, and what they answer over HTTP.

``running`` starts one, waits until it is healthy, and ends it. vLLM and llama.cpp speak the OpenAI API; the
log-probability of a prompt's tokens is theirs alone: vLLM echoes them, llama.cpp tells the whole
distribution of the token that follows, so a prompt is asked for token by token there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.engines import LLAMA_CPP

HOST = "127.0.0.1"
# Seconds until a server is healthy at most, and until it has ended after being asked to.
START, STOP = 600.0, 60.0
# Seconds for one answer: 8-bit floats on a CPU take minutes.
ANSWER = 3600.0
# Requests for a whole distribution at a time.
ASKERS = 2
# What a server is called by its clients.
NAME = "m"
# Lines of a log that say why a server ended.
TOLD = 20


@dataclass(frozen=True)
class Server:
    """url: without a path; vocabulary: tokens of its model"""

    engine: str
    url: str
    vocabulary: int

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probability of every prompt token but the first.

        tokens: (prompts, length) -> (prompts, length - 1)
        """
        rows = tokens.tolist()
        if self.engine == LLAMA_CPP:
            return torch.tensor([self._one_by_one(row) for row in rows])
        return torch.tensor([self._echoed(row) for row in rows])

    def greedy(self, tokens: Sequence[int], count: int) -> str:
        """The text that follows a prompt."""
        asked = {"prompt": list(tokens), "max_tokens": count, "temperature": 0}
        return str(self.post("/v1/completions", asked)["choices"][0]["text"])

    def _echoed(self, prompt: list[int]) -> list[float]:
        asked = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
        (choice,) = self.post("/v1/completions", asked)["choices"]
        # The last one is of the token it had to write.
        found = choice["logprobs"]["token_logprobs"][1:-1]
        assert len(found) == len(prompt) - 1, (len(found), len(prompt))
        return [float(value) for value in found]

    def _one_by_one(self, prompt: list[int]) -> list[float]:
        # Each answer is megabytes of JSON: with more at a time it drops connections.
        with ThreadPoolExecutor(ASKERS) as pool:
            ends = range(1, len(prompt))
            return list(pool.map(lambda end: self._next(prompt[:end], prompt[end]), ends))

    def _next(self, prompt: list[int], token: int) -> float:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": self.vocabulary, "temperature": 0}
        (told,) = self.post("/completion", asked)["completion_probabilities"]
        return float(next(e["logprob"] for e in told["top_logprobs"] if e["id"] == token))

    def post(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError with what the server says if it refuses, or does not answer."""
        body = json.dumps({"model": NAME, **asked}).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")[:500]
            raise RuntimeError(f"{self.engine} answers {path} with {error.code}: {told}") from error
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{self.engine} does not answer {path}: {error}") from error


@contextlib.contextmanager
def running(
    engine: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    port: int,
    log: Path,
    vocabulary: int,
) -> Iterator[Server]:
    """A server that has started, until the block ends.

    words: its command, which listens at ``port`` of this machine; log: what it prints

    Raises RuntimeError with the end of its log if it ends or is not healthy in time.
    """
    server = Server(engine, f"http://{HOST}:{port}", vocabulary)
    with log.open("w", encoding="utf-8") as out:
        # A group of its own: vLLM starts processes that must end with it.
        process = subprocess.Popen(
            words, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        _wait(server, process, log)
        yield server
    finally:
        _stop(process)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        # Refused, or 503 while weights load.
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    what = "is not healthy" if process.poll() is None else f"ended with {process.returncode}"
    told = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD:])
    raise RuntimeError(f"{server.engine} {what}:\n{told}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        # It may have ended, its group with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP)
            break
    # What a killed server left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nothing listens at now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
