"""Recipes that prune, from words to a checkpoint: what is left behind, and going on after being killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.compose import compose_settings
from compress.config import Run, parse
from compress.export.audit import verify
from compress.model.folder import ModelFolder
from compress.report.table import table
from tests.exported import checkpoint_bytes

SMALL = ["data.sequences=24", "data.length=64", "prune.trial_sequences=8"]
TRAINED = ["distill.steps=6", "distill.length=32", "distill.save_every=2", "distill.log_every=2"]


def run_of(tiny: ModelFolder, text_file: Path, *words: str) -> Run:
    return parse(
        compose_settings(
            [
                f"model.source={tiny.path}",
                "data=text",
                f"data.source={text_file}",
                "eval=none",
                "speed=none",
                *SMALL,
                *words,
            ]
        )
    )


def finished(run: Run, out: Path) -> dict[str, Any]:
    pipeline.check(run)
    return pipeline.run_recipe(run, "run", out)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["recipe=prune-depth", "prune.share=0.3"], {"num_hidden_layers": 2}),
        (["recipe=prune-width", "prune.share=0.3"], {}),
        (["recipe=prune-heads", "prune.share=0.05"], {"num_attention_heads": 2}),
        (["recipe=prune-kv-heads"], {"num_key_value_heads": 1, "num_attention_heads": 4}),
    ],
)
def test_recipes_leave_dense_models(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, words: list[str], changed: dict[str, int]
) -> None:
    metrics = finished(run_of(tiny, text_file, *words), tmp_path / "run")
    checkpoint = ModelFolder(tmp_path / "run" / "checkpoint")
    assert {key: checkpoint.config[key] for key in changed} == changed
    assert verify(checkpoint.path) == []
    sizes = metrics["candidate"]["size"], metrics["base"]["size"]
    assert sizes[0]["bytes"] < sizes[1]["bytes"]
    assert sizes[0]["parameters"] == metrics["compression"]["prune"]["parameters"][1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert model(torch.randint(256, (1, 8))).logits.isfinite().all()
    for file in ("pruning.png", "pruning.md", "table.md"):
        assert (tmp_path / "run" / file).stat().st_size > 100
    assert "| parameters " in (tmp_path / "run" / "pruning.md").read_text()


def test_a_search_takes_the_shape_that_strays_least(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    words = ["recipe=prune-width", "prune.share=0.3", "prune.multiple=8"]
    run = run_of(tiny, text_file, *words)
    report = finished(run, tmp_path / "run")["compression"]["prune"]
    best = min(report["candidates"], key=lambda trial: trial["kl"])
    assert len(report["candidates"]) > 1
    assert report["shape"]["after"] == {axis: best[axis] for axis in report["shape"]["after"]}
    old, new = report["block_parameters"]
    assert 1 - new / old >= 0.3


def test_prune_distill_quantize(tiny: ModelFolder, text_file: Path, tmp_path: Path) -> None:
    run = run_of(tiny, text_file, "recipe=minitron-awq", "prune.share=0.3", *TRAINED)
    metrics = finished(run, tmp_path / "run")
    compression = metrics["compression"]
    assert list(compression["stage_seconds"]) == ["prune", "distill", "quantize"]
    assert compression["distill"]["tokens"] == 6 * 4 * 32
    assert metrics["candidate"]["size"]["bits_linears"] < 5
    assert compression["prune"]["shape"]["after"]["mlp"] % 64 == 0
    assert verify(tmp_path / "run" / "checkpoint") == []
    assert (tmp_path / "run" / "distillation.png").stat().st_size > 1000
    assert not (tmp_path / "run" / "distill.state").exists()


def test_repair_after_quantization_picks_integers_anew(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    words = ["recipe=rtn-int4", "scheme.bits=3", "stages=[quantize,distill]", "distill=kl"]
    run = parse(
        compose_settings(
            [
                f"model.source={tiny.path}",
                "data=text",
                f"data.source={text_file}",
                "eval=none",
                "speed=none",
                *words,
                *TRAINED,
                "distill.rate=0.02",
            ]
        )
    )
    finished(run, tmp_path / "run")
    before, after = (ModelFolder(tmp_path / "run" / stage) for stage in ("quantize", "distill"))
    codes = [name for name in before.names if name.endswith(".codes")]
    moved = [not torch.equal(before.tensor(name), after.tensor(name)) for name in codes]
    assert len(codes) == 21
    assert any(moved)
    assert verify(tmp_path / "run" / "checkpoint") == []


def test_a_distillation_that_was_killed_goes_on_to_the_same_bytes(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tiny, text_file, "recipe=prune-width-distill", "prune.share=0.3", *TRAINED)
    finished(run, tmp_path / "whole")
    from compress.distill import training

    steps = []
    learn = training.Training._step  # type: ignore[attr-defined]

    def killed(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    monkeypatch.setattr(training.Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        finished(run, tmp_path / "killed")
    assert (tmp_path / "killed" / "prune").is_dir()
    assert (tmp_path / "killed" / "distill.state").is_dir()
    assert not (tmp_path / "killed" / "distill").exists()
    monkeypatch.setattr(training.Training, "_step", learn)
    metrics = pipeline.run_recipe(run, "run", tmp_path / "killed")
    assert metrics["compression"]["resumed"] == ["prune"]
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")


def test_the_table_counts_weights_where_they_differ() -> None:
    size = {
        "parameters": 100_000_000,
        "bytes": 2e8,
        "bits_linears": 16.0,
        "bits_file": 16.0,
        "kept": [],
    }
    smaller = {**size, "parameters": 80_000_000}
    run = {
        "name": "prune-width",
        "model": {"name": "m", "fingerprint": "f"},
        "recipe": {},
        "base": {"size": size},
        "candidate": {"size": smaller},
        "environment": {"device": "cpu", "versions": {"torch": "2"}, "date": "2026"},
    }
    header, _, original, candidate, *_ = table([run]).splitlines()
    assert header.split("|")[2].strip() == "M weights"
    assert original.split("|")[2].strip() == "100.0"
    assert candidate.split("|")[2].strip() == "80.0"
    assert "M weights" not in table([{**run, "candidate": {"size": size}}])
