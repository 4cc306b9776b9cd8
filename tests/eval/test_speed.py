"""The speed measurement on decoders of known speed, each in a process of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.memory import mark_peak, peak_rss, rss
from eval.speed import Limits, Load, Point, by_position, iqr, measure_speed, pattern_of

POINT = Point(batch=3, input_length=5, output_length=6)
LOAD = Load(points=(POINT,), warmup=1, repeats=4, seed=0, threads=1)
# Bytes that a step of the sleeper must read for each sequence and token of its context.
PER_TOKEN = 1000


class Sleeper:
    """Takes a known time for every token and fills a known amount of memory."""

    vocabulary = 100

    def __init__(self, seconds: float, megabytes: int = 1, most: int = 99):
        self.kernels = {"sleep": 1}
        self.seconds, self.most = seconds, most
        self.ballast = torch.ones(megabytes, 2**20, dtype=torch.uint8)
        self.left = 0

    def start(self, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
        if len(prompt) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(prompt)}\nand a second line")
        assert int(prompt.max()) < self.vocabulary
        self.left = tokens
        time.sleep(5 * self.seconds)
        return self._token(prompt)

    def step(self) -> torch.Tensor:
        time.sleep(self.seconds)
        return self._token(torch.zeros(1, 1))

    def _token(self, like: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        assert self.left >= 0, "more was asked for than start() was told"
        return like[:, :1]

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        return batch * context * PER_TOKEN


class Noting(Sleeper):
    """Writes down what it is asked: the sum of the prompt, and its name."""

    def __init__(self, name: str, file: Path, most: int = 99, deadly: int = 99):
        super().__init__(0.0, most=most)
        self.name, self.file, self.deadly = name, file, deadly
        self._note("opened")

    def start(self, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
        self._note(f"{tuple(prompt.shape)} {int(prompt.sum())}")
        if len(prompt) == self.deadly:
            os._exit(1)
        return super().start(prompt, tokens)

    def _note(self, what: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{self.name}: {what}\n")


def broken() -> Sleeper:
    raise ValueError("out of order")


def test_known_speeds_come_out() -> None:
    found = measure_speed(
        {
            "slow": functools.partial(Sleeper, 0.05, 200),
            "fast": functools.partial(Sleeper, 0.001, 1),
        },
        LOAD,
    )
    (slow,), (fast,) = (found[name]["points"] for name in ("slow", "fast"))
    # Sleeping never takes less than asked; a busy machine makes it take more, so no upper bounds.
    assert slow["itl_ms_p50"] >= 50
    assert slow["itl_ms_p50"] <= slow["itl_ms_p90"] <= slow["itl_ms_p99"]
    assert slow["itl_ms_mean"] >= 50
    assert slow["ttft_ms"] >= 250
    assert slow["ttft_ms_p90"] >= slow["ttft_ms"]
    # Three sequences of five gaps each: tokens of the whole batch count.
    assert slow["tokens_per_s"] <= 3 / 0.05
    assert slow["tokens_per_s"] == pytest.approx(3e3 / slow["itl_ms_mean"], rel=0.2)
    assert fast["tokens_per_s"] > slow["tokens_per_s"]
    assert len(slow["rounds"]["tokens_per_s"]) == 4
    assert slow["kernels"] == {"sleep": 1}
    assert slow["peak_rss"] - fast["peak_rss"] > 150 * 2**20
    assert found["slow"]["loaded_rss"] - found["fast"]["loaded_rss"] > 150 * 2**20
    # The first request is the first warm-up: one prompt and five steps.
    assert found["slow"]["first_request_s"] >= 10 * 0.05
    assert found["slow"]["load_s"] > 0
    # 3 sequences of 5 tokens in and, on average, 3 of the 6 out.
    assert slow["bytes_per_step"] == 3 * 8 * PER_TOKEN
    assert 0.5 < slow["read_gb_s"] < 10_000
    assert slow["rounds"]["e2e_ms"] == pytest.approx(
        [
            ttft + 5 * 3e3 / speed
            for ttft, speed in zip(
                *map(slow["rounds"].get, ("ttft_ms", "tokens_per_s")), strict=True
            )
        ]
    )
    assert slow["e2e_ms"] >= 500
    assert slow["itl_by_position"]["positions"] == [2, 3, 4, 5, 6]
    assert min(slow["itl_by_position"]["p50_ms"]) >= 50
    assert (slow["meets_limits"], slow["goodput_rps"]) == (None, None)
    shortest = slow["bytes_per_step"] / (1e9 * slow["read_gb_s"])
    assert slow["share_of_roofline"] == pytest.approx(shortest / (1e-3 * slow["itl_ms_p50"]))


def test_candidates_take_turns_with_the_same_prompts(tmp_path: Path) -> None:
    file = tmp_path / "asked"
    names = ("a", "b")
    points = (POINT, Point(1, 4, 2))
    load = Load(points, warmup=1, repeats=3, seed=7, threads=1)
    measure_speed({n: functools.partial(Noting, n, file) for n in names}, load)
    lines = [line.split(": ") for line in file.read_text().splitlines()]
    # One round of warm-up and three that count, at each point.
    assert [name for name, _ in lines] == ["a", "b"] * (1 + 2 * (1 + 3))
    asked = {name: [what for n, what in lines if n == name] for name in names}
    assert asked["a"] == asked["b"]
    assert len(set(asked["a"])) == 1 + 2 * 4, "a prompt that comes twice may be found in a cache"


def test_a_refused_point_costs_no_other(tmp_path: Path) -> None:
    """Also: apart, one candidate ends before the next begins."""
    file = tmp_path / "asked"
    points = tuple(Point(batch, 4, 3) for batch in (1, 8, 2))
    load = Load(points, warmup=0, repeats=2, seed=0, threads=1, together=False)
    found = measure_speed(
        {
            "small": functools.partial(Noting, "small", file, most=4),
            "broken": broken,
            "dying": functools.partial(Noting, "dying", file, deadly=8),
        },
        load,
    )
    assert [p["batch"] for p in found["small"]["points"]] == [1, 8, 2]
    assert {name: [p.get("refused") for p in found[name]["points"]] for name in found} == {
        "small": [None, "OutOfMemoryError: no room for 8", None],
        "broken": ["ValueError: out of order"] * 3,
        "dying": [None, "its process died", None],
    }
    assert found["broken"]["refused"] == "ValueError: out of order"
    assert len(found["dying"]["points"][2]["rounds"]["ttft_ms"]) == 2
    lines = file.read_text().splitlines()
    # One that died is opened again for the next point.
    opened = [i for i, line in enumerate(lines) if "opened" in line]
    assert opened == [0, 6, 10]
    assert [line.split(":")[0] for line in lines] == ["small"] * 6 + ["dying"] * 7


def test_itl_by_position() -> None:
    # Three tokens out in one round, four in the other: gaps before the second, third and fourth.
    found = by_position([[10.0, 20.0], [30.0, 40.0, 50.0]])
    assert found == {
        "positions": [2, 3, 4],
        "p50_ms": [20, 30, 50],
        "p90_ms": [pytest.approx(28), pytest.approx(38), 50],
    }


@pytest.mark.parametrize(("gaps", "parts", "width"), [(64, 64, 1), (65, 33, 2), (1023, 64, 16)])
def test_long_outputs_are_told_of_in_parts(gaps: int, parts: int, width: int) -> None:
    found = by_position([[float(token) for token in range(2, gaps + 2)]])
    # A gap of as many ms as its token's number: the median of a part is its middle.
    assert len(found["positions"]) == parts
    assert found["p50_ms"] == found["positions"]
    assert found["positions"][0] == 2 + (width - 1) / 2
    last = gaps - (parts - 1) * width
    assert found["positions"][-1] == gaps + 1 - (last - 1) / 2


def test_limits_and_goodput() -> None:
    limits = Limits(ttft_ms=200, itl_ms=None)
    assert limits.met(200, 1e9)
    assert not limits.met(200.1, 0)
    assert not Limits(itl_ms=10).met(0, 11)
    assert not Limits()
    load = Load((Point(2, 4, 3),), warmup=0, repeats=2, seed=0, threads=1, limits=limits)
    found = measure_speed({"slow": functools.partial(Sleeper, 0.05), "fast": Uneven}, load)
    (slow,), (fast,) = (found[name]["points"] for name in ("slow", "fast"))
    # Its first token takes 250 ms.
    assert (slow["meets_limits"], slow["goodput_rps"]) == (0, 0)
    # Every second request of it takes 300.
    assert fast["meets_limits"] == 0.5
    assert fast["goodput_rps"] == pytest.approx(2 * 0.5 / (fast["e2e_ms"] / 1e3))


class Uneven(Sleeper):
    """Every second request waits."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.asked = 0

    def start(self, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
        self.asked += 1
        time.sleep(0.3 * (self.asked % 2))
        return super().start(prompt, tokens)


class Padded(Sleeper):
    """Writes down the sizes it is asked for."""

    def __init__(self, file: Path) -> None:
        super().__init__(0.0)
        self.file = file

    def reserve(self, tokens: int) -> None:
        self._note(f"reserve {tokens}")

    def start(
        self, prompt: torch.Tensor, tokens: int, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        left = [0] * len(prompt) if padding is None else padding.tolist()
        self._note(f"{[prompt.shape[1] - n for n in left]} {tokens}")
        return super().start(prompt, tokens)

    def _note(self, what: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{what}\n")


def test_sizes_of_a_mix_are_log_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = Point(2000, 199, 12, least_input=10, least_output=3)
    assert str(mix) == "batch 2000, 10-199/3-12"
    inputs, _ = mix.sizes(generator)
    assert (min(inputs), max(inputs)) == (10, 199)
    # log(200 / 10) in two halves of a factor of sqrt(20): 10 to 44, 45 to 199; 5 standard deviations are 112.
    assert abs(sum(n < 45 for n in inputs) - 1000) < 112
    outputs = {mix.sizes(generator)[1] for _ in range(200)}
    assert outputs == set(range(3, 13))
    assert Point(2, 7, 5).sizes(generator) == ([7, 7], 5)
    assert Point(3, 1, 2, 1, 2).sizes(generator) == ([1, 1, 1], 2)


def test_a_mix_draws_every_batch_anew_and_the_same_for_all(tmp_path: Path) -> None:
    mix = Point(3, 200, 12, least_input=10, least_output=3)
    files = [tmp_path / name for name in "ab"]
    load = Load((mix,), warmup=1, repeats=3, seed=3, threads=1)
    found = measure_speed({f.name: functools.partial(Padded, f) for f in files}, load)
    first, *asked = files[0].read_text().splitlines()
    assert files[1].read_text() == files[0].read_text()
    assert first == "reserve 212"
    (point,) = found["a"]["points"]
    assert pattern_of(point) == "10-200/3-12"
    # What was drawn is kept, without the warm-up.
    sizes = list(zip(point["rounds"]["inputs"], point["rounds"]["outputs"], strict=True))
    assert asked[1:] == [f"{inputs} {output}" for inputs, output in sizes]
    assert len({str(inputs) for inputs, _ in sizes}) == 3
    assert all(10 <= n <= 200 for inputs, _ in sizes for n in inputs)
    assert point["itl_by_position"]["positions"] == list(range(2, max(o for _, o in sizes) + 1))
    bytes_read = [3 * (sum(inputs) // 3 + output // 2) * PER_TOKEN for inputs, output in sizes]
    assert point["bytes_per_step"] == round(sum(bytes_read) / 3)


def test_nothing_measured_is_told() -> None:
    with pytest.raises(RuntimeError, match="measuring bad: ValueError: out of order"):
        measure_speed({"bad": broken}, LOAD)


def test_quartiles() -> None:
    assert iqr([1.0]) == 0
    assert iqr([1.0, 2.0, 3.0, 4.0, 5.0]) == 2


def test_memory_counts_the_processes_that_were_started() -> None:
    before = rss(tree=True) - rss()
    code = "import sys; x = b'1' * 100_000_000; print('ready', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert rss(tree=True) - rss() - before > 90e6
        mark_peak(tree=True)
        assert peak_rss(tree=True) - peak_rss() > 90e6
        process.communicate(b"")
