"""GGUF files of every family that llama.cpp runs: names, numbers, and what the file says of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export import gguf as format_gguf
from compress.export.audit import AuditError, audit
from compress.export.formats import Weights
from compress.export.gguf_metadata import GRAPHS, check_model, stored_heads
from compress.model.families import FAMILIES, family_of, turned_over
from compress.model.folder import ModelFolder, save_tensors, write_json
from compress.model.gguf_file import (
    ARCHITECTURES,
    OF_BLOCK,
    Heads,
    gathered_order,
    gguf_name,
    our_name,
    place_of,
    shift_of,
)
from compress.pipeline import check as check_run
from compress.plan.rows import loadable_folder
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense
from eval.engines import family_models
from eval.engines.family_models import KINDS, written_model

CPU = torch.device("cpu")
# What llama.cpp's graph asks for beside the sizes of the kinds.
CHANGES: dict[str, dict[str, Any]] = {
    # transformers takes the default for what it reads of a file.
    "qwen3": {"head_dim": 128},
    "gpt2": {"n_positions": 1024},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "gemma3": {
        "query_pre_attn_scalar": 64,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
}
HERE = (
    "qwen3", "smollm3", "gemma2", "gemma3", "olmo2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
    "gpt_neox", "gpt2", "falcon-7b", "falcon-40b",
)  # fmt: skip
# transformers reads these files too.
READ_BY_TRANSFORMERS = ("qwen3", "gemma2", "gemma3", "phi3", "gpt2")


def changed(monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> str:
    """The name of a kind with other settings."""
    model_type, settings = KINDS[kind]
    settings = {**settings, **CHANGES.get(kind, {}), **changes}
    monkeypatch.setitem(family_models.KINDS, "changed", (model_type, settings))
    return "changed"


@pytest.fixture(scope="module", params=HERE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        kind = changed(monkeypatch, request.param)
        path = tmp_path_factory.mktemp(request.param) / "model"
        written_model(kind, path, torch.bfloat16)
    return request.param, ModelFolder(path)


def said(folder: ModelFolder) -> dict[str, Any]:
    (file,) = folder.weight_files
    fields = gguf.GGUFReader(file).fields
    name = fields["general.architecture"].contents()
    return {key.removeprefix(f"{name}."): field.contents() for key, field in fields.items()}


def test_every_architecture_has_its_names() -> None:
    known = {family.name: family.model_types for family in FAMILIES}
    assert {t for name in OF_BLOCK for t in known[name]} == set(ARCHITECTURES)
    assert set(ARCHITECTURES.values()) == set(GRAPHS)
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_names_are_those_of_the_gguf_package(made: Any) -> None:
    _, folder = made
    (architecture,) = (
        number
        for number, name in gguf.MODEL_ARCH_NAMES.items()
        if name == ARCHITECTURES[folder.config["model_type"]]
    )
    theirs = gguf.get_tensor_name_map(architecture, len(KINDS))
    family = family_of(folder.config)
    for name in folder.names:
        # Names of all experts together are what it knows, and Mixtral's by its first release.
        merged = re.sub(r"(?<=experts\.)\d+\.", "", name)
        merged = re.sub(
            r"model\.(layers\.\d+)\.block_sparse_moe\.experts", r"\1.feed_forward.experts", merged
        )
        assert gguf_name(name, family) == theirs.get_name(merged, (".weight", ".bias")), name
        expert = place_of(name, family)[1]
        ours = our_name(gguf_name(name, family), family)
        assert ours is not None
        assert ours.format(expert) == name


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, symmetric=True), Scheme(4, 32), Scheme(8, 32, True)]
)
def test_numbers_read_back_and_run(
    made: Any, scheme: Scheme, tokens: Tensor, tmp_path: Path
) -> None:
    kind, folder = made
    quantize(
        folder, tmp_path / "record", tokens=None, schemes=Schemes(scheme), transforms=[],
        roundings=[Nearest()], device=CPU,
    )  # fmt: skip
    record = ModelFolder(tmp_path / "record")
    format_gguf.fits(folder, Schemes(scheme))
    format_gguf.write(record, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    assert audit(record, exported)["linears"] > 0
    with torch.inference_mode():
        ours, theirs = (load_dense(f, CPU, torch.bfloat16)(tokens) for f in (exported, record))
    assert torch.equal(ours.logits, theirs.logits)
    (file,) = exported.weight_files
    weights, family = Weights(exported), family_of(folder.config)
    heads = stored_heads(check_model(folder.config, folder.path))
    stored = {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        )
        for tensor in gguf.GGUFReader(file).tensors
    }
    assert {gguf_name(name, family) for name in weights.names} == set(stored)
    for name in weights.names:
        inner, expert = place_of(name, family)
        found = stored[inner] if expert is None else stored[inner][expert]
        wanted = _values(weights.get(name)) + shift_of(inner, family)
        order = heads.order(inner, len(wanted))
        wanted = wanted if order is None else wanted[order]
        torch.testing.assert_close(
            found.view(wanted.shape), wanted, rtol=0.0, atol=_off(scheme, wanted)
        )
    if kind not in READ_BY_TRANSFORMERS:
        return
    state = AutoModelForCausalLM.from_pretrained(
        exported.path, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    for name in weights.names:
        wanted = _values(weights.get(name))
        found = state[name].T if name.endswith(turned_over(folder.config)) else state[name]
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=_off(scheme, wanted))


def _values(value: Tensor | QTensor) -> Tensor:
    return value.dequantize(torch.float32) if isinstance(value, QTensor) else value.float()


def _off(scheme: Scheme, wanted: Tensor) -> float:
    """The minima of Q4_1 are in float16."""
    return 0.0 if scheme.symmetric else 2e-3 * float(wanted.abs().max())


# What a file says beside sizes, of the kinds that differ there.
SAID: dict[str, dict[str, Any]] = {
    "gemma2": {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.key_length": 64,
    },
    "gemma3": {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base": 5e4,
        "rope.freq_base_swa": 1e3,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    },
    "phi3": {"rope.dimension_count": 16, "attention.key_length": 32, "feed_forward_length": 96},
    "olmo2": {
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    },
}


def test_what_a_file_says(made: Any, tmp_path: Path) -> None:
    kind, folder = made
    format_gguf.write(folder, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    found = said(exported)
    assert found["general.architecture"] == ARCHITECTURES[folder.config["model_type"]]
    expected = SAID.get(kind, {})
    assert {key: found[key] for key in expected} == expected
    engines = loadable_folder(exported)
    assert engines["llama.cpp"]["loads"]
    (reason,) = engines["transformers"]["reasons"]
    assert f"not of {folder.config['model_type']}: " in reason["text"]
    assert f"not looked at for models of type {folder.config['model_type']}" in str(
        engines["sglang"]
    )
    # Of a name with Phi-3 in it, llama.cpp asks for tokens that this vocabulary has not.
    assert (found["general.name"] == found["general.size_label"]) == (kind == "phi3")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "model.gguf").symlink_to(exported.weight_files[0])
    write_json(mixed / "config.json", {**folder.config, "model_type": "qwen2"})
    with pytest.raises(UserError, match=r"architecture \w+, its config.json asks for qwen2"):
        _ = ModelFolder(mixed).names


def test_norms_that_add_to_their_weights_are_stored_with_the_sum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 2^-20 + 2^-25 the sum in 32 bits keeps 2^-20; what is next to one keeps all."""
    kind = changed(monkeypatch, "gemma3")
    _, source = written_model(kind, tmp_path / "source", torch.bfloat16)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)]
    tensors = {name: source.tensor(name) for name in source.names}
    tensors[names[0]][:3] = torch.tensor([2.0**-20 + 2.0**-25, -(2.0**-23), 0.40625])
    save_tensors(source.path / "model.safetensors", tensors)
    folder = ModelFolder(source.path)
    format_gguf.write(folder, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    audit(folder, exported)
    (file,) = exported.weight_files
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    for layer, name in enumerate(names):
        sums = 1.0 + folder.tensor(name).float()
        assert np.array_equal(stored[f"blk.{layer}.attn_norm.weight"], sums.numpy())
    found = exported.tensor(names[0])
    assert found.dtype == torch.bfloat16
    assert found[:3].tolist() == [2.0**-20, -(2.0**-23), 0.40625]
    assert torch.equal(found[3:], folder.tensor(names[0])[3:])
    # A sum that is another one is told.
    tensors[names[1]][0] += 0.5
    save_tensors(source.path / "model.safetensors", tensors)
    with pytest.raises(AuditError, match=f"{names[1]} reads back different"):
        audit(ModelFolder(source.path), exported)


FACTORS = {
    "long_factor": [1 + index / 4 for index in range(8)],
    "short_factor": [1.0] * 6 + [1.125] * 2,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **FACTORS}


def test_the_two_factors_of_longrope(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {**LONG, "original_max_position_embeddings": 32}
    kind = changed(monkeypatch, "phi3", original_max_position_embeddings=32, rope_parameters=rope)
    _, folder = written_model(kind, tmp_path / "model")
    format_gguf.write(folder, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    audit(folder, exported)
    assert "room for more than 32 tokens" in caplog.text
    found = said(exported)
    assert found["rope.scaling.original_context_length"] == 32
    # By hand: 128 positions are four times those of before, and 32 = 2^5.
    assert found["rope.scaling.attn_factor"] == pytest.approx((1 + 2 / 5) ** 0.5)
    (file,) = exported.weight_files
    stored = {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(file).tensors}
    assert stored["rope_factors_long.weight"] == FACTORS["long_factor"]
    assert stored["rope_factors_short.weight"] == FACTORS["short_factor"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
     "a sliding window of 8 tokens"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}},
     "yarn with truncate=false"),
    ("smollm3", {"no_rope_layer_interval": 2}, "no_rope_layers other than every fourth"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
    ("gemma2", {"final_logit_softcapping": None}, "models without final_logit_softcapping"),
    ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24 where it takes 64"),
    ("gemma2", {"num_hidden_layers": 46, "layer_types": None}, "query_pre_attn_scalar=64 where it takes 32"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layers that see all tokens"),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers that see all tokens"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3", {"hidden_activation": "silu"}, "the activation silu"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "the kind dynamic"),
    ("phi3", {"sliding_window": 64}, "a sliding window of 64 tokens"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("falcon-7b", {"alibi": True}, "alibi=True"),
    ("falcon-7b", {"bias": True}, "bias=True"),
    ("falcon-rw", {}, "models of the kind falcon in series"),
    ("phi3", {"head_dim": 64}, "heads that are not as wide together"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**settings, **CHANGES.get(kind, {}), **changes})
    with pytest.raises(UserError, match=f"llama.cpp does not run .*{reason}"):
        check_model(config.to_dict(), Path("model"))


def test_experts_are_one_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the order of their numbers, which that of their names is not from ten on; in one type; the routers
    in 32 bits, and the gate of the shared expert without its one row."""
    kind = changed(monkeypatch, "qwen2_moe", num_experts=12, num_hidden_layers=1)
    _, folder = written_model(kind, tmp_path / "model", torch.bfloat16)
    path = "model.layers.0.mlp.experts"
    assert folder.names.index(f"{path}.10.up_proj.weight") < folder.names.index(
        f"{path}.2.up_proj.weight"
    )
    format_gguf.write(folder, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    audit(folder, exported)
    (file,) = exported.weight_files
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    up = stored["blk.0.ffn_up_exps.weight"]
    assert up.shape.tolist() == [128, 64, 12]
    found = torch.from_numpy(np.array(up.data)).view(torch.bfloat16)
    for number in range(12):
        assert torch.equal(found[number], folder.tensor(f"{path}.{number}.up_proj.weight"))
    router, gate = stored["blk.0.ffn_gate_inp.weight"], stored["blk.0.ffn_gate_inp_shexp.weight"]
    assert (router.tensor_type.name, gate.tensor_type.name) == ("F32", "F32")
    assert (router.shape.tolist(), gate.shape.tolist()) == ([128, 12], [128])
    mixed = Schemes(Scheme(4, 32), exceptions={f"{path}.3.up_proj": Scheme(8, 32, True)})
    with pytest.raises(
        UserError, match=r"one tensor for all experts .*Q4_1, .*3\.up_proj\.weight in Q8_0"
    ):
        format_gguf.fits(folder, mixed)


def test_queries_keys_and_values_are_gathered() -> None:
    """Two groups of two query heads of two channels, each followed by its key and its value; one group is as
    it is there."""
    order = Heads("falcon", 4, 2).order("blk.0.attn_qkv.weight", 16)
    assert order is not None
    assert order.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    order = Heads("gptneox", 2, 2).order("blk.0.attn_qkv.bias", 6)
    assert order is not None
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(gathered_order(12, 4, 1), torch.arange(12))
    assert Heads("phi3", 4, 2).order("blk.0.attn_qkv.weight", 16) is None


def test_another_gelu_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index, activation in enumerate(("gelu_fast", "gelu")):
        kind = changed(monkeypatch, "gpt_neox", hidden_act=activation)
        _, folder = written_model(kind, tmp_path / f"{index}")
        format_gguf.write(folder, tmp_path / f"out{index}")
        assert ("computes GELU by tanh" in caplog.text) == (activation == "gelu")


def test_a_search_may_not_part_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = changed(monkeypatch, "mixtral", num_hidden_layers=1)
    _, folder = written_model(kind, tmp_path / "model", torch.bfloat16)
    words = [
        "recipe=rtn-int4", f"model.source={folder.path}", "search=average", "search.average_bits=4",
        "data=text", f"data.source={tmp_path / 'text.txt'}", "data.sequences=4", "data.length=64",
        "eval=none", "speed=none", "export=gguf",
    ]  # fmt: skip
    (tmp_path / "text.txt").write_text("water and trees " * 100)
    with pytest.raises(UserError, match=r"choices=\[3, 5\] may put them into Q4_1, Q5_1"):
        check_run(parse(compose_settings([*words, "search.choices=[5,3]"])))
    # Three and four bits are in one type.
    check_run(parse(compose_settings([*words, "search.choices=[3,4]"])))


@pytest.mark.parametrize("shape", [(64, 64), (2**16 + 1, 1, 32)])
def test_experts_of_another_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    kind = changed(monkeypatch, "mixtral")
    _, folder = written_model(kind, tmp_path / "model")
    (tmp_path / "theirs").mkdir()
    write_json(tmp_path / "theirs/config.json", folder.config)
    writer = gguf.GGUFWriter(tmp_path / "theirs/their.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UserError, match=r"ffn_up_exps\.weight of shape \(.*\), not that of experts"
    ):
        _ = ModelFolder(tmp_path / "theirs").names
