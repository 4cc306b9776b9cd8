"""Decode speed of several candidates on one machine, interleaved.

Protocol: every candidate lives in a process of its own, so that its memory is its own. They are loaded one
after the other. A point is a batch size and a pattern (tokens in, tokens out); at every point each
candidate answers ``warmup`` requests, then they take turns, one request each, for ``repeats`` rounds: what
else the machine does hits them alike, and the ratio within a round is what to trust. One request is
prefill of random tokens, then greedy decoding, a batch at a time. After each timed request the same process
measures the read bandwidth of its memory.

TTFT = request to first token. ITL = gap between two tokens after the first; its mean over a request is
(end to end - TTFT) / (tokens out - 1). tokens/s counts the output tokens of the batch after the first
over the time after the first; end to end is from the request to its last token. Share of roofline = (bytes
that a step must read / read bandwidth) / median ITL, at the mean context of the decoding. Memory is the peak
while decoding, after load, with the processes that a candidate starts.

A point may be a mix: then every round draws its own sizes, the tokens in of each sequence by itself and the
tokens out of the whole batch, log-uniformly and with the seed; the same for all candidates. Shorter prompts
have padding on their left. It is a batch that begins and ends together, not one that requests join and leave.

Limits, as a service promises them and MLPerf asks: a request meets them if its TTFT and its own mean ITL are
within. Goodput is the requests a second that do: batch x share / median end to end.

A point that a candidate refuses, as for want of memory, is noted with the reason, and so is a candidate
that cannot be opened: the others are measured all the same.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self

import psutil
import torch
from torch import Tensor

from eval.bandwidth import read_bandwidth, read_kernel
from eval.memory import allocated_cuda, give_back, mark_peak, peak_cuda, peak_rss, rss
from eval.parts import Once, always, within

log = logging.getLogger(__name__)

# Seconds a candidate gets to end by itself.
GRACE = 20
# Characters of a reason that are kept.
REASON = 300
DIED = "its process died"
# The most parts of the output that ITL is told of.
BUCKETS = 64


class Decoder(Protocol):
    """Something that decodes greedily. ``kernels`` says what runs: name -> number of linears. One that starts
    processes has a ``close()`` too, which ends them; one whose buffers grow with the request a
    ``reserve(tokens)``: the room that every request of a point gets, so that none has to make it."""

    vocabulary: int
    kernels: dict[str, int]

    def start(self, prompt: Tensor, tokens: int, padding: Tensor | None = None) -> Tensor:
        """Prefill prompt (batch, length); the first token (batch, 1), computed when this returns.

        tokens: how many will be asked for in all, the first included
        padding: int64 (batch,) tokens on the left of each row that are none; only in batches of a mix
        """
        ...

    def step(self) -> Tensor:
        """The next token (batch, 1), computed when this returns."""
        ...

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        """Bytes a step must read: the weights as the kernels store them, and the cache of ``context`` tokens
        for each sequence. None where the engine does not tell."""
        ...


@dataclass(frozen=True)
class Point:
    """One size of request: sequences at a time, tokens in and tokens out of each; or, with the least of both,
    a mix of sizes up to these."""

    batch: int
    input_length: int
    output_length: int
    least_input: int | None = None
    least_output: int | None = None

    def __str__(self) -> str:
        return f"batch {self.batch}, {pattern_of(asdict(self))}"

    def sizes(self, generator: torch.Generator) -> tuple[list[int], int]:
        """Tokens in of each sequence, and tokens out of all, of one request."""
        if self.least_input is None or self.least_output is None:
            return [self.input_length] * self.batch, self.output_length
        inputs = _log_uniform(self.least_input, self.input_length, self.batch, generator)
        (output,) = _log_uniform(self.least_output, self.output_length, 1, generator)
        return inputs, output


def _log_uniform(least: int, most: int, count: int, generator: torch.Generator) -> list[int]:
    """Whole numbers of least to most: as many between 10 and 20 as between 100 and 200."""
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    low, high = math.log(least), math.log(most + 1)
    # Rounding may leave exp(log(x)) a hair beside x.
    return [min(most, max(least, int(math.exp(low + (high - low) * u)))) for u in drawn.tolist()]


def pattern_of(point: Mapping[str, Any]) -> str:
    """Tokens in and out of a point, as 128/32, or 16-512/8-64 of a mix."""
    ends = ("input", "output")
    least = [point.get(f"least_{end}") for end in ends]
    most = [point[f"{end}_length"] for end in ends]
    return "/".join(
        str(high) if low is None else f"{low}-{high}" for low, high in zip(least, most, strict=True)
    )


@dataclass(frozen=True)
class Limits:
    """What a request must keep, in milliseconds: TTFT, and its mean ITL. None: no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def __bool__(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None

    def met(self, ttft_ms: float, itl_ms: float) -> bool:
        pairs = ((ttft_ms, self.ttft_ms), (itl_ms, self.itl_ms))
        return all(limit is None or found <= limit for found, limit in pairs)


@dataclass(frozen=True)
class Load:
    """What is asked, and how often. together: all candidates in memory at one time; otherwise one after the
    other, and then no round has two of them. tune: let those that can measure first what runs best at these
    batches. device: whose bandwidth counts"""

    points: tuple[Point, ...]
    warmup: int
    repeats: int
    seed: int
    threads: int | None
    together: bool = True
    tune: bool = False
    device: str = "cpu"
    limits: Limits = Limits()


def measure_speed(
    decoders: Mapping[str, Callable[[], Decoder]], load: Load, once: Once = always
) -> dict[str, dict[str, Any]]:
    """Speed and memory of each candidate under the same load.

    decoders: name -> a picklable function that opens the decoder, called in the candidate's process
    Returns name -> {load_s, first_request_s (the first of all, cold), idle_rss (before it was opened),
    load_peak_rss, load_peak_cuda, tune_s, loaded_rss, loaded_cuda,
    memory_since_load, read_kernel, points}, or of one that was not opened {refused, points}. A point is
    {batch, input_length, output_length; of a mix also least_input, least_output} with {ttft_ms, ttft_ms_iqr,
    ttft_ms_p90, itl_ms_mean, itl_ms_p50, itl_ms_p90, itl_ms_p99, tokens_per_s, tokens_per_s_iqr, e2e_ms,
    e2e_ms_iqr, itl_by_position {positions, p50_ms, p90_ms}, meets_limits (share of the timed requests),
    goodput_rps, peak_rss, peak_cuda, kernels, bytes_per_step, read_gb_s, share_of_roofline, rounds}, medians
    over the rounds, or with {refused}, a sentence. ``rounds`` keeps every round's TTFT, tokens/s and end to
    end for ratios, and of a mix the sizes that were drawn. A point is a part of ``once``; what is told of a
    candidate's load is of the process that measured the first one.

    Raises RuntimeError with a child's own message if nothing at all was measured.
    """
    groups = [dict(decoders)] if load.together else [{name: f} for name, f in decoders.items()]
    results: dict[str, dict[str, Any]] = {}
    for group in groups:
        results |= _measure(group, load, within(once, *group))
    reasons = [
        f"measuring {name}: {point['refused']}"
        for name, result in results.items()
        for point in result["points"]
        if "refused" in point
    ]
    if len(reasons) == len(decoders) * len(load.points):
        raise RuntimeError(reasons[0])
    for reason in dict.fromkeys(reasons):
        log.warning("%s", reason)
    return results


def _measure(
    decoders: Mapping[str, Callable[[], Decoder]], load: Load, once: Once
) -> dict[str, dict[str, Any]]:
    """Candidates in memory at one time."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:

        @functools.cache
        def candidates() -> list[_Candidate]:
            return [
                # One after the other: they would slow down each other's load otherwise.
                stack.enter_context(_Candidate(name, open_decoder, load))
                for name, open_decoder in decoders.items()
            ]

        def measured(point: Point) -> dict[str, dict[str, dict[str, Any]]]:
            answers = _requests(candidates(), point, load)
            return {
                c.name: {"load": c.facts, "point": _summary(point, found, load.limits)}
                for c, found in zip(candidates(), answers, strict=True)
            }

        for point in load.points:
            told = []
            for name, found in once(str(point), functools.partial(measured, point)).items():
                result = results.setdefault(name, {**found["load"], "points": []})
                result["points"].append(found["point"])
                speed = found["point"].get("tokens_per_s")
                told.append(f"{name} {'refused' if speed is None else f'{speed:.1f}'}")
            log.info("%s, tokens/s: %s", point, "; ".join(told))
    return results


class _Candidate:
    """The parent's end of a candidate's process.

    facts: of its load, ``first_request_s`` after its first request; only ``refused`` if it did not open
    """

    def __init__(self, name: str, open_decoder: Callable[[], Decoder], load: Load):
        self.name = name
        self.facts: dict[str, Any] = {}
        self._arguments = (open_decoder, load)
        self._died = False

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        log.info("opening %s", self.name)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: engines start processes themselves.
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()
        try:
            facts = self._receive()
        except BaseException:
            self._end()
            raise
        self._died = False
        self.facts = self.facts or facts

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pipe.close()
        if kind is None:
            # It reads the end of the pipe, and closes its decoder.
            self._process.join(GRACE)
        self._end()

    def _end(self) -> None:
        """With the processes that it started, which would outlive it."""
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).children(recursive=True)
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        self._process.terminate()
        self._process.join(GRACE)
        self._process.kill()

    def revive(self) -> None:
        """Open it again if it died, as where the system was short of memory."""
        if self._died and "refused" not in self.facts:
            self._end()
            self._start()

    def ask(self, point: Point, number: int) -> dict[str, Any]:
        """One request. number: among those of the point, so that all candidates get the same prompts"""
        if "refused" in self.facts:
            return self.facts
        try:
            self._pipe.send((point, number))
        except OSError:
            return {"refused": DIED}
        answer = self._receive()
        if "gaps" in answer:
            self.facts.setdefault("first_request_s", sum(answer["gaps"]))
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._died = True
            return {"refused": DIED}


def _requests(
    candidates: Sequence[_Candidate], point: Point, load: Load
) -> list[list[dict[str, Any]]]:
    """The timed answers of each candidate, by round; after a refusal nothing more is asked of it."""
    answers: list[list[dict[str, Any]]] = [[] for _ in candidates]
    refused: dict[int, dict[str, Any]] = {}

    def ask(index: int, number: int, kept: list[dict[str, Any]]) -> None:
        if index in refused:
            return
        answer = candidates[index].ask(point, number)
        if "refused" in answer:
            refused[index] = answer
        kept.append(answer)

    for index, candidate in enumerate(candidates):
        candidate.revive()
        for number in range(load.warmup):
            ask(index, number, [])
    for number in range(load.repeats):
        for index in range(len(candidates)):
            ask(index, load.warmup + number, answers[index])
    return [[refused[i]] if i in refused else found for i, found in enumerate(answers)]


def _serve(pipe: Connection, open_decoder: Callable[[], Decoder], load: Load) -> None:
    """The candidate's process: open, then answer requests until nobody asks."""
    # Ctrl-C reaches it too: it is the parent that stops, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pipe:
        try:
            facts, decoder = _open(open_decoder, load)
        except Exception as error:  # handed to the parent, which notes it
            pipe.send({"refused": _reason(error)})
            return
        pipe.send(facts)
        while True:
            try:
                point, number = pipe.recv()
            except (EOFError, OSError):
                getattr(decoder, "close", lambda: None)()
                return
            try:
                answer = _request(decoder, point, load, number)
            except Exception as error:  # as above; most often a batch too large for the memory
                answer = {"refused": _reason(error)}
            # The error is gone by now, and with it the frames that held what did not fit.
            if "refused" in answer:
                give_back()
            pipe.send(answer)


def _open(open_decoder: Callable[[], Decoder], load: Load) -> tuple[dict[str, Any], Decoder]:
    if load.threads:
        torch.set_num_threads(load.threads)
    give_back()
    mark_peak()
    idle = rss(tree=True)
    start = time.perf_counter()
    decoder = open_decoder()
    seconds = time.perf_counter() - start
    peak, peak_device = peak_rss(tree=True), peak_cuda()
    tune = getattr(decoder, "tune", None)
    if load.tune and tune is not None:
        tune(sorted({point.batch for point in load.points}))
    tuned = time.perf_counter() - start - seconds
    give_back()
    facts = {
        "load_s": seconds,
        "idle_rss": idle,
        "tune_s": tuned if load.tune else None,
        "load_peak_rss": peak,
        "load_peak_cuda": peak_device,
        "loaded_rss": rss(tree=True),
        "loaded_cuda": allocated_cuda(),
        "memory_since_load": mark_peak(tree=True),
        "read_kernel": read_kernel(torch.device(load.device)),
    }
    return facts, decoder


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:REASON]}"


def _request(decoder: Decoder, point: Point, load: Load, number: int) -> dict[str, Any]:
    if number == 0:
        # What other points left behind is not of this one.
        give_back()
        getattr(decoder, "reserve", lambda tokens: None)(point.input_length + point.output_length)
    generator = torch.Generator().manual_seed(load.seed + number)
    inputs, output = point.sizes(generator)
    shape = (point.batch, max(inputs))
    prompt = torch.randint(decoder.vocabulary, shape, generator=generator)
    padding = max(inputs) - torch.tensor(inputs)
    padded = [padding] if padding.any() else []
    mark_peak(tree=True)
    times = [time.perf_counter()]
    decoder.start(prompt, output, *padded)
    times.append(time.perf_counter())
    for _ in range(output - 1):
        decoder.step()
        times.append(time.perf_counter())
    answer = {
        "gaps": [after - before for before, after in itertools.pairwise(times)],
        "inputs": inputs,
        "peak_rss": peak_rss(tree=True),
        "peak_cuda": peak_cuda(),
        "kernels": dict(decoder.kernels),
        # At the tokens in the cache after the first token, on average.
        "bytes_per_step": decoder.bytes_per_step(
            point.batch, sum(inputs) // point.batch + output // 2
        ),
        "bandwidth": None,
    }
    if number >= load.warmup:
        answer["bandwidth"] = _bandwidth(torch.device(load.device))
    return answer


def _bandwidth(device: torch.device) -> float | None:
    """None where there is no room for the buffer."""
    try:
        return read_bandwidth(device)
    except (torch.OutOfMemoryError, MemoryError):
        return None


def _summary(point: Point, answers: list[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """A point of the results: what the timed requests of one candidate say."""
    facts = {key: value for key, value in asdict(point).items() if value is not None}
    if "refused" in answers[0]:
        return {**facts, "refused": answers[0]["refused"]}
    ttft = [1e3 * answer["gaps"][0] for answer in answers]
    gaps = [[1e3 * gap for gap in answer["gaps"][1:]] for answer in answers]
    means = [statistics.fmean(found) for found in gaps]
    speed = [1e3 * point.batch / mean for mean in means]
    e2e = [1e3 * sum(answer["gaps"]) for answer in answers]
    rounds = {"ttft_ms": ttft, "tokens_per_s": speed, "e2e_ms": e2e}
    if point.least_input is not None:
        rounds["inputs"] = [answer["inputs"] for answer in answers]
        rounds["outputs"] = [len(answer["gaps"]) for answer in answers]
    itl = torch.tensor([gap for found in gaps for gap in found], dtype=torch.float64)
    p50, p90, p99 = (float(itl.quantile(q)) for q in (0.5, 0.9, 0.99))
    counted = [answer["bytes_per_step"] for answer in answers]
    nbytes = None if None in counted else round(statistics.fmean(counted))
    read = [answer["bandwidth"] for answer in answers if answer["bandwidth"] is not None]
    bandwidth = statistics.median(read) if read else None
    cuda = [answer["peak_cuda"] for answer in answers if answer["peak_cuda"] is not None]
    return {
        **facts,
        "ttft_ms": statistics.median(ttft),
        "ttft_ms_iqr": iqr(ttft),
        "ttft_ms_p90": float(torch.tensor(ttft, dtype=torch.float64).quantile(0.9)),
        "itl_ms_mean": statistics.median(means),
        "itl_ms_p50": p50,
        "itl_ms_p90": p90,
        "itl_ms_p99": p99,
        "tokens_per_s": statistics.median(speed),
        "tokens_per_s_iqr": iqr(speed),
        "e2e_ms": statistics.median(e2e),
        "e2e_ms_iqr": iqr(e2e),
        "itl_by_position": by_position(gaps),
        **_within(limits, point.batch, ttft, means, statistics.median(e2e)),
        "peak_rss": max(answer["peak_rss"] for answer in answers),
        "peak_cuda": max(cuda, default=None),
        "kernels": answers[-1]["kernels"],
        "bytes_per_step": nbytes,
        "read_gb_s": None if bandwidth is None else bandwidth / 1e9,
        "share_of_roofline": (
            None if nbytes is None or bandwidth is None else nbytes / bandwidth / (p50 / 1e3)
        ),
        "rounds": rounds,
    }


def by_position(gaps: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Median and 90th percentile over the rounds of the gaps before the tokens of each part of the output, of
    equal width, at most BUCKETS of them.

    gaps: of each round those before its second token, its third, and so on, in ms
    Returns {positions, p50_ms, p90_ms}; a position is the mean number of the part's tokens, the first token
    of the output being number 1.
    """
    most = max(map(len, gaps))
    width = -(-most // BUCKETS)
    found: dict[str, list[float]] = {"positions": [], "p50_ms": [], "p90_ms": []}
    for first in range(0, most, width):
        last = min(first + width, most)
        part = torch.tensor([gap for row in gaps for gap in row[first:last]], dtype=torch.float64)
        found["positions"].append((first + 2 + last + 1) / 2)
        found["p50_ms"].append(float(part.quantile(0.5)))
        found["p90_ms"].append(float(part.quantile(0.9)))
    return found


def _within(
    limits: Limits, batch: int, ttft: list[float], itl: list[float], e2e: float
) -> dict[str, float | None]:
    """The share of requests within the limits, and how many of those a second; None without limits."""
    if not limits:
        return {"meets_limits": None, "goodput_rps": None}
    share = statistics.fmean(map(limits.met, ttft, itl))
    return {"meets_limits": share, "goodput_rps": 1e3 * batch * share / e2e}


def iqr(values: list[float]) -> float:
    """Distance of the quartiles; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
