"""The bench's tables on figures made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from compress.commands.bench import short_names
from compress.report.speed import bench_report, crossover
from compress.report.table import first_point, speedup, table

ENVIRONMENT = {"device": "2 x CPU", "threads": 2, "versions": {"torch": "2.13", "lm-eval": "0.4"}}


def point(batch: int, rounds: list[float], *, out: int = 32, **changes: Any) -> dict[str, Any]:
    """Three rounds, the middle one the median."""
    return {
        "batch": batch,
        "input_length": 128,
        "output_length": out,
        "ttft_ms": 250.4,
        "tokens_per_s": sorted(rounds)[1],
        "tokens_per_s_iqr": 2.0,
        "itl_ms_p50": 12.345,
        "itl_ms_p99": 20.0,
        "peak_rss": 700e6,
        "peak_cuda": None,
        "kernels": {"int4-cpu": 7, "dense": 1},
        "share_of_roofline": 0.456,
        "read_gb_s": 22.5,
        "rounds": {"tokens_per_s": rounds},
        **changes,
    }


def speed(points: list[dict[str, Any]], *, together: bool = True, **changes: Any) -> dict[str, Any]:
    load = {"repeats": 3, "warmup": 1, "threads": None, "together": together}
    return {
        "load": load,
        "engine": "compress",
        "version": "0.1.0",
        "checkpoint_bytes": 1e8,
        "load_s": 1.25,
        "idle_rss": 400e6,
        "load_peak_rss": 650e6,
        "load_peak_cuda": None,
        "loaded_rss": 500e6,
        "loaded_cuda": None,
        "first_request_s": 0.5,
        "read_kernel": "torch.sum",
        "memory_since_load": True,
        "points": points,
        **changes,
    }


REFUSED = {"batch": 64, "input_length": 128, "output_length": 32, "refused": "OutOfMemoryError: no"}
BASE = speed([point(1, [10, 20, 30]), point(8, [50, 60, 70]), point(64, [100, 100, 100])])
FAST = speed([point(1, [20, 30, 90]), point(8, [55, 54, 63]), REFUSED])


def cells(report: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.splitlines()
        if line.startswith("|")
    ]


def test_a_row_for_every_point_and_candidate() -> None:
    report = bench_report({"base": {"compress": BASE}, "int4": {"compress": FAST}}, ENVIRONMENT)
    rows = cells(report)
    assert rows[0][:5] == ["batch", "in/out", "", "tokens/s", "ratio"]
    assert [row[:3] for row in rows[2:8]] == [
        [batch, "128/32", name] for batch in ("1", "8", "64") for name in ("base", "int4")
    ]
    # Ratios of the rounds are 2, 1.5, 3: their median, not that of the medians (1.5).
    assert rows[3][3:] == [
        "30.0 ±1.0",
        "2.00x",
        "250",
        "12.35",
        "20.00",
        "46%",
        "700",
        "int4-cpu+dense",
    ]
    assert rows[7][3:] == ["refused"] + ["-"] * 7
    assert ["base", "compress 0.1.0", "100.0", "1.2", "0.50", "100", "250"] in rows
    assert "- Refused: int4 (compress), batch 64, 128/32: OutOfMemoryError: no" in report
    assert "(22.5 GB/s by torch.sum)" in report
    assert "median of 3 interleaved rounds" in report
    assert "2 x CPU, threads: 2, torch 2.13." in report


def test_engines_have_a_column_and_a_base_each() -> None:
    vllm = speed([point(1, [40, 40, 40]), point(8, [60, 60, 60]), point(64, [300, 300, 300])])
    results = {
        "base": {"compress": BASE, "vllm": vllm},
        "int4": {"compress": FAST, "vllm": speed([], refused="no") | {"points": [REFUSED] * 3}},
    }
    report = bench_report(results, ENVIRONMENT)
    rows = cells(report)
    assert [row[3] for row in rows[2:6]] == ["compress", "vllm", "compress", "vllm"]
    # The ratio is to the first row of all; crossover to the same engine.
    assert rows[3][5] == "2.00x"
    assert (
        "- int4 against base (compress): 128/32 no longer faster from batch 8 on (0.90x)" in report
    )
    assert "- int4 against base (vllm): no point that both answered" in report
    assert ["int4", "vllm 0.1.0", "100.0", "-", "-", "-", "-"] in rows


def test_crossover() -> None:
    batches = [64, 1, 8]
    base = speed([point(b, [10, 10, 10]) for b in batches] + [point(1, [10, 10, 10], out=9)])
    ours = speed(
        [point(b, [10 * r] * 3) for b, r in zip(batches, (0.8, 2, 0.95), strict=True)]
        + [point(1, [30, 30, 30], out=9)]
    )
    assert crossover(ours, base) == (
        "128/32 no longer faster from batch 8 on (0.95x); 128/9 faster at every batch measured; "
        "largest loss 0.80x at batch 64, 128/32"
    )
    assert crossover(base, base).endswith("not faster at any batch measured; no loss")
    # As where a small batch waits for memory that is not the weights': faster again later.
    late = speed([point(b, [10 * r] * 3) for b, r in zip(batches, (1.5, 0.9, 0.95), strict=True)])
    few = speed(base["points"][:3])
    assert crossover(late, few) == (
        "128/32 not faster at batch 1 (0.90x), 8 (0.95x); largest loss 0.90x at batch 1, 128/32"
    )


def test_what_did_not_run_in_the_same_rounds_has_no_ratio_within_them() -> None:
    ours, theirs = FAST["points"][0], BASE["points"][0]
    assert speedup(ours, theirs) == 2
    assert speedup(ours, theirs, together=False) == 1.5
    apart = {
        name: {"compress": speed(s["points"], together=False)}
        for name, s in (("base", BASE), ("int4", FAST))
    }
    report = bench_report(apart, ENVIRONMENT)
    assert "one candidate AFTER the other (speed.together=false)" in report
    assert "interleaved" not in report
    assert cells(report)[3][4] == "1.50x"


def test_the_first_point_stands_for_a_run() -> None:
    assert first_point(BASE) is BASE["points"][0]
    assert first_point(None) is None
    assert first_point(speed([REFUSED])) is None
    # As it was before there were points.
    old = {"load": {"batch": 1, "output_length": 32}, "ttft_ms": 3.0}
    found = first_point(old)
    assert found is not None
    assert (found["batch"], found["ttft_ms"]) == (1, 3.0)


@pytest.mark.parametrize(
    ("base", "shown"), [(BASE, "30.0 ±1.0 (2.00x)"), (speed([REFUSED]), "30.0 ±1.0")]
)
def test_the_comparison_table_shows_the_first_point(base: dict[str, Any], shown: str) -> None:
    size = {"bytes": 1e8, "bits_linears": 4.0, "bits_file": 5.0, "parameters": 1, "kept": []}
    run = {
        "name": "int4",
        "model": {"name": "m", "fingerprint": "f"},
        "recipe": {},
        "base": {"size": size, "speed": base},
        "candidate": {"size": size, "speed": FAST},
        "environment": ENVIRONMENT,
    }
    found = table([run])
    assert cells(found)[3][-4:] == ["250", shown, "700", "int4-cpu+dense"]
    assert "- Speed: 128/32 tokens in/out, batch 1, median of 3 interleaved rounds, ±" in found


def test_short_names_tell_folders_apart() -> None:
    words = ["runs/a/checkpoint", "/data/b/checkpoint", "~/model", "/model/"]
    found = short_names(words)
    assert [found[word] for word in words[:2]] == ["a/checkpoint", "b/checkpoint"]
    assert found["~/model"].endswith("/model")
    assert found["/model/"] == "/model"
