"""Timing calls beside each other: in turns, for many rounds, as replayed graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ROUNDS, SECONDS = 21, 0.02


def measure(calls: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, Any]:
    """Microseconds a call, by round, the candidates taking turns in each."""
    runs = {name: captured(call) if device.type == "cuda" else call for name, call in calls.items()}
    counts = {}
    for name, run in runs.items():
        once = seconds(run, 3, device) / 3
        counts[name] = max(1, min(1000, round(SECONDS / once)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(1e6 * seconds(run, counts[name], device) / counts[name])
    return found


def seconds(run: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def captured(call: Callable[[], Tensor]) -> Callable[[], Any]:
    """The call as a CUDA graph; as it is where it cannot be captured, as with sizes found while it runs."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return call
    return graph.replay
