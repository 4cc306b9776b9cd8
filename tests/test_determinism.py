"""The same recipe twice ends in the same bytes, whatever method it uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import pipeline
from compress.compose import compose_settings
from compress.config import parse
from compress.model.folder import ModelFolder
from eval.faults.kills import DISTILL, differences, files_of, forget_figures

GROUPS = "scheme.group_size=32"
METHODS = {
    "awq": ["recipe=awq-int4-kv-fp8", GROUPS, "context=none"],
    "gptq and learned": [
        "recipe=gptq-int4",
        GROUPS,
        "rounding=[gptq,learned]",
        "rounding.learned.iters=4",
        "search=average",
    ],
    "prune and distill": ["recipe=prune-width-distill", *DISTILL],
    "rotate and repair": [
        "recipe=rtn-int4",
        GROUPS,
        "stages=[rotate,quantize,repair]",
        "repair=kl",
        "repair.kl.epochs=1",
        "data.generated=2",
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_recipe_twice(
    method: str,
    tiny: ModelFolder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [*METHODS[method], f"model.source={tiny.path}", "data=text", "speed=none"]
    words += [f"data.source={text_file}", "data.sequences=4", "data.length=64"]
    words += [f"eval.texts=[{text_file}]", "eval.tasks=[]", "eval.tokens=512", "eval.window=128"]
    words += ["eval.block_tokens=128", "eval.generated=8", "eval.prompt_tokens=32"]
    for name in ("one", "two"):
        # Noise of the original is measured twice too.
        forget_figures(tmp_path / "cache")
        pipeline.run_recipe(parse(compose_settings(words)), method, tmp_path / name)
    files = files_of(tmp_path / "one")
    assert {"metrics.json", "accuracy.safetensors", "checkpoint/manifest.json"} <= files
    assert differences(tmp_path / "one", tmp_path / "two") == []
