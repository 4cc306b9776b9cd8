"""Several formats of one run, and ``compress export``, which adds more to a finished one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.commands import export
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export.audit import audit, verify
from compress.export.formats import Weights
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder, read_json, write_json
from compress.run_folder import held
from tests.conftest import write_model

Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tiny: ModelFolder, tmp_path: Path) -> Start:
    """start(words) runs a recipe on the tiny model, or another, in tmp_path/run."""

    def run(*words: str, model: Path = tiny.path) -> dict[str, Any]:
        fixed = ["scheme.group_size=32", "eval=none", "speed=none", f"model.source={model}"]
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
        ([str(out), "export=gguf"], "zero points up to 5 bits, not int7-g32-asym"),
        ([str(out), "export=nope"], "export=nope is not known: known are awq"),
        ([str(out), "export=[]"], r"export=\[\] is not allowed"),
        ([str(out), "scheme.bits=4"], r"scheme.bits=4 is not export=NAME"),
    ):
        with pytest.raises(UserError, match=sentence):
            export.main(words)
    assert names(out) == before
    with held(out), pytest.raises(UserError, match="another process works in"):
        export.main([str(out), "export=gptq"])
    (out / "run.json").unlink()
    with pytest.raises(UserError, match=r"is not the folder of a run: there is no run\.json"):
        export.main([str(out), "export=dense"])


@pytest.fixture
def small(tiny: ModelFolder, tmp_path: Path) -> Path:
    """A model with a group of weights whose scale float16 does not hold."""
    path = Path(shutil.copytree(tiny.path, tmp_path / "small"))
    tensors = load_file(path / "model.safetensors")
    noise = torch.randn(32, generator=torch.Generator().manual_seed(5))
    tensors["model.layers.1.mlp.up_proj.weight"][7, :32] = 1e-7 * noise
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_format_that_fails_costs_no_second_compression(
    start: Start, small: Path, tmp_path: Path
) -> None:
    beyond = (
        r"holds those of model\.layers\.1\.mlp\.up_proj not exactly .* choose export=compressed"
    )
    with pytest.raises(UserError, match=beyond):
        start("export=gguf", model=small)
    with pytest.raises(UserError, match=beyond):
        start("export=[gptq,gguf]", model=small)
    assert (tmp_path / "run/checkpoint").exists()
    for ask in (start, lambda *words, model: check_run(words, model, tmp_path / "run")):
        with pytest.raises(
            UserError, match=r"checkpoint is there in gptq already: name that first"
        ):
            ask("export=awq", model=small)
    metrics = start("export=[gptq,awq]", model=small)
    assert metrics["compression"]["resumed"] == ["quantize", "checkpoint"]
    assert list(metrics["exports"]) == ["gptq", "awq"]
    origins = [
        read_json(tmp_path / "run" / made["folder"] / "manifest.json")["origin"]
        for made in metrics["exports"].values()
    ]
    assert origins == [metrics["compression"]["origin"]] * 2


def check_run(words: tuple[str, ...], model: Path, out: Path) -> None:
    fixed = ["scheme.group_size=32", "eval=none", "speed=none", f"model.source={model}"]
    pipeline.check(parse(compose_settings(["recipe=rtn-int4", *fixed, *words])), out)


def test_all_formats_are_checked_before_one_is_written(
    start: Start, small: Path, tmp_path: Path
) -> None:
    start(model=small)
    before = names(tmp_path / "run")
    with pytest.raises(UserError, match="in float16, which holds those of"):
        export.main([str(tmp_path / "run"), "export=[dense,gguf]"])
    assert names(tmp_path / "run") == before


def test_a_type_stated_by_the_key_of_older_configs(
    start: Start, tiny: ModelFolder, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "older"))
    config = read_json(path / "config.json")
    config["torch_dtype"] = config.pop("dtype")
    write_json(path / "config.json", config)
    formats = ["gguf", "gptq", "awq", "dense", "compressed-tensors"]
    metrics = start(f"export=[{','.join(formats)}]", model=path)
    assert {name: made["audit"]["linears"] for name, made in metrics["exports"].items()} == (
        dict.fromkeys(formats, 21)
    )


def test_one_killed_before_the_cards_is_done_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    out = tmp_path / "run"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_cards", killed)
        with pytest.raises(KeyboardInterrupt):
            export.main([str(out), "export=dense"])
    assert "dense" not in read_json(out / "metrics.json")["exports"]
    assert export.main([str(out), "export=dense"]) == 0
    assert (out / "checkpoint-dense/README.md").exists()
    assert verify(out / "checkpoint-dense") == []


def test_the_original_is_not_needed(start: Start, tiny: ModelFolder, tmp_path: Path) -> None:
    """Its licence is in the card of checkpoint/."""
    path = Path(shutil.copytree(tiny.path, tmp_path / "licensed"))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    start(model=path)
    shutil.rmtree(path)
    assert export.main([str(tmp_path / "run"), "export=dense"]) == 0
    for folder in ("checkpoint", "checkpoint-dense"):
        assert "license: apache-2.0" in (tmp_path / "run" / folder / "README.md").read_text()


def test_a_plain_model_in_32_bits(start: Start, tmp_path: Path) -> None:
    """Which a format refuses for the scales of quantized weights alone."""
    path = write_model(tmp_path / "wide", dtype="float32")
    start("stages=[kv_cache]", "kv_cache=int8", "context=none", model=path)
    assert export.main([str(tmp_path / "run"), "export=gguf"]) == 0
    assert [file.name for file in (tmp_path / "run/checkpoint-gguf").glob("*.gguf")] == [
        "model-F32.gguf"
    ]
