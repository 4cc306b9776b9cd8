"""Logs of requests on cases worked by hand: reading, lengths, sizes that stand for all, speeds weighed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import UserError
from eval.traffic import (
    KINDS,
    Traffic,
    describe,
    heat_map,
    mixed,
    patterns,
    ratio,
    read_traffic,
    sample,
    weigh,
    write_log,
)


def traffic(inputs: list[int], outputs: list[int], times: list[float] | None = None) -> Traffic:
    stamps = None if times is None else np.array(times)
    return Traffic("log", np.array(inputs), np.array(outputs), stamps)


def written(tmp_path: Path, text: str, name: str = "log.csv") -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt_tokens,completion_tokens\n5,7\n100,20.0\n0,3\n"),
        ("a.tsv", "ISL\tOSL\n5\t7\n100\t20\n9\t0\n"),
        # Of published traces: Azure's and BurstGPT's.
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n1,5,7\n2,100,20\n3,0,0\n"),
        ("a.csv", "Timestamp,Model,Request tokens,Response tokens\n1,x,5,7\n2,x,100,20\n3,x,1,0\n"),
        (
            "a.jsonl",
            '{"usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'
            '{"usage": {"prompt_tokens": 100, "completion_tokens": 20}}\n'
            '{"usage": {"prompt_tokens": 1, "completion_tokens": 0}}\n',
        ),
    ],
)
def test_logs_of_many_kinds(tmp_path: Path, name: str, text: str) -> None:
    found = read_traffic(written(tmp_path, text, name))
    assert found.inputs.tolist() == [5, 100]
    assert found.outputs.tolist() == [7, 20]
    assert (found.empty, found.longer) == (1, 0)


def test_named_columns_long_requests_and_times(tmp_path: Path) -> None:
    text = "in,out,at,time\n5,7,2025-01-31T12:00:00,x\n9,1,2025-01-31T13:00:01+01:00,x\n90,9,,x\n"
    file = written(tmp_path, text)
    columns = {"input": "in", "output": "out", "time": "at"}
    with pytest.raises(UserError, match=r"log.csv line 4 has at=nothing: a time is in seconds"):
        read_traffic(file, columns)
    file.write_text(text.replace("90,9,,", "90,9,1738324802000,"))
    found = read_traffic(file, columns, longest=98)
    assert found.times is not None
    # The same zone or none; and in milliseconds.
    assert (found.times - found.times[0]).tolist() == [0, 1]
    assert (found.inputs.tolist(), found.longer) == ([5, 9], 1)
    whole = read_traffic(file, columns, longest=99)
    assert whole.times is not None
    assert (whole.times - whole.times[0]).tolist() == [0, 1, 2]
    assert (whole.above(98), whole.above(99)) == (1, 0)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "x", r"choose a log that ends in .jsonl, .ndjson, .csv, .tsv"),
        ("a.csv", "", "holds no request"),
        ("a.csv", "isl,osl\n", "holds no request"),
        ("a.jsonl", "\n\n", "holds no request"),
        ("a.csv", "isl,osl\n0,5\n", "holds no request that counts: 1 have no token in or out"),
        (
            "a.csv",
            "isl,tokens\n1,5\n",
            r"a.csv has no column of tokens out \(output_tokens, .*isl, t",
        ),
        (
            "a.csv",
            "isl,osl\n1,5\n2,-1\n",
            "a.csv line 3 has osl=-1: a count of tokens is 0 to 1e\\+12",
        ),
        ("a.csv", "isl,osl\n1,5\n2\n", "a.csv line 3 has osl=nothing: a count"),
        ("a.csv", "isl,osl\n1.5,5\n", "a.csv line 2 has isl=1.5: a count"),
        ("a.csv", "isl,osl\nnan,5\n", "a.csv line 2 has isl=nan: a count"),
        ("a.csv", "isl,osl\n1e30,5\n", "a.csv line 2 has isl=1e30: a count"),
        ("a.jsonl", '{"isl": true, "osl": 2}\n', "a.jsonl line 1 has isl=True: a count"),
        ("a.jsonl", '{"isl": 1, "osl": 2}\n\n{"isl"\n', "a.jsonl line 3 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl line 1 is not an object in JSON"),
    ],
)
def test_what_is_no_log_is_told(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_traffic(written(tmp_path, text, name))


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*gone.csv"):
        read_traffic(tmp_path / "gone.csv")
    file = written(tmp_path, "isl,osl\n8,9\n")
    with pytest.raises(UserError, match=r"has no column x, as traffic.input says: it has isl, osl"):
        read_traffic(file, {"input": "x"})
    with pytest.raises(UserError, match=r"0 have no token in or out, the rest more than traffic.l"):
        read_traffic(file, longest=16)
    file.write_text(f"isl,osl\n{'9' * 200_000},5\n")
    with pytest.raises(UserError, match="cannot be read as CSV: field larger"):
        read_traffic(file)
    file.write_bytes(b"isl,osl\n\xff,3\n")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        read_traffic(file)


def test_lengths_and_arrivals() -> None:
    # 0 to 100: each percentile is itself. Every second request comes 0.25 s after the one before.
    tokens = list(range(1, 102))
    times = [100.0 + i // 2 + 0.25 * (i % 2) for i in range(101)]
    found = describe(traffic(tokens, [2 * n for n in tokens], times))
    assert found["requests"] == 101
    assert found["input"] == {"mean": 51, "p50": 51, "p90": 91, "p95": 96, "p99": 100, "most": 101}
    assert found["output"]["p90"] == 182
    assert found["correlation"] == pytest.approx(1)
    arrivals = found["arrivals"]
    assert arrivals["requests_per_s"] == 2
    assert (arrivals["peak_second"], arrivals["peak_minute"], arrivals["seconds"]) == (2, 101, 50)
    # All in one part of a minute: it is that part that a mean one is counted by.
    assert arrivals["burstiness"] == pytest.approx(1.01)
    # A clock that was not set: 50 years of seconds are not counted one by one.
    late = describe(traffic([1, 2, 3], [1, 1, 1], [0.0, 1.7e9, 1.7e9 + 0.5]))["arrivals"]
    assert (late["peak_second"], late["peak_minute"]) == (2, 2)
    constant = describe(traffic([3, 3], [1, 2], [5.0, 5.0]))
    assert (constant["correlation"], constant["arrivals"]) == (None, None)
    assert describe(traffic([1, 2], [4, 2]))["correlation"] == pytest.approx(-1)


def test_bins_are_powers_of_two() -> None:
    found = heat_map(traffic([1, 15, 16, 31, 32], [8, 7, 8, 15, 16]))
    assert found["input"] == [1, 2, 4, 8, 16, 32]
    assert found["output"] == [4, 8, 16]
    assert found["requests"] == [
        [0, 1, 0],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
        [0, 2, 0],
        [0, 0, 1],
    ]


def test_patterns_are_the_clusters_with_their_means() -> None:
    """Three far apart, of 5, 3 and 2 requests."""
    inputs = [100, 100, 110, 90, 100, 2000, 2200, 2100, 10, 12]
    outputs = [10, 10, 10, 12, 8, 100, 100, 130, 1, 1]
    found = patterns(traffic(inputs, outputs), 3)
    assert [(p.input_length, p.output_length, p.weight) for p in found] == [
        (100, 10, 0.5),
        (2100, 110, 0.3),
        # Of one token out there is no gap to measure.
        (11, 2, 0.2),
    ]
    one = patterns(traffic(inputs, outputs), 1)
    assert [(p.input_length, p.output_length, p.weight) for p in one] == [(682, 38, 1.0)]
    assert len(patterns(traffic([5] * 4, [6] * 4), 3)) == 1, "as many as there are sizes"


@pytest.mark.parametrize("most", [1, 2, 4, 9])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_patterns_keep_the_weight_and_the_tokens(kind: str, most: int) -> None:
    rows = sample(kind, 400, seed=most, rate=1)
    log = traffic([int(r["input_tokens"]) for r in rows], [int(r["output_tokens"]) for r in rows])
    found = patterns(log, most)
    assert len(found) == most
    assert sum(p.weight for p in found) == pytest.approx(1, abs=1e-12)
    assert all(p.weight > 0 for p in found)
    # Rounded to a token each.
    mean = sum(p.weight * p.input_length for p in found)
    assert mean == pytest.approx(log.inputs.mean(), abs=0.5)
    assert sum(p.weight * p.output_length for p in found) == pytest.approx(
        log.outputs.mean(), abs=0.5
    )
    assert [p.weight for p in found] == sorted((p.weight for p in found), reverse=True)


def point(batch: int, size: tuple[int, int], ttft: list[float], itl: list[float]) -> dict[str, Any]:
    rounds = {
        "ttft_ms": ttft,
        "tokens_per_s": [1e3 * batch / gap for gap in itl],
        "e2e_ms": [t + (size[1] - 1) * gap for t, gap in zip(ttft, itl, strict=True)],
    }
    lengths = {"input_length": size[0], "output_length": size[1]}
    return {"batch": batch, **lengths, "rounds": rounds}


def test_measured_patterns_weighed() -> None:
    points = [
        point(2, (10, 11), [100, 200], [10, 10]),
        point(1, (10, 11), [1, 1], [1, 1]),
        point(2, (50, 101), [500, 500], [5, 6]),
    ]
    found = mixed(points, [0.75, 0.25], 2)
    # 0.75 x 200 + 0.25 x 1000, and 0.75 x 300 + 0.25 x 1100.
    assert found["rounds"]["time_per_request_ms"] == pytest.approx([400, 500])
    assert found["time_per_request_ms"] == pytest.approx(450)
    # 33.5 tokens of each of two sequences.
    assert found["rounds"]["tokens_per_s"] == pytest.approx([2 * 33.5 / 0.4, 2 * 33.5 / 0.5])
    assert found["covered"] == 1
    refused = [points[0], {"batch": 2, "input_length": 50, "output_length": 101, "refused": "no"}]
    found = mixed(refused, [0.75, 0.25], 2)
    assert (found["covered"], found["time_per_request_ms"]) == (0.75, None)
    assert ratio(found, mixed(points, [0.75, 0.25], 2)) is None


def test_ratios_are_those_of_the_rounds() -> None:
    base = mixed([point(1, (1, 2), [10, 20, 50], [10, 20, 50])], [1.0], 1)
    ours = mixed([point(1, (1, 2), [5, 20, 25], [5, 20, 25])], [1.0], 1)
    assert ratio(ours, base) == 2
    assert ratio(ours, base, together=False) == 1
    assert statistics.median(base["rounds"]["time_per_request_ms"]) == 40


# Contexts while decoding: 100 + 10, 300 + 10.
MEASURED = [
    point(1, (100, 20), [50], [4]),
    point(1, (300, 20), [250], [8]),
    # Say nothing here: another batch, refused, a mix.
    point(8, (900, 20), [999], [99]),
    {"batch": 1, "input_length": 900, "output_length": 20, "refused": "no room"},
    point(1, (900, 20), [999], [99]) | {"least_input": 1, "least_output": 2},
]


def test_between_what_was_measured_all_is_linear() -> None:
    found = weigh(MEASURED, traffic([100, 200, 300], [20, 21, 20]), 1)
    assert (found["covered"], found["inputs"], found["contexts"]) == (1, [100, 300], [110, 310])
    # 50 + 19 x 4, 150 + 20 x 6, 250 + 19 x 8.
    assert found["time_per_request_ms"] == pytest.approx((126 + 270 + 402) / 3)
    assert found["tokens_per_s"] == pytest.approx(1e3 * 61 / (126 + 270 + 402))


def test_beyond_what_was_measured_nothing_is_said() -> None:
    # The first has too few tokens in, the second too long a context, the last one token out: TTFT alone.
    log = traffic([99, 300, 200, 100], [30, 22, 20, 1])
    found = weigh(MEASURED, log, 1)
    assert found["covered"] == 0.5
    assert found["time_per_request_ms"] == pytest.approx((150 + 19 * 6 + 50) / 2)
    outside = weigh(MEASURED, traffic([1000], [20]), 1)
    assert (outside["covered"], outside["time_per_request_ms"]) == (0, None)
    assert outside["rounds"]["time_per_request_ms"] == []
    never = weigh(MEASURED, log, 4)
    assert (never["covered"], never["inputs"], never["tokens_per_s"]) == (0, None, None)


def test_one_place_measured_twice_counts_by_its_mean() -> None:
    points = [*MEASURED[:2], point(1, (100, 20), [70], [6])]
    found = weigh(points, traffic([100], [20]), 1)
    assert found["time_per_request_ms"] == pytest.approx(60 + 19 * 5)


def test_patterns_measured_as_they_are_agree_with_the_interpolation() -> None:
    sizes = [(100, 20), (300, 20)]
    points = [point(1, size, [40, 50], [4, 5]) for size in sizes]
    log = traffic([100, 100, 100, 300], [20] * 4)
    ours, theirs = weigh(points, log, 1), mixed(points, [0.75, 0.25], 1)
    assert ours["rounds"] == {k: pytest.approx(v) for k, v in theirs["rounds"].items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_sample_is_the_same_by_its_seed(tmp_path: Path, name: str) -> None:
    rows = sample("rag", 300, seed=5, rate=4)
    assert rows == sample("rag", 300, seed=5, rate=4)
    assert rows != sample("rag", 300, seed=6, rate=4)
    write_log(rows, tmp_path / name)
    found = read_traffic(tmp_path / name)
    assert found.inputs.tolist() == [row["input_tokens"] for row in rows]
    assert found.times is not None
    assert found.times.tolist() == [row["timestamp"] for row in rows]
    told = describe(found)
    # Medians of 300 draws with spread 0.5 and 0.6 are within 15 %, the rate is within 5 / sqrt(300).
    assert told["input"]["p50"] == pytest.approx(2500, rel=0.15)
    assert told["output"]["p50"] == pytest.approx(180, rel=0.15)
    assert told["arrivals"]["requests_per_s"] == pytest.approx(4, rel=0.3)
