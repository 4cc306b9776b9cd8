"""The speed measurement on decoders of known speed, each in a process of its own."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from eval.speed import Load, measure_speed

LOAD = Load(input_length=5, output_length=6, batch=3, warmup=1, repeats=4, seed=0, threads=1)


class Sleeper:
    """Takes a known time for every token and fills a known amount of memory."""

    vocabulary = 100

    def __init__(self, seconds: float, megabytes: int):
        self.kernels = {"sleep": 1}
        self.seconds = seconds
        self.ballast = torch.ones(megabytes, 2**20, dtype=torch.uint8)

    def start(self, prompt: torch.Tensor) -> torch.Tensor:
        assert prompt.shape == (3, 5)
        assert int(prompt.max()) < self.vocabulary
        time.sleep(5 * self.seconds)
        return prompt[:, :1]

    def step(self) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.zeros(3, 1)


class Broken:
    vocabulary = 100
    kernels: dict[str, int] = {}  # noqa: RUF012

    def start(self, prompt: torch.Tensor) -> torch.Tensor:
        raise ValueError("out of order")

    def step(self) -> torch.Tensor:
        raise AssertionError


def test_known_speeds_come_out() -> None:
    found = measure_speed(
        {
            "slow": functools.partial(Sleeper, 0.05, 200),
            "fast": functools.partial(Sleeper, 0.001, 1),
        },
        LOAD,
    )
    slow, fast = found["slow"], found["fast"]
    # Sleeping never takes less than asked; a busy machine makes it take more, so no upper bounds.
    assert slow["itl_ms_p50"] >= 50
    assert slow["itl_ms_p50"] <= slow["itl_ms_p90"] <= slow["itl_ms_p99"]
    assert slow["ttft_ms"] >= 250
    # Three sequences of five gaps each: tokens of the whole batch count.
    assert slow["tokens_per_s"] <= 3 / 0.05
    assert fast["tokens_per_s"] > slow["tokens_per_s"]
    assert len(slow["rounds"]["tokens_per_s"]) == 4
    assert slow["kernels"] == {"sleep": 1}
    assert slow["peak_rss"] - fast["peak_rss"] > 150 * 2**20


def test_a_failing_candidate_is_told() -> None:
    with pytest.raises(RuntimeError, match="measuring bad: ValueError: out of order"):
        measure_speed({"bad": Broken}, LOAD)
