"""What a server is asked, from a log of requests, and what measured speeds make of it.

A log is JSON lines or CSV, one request a line, with its tokens in and tokens out and, if any, its time; no
text is read. Lengths spread over orders of magnitude, so they are counted in bins of powers of two, and
compared by their logarithms.

Two ways to the time of the whole traffic. ``patterns`` picks a few sizes that stand for all requests, each
with its share, to be measured as they are; ``mixed`` weighs what was measured. ``weigh`` takes speeds that
were measured before, at other sizes: a request of I tokens in and O out takes

    TTFT(I) + (O - 1) x ITL(I + O/2)

TTFT linear in the tokens in between those measured, ITL linear in the mean context of the decoding between
those measured. Nothing is said of requests beyond: ``covered`` is the share of those within.
"""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from eval.speed import iqr

Point = Mapping[str, Any]
Row = dict[str, Any]

# Names of columns in the logs of servers and in published traces, in small letters, _ for a space.
COLUMNS = {
    "input": (
        "input_tokens",
        "prompt_tokens",
        "isl",
        "input_length",
        "request_tokens",
        "contexttokens",
        "usage.prompt_tokens",
        "usage.input_tokens",
    ),
    "output": (
        "output_tokens",
        "completion_tokens",
        "osl",
        "output_length",
        "response_tokens",
        "generatedtokens",
        "usage.completion_tokens",
        "usage.output_tokens",
    ),
    "time": ("timestamp", "time", "arrival", "arrival_time", "created", "created_at"),
}
JSON_ENDINGS, CSV_ENDINGS = (".jsonl", ".ndjson"), (".csv", ".tsv")
# Tokens that no request has, and of which a sum is still exact.
MOST = 10**12
# Times above this are milliseconds since 1970: as seconds it would be the year 5138.
MILLISECONDS = 1e11
PERCENTILES = (50, 90, 95, 99)
# Rounds of k-means; it ends by itself long before.
ROUNDS = 100
# Tokens that an invented request has at most.
LONGEST = 32_768


@dataclass(frozen=True)
class Traffic:
    """Requests: tokens in and out, int64 (requests,), each 1 or more; times in seconds, float64 (requests,),
    or None.

    empty, longer: how many were left out, for having no token in or out, or more than ``longest`` in all
    """

    name: str
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    times: NDArray[np.float64] | None = None
    empty: int = 0
    longer: int = 0
    longest: int | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def above(self, tokens: int) -> int:
        """Requests that need more tokens than so many."""
        return int((self.inputs + self.outputs > tokens).sum())


@dataclass(frozen=True)
class Pattern:
    """A size that stands for a share of the requests, with the mean lengths of these."""

    input_length: int
    output_length: int
    weight: float


def read_traffic(
    path: Path, columns: Mapping[str, str | None] | None = None, longest: int | None = None
) -> Traffic:
    """The requests of a log, those without a token in or out left out, as failures are logged.

    columns: names of the columns "input", "output", "time", where they are not of the common ones
    longest: tokens in and out of the longest request that is kept
    Raises UserError, with the number of the line, for what is no count or time.
    """
    chosen = dict.fromkeys(COLUMNS, "") | {k: v for k, v in (columns or {}).items() if v}
    inputs, outputs, times = [], [], []
    found: dict[str, str | None] = {}
    for line, row in _rows(path):
        where = f"{path.name} line {line}"
        if not found:
            found = {key: _column(key, chosen[key], row, path.name) for key in COLUMNS}
        inputs.append(_count(row, found["input"], where))
        outputs.append(_count(row, found["output"], where))
        if found["time"] is not None:
            times.append(_seconds(row.get(found["time"]), found["time"], where))
    if not found:
        raise UserError(f"{path} holds no request")
    tokens = np.array([inputs, outputs], dtype=np.int64)
    whole = tokens.min(0) > 0
    kept = whole if longest is None else whole & (tokens.sum(0) <= longest)
    if not kept.any():
        raise UserError(
            f"{path} holds no request that counts: {int((~whole).sum())} have no token in or out"
            + ("" if longest is None else f", the rest more than traffic.longest={longest}")
        )
    return Traffic(
        name=path.name,
        inputs=tokens[0, kept],
        outputs=tokens[1, kept],
        times=np.array(times)[kept] if times else None,
        empty=int((~whole).sum()),
        longer=int((whole & ~kept).sum()),
        longest=longest,
    )


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Number of the line and values of each request."""
    if path.suffix not in (*JSON_ENDINGS, *CSV_ENDINGS):
        raise UserError(
            f"{path} is not allowed: choose a log that ends in "
            f"{', '.join((*JSON_ENDINGS, *CSV_ENDINGS))}"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix in CSV_ENDINGS:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, row
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _object(text, f"{path.name} line {line}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error


def _object(text: str, where: str) -> Row:
    """Parts of parts are named as usage.prompt_tokens."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: one object a line is") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is not an object in JSON, as {{...}}")
    row: Row = {}
    for key, value in found.items():
        if isinstance(value, dict):
            row |= {f"{key}.{part}": v for part, v in value.items()}
        else:
            row[key] = value
    return row


def _column(key: str, asked: str, row: Row, name: str) -> str | None:
    """The column of a row that holds ``key``; only a time may be missing."""
    if asked and asked not in row:
        raise UserError(
            f"{name} has no column {asked}, as traffic.{key} says: it has {', '.join(map(str, row))}"
        )
    if asked:
        return asked
    spelled = {str(column).strip().lower().replace(" ", "_"): column for column in row}
    known = next((spelled[column] for column in COLUMNS[key] if column in spelled), None)
    if known is None and key != "time":
        end = "in" if key == "input" else "out"
        raise UserError(
            f"{name} has no column of tokens {end} ({', '.join(COLUMNS[key])}): "
            f"name one of its {', '.join(map(str, row))}, as in traffic.{key}=NAME"
        )
    return known


def _count(row: Row, column: str | None, where: str) -> int:
    value = row.get(str(column))
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number.is_integer() or not 0 <= number <= MOST:
        told = "nothing" if value in (None, "") else value
        raise UserError(f"{where} has {column}={told}: a count of tokens is 0 to {MOST:.0e}")
    return int(number)


def _seconds(value: Any, column: str, where: str) -> float:
    """Of seconds, or milliseconds since 1970, or a time as 2025-01-31T12:00:00, in UTC if it does not say."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = _moment(value)
    if isinstance(value, bool) or not math.isfinite(number):
        told = "nothing" if value in (None, "") else value
        raise UserError(
            f"{where} has {column}={told}: a time is in seconds, or as 2025-01-31T12:00:00"
        )
    return number / 1e3 if number > MILLISECONDS else number


def _moment(value: Any) -> float:
    try:
        found = datetime.fromisoformat(str(value))
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def describe(traffic: Traffic) -> dict[str, Any]:
    """Counts, lengths {mean, p50, p90, p95, p99, most}, the correlation of their logarithms (None if all
    of one are equal), and how requests arrive (None without times): see ``_arrivals``.
    """
    lengths = {"input": traffic.inputs, "output": traffic.outputs}
    logs = np.log2(np.stack(list(lengths.values())))
    varied = len(traffic) > 1 and bool((logs.std(1) > 0).all())
    return {
        "name": traffic.name,
        "requests": len(traffic),
        "left_out": {
            "empty": traffic.empty,
            "longer": traffic.longer,
            "longest": traffic.longest,
        },
        **{
            end: {
                "mean": float(tokens.mean()),
                **{f"p{q}": float(np.percentile(tokens, q)) for q in PERCENTILES},
                "most": int(tokens.max()),
            }
            for end, tokens in lengths.items()
        },
        "correlation": float(np.corrcoef(logs)[0, 1]) if varied else None,
        "arrivals": None if traffic.times is None else _arrivals(traffic.times),
    }


def _arrivals(times: NDArray[np.float64]) -> dict[str, Any] | None:
    """seconds from first to last; requests_per_s between them; the most in a second and in a minute, counted
    from the first; burstiness: that minute over a mean one. None if all came at one time."""
    since = times - times.min()
    seconds = float(since.max())
    if seconds == 0:
        return None
    rate = (len(times) - 1) / seconds
    # Not by bincount: a log may have a gap of years.
    peaks = {
        width: int(np.unique(since // width, return_counts=True)[1].max()) for width in (1, 60)
    }
    return {
        "seconds": seconds,
        "requests_per_s": rate,
        "peak_second": peaks[1],
        "peak_minute": peaks[60],
        "burstiness": peaks[60] / (rate * min(60.0, seconds)),
    }


def bins(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """b for 2^b to 2^(b+1) - 1 tokens; exact, as a logarithm is not."""
    return np.frexp(tokens)[1].astype(np.int64) - 1


def heat_map(traffic: Traffic) -> dict[str, Any]:
    """Requests by bins of tokens in (rows) and out (columns): {input, output (the least tokens of each bin),
    requests}."""
    found = [bins(tokens) for tokens in (traffic.inputs, traffic.outputs)]
    low = [int(b.min()) for b in found]
    shape = [int(b.max()) - least + 1 for b, least in zip(found, low, strict=True)]
    counts = np.zeros(shape, dtype=np.int64)
    np.add.at(counts, (found[0] - low[0], found[1] - low[1]), 1)
    ends = [[2 ** (least + i) for i in range(n)] for least, n in zip(low, shape, strict=True)]
    return {"input": ends[0], "output": ends[1], "requests": counts.tolist()}


def patterns(traffic: Traffic, most: int) -> list[Pattern]:
    """At most so many sizes that stand for all requests, the heaviest first; weights sum to 1.

    k-means of the logarithms of both lengths. It starts from the fullest cell of the heat map, then from the
    cells with the most requests x squared distance from those chosen. Each pattern has the mean lengths of
    its requests, so that the tokens of the mix are those of the log, but for rounding (and 2 out at least).
    """
    lengths = np.stack([traffic.inputs, traffic.outputs], 1)
    logs = np.log2(lengths)
    _, cell, count = np.unique(bins(lengths), axis=0, return_inverse=True, return_counts=True)
    cell = cell.reshape(-1)
    centres = _first_centres(_means(logs, cell), count, most)
    nearest = np.full(len(lengths), -1)
    for _ in range(ROUNDS):
        found = ((logs[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        if (found == nearest).all():
            break
        # One that nobody is nearest to is gone.
        _, nearest = np.unique(found, return_inverse=True)
        centres = _means(logs, nearest)
    shares = np.bincount(nearest) / len(lengths)
    chosen = [
        Pattern(round(float(tokens_in)), max(2, round(float(tokens_out))), float(share))
        for (tokens_in, tokens_out), share in zip(_means(lengths, nearest), shares, strict=True)
    ]
    return sorted(chosen, key=lambda p: (-p.weight, p.input_length, p.output_length))


def _means(values: NDArray[Any], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of the rows of each group, (groups, columns)."""
    count = np.bincount(group)
    sums = [np.bincount(group, column) for column in values.T]
    return np.stack(sums, 1) / count[:, None]


def _first_centres(
    cells: NDArray[np.float64], count: NDArray[np.int64], most: int
) -> NDArray[np.float64]:
    chosen = [int(count.argmax())]
    while len(chosen) < most:
        away = ((cells[:, None] - cells[None, chosen]) ** 2).sum(-1).min(1) * count
        if away.max() == 0:
            break
        chosen.append(int(away.argmax()))
    return cells[chosen]


def mixed(points: Sequence[Point], weights: Sequence[float], batch: int) -> dict[str, Any]:
    """Patterns that were measured, weighed: {batch, covered (the weight of those that were not refused),
    time_per_request_ms (end to end, the mean over the mix), its iqr, tokens_per_s (all tokens out of the
    batch over the time of its requests), rounds of both}; None instead of figures if one was refused.

    points: speed points of one candidate; those of this batch in the order of the weights
    """
    of_batch = [point for point in points if point["batch"] == batch]
    pairs = list(zip(of_batch, weights, strict=True))
    covered = sum(weight for point, weight in pairs if "refused" not in point)
    if any("refused" in point for point in of_batch):
        return _row(batch, covered, [], 0.0)
    rounds = zip(*(point["rounds"]["e2e_ms"] for point in of_batch), strict=True)
    times = [sum(w * t for w, t in zip(weights, found, strict=True)) for found in rounds]
    tokens = sum(weight * point["output_length"] for point, weight in pairs)
    return _row(batch, covered, times, tokens)


def weigh(points: Sequence[Point], traffic: Traffic, batch: int) -> dict[str, Any]:
    """What a traffic would take by speeds measured at other sizes, all requests in batches of alike: as
    ``mixed``, over the requests that lie between the sizes measured; ``covered`` is their share. Beside it
    ``inputs`` and ``contexts``, [least, most] of what was measured; None if nothing was at this batch.

    points: speed points of one candidate; of those of this batch the mixes and the refused say nothing here
    """
    usable = [
        point
        for point in points
        if point["batch"] == batch and "refused" not in point and "least_input" not in point
    ]
    if not usable:
        return _row(batch, 0.0, [], 0.0) | {"inputs": None, "contexts": None}
    ins = np.array([point["input_length"] for point in usable])
    contexts = np.array(
        [_context(point["input_length"], point["output_length"]) for point in usable]
    )
    of_traffic = _context(traffic.inputs, traffic.outputs)
    inside = (traffic.inputs >= ins.min()) & (traffic.inputs <= ins.max())
    # Of one token out there is no gap.
    inside &= (traffic.outputs == 1) | (
        (of_traffic >= contexts.min()) & (of_traffic <= contexts.max())
    )
    requests, outs = traffic.inputs[inside], traffic.outputs[inside]
    times = []
    rounds = min(len(point["rounds"]["ttft_ms"]) for point in usable)
    for number in range(rounds if inside.any() else 0):
        ttft = np.array([point["rounds"]["ttft_ms"][number] for point in usable])
        # tokens/s is the batch over the mean ITL.
        itl = np.array([1e3 * batch / point["rounds"]["tokens_per_s"][number] for point in usable])
        found = _between(ins, ttft)(requests)
        found += (outs - 1) * _between(contexts, itl)(of_traffic[inside])
        times.append(float(found.mean()))
    row = _row(batch, float(inside.mean()), times, float(outs.mean()) if len(outs) else 0.0)
    return row | {
        "inputs": [int(ins.min()), int(ins.max())],
        "contexts": [int(contexts.min()), int(contexts.max())],
    }


def _context(tokens_in: Any, tokens_out: Any) -> Any:
    """Tokens in the cache while decoding, on average."""
    return tokens_in + tokens_out // 2


def _between(
    at: NDArray[np.int64], values: NDArray[np.float64]
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Linear between the places measured, with the mean of those measured at the same place."""
    places, group = np.unique(at, return_inverse=True)
    means = _means(values[:, None], group.reshape(-1))[:, 0]
    return lambda wanted: np.interp(wanted, places, means)


def _row(batch: int, covered: float, times: list[float], tokens: float) -> dict[str, Any]:
    """times: mean time of a request in each round, ms; tokens: out of a request, on average"""
    speeds = [1e3 * batch * tokens / time for time in times]
    return {
        "batch": batch,
        "covered": covered,
        "time_per_request_ms": statistics.median(times) if times else None,
        "time_per_request_ms_iqr": iqr(times) if times else None,
        "tokens_per_s": statistics.median(speeds) if times else None,
        "rounds": {"time_per_request_ms": times, "tokens_per_s": speeds},
    }


def ratio(
    row: Mapping[str, Any], base: Mapping[str, Any], *, together: bool = True
) -> float | None:
    """How many times faster than the original: the median over the rounds; of what did not run in the same
    rounds the ratio of the medians. None if one of them has no time, or they cover different requests."""
    ours, theirs = (r["rounds"]["time_per_request_ms"] for r in (row, base))
    if not ours or not theirs or row["covered"] != base["covered"]:
        return None
    if not together or len(ours) != len(theirs):
        return statistics.median(theirs) / statistics.median(ours)
    return statistics.median(b / c for c, b in zip(ours, theirs, strict=True))


# Medians of tokens in and out of an invented request, and the spreads of their logarithms.
KINDS = {
    "chat": ((150, 1.1), (200, 0.9)),
    "rag": ((2500, 0.5), (180, 0.6)),
    "summarize": ((3000, 0.7), (150, 0.5)),
    "code": ((1000, 1.0), (60, 1.1)),
}
# Shares of the kinds in a sample named "mixed".
MIXED = {"chat": 0.4, "rag": 0.25, "summarize": 0.15, "code": 0.2}


def sample(mix: str, requests: int, seed: int, rate: float) -> list[dict[str, float]]:
    """Requests invented by a seed, no real traffic: lengths log-normal, of a kind of KINDS or of all of them
    ("mixed"), cut at LONGEST; arrivals a Poisson process of ``rate`` requests a second."""
    draw = random.Random(seed)
    shares = MIXED if mix == "mixed" else {mix: 1.0}
    now, rows = 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        (kind,) = draw.choices(list(shares), list(shares.values()))
        lengths = [
            min(LONGEST, max(1, round(draw.lognormvariate(math.log(median), spread))))
            for median, spread in KINDS[kind]
        ]
        rows.append(
            {
                "timestamp": round(now, 3),
                "input_tokens": lengths[0],
                "output_tokens": lengths[1],
            }
        )
    return rows


def write_log(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A log as ``read_traffic`` reads it, by the ending of its name."""
    if path.suffix in JSON_ENDINGS:
        lines = (json.dumps(row) for row in rows)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = (mark.join(map(str, row)) for row in chain([rows[0]], (r.values() for r in rows)))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
