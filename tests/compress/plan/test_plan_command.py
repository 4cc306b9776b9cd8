"""``compress plan`` as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compress.commands.plan import main
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.model.shapes import shape_config
from compress.plan import hardware
from compress.quantize.scheme import Scheme, Schemes
from tests.exported import exported


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_original_and_candidate_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=awq-int4", "model=shape:llama-2-13b", "hardware=h100"]
    found = told(capsys, *words, "plan.batches=[1,256]")
    base, candidate = found["rows"]["base"], found["rows"]["candidate"]
    assert [p["fits"] for p in base["points"]] == [True, False]
    assert base["points"][0]["all_weights"]["tokens_per_s"] == pytest.approx(124.67, abs=0.01)
    # Four bits, and in a group of 128 a scale of 16 and a zero of 4.
    assert candidate["bits_linears"] == pytest.approx(4 + 20 / 128, rel=1e-3)
    assert candidate["points"][0]["limit"] == "weights"
    assert {e["name"]: e["count"] for e in found["linears"]}["mlp.down_proj"] == 40
    assert [s["name"] for s in found["calibration"]] == ["quantize", "export"]
    assert found["engines"]["sglang"]["loads"]
    assert main([*words]) == 0
    printed = capsys.readouterr().out
    assert "8.02 ms and 124.7 tokens/s at batch 1" in printed
    assert "int4-g128-asym" in printed


def test_pruned_heads_of_the_cache_on_shapes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=prune-kv-heads", "prune=sizes", "prune.kv_heads=8", "prune.kv=principal"]
    found = told(capsys, *words, "model=shape:llama-2-13b", "hardware=h100", "plan.batches=[256]")
    assert not found["rows"]["base"]["points"][0]["fits"]
    assert found["rows"]["candidate"]["points"][0]["fits"]
    cache = [found["rows"][row]["cache_bytes_per_token"] for row in ("base", "candidate")]
    assert cache[0] == 5 * cache[1]


def test_without_a_recipe_it_is_the_model(
    tiny: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tiny, Scheme(4, 32), tmp_path)
    found = told(capsys, f"model={folder.path}", "hardware=l4")
    assert list(found["rows"]) == ["base"]
    assert found["rows"]["base"]["bits_linears"] < 5.5
    assert not found["engines"]["tensorrt-llm"]["loads"]


def test_engines_are_asked_about_every_linear_of_a_folder(
    tiny: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four, last = Scheme(4, 32, True), "model.layers.1.mlp.down_proj"
    mixed = exported(tiny, Schemes(four, {last: replace(four, bits=3)}), tmp_path / "mixed")
    engines = told(capsys, f"model={mixed.path}", "hardware=l4")["engines"]
    assert any("this has 3" in reason["text"] for reason in engines["sglang"]["reasons"])
    assert engines["vllm"]["loads"]
    head = exported(tiny, Schemes(four, head=Scheme(8, "channel", True)), tmp_path / "head")
    engines = told(capsys, f"model={head.path}", "hardware=l4")["engines"]
    assert "quantized embedding" in engines["vllm"]["reasons"][0]["text"]


def test_a_group_that_does_not_divide_is_told_linear_by_linear(
    make_model: Callable[..., ModelFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(intermediate_size=288)
    words = [f"model={model.path}", "recipe=rtn-int4", "scheme.group_size=64", "hardware=l4"]
    found = told(capsys, *words, code=2)
    reasons = {entry["name"]: entry["reason"] for entry in found["linears"]}
    assert "does not divide the 288 inputs" in reasons["mlp.down_proj"]
    assert reasons["mlp.up_proj"] is None
    assert "mlp.down_proj" in found["refused"]
    # The embedding too, by its own inputs.
    found = told(capsys, *words, "scheme.symmetric=true", "head.group_size=48", "head=int8", code=2)
    assert (
        "does not divide"
        in {e["name"]: e["reason"] for e in found["linears"]}["model.embed_tokens"]
    )
    assert main(words) == 2
    assert "the recipe does not fit" in capsys.readouterr().out


def test_every_stage_can_be_planned(tiny: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in (
        "rotate-int4-channel",
        "mixed-3.5",
        "best-int4",
        "awq-int4-kv-fp8",
        "prune-depth",
    ):
        words = [f"recipe={recipe}", f"model={tiny.path}", "hardware=a100"]
        found = told(capsys, *words, "prune.layers=2" if "prune" in recipe else "serve.tp=1", *(
            ["prune=sizes"] if "prune" in recipe else []
        ))  # fmt: skip
        base, candidate = found["rows"]["base"], found["rows"]["candidate"]
        if recipe != "rotate-int4-channel":
            assert candidate["bytes"] < base["bytes"]
    assert candidate["parameters"] < base["parameters"]
    assert found["uncounted"] == ["prune"]
    main(
        [f"recipe={recipe}", f"model={tiny.path}", "hardware=a100", "prune=sizes", "prune.layers=2"]
    )
    printed = capsys.readouterr().out
    assert "Pruned to (where several shapes are tried, the first): num_hidden_layers 2" in printed
    assert "Not counted in the run's own needs: prune." in printed


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"hardware=nothing is not known: known are a100, b200, cpu"
    ):
        main(["hardware=nothing", "model=shape:llama-2-7b"])
    with pytest.raises(UserError, match="hardware= is missing: choose one of a100"):
        main(["model=shape:llama-2-7b"])
    with pytest.raises(UserError, match="shape:nothing is not known"):
        main(["model=shape:nothing", "hardware=h100"])
    with pytest.raises(UserError, match=r"plan.batches=\[0\] is not allowed"):
        main(["plan.batches=[0]", "hardware=h100"])
    with pytest.raises(UserError, match=r"plan.context=0 is not allowed"):
        main(["plan.context=0", "hardware=h100"])
    with pytest.raises(UserError, match=r"hardware.gigabytes=-1 is not allowed"):
        main(["hardware=h100", "hardware.gigabytes=-1", "model=shape:llama-2-7b"])
    with pytest.raises(UserError, match=r"hardware.teraflops=989 is not allowed: give a rate"):
        main(["hardware=h100", "hardware.teraflops=989", "model=shape:llama-2-7b"])
    with pytest.raises(UserError, match=r"hardware.teraflops.fp16 is not known: known are bf16"):
        main(["hardware=h100", "+hardware.teraflops.fp16=989", "model=shape:llama-2-7b"])
    with pytest.raises(UserError, match=r"hardware.gigabytes is missing: only hardware=cpu"):
        main(["hardware=h100", "hardware.gigabytes=null", "model=shape:llama-2-7b"])
    quantized = shape_config("llama-2-7b") | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(UserError, match=r"is quantized: .* give the folder of its files"):
        main([f"model=shape:{tmp_path}/config.json", "hardware=h100"])
    with pytest.raises(UserError, match="FOLDER is not KEY=VALUE"):
        main(["FOLDER", "hardware=h100"])
    config = shape_config("llama-2-7b") | {"model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mamba"):
        main([f"model=shape:{tmp_path}/config.json", "hardware=h100"])


def test_the_cpu_is_measured_once_and_its_best_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = iter([2e9, 5e9, 3e9])
    monkeypatch.setattr(hardware, "read_bandwidth", lambda device: next(seen))
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: 1e11)
    assert hardware.hardware_named("cpu").bandwidth == 2e9
    # Kept: nothing is measured again, until somebody asks for it.
    assert hardware.hardware_named("cpu").bandwidth == 2e9
    for _ in range(2):
        assert hardware.measured_cpu(again=True)["gigabytes_per_second"] == 5
    found = hardware.hardware_named("cpu")
    assert found.flops("bf16") == found.flops("fp8") == 1e11
    assert found.gigabytes > 0


def test_a_rate_is_measured() -> None:
    import torch

    assert 1e8 < hardware.matmul_rate(torch.float32) < 1e15
