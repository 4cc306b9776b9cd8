"""Decode speed of several candidates on one machine, interleaved.

Protocol: every candidate lives in a process of its own, so that its memory is its own. One request
is prefill of ``input_length`` random tokens, then greedy decoding to ``output_length`` tokens, a
batch at a time. After warm-up the candidates take turns, one request each, for ``repeats`` rounds:
what else the machine does hits them alike, and the ratio within a round is what to trust.

TTFT = request to first token. ITL = gap between two tokens after the first. tokens/s counts the output
tokens of the batch over the time after the first token. Memory is the peak while decoding, after
load.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.memory import peak_cuda, peak_rss, reset_peak


class Decoder(Protocol):
    """Something that decodes greedily. ``kernels`` says what runs: name -> number of linears."""

    vocabulary: int
    kernels: dict[str, int]

    def start(self, prompt: Tensor) -> Tensor:
        """Prefill prompt (batch, length); the first token (batch, 1), computed when this returns."""
        ...

    def step(self) -> Tensor:
        """The next token (batch, 1), computed when this returns."""
        ...


@dataclass(frozen=True)
class Load:
    """What one request is made of, and how often it is asked."""

    input_length: int
    output_length: int
    batch: int
    warmup: int
    repeats: int
    seed: int
    threads: int | None


def measure_speed(
    decoders: Mapping[str, Callable[[], Decoder]], load: Load
) -> dict[str, dict[str, Any]]:
    """Speed and memory of each candidate under the same load.

    decoders: name -> a picklable function that opens the decoder, called in the candidate's process
    Returns name -> {ttft_ms, ttft_ms_iqr, itl_ms_p50, itl_ms_p90, itl_ms_p99, tokens_per_s,
    tokens_per_s_iqr, peak_rss, load_peak_rss, peak_cuda, kernels, rounds}, medians over the rounds;
    ``rounds`` keeps every round's TTFT and tokens/s for ratios.

    Raises RuntimeError with the child's own message if a candidate fails.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        for name, open_decoder in decoders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, open_decoder, load), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 10)
            stack.callback(process.terminate)
            pipes[name] = ours
            # Loading one after the other: they would slow down each other's warm-up otherwise.
            _receive(name, ours)
        requests: dict[str, list[dict[str, Any]]] = {name: [] for name in decoders}
        for _ in range(load.repeats):
            for name, pipe in pipes.items():
                pipe.send("request")
                requests[name].append(_receive(name, pipe))
        results = {}
        for name, pipe in pipes.items():
            pipe.send("finish")
            results[name] = _summary(requests[name], load) | _receive(name, pipe)
    return results


def _receive(name: str, pipe: Connection) -> dict[str, Any]:
    try:
        message = pipe.recv()
    except EOFError:
        raise RuntimeError(f"measuring {name}: its process died") from None
    if "error" in message:
        raise RuntimeError(f"measuring {name}: {message['error']}")
    return message


def _serve(pipe: Connection, open_decoder: Callable[[], Decoder], load: Load) -> None:
    """The candidate's process: load, warm up, then answer requests until told to finish."""
    try:
        if load.threads:
            torch.set_num_threads(load.threads)
        reset_peak()
        decoder = open_decoder()
        load_peak = peak_rss()
        generator = torch.Generator().manual_seed(load.seed)
        for _ in range(load.warmup):
            _request(decoder, load, generator)
        memory_since_load = reset_peak()
        pipe.send({"ready": True})
        while pipe.recv() == "request":
            pipe.send(_request(decoder, load, generator))
        pipe.send(
            {
                "load_peak_rss": load_peak,
                "peak_rss": peak_rss(),
                "memory_since_load": memory_since_load,
                "peak_cuda": peak_cuda(),
                "kernels": decoder.kernels,
            }
        )
    except (EOFError, BrokenPipeError):
        return  # the parent is gone, and with it whom to tell
    except Exception as error:  # handed to the parent, which raises it
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def _request(decoder: Decoder, load: Load, generator: torch.Generator) -> dict[str, Any]:
    prompt = torch.randint(decoder.vocabulary, (load.batch, load.input_length), generator=generator)
    times = [time.perf_counter()]
    decoder.start(prompt)
    times.append(time.perf_counter())
    for _ in range(load.output_length - 1):
        decoder.step()
        times.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return {"ttft": gaps[0], "itl": gaps[1:]}


def _summary(requests: list[dict[str, Any]], load: Load) -> dict[str, Any]:
    ttft = [1e3 * r["ttft"] for r in requests]
    speed = [load.batch * len(r["itl"]) / sum(r["itl"]) for r in requests]
    itl = torch.tensor([1e3 * gap for r in requests for gap in r["itl"]])
    p50, p90, p99 = (float(itl.quantile(q)) for q in (0.5, 0.9, 0.99))
    return {
        "ttft_ms": statistics.median(ttft),
        "ttft_ms_iqr": _iqr(ttft),
        "itl_ms_p50": p50,
        "itl_ms_p90": p90,
        "itl_ms_p99": p99,
        "tokens_per_s": statistics.median(speed),
        "tokens_per_s_iqr": _iqr(speed),
        "rounds": {"ttft_ms": ttft, "tokens_per_s": speed},
    }


def _iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
