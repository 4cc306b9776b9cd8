"""Exports with a quantized embedding and head: the same numbers everywhere, a tie stays a tie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.export import compressed_tensors
from compress.export.audit import AuditError, audit, verify, write_manifest
from compress.export.formats import Weights
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder
from compress.quantize import record as records
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense, load_packed

CPU = torch.device("cpu")
INT8 = Scheme(8, "channel", symmetric=True)
SCHEMES = [
    Schemes(Scheme(4, 32), head=Scheme(4, 32)),
    Schemes(Scheme(4, 32, True), head=Scheme(4, 32, True)),
    Schemes(Scheme(4, 32, True), head=INT8),
    Schemes(Scheme(3, 32, True), head=Scheme(8, 32, True)),
    Schemes(INT8, head=INT8),
    Schemes(Scheme(4, 32, True), {"model.layers.0.mlp.down_proj": Scheme(3, 32, True)}, head=INT8),
]
Export = Callable[[Schemes, bool], tuple[ModelFolder, ModelFolder]]


@pytest.fixture
def export(tmp_path: Path, make_model: Callable[..., ModelFolder]) -> Export:
    """export(schemes, tied) -> (record, exported)."""

    def run(schemes: Schemes, tied: bool) -> tuple[ModelFolder, ModelFolder]:
        quantize(
            make_model(tie_word_embeddings=tied),
            tmp_path / "record",
            tokens=None,
            schemes=schemes,
            transforms=[],
            roundings=[Nearest()],
            device=CPU,
        )
        record = ModelFolder(tmp_path / "record")
        compressed_tensors.write(record, tmp_path / "out")
        return record, ModelFolder(tmp_path / "out")

    return run


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schemes", SCHEMES, ids=lambda s: s.name)
def test_everyone_reads_the_same_numbers(
    export: Export, tokens: torch.Tensor, schemes: Schemes, tied: bool
) -> None:
    record, exported = export(schemes, tied)
    assert audit(record, exported)["linears"] == 21 + (1 if tied else 2)
    ours = load_dense(exported, CPU, torch.bfloat16)
    decided = records.read_linear(record, "model.embed_tokens").dequantize(torch.bfloat16)
    assert torch.equal(ours.get_input_embeddings().weight, decided)
    name = "model.embed_tokens" if tied else "lm_head"
    decided = records.read_linear(record, name).dequantize(torch.bfloat16)
    assert torch.equal(ours.get_output_embeddings().weight, decided)
    theirs = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_codes_of_eight_bits_round_trip(export: Export, tied: bool) -> None:
    record, exported = export(SCHEMES[2], tied)
    decided = records.read_linear(record, "model.embed_tokens")
    read = Weights(exported).get("model.embed_tokens.weight")
    assert isinstance(read, QTensor)
    assert torch.equal(read.codes, decided.codes)
    assert exported.tensor("model.embed_tokens.weight").dtype == torch.int8
    assert ("lm_head.weight" in exported) is not tied
    assert measure_size(exported)["kept"] == []


@pytest.mark.parametrize("schemes", SCHEMES[:3], ids=lambda s: s.name)
def test_the_file_is_smaller_by_what_the_scheme_says(
    export: Export, make_model: Callable[..., ModelFolder], schemes: Schemes
) -> None:
    _, exported = export(schemes, True)
    stored = sum(
        exported.nbytes(n) for n in exported.names if n.startswith(("model.embed", "lm_head"))
    )
    assert schemes.head is not None
    groups = 1 if schemes.head.group_size == "channel" else 4
    expected = 320 * 128 * schemes.head.bits // 8 + 320 * groups * 2
    expected += 16 if schemes.head.bits == 4 else 320 * 2
    expected += 0 if schemes.head.symmetric else 320 * groups // 2
    assert stored == expected


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_audit_finds_a_changed_scale(export: Export, name: str) -> None:
    record, exported = export(SCHEMES[2], True)
    file = exported.path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight_scale"][7] *= 2
    save_file(tensors, file)
    with pytest.raises((AuditError, UserError), match=r"scale|different"):
        audit(record, ModelFolder(exported.path))
    write_manifest(exported.path, {})
    with pytest.raises(UserError, match="which it shares"):
        verify(exported.path)


def test_verify_finds_a_head_in_16_bits(export: Export) -> None:
    _, exported = export(SCHEMES[2], False)
    file = exported.path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith("lm_head")}
    save_file(kept | {"lm_head.weight": torch.zeros(320, 128).bfloat16()}, file)
    write_manifest(exported.path, {})
    assert verify(exported.path) == ["lm_head.weight is not quantized"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_head_runs_through_the_kernel(
    export: Export, tokens: torch.Tensor, bits: int, tied: bool
) -> None:
    _, exported = export(SCHEMES[0 if bits == 4 else 2], tied)
    packed, kernels = load_packed(exported, CPU)
    heads = 1 if tied else 2
    # Which kernel it is depends on the machine.
    assert sorted(kernels.values()) == ([21 + heads] if bits == 4 else [heads, 21])
    assert "dense" not in kernels
    dense = load_dense(exported, CPU, torch.float32)
    with torch.inference_mode():
        rows = packed.get_input_embeddings()(tokens)
        assert torch.equal(rows.float(), dense.get_input_embeddings()(tokens))
        hidden = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        ours = packed.get_output_embeddings()(hidden).float()
        exact = dense.get_output_embeddings()(hidden.float())
        packed(tokens)
    assert (ours - exact).norm() < 0.01 * exact.norm()
