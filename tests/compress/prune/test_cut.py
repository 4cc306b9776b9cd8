"""Pruned folders against masked models: every axis alone and all together, read by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.export.audit import audit
from compress.export.compressed_tensors import write
from compress.model.folder import PRUNED, ModelFolder
from compress.prune import cut
from compress.prune.knobs import Prune
from compress.prune.shape import elements
from compress.prune.stage import prune
from compress.runtime.load import load_dense

CPU = torch.device("cpu")
MODELS = {
    "gqa-tied": ("llama", {}),
    "mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-biases": ("qwen2", {}),
    "own-head-size": ("mistral", {"head_dim": 16}),
}
AXES: dict[str, dict[str, Any]] = {
    "layers": {"layers": 2},
    "heads": {"heads": 2},
    "kv_heads": {"kv_heads": 1},
    "mlp": {"mlp": 160},
    "hidden": {"hidden": 96},
    "all": {"layers": 2, "heads": 1, "kv_heads": 1, "mlp": 160, "hidden": 96},
}


def pruned(
    source: ModelFolder, tokens: Tensor, path: Path, **knobs: Any
) -> tuple[ModelFolder, dict[str, Any]]:
    report = prune(source, path / "pruned", Prune(**knobs), tokens=tokens, device=CPU)["prune"]
    return ModelFolder(path / "pruned"), report


def sizes(knobs: dict[str, Any], source: ModelFolder) -> dict[str, Any]:
    """heads=2 of four groups would be none a group: as many as there are groups then."""
    groups = source.config["num_key_value_heads"]
    if "kv_heads" not in knobs and "heads" in knobs and groups == 4:
        return {**knobs, "heads": 4, "kv_heads": 4, "mlp": 224}
    return knobs


def masked(source: ModelFolder, small: ModelFolder) -> Any:
    """The original with everything that went as zeros, and norms as the pruned model has them. In
    transformers' own
    code: nothing of the pruning is used but which parts stayed."""
    kept = json.loads((small.path / PRUNED).read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    layers = model.model.layers
    head_dim = small.config["head_dim"]
    hidden = source.config["hidden_size"]
    channels = torch.arange(hidden) if kept["hidden"] is None else torch.tensor(kept["hidden"])
    gone = torch.ones(hidden, dtype=torch.bool)
    gone[channels] = False
    # A norm over all channels divides by less than one over those that stay.
    factor = (len(channels) / hidden) ** 0.5
    with torch.no_grad():
        for place, index in enumerate(kept["layers"]):
            layer, prefix = layers[index], f"model.layers.{place}"
            heads = elements(kept["heads"][place], head_dim)
            dropped = torch.ones(layer.self_attn.o_proj.weight.shape[1], dtype=torch.bool)
            dropped[heads] = False
            layer.self_attn.o_proj.weight[:, dropped] = 0
            rows = small.tensor(f"{prefix}.mlp.gate_proj.weight").float()
            old = layer.mlp.gate_proj.weight[:, channels]
            neurons = (old.unsqueeze(0) == rows.unsqueeze(1)).all(-1).float().argmax(1)
            dropped = torch.ones(len(old), dtype=torch.bool)
            dropped[neurons] = False
            layer.mlp.down_proj.weight[:, dropped] = 0
            for name, norm in layer.named_modules():
                if name.endswith("norm"):
                    norm.weight[channels] = factor * small.tensor(f"{prefix}.{name}.weight").float()
                    norm.variance_epsilon *= factor**2
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[gone] = 0
                if writer.bias is not None:
                    writer.bias[gone] = 0
        head = model.lm_head.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head)
        model.model.embed_tokens.weight[:, gone] = 0
        model.model.norm.weight[channels] = factor * small.tensor("model.norm.weight").float()
        model.model.norm.variance_epsilon *= factor**2
    model.model.layers = torch.nn.ModuleList([layers[i] for i in kept["layers"]])
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", MODELS)
def test_a_pruned_model_is_the_masked_one(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path, case: str, axis: str
) -> None:
    model_type, changes = MODELS[case]
    source = make_model(model_type, dtype="float32", **changes)
    knobs = sizes(AXES[axis], source)
    small, report = pruned(source, tokens, tmp_path, refit="none", **knobs)
    with torch.inference_mode():
        ours = load_dense(small, CPU, torch.float32)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32)(
            tokens
        ).logits
        expected = masked(source, small)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    # Sums of fewer terms round otherwise, and a random model makes more of it from block to block.
    assert (ours - expected).norm() < 3e-5 * expected.norm()
    for name, size in {**report["shape"]["after"], **knobs}.items():
        key = {
            "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size",
            "kv_heads": "num_key_value_heads", "hidden": "hidden_size",
        }[name]  # fmt: skip
        if name != "heads" or "kv_heads" not in knobs:
            assert small.config[key] == size
    stored = sum(small.tensor(name).numel() for name in small.names)
    assert stored == report["parameters"][1]
    assert report["parameters"][0] == sum(source.tensor(name).numel() for name in source.names)


@pytest.mark.parametrize("importance", ["error", "activation", "magnitude", "random"])
@pytest.mark.parametrize("refit", ["outputs", "all"])
def test_every_way_to_choose_gives_a_model_that_loads(
    make_model: Callable[..., ModelFolder],
    tokens: Tensor,
    tmp_path: Path,
    importance: str,
    refit: str,
) -> None:
    source = make_model("qwen2", dtype="float32")
    small, report = pruned(
        source, tokens, tmp_path, importance=importance, refit=refit, heads=2, mlp=160, layers=2
    )
    assert small.config["model_type"] == "llama"
    model = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens).logits, load_dense(small, CPU, torch.float32)(tokens).logits
        )
    assert [block["block"] for block in report["blocks"]] == json.loads(
        (small.path / PRUNED).read_text()
    )["layers"]


def divergence(source: ModelFolder, small: ModelFolder, tokens: Tensor) -> float:
    with torch.inference_mode():
        p, q = (
            load_dense(f, CPU, torch.float32)(tokens).logits.log_softmax(-1)
            for f in (source, small)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def repeated(source: ModelFolder, path: Path) -> ModelFolder:
    """A copy in which half of the neurons, and one query head of every two in a group, repeat the others:
    what they add can be had without them."""
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[128:] = linear.weight[:128]
            heads = layer.self_attn.q_proj.weight.unflatten(0, (2, 2, 32))
            heads[:, 1] = heads[:, 0]
    model.save_pretrained(path)
    return ModelFolder(path)


def test_what_is_said_twice_goes_without_a_loss(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    """On tokens that calibration has not seen."""
    tokens = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(7))
    source = repeated(make_model("llama", dtype="float32"), tmp_path / "twice")
    found = {}
    for i, (importance, refit) in enumerate(
        [("error", "outputs"), ("error", "none"), ("random", "outputs"), ("random", "none")]
    ):
        small, _ = pruned(
            source, tokens[:16], tmp_path / str(i),
            importance=importance, refit=refit, mlp=128, heads=2, damping=1e-3,
        )  # fmt: skip
        found[importance, refit] = divergence(source, small, tokens[16:])
    assert found["error", "outputs"] < 0.02
    assert min(found["error", "none"], found["random", "outputs"], found["random", "none"]) > 0.5


def test_the_refit_is_the_least_squares_of_the_stream(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path
) -> None:
    """The first block's attention: o_proj on the heads that stay, by lstsq over weighted tokens."""
    source = make_model("llama", dtype="float32", num_hidden_layers=1)
    small, report = pruned(source, tokens, tmp_path, heads=2, damping=0.01)
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    seen = {}
    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, a: seen.update(m=a[0]))
    with torch.inference_mode():
        model(tokens)
    kept = json.loads((small.path / PRUNED).read_text())["heads"][0]
    x = seen["x"].flatten(0, 1).double()[:, elements(kept, 32)]
    middle = seen["m"].flatten(0, 1).double()
    t = middle - seen["h"].flatten(0, 1).double()
    root = (1 / middle.square().mean(1)).sqrt().unsqueeze(1)
    # Towards the old weights, as rows of more data: sqrt(ridge) (W - old) = 0.
    old = source.tensor("model.layers.0.self_attn.o_proj.weight").double()[:, elements(kept, 32)]
    ridge = 0.01 * (x * root).square().sum(0).mean()
    rows = torch.cat([x * root, ridge.sqrt() * torch.eye(64).double()])
    expected = torch.linalg.lstsq(rows, torch.cat([t * root, ridge.sqrt() * old.T])).solution.T
    found = small.tensor("model.layers.0.self_attn.o_proj.weight").double()
    assert (found - expected).norm() < 2e-3 * expected.norm()
    lost = ((t - x @ expected.T) * root).square().sum() / (t * root).square().sum()
    assert report["blocks"][0]["errors"]["attention"] == pytest.approx(float(lost), rel=1e-2)


def test_a_block_makes_up_for_those_that_go_after_it(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    tokens = torch.randint(256, (40, 32), generator=torch.Generator().manual_seed(7))
    source = make_model("llama", dtype="float32")
    found = {}
    for refit in ("outputs", "none"):
        small, _report = pruned(source, tokens[:32], tmp_path / refit, layers=2, refit=refit)
        found[refit] = divergence(source, small, tokens[32:])
    assert found["outputs"] < found["none"]


@pytest.mark.parametrize("kv", ["principal", "mean"])
@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_merged_heads_serve_all_queries(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path, kv: str, case: str
) -> None:
    source = make_model(case, dtype="float32", num_key_value_heads=4)
    small, report = pruned(source, tokens, tmp_path, kv_heads=2, kv=kv)
    assert report["shape"]["after"]["heads"] == 4
    assert small.shape("model.layers.0.self_attn.q_proj.weight") == (128, 128)
    assert small.shape("model.layers.0.self_attn.k_proj.weight") == (64, 128)
    model = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens).logits, load_dense(small, CPU, torch.float32)(tokens).logits
        )


def test_equal_heads_merge_without_a_loss(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path
) -> None:
    """Two of four heads of keys and values are copies of the others: as the masked model is exact here, so
    must be the merged one, whatever the order in which heads are found alike."""
    source = make_model("llama", dtype="float32", num_key_value_heads=4)
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[64:96] = linear.weight[:32]
                linear.weight[96:] = linear.weight[32:64]
    model.save_pretrained(tmp_path / "twice")
    twice = ModelFolder(tmp_path / "twice")
    small, _ = pruned(twice, tokens, tmp_path, kv_heads=2, kv="principal", refit="none")
    assert json.loads((small.path / PRUNED).read_text())["heads"][0] == [0, 2, 1, 3]
    with torch.inference_mode():
        expected = load_dense(twice, CPU, torch.float32)(tokens).logits
        found = load_dense(small, CPU, torch.float32)(tokens).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_same_seed_gives_the_same_bytes(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    first, again = (
        pruned(tiny, tokens, tmp_path / name, mlp=160, heads=2)[0] for name in ("a", "b")
    )
    assert first.fingerprint == again.fingerprint


def test_a_pruned_folder_is_exported_as_it_is(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    small, _ = pruned(tiny, tokens, tmp_path, mlp=160)
    write(small, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    assert audit(small, exported)["linears"] == 0
    assert exported.config == small.config
    assert (exported.path / PRUNED).exists()
    assert (exported.path / "tokenizer.json").exists()


def test_readers_of_fewer_channels_are_refitted(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path
) -> None:
    """The first block's queries, keys and values on 96 of 128 channels, by lstsq: what they made of the
    original's normed stream, from the pruned one's, whose norm divides by less."""
    source = make_model("llama", dtype="float32", num_hidden_layers=1)
    small, _ = pruned(source, tokens, tmp_path, hidden=96, damping=0.01)
    channels = torch.tensor(json.loads((small.path / PRUNED).read_text())["hidden"])
    E = source.tensor("model.embed_tokens.weight")[tokens.flatten()].double()
    gain = source.tensor("model.layers.0.input_layernorm.weight").double()

    def rms(X: Tensor) -> Tensor:
        return X.square().mean(1).sqrt()

    kept = E[:, channels]
    ratio = (rms(kept) / rms(E)).mean()
    norm = small.tensor("model.layers.0.input_layernorm.weight").double()
    torch.testing.assert_close(norm, gain[channels] * ratio, rtol=1e-4, atol=1e-6)
    theirs = E / rms(E).unsqueeze(1) * gain
    ours = kept / rms(kept).unsqueeze(1) * norm
    ridge = (0.01 * ours.square().sum(0).mean()).sqrt()
    rows = torch.cat([ours, ridge * torch.eye(96).double()])
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        W = source.tensor(name).double()
        goal = torch.cat([theirs @ W.T, ridge * W[:, channels].T])
        expected = torch.linalg.lstsq(rows, goal).solution.T
        found = small.tensor(name).double()
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_refitting_pays_with_fewer_channels(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    """On tokens that calibration has not seen, where a quarter of the channels repeat others in small."""
    tokens = torch.randint(256, (40, 32), generator=torch.Generator().manual_seed(7))
    source = make_model("llama", dtype="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 96:] = 0.1 * model.model.embed_tokens.weight[:, :32]
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[96:] = 0.1 * writer.weight[:32]
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:] = 1
                norm.weight[96:] = 3
        model.model.norm.weight[:] = 1
    model.save_pretrained(tmp_path / "twice")
    twice = ModelFolder(tmp_path / "twice")
    found = {}
    for refit in ("outputs", "none"):
        small, _ = pruned(
            twice, tokens[:32], tmp_path / refit, hidden=96, refit=refit, damping=1e-4
        )
        kept = json.loads((small.path / PRUNED).read_text())["hidden"]
        assert kept == list(range(96))
        found[refit] = divergence(twice, small, tokens[32:])
    assert found["outputs"] < 0.5 * found["none"]


def test_several_files_are_read_and_written(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = pruned(tiny, tokens, tmp_path / "whole", mlp=160, heads=2)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    shards = ModelFolder(tmp_path / "shards")
    assert len(shards.weight_files) > 2
    monkeypatch.setattr(cut, "SHARD_BYTES", 100_000)
    small, _ = pruned(shards, tokens, tmp_path / "small", mlp=160, heads=2)
    assert len(small.weight_files) > 2
    assert sorted(small.names) == sorted(whole.names)
    assert all(torch.equal(small.tensor(name), whole.tensor(name)) for name in whole.names)
