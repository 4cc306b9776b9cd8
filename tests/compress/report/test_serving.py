"""Figures of a bench and of a traffic: what is in them, and that they can be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.report.drawn import MARKERS as DRAWN
from compress.report.drawn import draw_figures
from compress.report.palette import DASHES, MARKERS, PALETTE
from compress.report.serving import (
    itl_figure,
    mixture_table,
    serving_figures,
    throughput_figure,
    total_figure,
    traffic_figure,
    traffic_report,
    traffic_sections,
    ttft_figure,
)
from compress.report.speed import bench_report
from eval.traffic import Traffic, describe, mixed

ENVIRONMENT = {"device": "2 x CPU", "threads": 2, "versions": {"torch": "2.13"}}


def point(batch: int, size: tuple[int, int], scale: float, **changes: Any) -> dict[str, Any]:
    """TTFT of a millisecond a token in, ITL of 10, both times ``scale``; three rounds, the last slow."""
    ttft = [scale * size[0] * slow for slow in (1, 1, 2)]
    itl = [scale * 10.0 * slow for slow in (1, 1, 2)]
    e2e = [t + (size[1] - 1) * gap for t, gap in zip(ttft, itl, strict=True)]
    speed = [1e3 * batch / gap for gap in itl]
    return {
        "batch": batch,
        "input_length": size[0],
        "output_length": size[1],
        "ttft_ms": ttft[0],
        "ttft_ms_iqr": ttft[0] / 2,
        "itl_ms_p50": itl[0],
        "itl_ms_p99": itl[2],
        "tokens_per_s": speed[0],
        "tokens_per_s_iqr": 4.0,
        "e2e_ms": e2e[0],
        "itl_by_position": {"positions": [2, 3], "p50_ms": [itl[0]] * 2, "p90_ms": [itl[2]] * 2},
        "meets_limits": 1.0 if batch < 8 else 2 / 3,
        "goodput_rps": 1e3 * batch / e2e[0] * (1.0 if batch < 8 else 2 / 3),
        "peak_rss": 7e8,
        "peak_cuda": None,
        "kernels": {"dense": 1},
        "share_of_roofline": None,
        "read_gb_s": None,
        "rounds": {"ttft_ms": ttft, "tokens_per_s": speed, "e2e_ms": e2e},
        **changes,
    }


def speed(scale: float, *more: dict[str, Any], **limits: float) -> dict[str, Any]:
    points = [point(b, s, scale) for s in ((16, 4), (64, 4), (32, 8)) for b in (8, 1)]
    return {
        "load": {"together": True, "repeats": 3, "warmup": 1, "threads": 1, "limits": limits},
        "version": "0.1",
        "checkpoint_bytes": 1e8,
        "refused": "not opened here",
        "points": [*points, *more],
    }


REFUSED = {"batch": 64, "input_length": 16, "output_length": 4, "refused": "no room"}
MIX = point(1, (64, 8), 1.0, least_input=4, least_output=2)
SPEEDS = {"base": speed(1.0, REFUSED, MIX), "int4": speed(0.5, REFUSED, MIX)}
LOG = Traffic("log.csv", np.array([16, 32, 64, 500]), np.array([4, 4, 4, 1]))


def traces(figure: dict[str, Any]) -> dict[str, Any]:
    assert figure["layout"]["title"]["text"]
    json.dumps(figure, allow_nan=False)
    return {trace["name"]: trace for trace in figure["data"]}


def test_ttft_against_the_tokens_in() -> None:
    found = traces(ttft_figure(SPEEDS))
    assert list(found) == ["base, batch 1", "base, batch 8", "int4, batch 1", "int4, batch 8"]
    line = found["int4, batch 8"]
    # In order of length, without the mix and what was refused; bars are half the interquartile range.
    assert (line["x"], line["y"]) == ([16, 32, 64], [8, 16, 32])
    assert line["error_y"]["array"] == [2, 4, 8]
    assert line["line"]["dash"] != found["int4, batch 1"]["line"]["dash"]
    assert line["line"]["color"] == found["int4, batch 1"]["line"]["color"] == PALETTE[1]
    assert ttft_figure(SPEEDS)["layout"]["xaxis"]["tickvals"] == [16, 32, 64]


def test_itl_of_the_longest_output_by_position() -> None:
    figure = itl_figure(SPEEDS)
    assert "32 in, 8 out" in figure["layout"]["title"]["text"]
    found = traces(figure)
    assert found["int4, batch 1"]["y"] == [5, 5]
    assert found["int4, batch 1"]["x"] == [2, 3]
    assert found["int4, batch 1, p90"]["y"] == [10, 10]
    assert not found["int4, batch 1, p90"]["showlegend"]


def test_total_time_of_every_round() -> None:
    found = traces(total_figure(SPEEDS))
    assert list(found) == ["base", "int4"]
    assert len(found["base"]["x"]) == len(found["base"]["y"]) == 7 * 3
    assert found["base"]["x"][-1] == "batch 1, 4-64/2-8"
    # 16 in and 3 gaps of 10.
    assert found["base"]["y"][:3] == [46, 46, 92]


def test_throughput_and_goodput_against_the_batch() -> None:
    found = traces(throughput_figure({"base": SPEEDS["base"]}))
    assert list(found) == [
        *(f"base, {p}{end}" for p in ("16/4", "64/4", "32/8") for end in ("", ", goodput")),
        "base, 4-64/2-8",
    ]
    assert (found["base, 16/4"]["x"], found["base, 16/4"]["y"]) == ([1, 8], [100, 800])
    # Four tokens of each request in 46 ms; of the larger batch two in three keep the limits.
    goodput = found["base, 16/4, goodput"]["y"]
    assert goodput == pytest.approx([4 / 0.046, 8 * 4 / 0.046 * 2 / 3])


def test_older_runs_lack_what_they_did_not_keep() -> None:
    keys = ("e2e_ms", "itl_by_position", "meets_limits", "goodput_rps")
    old = {k: v for k, v in point(1, (16, 4), 1).items() if k not in keys}
    old["rounds"] = {"tokens_per_s": [1.0], "ttft_ms": [2.0]}
    counts = [len(figure["data"]) for figure in serving_figures({"old": {"points": [old]}})]
    assert counts == [1, 0, 0, 1]


def test_a_traffic_as_a_heat_map() -> None:
    (trace,) = traffic_figure(LOG)["data"]
    assert trace["x"] == ["1", "2-3", "4-7"]
    assert trace["y"] == ["16-31", "32-63", "64-127", "128-255", "256-511"]
    assert trace["z"][0] == [None, None, 25]
    assert trace["z"][4] == [25, None, None]
    assert trace["text"][1] == ["", "", "25.0"]
    report = traffic_report(LOG)
    assert "- log.csv: 4 requests." in report
    assert "| tokens in  | 153  | 48  |" in report
    left = Traffic("log.csv", LOG.inputs, LOG.outputs, empty=2, longer=1, longest=600)
    assert "(left out: 2 without a token in or out, 1 (20.0%) of more than 600 tokens)" in (
        traffic_report(left)
    )


def test_runs_weighed_by_a_traffic() -> None:
    runs = [
        of_speed("r", SPEEDS["base"], SPEEDS["int4"]),
        of_speed("none", None, None),
        of_speed("old", None, {"load": {}, "ttft_ms": 3}),
    ]
    first, second = traffic_sections(LOG, runs)
    assert first.figure == traffic_figure(LOG)
    assert (second.title, second.figure) == ("Your traffic on these runs", None)
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in second.text.splitlines()
        if "|" in line
    ]
    # 75 % of the requests, and of these 16, 32 and 64 in with 3 gaps each: of the original 46, 62 and 94 ms.
    assert rows[2] == ["r", "1", "75.0%", "33.7 ±8.4", "67.3", "118.8", "2.00x"]
    # Of batch 64 there is nothing.
    assert rows[4] == ["r", "64", "0.0%", *"----"]
    assert len(traffic_sections(LOG, runs[1:])) == 1


def of_speed(name: str, base: Any, candidate: Any) -> dict[str, Any]:
    about = {"model": {"name": "m", "fingerprint": "f"}, "environment": {"date": name}}
    return {"name": name, "base": {"speed": base}, "candidate": {"speed": candidate}, **about}


def test_every_engine_is_weighed_against_its_own_original() -> None:
    base, ours = (
        speed(scale) | {"engine": "compress", "other_engines": [speed(other) | {"engine": "vllm"}]}
        for scale, other in ((1.0, 0.6), (0.5, 0.2))
    )
    _, second = traffic_sections(LOG, [of_speed("a|b", base, ours)])
    rows = [line for line in second.text.splitlines() if line.startswith("| a")]
    found = [(row.split("(")[1].split(")")[0], row.split("|")[-2].strip()) for row in rows]
    assert found == [("compress", "2.00x")] * 2 + [("vllm", "3.00x")] * 2
    assert all(row.startswith("| a\\|b (") for row in rows)


def test_a_bench_over_a_traffic_ends_in_weighted_rows() -> None:
    results = {name: {"compress": found} for name, found in SPEEDS.items()}
    weights = [0.5, 0.25, 0.25]
    weighted = {
        name: {"compress": [mixed(found["points"][:6], weights, batch) for batch in (1, 8)]}
        for name, found in SPEEDS.items()
    }
    sizes = [
        {"input_length": i, "output_length": o, "weight": w}
        for (i, o), w in zip(((16, 4), (64, 4), (32, 8)), weights, strict=True)
    ]
    mixture = {"traffic": describe(LOG), "patterns": sizes, "weighted": weighted}
    table = mixture_table(mixture, results)
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line
    ]
    # 0.5 x 46 + 0.25 x 94 + 0.25 x 102 = 72 ms, of 5 tokens out.
    assert rows[2] == ["log.csv", "base", "1", "100.0%", "72.0 ±18.0", "69.4", "1.00x"]
    assert rows[5] == ["log.csv", "int4", "8", "100.0%", "36.0 ±9.0", "1111.1", "2.00x"]
    assert "4 requests of log.csv as 3 sizes" in table
    assert "50.0% 16/4; 25.0% 64/4; 25.0% 32/8" in table


def test_the_report_names_the_largest_batch_within_the_limits() -> None:
    within = {n: {"compress": speed(s, ttft_ms=300, itl_ms=20)} for n, s in (("a", 1), ("b", 0.5))}
    report = bench_report(within, ENVIRONMENT)
    assert "every timed request had TTFT within 300 ms and mean ITL within 20 ms:" in report
    # Of batch 8 only two requests in three are within; 1 request in 46, 94, 102 ms.
    assert (
        "- a: 16/4 batch 1, 21.7 requests/s; 64/4 batch 1, 10.6 requests/s; 32/8 batch 1, 9.8 requests/s"
        in report
    )
    assert "The largest batch" not in bench_report({"a": {"compress": speed(1.0)}}, ENVIRONMENT)


@pytest.mark.parametrize("figures", [serving_figures(SPEEDS), [traffic_figure(LOG)], []])
def test_figures_are_drawn(figures: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_figures(figures, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_every_shape_can_be_drawn(tmp_path: Path) -> None:
    assert set(MARKERS) == set(DRAWN)
    assert len(set(PALETTE)) == len(PALETTE) == len(MARKERS)
    many = {str(i): speed(1.0) for i in range(len(PALETTE) + 1)}
    figure = throughput_figure(many)
    assert {trace["line"]["dash"] for trace in figure["data"]} <= set(DASHES)
    draw_figures([figure], tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 20_000
