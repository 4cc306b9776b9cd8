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
from eval.engines import serve_check
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
    loads_of,
    over,
    tell_all,
    together,
)
from tests.compress.report.test_served import entry, served_point
from tests.exported import exported
from tests.report_runs import run_of, write_runs


def asked(name: str, engine: str = VLLM_CPU, run: Path | None = Path(), **more: Any) -> Asked:
    return Asked(name, "awq", engine, Path(), run, **more)


def test_every_case_is_a_recipe() -> None:
    for case in CASES.values():
        assert parse(compose_settings(list(case.words))).settings.export


def test_as_many_servers_as_memory_holds() -> None:
    assert [together(gigabytes * 1e9) for gigabytes in (1, 9, 13, 100)] == [2, 2, 3, TOGETHER]


def test_the_original_is_in_every_group_that_is_compared_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_check, "together", lambda nbytes: TOGETHER)
    original, llama = asked("original", run=None), asked("original", LLAMA_CPP, None)
    others = [asked(f"c{i}") for i in range(TOGETHER)]
    slow, unserved = asked("slow", slow=True), asked("c0", TRANSFORMERS)
    quiet = asked("quiet", load=False)
    found = list(groups([original, llama, unserved, *others, quiet, slow]))
    room = TOGETHER - 1
    # llama.cpp has nothing beside its original: there is nothing to compare.
    assert found == [[original, *others[:room]], [original, *others[room:]], [quiet], [slow]]


def test_folders_are_asked_of_the_engines_that_load_them(tiny: ModelFolder, tmp_path: Path) -> None:
    def engines(scheme: Scheme) -> list[str]:
        folder = exported(tiny, scheme, tmp_path / scheme.name).path
        return [one.engine for one in asked_of("x", folder, None)]

    assert engines(Scheme(4, 32)) == [TRANSFORMERS, VLLM_CPU]
    assert engines(Scheme(3, 32)) == [TRANSFORMERS]


def test_loads_are_the_four_patterns_at_several_concurrencies_and_many_requests() -> None:
    *short, many = loads_of([asked("a"), asked("b")])
    sizes = {(load.input_length, load.output_length) for load in short}
    assert sizes == {(16, 16), (16, 128), (128, 16), (128, 128)}
    assert {load.concurrency for load in short} == {1, 4, 16}
    assert len(short) == 12
    assert all(load.requests >= load.concurrency and load.rounds > 1 for load in short)
    assert (many.requests, many.concurrency) == (200, 16)
    (one,) = loads_of([asked("a", slow=True)])
    assert one.requests * one.output_length < 32
    assert loads_of([asked("a", load=False)]) == []
    assert loads_of([asked("a", LLAMA_CPP)]) == short


def test_a_ratio_is_the_median_of_those_within_the_rounds() -> None:
    ours, theirs = served_point(1, [20, 50, 60]), served_point(1, [10, 20, 40])
    # 2, 2.5 and 1.5: not 50 / 20.
    assert over(ours, theirs) == 2
    assert over(ours, served_point(1, [10, 0, 40])) is None


def test_entries_go_into_the_run_beside_the_original(tmp_path: Path) -> None:
    write_runs(tmp_path, [run_of("awq-int4")])
    run = tmp_path / "run 0"
    before = json.loads((run / METRICS).read_text())
    who = [asked("original", run=None), asked("awq-int4", run=run)]
    old = entry(VLLM_CPU, "awq", [])
    for points in ([served_point(1, [5, 5, 5])], [served_point(1, [8, 8, 9])]):
        keep(who, [entry(VLLM_CPU, "plain", []), {**old, "points": points}])
    keep([asked("awq-int4", LLAMA_CPP, run)], [entry(LLAMA_CPP, "gguf", [])])
    # Newer entries replace those of the same engine and format alone, but for points they have none of.
    keep(who, [entry(VLLM_CPU, "plain", []), {**old, "date": "later"}])
    metrics = json.loads((run / METRICS).read_text())
    found = metrics["candidate"].pop("served")
    assert list(found) == ["vllm-cpu/awq", "llama.cpp/gguf"]
    assert found["vllm-cpu/awq"]["points"][0]["tokens_per_s"] == 8
    assert found["vllm-cpu/awq"]["date"] == "later"
    assert list(metrics["base"].pop("served")) == ["vllm-cpu/plain"]
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
    tell_all([tmp_path / "run 0"], tiny, tmp_path)
    assert "within 0.1 of ours" in capsys.readouterr().out
    found = json.loads((tmp_path / "served.json").read_text())
    assert list(found["served"]["awq-int4"]) == ["vllm-cpu/awq"]
    assert found["device"]
    card = (checkpoint / "README.md").read_text()
    assert "## Served" in card
    assert "answers of serving engines" not in card
    assert verify(checkpoint) == []
