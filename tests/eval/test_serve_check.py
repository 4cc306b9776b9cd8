"""How the serve check puts servers together, and where it leaves what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.compose import compose_settings
from compress.config import parse
from compress.export.audit import verify, write_manifest
from compress.model.folder import ModelFolder
from compress.quantize.scheme import Scheme
from compress.report.table import METRICS
from eval.engines.serve_check import (
    CASES,
    LLAMA_CPP,
    TOGETHER,
    TRANSFORMERS,
    VLLM_CPU,
    Asked,
    asked_of,
    groups,
    keep,
    loads,
    tell_all,
)
from tests.compress.report.test_served import entry, served_point
from tests.exported import exported
from tests.report_runs import run_of, write_runs


def asked(name: str, engine: str = VLLM_CPU, run: Path | None = Path(), **more: Any) -> Asked:
    return Asked(name, "awq", engine, Path(), run, **{"slow": False, **more})


def test_every_case_is_a_recipe() -> None:
    for case in CASES.values():
        assert parse(compose_settings(list(case.words))).settings.export


def test_the_original_is_in_every_group_that_is_compared_with_it() -> None:
    original, llama = asked("original", run=None), asked("original", LLAMA_CPP, None)
    others = [asked(f"c{i}") for i in range(TOGETHER)]
    slow, unserved = asked("slow", slow=True), asked("c0", TRANSFORMERS)
    found = list(groups([original, llama, unserved, *others, slow]))
    assert found == [[original, *others[: TOGETHER - 1]], [original, others[-1]], [slow], [llama]]


def test_folders_are_asked_of_the_engines_that_load_them(tiny: ModelFolder, tmp_path: Path) -> None:
    def engines(scheme: Scheme) -> list[str]:
        folder = exported(tiny, scheme, tmp_path / scheme.name).path
        return [one.engine for one in asked_of("x", folder, None)]

    assert engines(Scheme(4, 32)) == [TRANSFORMERS, VLLM_CPU]
    assert engines(Scheme(3, 32)) == [TRANSFORMERS]


def test_loads_are_the_four_patterns_at_several_concurrencies() -> None:
    found = loads()
    sizes = {(load.input_length, load.output_length) for load in found}
    assert sizes == {(16, 16), (16, 128), (128, 16), (128, 128)}
    assert len(found) == 12
    # In a round as many requests as there are at a time.
    assert all(load.requests == load.concurrency for load in found)


def test_entries_go_into_the_run_beside_the_original(tmp_path: Path) -> None:
    write_runs(tmp_path, [run_of("awq-int4")])
    run = tmp_path / "run 0"
    before = json.loads((run / METRICS).read_text())
    who = [asked("original", run=None), asked("awq-int4", run=run)]
    old = entry(VLLM_CPU, "awq", [])
    for points in ([served_point(1, [5, 5, 5])], [served_point(1, [8, 8, 9])]):
        keep(who, [entry(VLLM_CPU, "16 bits", []), {**old, "points": points}])
    keep([asked("awq-int4", LLAMA_CPP, run)], [entry(LLAMA_CPP, "gguf", [])])
    metrics = json.loads((run / METRICS).read_text())
    # Newer entries replace those of the same engine and format alone.
    found = metrics["candidate"].pop("served")
    assert [(e["engine"], e["export"]) for e in found] == [(VLLM_CPU, "awq"), (LLAMA_CPP, "gguf")]
    assert found[0]["points"][0]["tokens_per_s"] == 8
    assert [e["export"] for e in metrics["base"].pop("served")] == ["16 bits"]
    assert metrics == before
    assert "| awq-int4" in (run / "served.md").read_text()


def test_all_of_it_is_told_together(
    tiny: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path, [run_of("awq-int4")])
    checkpoint = tmp_path / "run 0" / "checkpoint"
    checkpoint.symlink_to(exported(tiny, Scheme(4, 32), tmp_path / "made").path)
    write_manifest(checkpoint, {})
    keep([asked("awq-int4", run=tmp_path / "run 0")], [entry(VLLM_CPU, "awq", [])])
    tell_all(tmp_path, tiny)
    assert "within 0.1 of ours" in capsys.readouterr().out
    found = json.loads((tmp_path / "served.json").read_text())
    assert [e["export"] for e in found["served"]["awq-int4"]] == ["awq"]
    assert found["device"]
    card = (checkpoint / "README.md").read_text()
    assert "## Served" in card
    assert "answers of serving engines" not in card
    assert verify(checkpoint) == []
