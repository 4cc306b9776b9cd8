"""The kv_cache stage and what an export says of the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from compress.errors import UserError
from compress.export.audit import AuditError, audit, verify, write_manifest
from compress.export.formats import FORMATS, Weights
from compress.kv_cache.folder import scales_of, scheme_of
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder, write_json
from compress.quantize.rounding.nearest import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense

CPU = torch.device("cpu")
TENSOR, HEAD = StateScheme("float", 8, "tensor"), StateScheme("float", 8, "head")
FP8, FP8_HEAD = CacheScheme(TENSOR, TENSOR), CacheScheme(HEAD, HEAD)
INT4 = CacheScheme(StateScheme(per="channel", group_size=8), StateScheme(rotate=True), 4, 16)


def staged(
    source: ModelFolder, target: Path, scheme: CacheScheme, tokens: torch.Tensor
) -> ModelFolder:
    quantize_cache(source, target, scheme, tokens=tokens if scheme.static else None, device=CPU)
    return ModelFolder(target)


def record_of(source: ModelFolder, target: Path) -> ModelFolder:
    quantize(
        source,
        target,
        tokens=None,
        schemes=Schemes(Scheme(bits=4, group_size=32)),
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    return ModelFolder(target)


@pytest.mark.parametrize("scheme", [FP8, FP8_HEAD], ids=["tensor", "head"])
@pytest.mark.parametrize("quantized", [False, True])
def test_scales_are_the_largest_seen(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, scheme: CacheScheme, quantized: bool
) -> None:
    """Against keys and values of the whole model, run with a plain cache."""
    source = record_of(tiny, tmp_path / "record") if quantized else tiny
    folder = staged(source, tmp_path / "staged", scheme, tokens)
    assert scheme_of(folder) == scheme
    scales = scales_of(folder, scheme, CPU)
    assert scales is not None
    cache = DynamicCache()
    with torch.no_grad():
        load_dense(source, CPU, source.dtype)(tokens, past_key_values=cache)
    assert len(scales) == len(cache.layers) == 3
    for found, layer in zip(scales, cache.layers, strict=True):
        for scale, states in ((found.keys, layer.keys), (found.values, layer.values)):
            axes = (0, 2, 3) if scheme is FP8_HEAD else (0, 1, 2, 3)
            largest = states.abs().amax(axes, keepdim=True)[0].float()
            assert torch.allclose(448 * scale, largest.view(scale.shape), rtol=1e-2)


def test_weights_stay_as_they_are(tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = staged(tiny, tmp_path / "staged", INT4, tokens)
    assert folder.names == tiny.names
    assert all(torch.equal(folder.tensor(name), tiny.tensor(name)) for name in tiny.names)
    assert folder.config == tiny.config
    with pytest.raises(UserError, match="has a quantized cache already"):
        staged(folder, tmp_path / "twice", INT4, tokens)


def exported(source: ModelFolder, target: Path) -> ModelFolder:
    FORMATS["compressed-tensors"].write(source, target)
    return ModelFolder(target)


def test_a_checkpoint_with_scales(tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Names, shapes and config as vLLM's loader and compressed-tensors want them."""
    for name, scheme, strategy, shape in (
        ("tensor", FP8, "tensor", (1,)),
        ("head", FP8_HEAD, "attn_head", (2, 1, 1)),
    ):
        folder = staged(tiny, tmp_path / name, scheme, tokens)
        checkpoint = exported(folder, tmp_path / f"{name}-out")
        assert audit(folder, checkpoint) == {"linears": 0, "other_tensors": len(tiny.names)}
        config = checkpoint.config["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
        assert config["config_groups"] == {}
        assert config["kv_cache_scheme"] == {
            "num_bits": 8,
            "type": "float",
            "strategy": strategy,
            "dynamic": False,
            "symmetric": True,
        }
        found = load_file(checkpoint.path / "model.safetensors")
        for index in range(3):
            for key in ("k_scale", "v_scale"):
                scale = found[f"model.layers.{index}.self_attn.{key}"]
                assert scale.dtype == torch.float32
                assert scale.shape == shape
                assert (scale > 0).all()
        # Without our own file the checkpoint still says what its cache is.
        (checkpoint.path / "kv_cache.json").unlink()
        assert scheme_of(checkpoint) == scheme


def test_transformers_loads_it(tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    """compressed-tensors finds a parameter for every scale, with our numbers in it."""
    checkpoint = exported(staged(tiny, tmp_path / "staged", FP8, tokens), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    scales = scales_of(checkpoint, FP8, CPU)
    assert scales is not None
    for layer, found in zip(model.model.layers, scales, strict=True):
        assert torch.equal(
            layer.self_attn.k_scale.float().view(1), found.keys.to(torch.bfloat16).float()
        )
        assert torch.equal(
            layer.self_attn.v_scale.float().view(1), found.values.to(torch.bfloat16).float()
        )


def test_quantized_weights_and_cache(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    record = record_of(tiny, tmp_path / "record")
    folder = staged(record, tmp_path / "staged", FP8, tokens)
    checkpoint = exported(folder, tmp_path / "out")
    assert audit(folder, checkpoint)["linears"] == 21
    config = checkpoint.config["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "tensor"
    assert config["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert scheme_of(checkpoint) == FP8
    assert len(Weights(checkpoint).linears) == 21


def test_integers_leave_weights_plain(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """No engine reads scales of integers: the folder stays what every engine loads, with a note beside it."""
    folder = staged(tiny, tmp_path / "staged", INT4, tokens)
    checkpoint = exported(folder, tmp_path / "out")
    audit(folder, checkpoint)
    assert "quantization_config" not in checkpoint.config
    assert scheme_of(checkpoint) == INT4
    note = json.loads((checkpoint.path / "kv_cache.json").read_text())
    assert note["engines"]["vllm"]["arguments"] == ["--kv-cache-dtype", "int4_per_token_head"]


def test_the_audit_sees_other_scales(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = staged(tiny, tmp_path / "staged", FP8, tokens)
    checkpoint = exported(folder, tmp_path / "out")
    file = checkpoint.path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.self_attn.v_scale"
    save_file({**tensors, key: 1.01 * tensors[key]}, file, metadata={"format": "pt"})
    with pytest.raises(AuditError, match="v_scale reads back different"):
        audit(folder, ModelFolder(checkpoint.path))
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AuditError, match="scales of the cache differ"):
        audit(folder, ModelFolder(checkpoint.path))
    stated = exported(folder, tmp_path / "stated")
    config = stated.config
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    write_json(stated.path / "config.json", config)
    with pytest.raises(AuditError, match="kv_cache_scheme is not that of the record"):
        audit(folder, ModelFolder(stated.path))
    other = exported(staged(tiny, tmp_path / "other", INT4, tokens), tmp_path / "other-out")
    with pytest.raises(AuditError, match="scheme of the cache differs"):
        audit(folder, other)


@pytest.mark.parametrize("scheme", [FP8, INT4], ids=["fp8", "int4"])
def test_a_checkpoint_of_the_cache_alone_is_verified(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, scheme: CacheScheme
) -> None:
    checkpoint = exported(staged(tiny, tmp_path / "staged", scheme, tokens), tmp_path / "out")
    write_manifest(checkpoint.path, {})
    assert verify(checkpoint.path) == []
    (checkpoint.path / "kv_cache.json").write_text("{}")
    assert "kv_cache.json" in verify(checkpoint.path)[0]


def test_an_exported_folder_is_refused(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = exported(record_of(tiny, tmp_path / "record"), tmp_path / "out")
    with pytest.raises(UserError, match="is quantized already: choose its original"):
        staged(checkpoint, tmp_path / "staged", INT4, tokens)


def test_what_does_not_fit_the_model(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, make_model: Callable[..., ModelFolder]
) -> None:
    values = StateScheme(group_size=24)
    with pytest.raises(UserError, match="group_size=24 does not divide the head size 32"):
        staged(tiny, tmp_path / "a", CacheScheme(INT4.keys, values), tokens)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    scaled = make_model(rope_parameters=rope)
    with pytest.raises(UserError, match="not allowed with the rotary embedding dynamic"):
        staged(scaled, tmp_path / "b", replace(INT4, pre_rope=True), tokens)
    assert not any((tmp_path / name).exists() for name in ("a", "b"))


def test_caches_of_others_that_are_not_read(tiny: ModelFolder, tmp_path: Path) -> None:
    for scheme in (
        {"type": "int", "num_bits": 8},
        {"type": "float", "num_bits": 8, "strategy": "token"},
    ):
        config = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
        write_json(tmp_path / "config.json", {**tiny.config, "quantization_config": config})
        with pytest.raises(UserError, match="only float, 8 bits, per tensor or attn_head"):
            scheme_of(ModelFolder(tmp_path))
