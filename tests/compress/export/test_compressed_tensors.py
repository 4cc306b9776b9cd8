"""Exports of tiny models: what is in the files, and that transformers reads the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.export import compressed_tensors
from compress.export.audit import AuditError, audit, verify, write_manifest
from compress.export.shards import ShardWriter
from compress.model.folder import INDEX, ModelFolder
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense

CPU = torch.device("cpu")
Exported = tuple[ModelFolder, ModelFolder]


@pytest.fixture
def export(tmp_path: Path, make_model: Callable[..., ModelFolder]) -> Callable[..., Exported]:
    """export(scheme, model_type) -> (record, exported)."""

    def run(scheme: Scheme, model_type: str = "llama") -> Exported:
        quantize(
            make_model(model_type),
            tmp_path / "record",
            tokens=None,
            schemes=Schemes(scheme),
            transforms=[],
            roundings=[Nearest()],
            device=CPU,
        )
        record = ModelFolder(tmp_path / "record")
        compressed_tensors.write(record, tmp_path / "out")
        return record, ModelFolder(tmp_path / "out")

    return run


SCHEMES = [
    Scheme(4, 32),
    Scheme(3, 32),
    Scheme(4, 64, symmetric=True),
    Scheme(3, "channel", symmetric=True),
    Scheme(2, "channel"),
    Scheme(8, 32),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_transformers_reads_the_same_logits(
    export: Callable[..., Exported], tokens: torch.Tensor, scheme: Scheme
) -> None:
    _, exported = export(scheme)
    theirs = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.bfloat16)
    ours = load_dense(exported, CPU, torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_biases_travel(export: Callable[..., Exported], tokens: torch.Tensor) -> None:
    record, exported = export(Scheme(4, 32), "qwen2")
    audit(record, exported)
    assert "model.layers.0.self_attn.q_proj.bias" in exported
    theirs = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.bfloat16)
    with torch.inference_mode():
        ours = load_dense(exported, CPU, torch.bfloat16)(tokens).logits
        assert torch.equal(ours, theirs(tokens).logits)


def test_keys_shapes_dtypes(export: Callable[..., Exported]) -> None:
    """What is on disk for one linear of each shape, 3 bits, groups of 32, asymmetric."""
    _, exported = export(Scheme(3, 32))
    files = load_file(exported.path / "model.safetensors")
    found = {
        name.removeprefix("model.layers.1."): (str(t.dtype).removeprefix("torch."), list(t.shape))
        for name, t in files.items()
        if name.startswith(("model.layers.1.mlp.down", "model.layers.1.self_attn.k"))
    }
    assert found == {
        "mlp.down_proj.weight_packed": ("int32", [128, 24]),
        "mlp.down_proj.weight_scale": ("bfloat16", [128, 8]),
        "mlp.down_proj.weight_shape": ("int64", [2]),
        "mlp.down_proj.weight_zero_point": ("int32", [12, 8]),
        "self_attn.k_proj.weight_packed": ("int32", [64, 12]),
        "self_attn.k_proj.weight_scale": ("bfloat16", [64, 4]),
        "self_attn.k_proj.weight_shape": ("int64", [2]),
        "self_attn.k_proj.weight_zero_point": ("int32", [6, 4]),
    }
    config = json.loads((exported.path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (3, 32, False)
    assert (exported.path / "tokenizer.json").exists()


def test_many_shards_open_alike(export: Callable[..., Exported], tmp_path: Path) -> None:
    _, exported = export(Scheme(4, 32))
    target = tmp_path / "sharded"
    target.mkdir()
    writer = ShardWriter(target, shard_bytes=50_000)
    for name in exported.names:
        writer.add(name, exported.tensor(name))
    writer.close()
    (target / "config.json").write_bytes((exported.path / "config.json").read_bytes())
    sharded = ModelFolder(target)
    assert len(sharded.weight_files) > 3
    assert set(sharded.names) == set(exported.names)
    assert all(torch.equal(sharded.tensor(n), exported.tensor(n)) for n in sharded.names)


def test_audit_finds_a_flipped_bit(export: Callable[..., Exported]) -> None:
    record, exported = export(Scheme(4, 32))
    assert audit(record, exported)["linears"] == 21
    file = exported.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AuditError, match="different from what was decided"):
        audit(record, ModelFolder(exported.path))


def rewrite(folder: ModelFolder, drop: str, add: dict[str, torch.Tensor]) -> ModelFolder:
    """The folder with the tensors that start with ``drop`` replaced by others."""
    index = folder.path / INDEX
    for file in folder.weight_files:
        tensors = load_file(file)
        if not any(name.startswith(drop) for name in tensors):
            continue
        save_file({n: t for n, t in tensors.items() if not n.startswith(drop)} | add, file)
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
            kept = {n: f for n, f in files.items() if not n.startswith(drop)}
            index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(add, file.name)}))
    return ModelFolder(folder.path)


def test_audit_finds_a_linear_left_in_16_bits(export: Callable[..., Exported]) -> None:
    """Record and export agree, but the linear is not quantized in either."""
    name = "model.layers.2.mlp.up_proj"
    plain = {f"{name}.weight": torch.zeros(256, 128, dtype=torch.bfloat16)}
    record, exported = (rewrite(folder, f"{name}.", plain) for folder in export(Scheme(4, 32)))
    with pytest.raises(AuditError, match=r"layers.2.mlp.up_proj.weight should be quantized"):
        audit(record, exported)
    write_manifest(exported.path, {})
    assert verify(exported.path) == [f"{name}.weight is not quantized"]


def test_audit_finds_wasted_bytes(export: Callable[..., Exported]) -> None:
    record, exported = export(Scheme(4, 32))
    file = exported.path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.up_proj.stray": torch.zeros(1)}, file)
    with pytest.raises(AuditError, match=r"mlp.up_proj takes \d+ bytes, its scheme says \d+"):
        audit(record, ModelFolder(exported.path))


def test_verify_reads_every_linear_back(export: Callable[..., Exported]) -> None:
    """A file can match its manifest and still contradict its config."""
    _, exported = export(Scheme(4, 32))
    config = exported.path / "config.json"
    config.write_text(config.read_text().replace('"num_bits": 4', '"num_bits": 3'))
    write_manifest(exported.path, {})
    with pytest.raises(UserError, match="its config asks for"):
        verify(exported.path)


def test_verify_takes_a_plain_folder_at_its_word(tiny: ModelFolder, tmp_path: Path) -> None:
    """It passes as it is, and not if its config says that it is quantized."""
    folder = tmp_path / "plain"
    compressed_tensors.write(tiny, folder)
    write_manifest(folder, {})
    assert verify(folder) == []
    config = json.loads((folder / "config.json").read_text())
    claim = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": claim}))
    write_manifest(folder, {})
    problems = verify(folder)
    assert len(problems) == 21
    assert problems[0].endswith("is not quantized")


def test_verify_names_what_changed(export: Callable[..., Exported]) -> None:
    _, exported = export(Scheme(4, 32))
    write_manifest(exported.path, {"model": "m"})
    assert verify(exported.path) == []
    (exported.path / "extra.bin").write_text("x")
    (exported.path / "generation_config.json").unlink()
    config = exported.path / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    weights = exported.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert verify(exported.path) == [
        "generation_config.json is missing",
        "extra.bin is not in the manifest",
        "config.json has changed: its SHA-256 differs from the manifest",
        "model.safetensors has changed: its SHA-256 differs from the manifest",
    ]
