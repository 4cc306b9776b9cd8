"""Several formats of one run, and ``compress export``, which adds more to a finished one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.commands import export
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export.audit import audit, verify
from compress.export.formats import Weights
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder, read_json, write_json

Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tiny: ModelFolder, tmp_path: Path) -> Start:
    """start(words) runs a recipe on the tiny model in tmp_path/run."""

    def run(*words: str) -> dict[str, Any]:
        fixed = ["scheme.group_size=32", "eval=none", "speed=none", f"model.source={tiny.path}"]
        settings = compose_settings(["recipe=rtn-int4", *fixed, *words])
        return pipeline.run_recipe(parse(settings), "run", tmp_path / "run")

    return run


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_run_writes_every_format_and_says_how_large_it_is(start: Start, tmp_path: Path) -> None:
    metrics = start("export=[awq,compressed-tensors,dense]")
    out = tmp_path / "run"
    folders = {name: made["folder"] for name, made in metrics["exports"].items()}
    assert folders == {
        "awq": "checkpoint",
        "compressed-tensors": "checkpoint-compressed-tensors",
        "dense": "checkpoint-dense",
    }
    assert read_json(out / "metrics.json")["exports"] == metrics["exports"]
    assert metrics["candidate"]["size"] == metrics["exports"]["awq"]["size"]
    for name, made in metrics["exports"].items():
        folder = ModelFolder(out / made["folder"])
        assert made["size"] == measure_size(folder)
        assert made["audit"]["linears"] == 21
        assert verify(folder.path) == []
        assert Weights(folder).format == (name if name != "dense" else "plain")
        origin = read_json(folder.path / "manifest.json")["origin"]
        assert origin == metrics["compression"]["origin"]


def test_a_run_killed_between_formats_goes_on_after_the_first(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def second(*words: Any) -> Any:
        asked.append(words)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return audit(*words)

    monkeypatch.setattr(pipeline, "audit", second)
    with pytest.raises(KeyboardInterrupt):
        start("export=[gptq,awq]")
    assert {"checkpoint", "checkpoint.json"} <= names(tmp_path / "run")
    assert not any("awq" in name or "partial" in name for name in names(tmp_path / "run"))
    metrics = start("export=[gptq,awq]")
    assert metrics["compression"]["resumed"] == ["quantize", "checkpoint"]
    assert list(metrics["exports"]) == ["gptq", "awq"]


def test_formats_are_added_to_a_finished_run(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = start()
    out = tmp_path / "run"
    assert export.main([str(out), "export=[gptq,dense]"]) == 0
    assert f"{out / 'checkpoint-gptq'}: " in capsys.readouterr().out
    after = read_json(out / "metrics.json")
    assert list(after.pop("exports")) == ["compressed-tensors", "gptq", "dense"]
    before.pop("exports")
    assert after == json.loads(json.dumps(before))
    for name in ("gptq", "dense"):
        assert verify(out / f"checkpoint-{name}") == []
        assert (out / f"checkpoint-{name}" / "README.md").exists()
    record = ModelFolder(out / "quantize")
    assert audit(record, ModelFolder(out / "checkpoint-gptq"))["linears"] == 21
    # One that was killed before it wrote metrics.json is taken over.
    metrics = read_json(out / "metrics.json")
    kept = metrics["exports"].pop("gptq")
    write_json(out / "metrics.json", metrics)
    assert export.main([str(out), "export=gptq"]) == 0
    assert read_json(out / "metrics.json")["exports"]["gptq"] == kept


def test_a_plain_run_takes_a_plain_format_alone(start: Start, tmp_path: Path) -> None:
    start("stages=[kv_cache]", "kv_cache=int8", "context=none")
    assert export.main([str(tmp_path / "run"), "export=dense"]) == 0
    assert (tmp_path / "run/checkpoint-dense/kv_cache.json").exists()
    with pytest.raises(UserError, match="export=awq holds quantized weights, and these stay in 16"):
        export.main([str(tmp_path / "run"), "export=awq"])


def test_what_is_refused_writes_nothing(start: Start, tiny: ModelFolder, tmp_path: Path) -> None:
    start("scheme.bits=7")
    out = tmp_path / "run"
    (out / "checkpoint-dense").mkdir()
    before = names(out)
    for words, sentence in (
        ([str(tiny.path), "export=gptq"], "holds no finished run: there is no metrics.json"),
        ([str(out), "export=compressed-tensors"], "checkpoint has this run as compressed-tensors"),
        ([str(out), "export=awq"], "export=awq holds integers of 4 bits"),
        ([str(out), "export=dense"], "checkpoint-dense is there already: move it"),
        ([str(out), "export=[dense,awq]"], "export=awq holds integers of 4 bits"),
        ([str(out), "export=gguf"], "export=gguf "),
        ([str(out), "export=nope"], "export=nope is not known: known are awq"),
        ([str(out), "export=[]"], r"export=\[\] is not allowed"),
        ([str(out), "scheme.bits=4"], r"scheme.bits=4 is not export=NAME"),
    ):
        with pytest.raises(UserError, match=sentence):
            export.main(words)
    assert names(out) == before
