"""The dense format: a plain folder of the weights that codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.export.audit import AuditError, audit, verify, write_manifest
from compress.export.formats import FORMATS, Weights
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder
from compress.plan.checkpoint import as_planned
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense

CPU = torch.device("cpu")
DENSE = FORMATS["dense"]
FOUR = Scheme(4, 32)
SCHEMES = [
    Schemes(FOUR),
    Schemes(Scheme(3, "channel", True)),
    Schemes(Scheme(4, 16, True, "float")),
    Schemes(FOUR, {"model.layers.1.mlp.up_proj": Scheme(8, 32)}, head=Scheme(8, "channel", True)),
]


def record_of(model: ModelFolder, schemes: Schemes, path: Path) -> ModelFolder:
    quantize(
        model, path, tokens=None, schemes=schemes, transforms=[], roundings=[Nearest()], device=CPU
    )
    return ModelFolder(path)


@pytest.mark.parametrize("schemes", SCHEMES, ids=lambda s: s.name)
def test_transformers_and_the_record_compute_the_same(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, schemes: Schemes
) -> None:
    record = record_of(tiny, schemes, tmp_path / "record")
    DENSE.write(record, tmp_path / "out")
    written = ModelFolder(tmp_path / "out")
    count = 22 if schemes.head else 21
    assert audit(record, written, quantized=False)["linears"] == count
    theirs = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.bfloat16)
    with torch.inference_mode():
        ours = load_dense(record, CPU, torch.bfloat16)(tokens).logits
        assert torch.equal(theirs(tokens).logits, ours)
    write_manifest(written.path, {})
    assert verify(written.path) == []


def test_keys_shapes_dtypes_and_config_are_those_of_the_original(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    record = record_of(tiny, Schemes(FOUR), tmp_path / "record")
    DENSE.write(record, tmp_path / "out")
    written = ModelFolder(tmp_path / "out")

    def described(folder: ModelFolder) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {n: (folder.tensor(n).dtype, folder.tensor(n).shape) for n in folder.names}

    assert described(written) == described(tiny)
    assert written.config == tiny.config
    assert Weights(written).format == "plain"
    assert not torch.equal(
        *(f.tensor("model.layers.0.mlp.up_proj.weight") for f in (written, tiny))
    )
    planned = as_planned(tiny, Schemes(FOUR), export="dense")
    assert planned.bits_linears == measure_size(written)["bits_linears"] == 16
    # Nothing of it says so, so who compares must say which it is.
    with pytest.raises(AuditError, match="should be quantized and is not"):
        audit(record, written)


def test_another_weight_fails_the_audit(tiny: ModelFolder, tmp_path: Path) -> None:
    record = record_of(tiny, Schemes(FOUR), tmp_path / "record")
    DENSE.write(record, tmp_path / "out")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors[name][3, 40] *= 1.01
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AuditError, match=f"{name} reads back different"):
        audit(record, ModelFolder(tmp_path / "out"), quantized=False)


def test_plain_folders_and_caches(
    tiny: ModelFolder, tokens: torch.Tensor, make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    DENSE.write(tiny, tmp_path / "plain")
    plain = ModelFolder(tmp_path / "plain")
    assert audit(tiny, plain, quantized=False) == {"linears": 0, "other_tensors": len(tiny.names)}
    whole = StateScheme(bits=8, symmetric=True)
    for name, scheme in (
        ("int8", CacheScheme(whole, whole)),
        ("fp8", CacheScheme(StateScheme("float", 8, "tensor"), StateScheme("float", 8, "tensor"))),
    ):
        quantize_cache(tiny, tmp_path / name, scheme, tokens=tokens, device=CPU)
        source = ModelFolder(tmp_path / name)
        if scheme.static:
            with pytest.raises(UserError, match="no place for the scales of the cache"):
                DENSE.write(source, tmp_path / f"{name}-out")
            assert not (tmp_path / f"{name}-out").exists()
        else:
            DENSE.write(source, tmp_path / f"{name}-out")
            audit(source, ModelFolder(tmp_path / f"{name}-out"), quantized=False)
            assert (tmp_path / f"{name}-out" / "kv_cache.json").exists()


def test_rounded_inputs_are_refused() -> None:
    with pytest.raises(UserError, match=r"int8-channel-sym\+int8-token rounds inputs too"):
        DENSE.check(Schemes(Scheme(8, "channel", True, inputs=InputScheme())))
