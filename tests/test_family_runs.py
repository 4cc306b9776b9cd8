"""Whole runs on models of kinds that differ most: compressed, exported, audited, judged, with a card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.commands.plan import plan
from compress.compose import compose_settings
from compress.config import Run, parse
from compress.errors import UserError
from compress.model.added import digest_of, families_dir, write_family
from compress.model.families import family_of
from compress.model.folder import SINGLE, ModelFolder
from eval.engines.family_models import KINDS, SEEING, written_model, written_seeing_model

# Fused and turned over; positions by a table; tuples; experts; states; latents; caps; names within others.
DIFFERENT = ("gpt2", "opt", "falcon-7b", "qwen3_moe", "mamba2", "deepseek_v3", "gemma2", "llava")
TEXT = " ".join(f"the {n}th bird of {n * 7 % 31} sat by the water and waited." for n in range(900))


def folder_of(kind: str, path: Path) -> ModelFolder:
    make: Any = written_seeing_model if kind in SEEING else written_model
    folder: ModelFolder = make(kind, path, torch.bfloat16)[1]
    return folder


def run_of(model: Path, place: Path, *words: str, judged: bool = False) -> Run:
    text = place / "text.txt"
    text.write_text(TEXT)
    settings = [
        f"model.source={model}", "model.name=it", "data=text", f"data.source={text}", "data.sequences=4",
        "data.length=64", "speed=none",
    ]  # fmt: skip
    judge = [
        f"eval.texts=[{text}]", "eval.tasks=[]", "eval.tokens=256", "eval.window=64", "eval.block_tokens=64",
        "eval.generated=4", "eval.prompt_tokens=8",
    ]  # fmt: skip
    return parse(compose_settings([*words, *settings, *(judge if judged else ["eval=none"])]))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_whole_run(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model")
    run = run_of(folder.path, tmp_path, "recipe=awq-int4", "scheme.group_size=32", judged=True)
    out = tmp_path / "out"
    pipeline.check(run, out)
    metrics = pipeline.run_recipe(run, "awq-int4", out)
    (found,) = metrics["candidate"]["texts"].values()
    assert 0 < found["kl"] < 0.5
    assert 4 < metrics["candidate"]["size"]["bits_linears"] < 5
    assert metrics["compression"]["audit"]["linears"] > 0
    # Its logits are capped: the loss of a block alone is not known from the head.
    assert ("block_kl" in metrics["compression"]) == (kind != "gemma2")
    card = (out / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "awq-int4" in card
    if kind in SEEING:
        assert ModelFolder(out / "checkpoint").stated["model_type"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_plans(kind: str, tmp_path: Path) -> None:
    """Bytes as they would be on disk, and what a step reads: of experts those that one token is sent to."""
    folder = folder_of(kind, tmp_path / "model")
    words = [f"model.source={folder.path}", "hardware=h100", "plan.context=64", "plan.batches=[1]"]
    settings = compose_settings(["recipe=rtn-int4", "scheme.group_size=32", *words])
    if "plan" in family_of(folder.config).refuses:
        with pytest.raises(UserError, match="plan does not apply"):
            plan(settings)
        return
    found = plan(settings)
    assert "refused" not in found
    base, candidate = (found["rows"][row] for row in ("base", "candidate"))
    assert base["bytes"] == folder.path.joinpath(SINGLE).stat().st_size
    assert candidate["bytes"] < 0.6 * base["bytes"]
    experts = [name for name in folder.names if ".experts." in name]
    if experts:
        # Two of four: the others wait.
        inactive = sum(folder.nbytes(name) for name in experts if name.endswith("weight")) / 2
        table = folder.nbytes(f"{family_of(folder.config).embedding}.weight")
        assert base["read"] == pytest.approx(base["weights"] - table - inactive)


def test_layers_that_only_draft_are_left_out(tmp_path: Path) -> None:
    """As DeepSeek-V3's files hold them: a block behind the last."""
    folder = folder_of("deepseek_v3", tmp_path / "model")
    tensors = load_file(folder.path / SINGLE)
    drafts = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save_file(tensors | drafts, folder.path / SINGLE, {"format": "pt"})
    config = folder.path / "config.json"
    stated = {**json.loads(config.read_text()), "num_nextn_predict_layers": 1}
    config.write_text(json.dumps(stated))
    assert not any("layers.2." in name for name in ModelFolder(folder.path).names)
    run = run_of(folder.path, tmp_path, "recipe=rtn-int4", "scheme.group_size=32")
    pipeline.check(run)
    pipeline.run_recipe(run, "rtn-int4", tmp_path / "out")
    # One more than it says is a mistake still.
    config.write_text(json.dumps({**stated, "num_nextn_predict_layers": 0}))
    with pytest.raises(UserError, match=r"layers\.2.* which its config.json has no place for"):
        pipeline.check(run)


def test_what_sees_is_neither_rotated_nor_pruned(tmp_path: Path) -> None:
    folder = folder_of("llava", tmp_path / "model")
    for words, sentence in (
        (["recipe=rotate-int4-channel"], "rotate does not apply to models of type llava"),
        (["recipe=prune-width"], "prune does not apply to models of type llava"),
        (["recipe=rtn-int4", "export=gguf"], "export=gguf holds language models alone"),
    ):
        run = run_of(folder.path, tmp_path, *words)
        with pytest.raises(UserError, match=sentence):
            pipeline.check(run)


def test_experts_are_asked_for_where_there_are_some(tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path / "model")
    words = ["recipe=awq-int4", "scheme.group_size=32", "data.all_experts=true"]
    with pytest.raises(UserError, match="all_experts=true is for models with experts"):
        pipeline.check(run_of(folder.path, tmp_path, *words))
    pipeline.check(run_of(folder_of("mixtral", tmp_path / "other").path, tmp_path, *words))


def test_an_engine_that_does_not_read_the_checkpoint_is_not_asked_to_measure_it(
    tmp_path: Path,
) -> None:
    """transformers would end in its own error, after all the work."""
    folder = folder_of("qwen3_moe", tmp_path / "model")
    words = [
        f"model.source={folder.path}", "recipe=rtn-int4", "scheme.group_size=32", "eval=none",
        "speed.patterns=[[8,8]]",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"experts without zero points.*; or choose speed=none"):
        pipeline.check(parse(compose_settings(words)))
    pipeline.check(parse(compose_settings([*words, "scheme.symmetric=true"])))


def test_another_family_file_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    folder = folder_of("olmo2", tmp_path / "model")
    config = folder.path / "config.json"
    # As an unknown type would be: transformers has it, this project has not.
    known = family_of(folder.config)
    assert digest_of(folder.config) is None

    config.write_text(config.read_text().replace('"olmo2"', '"olmo3"'))
    mine = replace(known, name="mine", model_types=("olmo3",))
    write_family(families_dir() / "mine.json", mine)
    changed = ModelFolder(folder.path).config
    before = digest_of(changed)
    write_family(families_dir() / "mine.json", replace(mine, smooth_alpha=0.3))
    assert None is not before != digest_of(changed)
