"""The rotate stage: Hadamard matrices, the function kept, the outliers gone, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.rotate import core_order, hadamard, rotate, rotation
from compress.runtime.load import load_dense

CPU = torch.device("cpu")
MODELS = {
    "gqa-tied": ("llama", {}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "no-gqa-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    # Heads of 16 in a stream of 128: together they are narrower than the stream.
    "own-head-size": ("mistral", {"head_dim": 16}),
    "qkv-biases": ("qwen2", {"tie_word_embeddings": False}),
    "qkv-biases-tied": ("qwen2", {}),
    # 96 = 8 * 12 and heads of 24: no power of two.
    "paley": ("qwen2", {"hidden_size": 96}),
}


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 60, 64, 72, 128, 200, 576, 960])
def test_hadamard_matrices_are_orthogonal(order: int) -> None:
    H = hadamard(order)
    assert H.dtype == torch.int8
    assert set(H.unique().tolist()) <= {-1, 1}
    assert torch.equal(H.double() @ H.double().T, order * torch.eye(order).double())


@pytest.mark.parametrize("order", [896, 1536, 2048, 3584, 4096, 5120, 8192, 11008])
def test_hadamard_matrices_of_large_models(order: int) -> None:
    rows = hadamard(order)[torch.randint(order, (32,), generator=torch.Generator().manual_seed(0))]
    products = rows.double() @ rows.double().T
    same = (rows.unsqueeze(1) == rows).all(-1)
    assert torch.equal(products, order * same.double())


def test_hadamard_by_hand() -> None:
    plus_minus = {"+": 1, "-": -1}

    def matrix(*rows: str) -> Tensor:
        return torch.tensor([[plus_minus[c] for c in row] for row in rows], dtype=torch.int8)

    assert torch.equal(hadamard(4), matrix("++++", "+-+-", "++--", "+--+"))
    # q = 11, squares 1 3 4 5 9: row i + 1 of the core has + on the diagonal and where i - j is one.
    assert torch.equal(
        hadamard(12)[:4], matrix("++++++++++++", "-+-+---+++-+", "-++-+---+++-", "--++-+---+++")
    )
    # Order 36 = 2 (17 + 1): the corner block stands for 0, the rest of the border for 1.
    assert torch.equal(hadamard(36)[:2, :6], matrix("+-++++", "--+-+-"))


@pytest.mark.parametrize("order", [3, 6, 18, 27, 92, 100, 116, 7001])
def test_orders_without_a_construction_are_named(order: int) -> None:
    assert core_order(order) is None
    with pytest.raises(UserError, match=f"order {order} is known"):
        hadamard(order)


def test_rotations_spread_single_channels_and_constants() -> None:
    R = rotation(576, torch.Generator().manual_seed(0))
    assert torch.allclose(R @ R.T, torch.eye(576).double(), atol=1e-12)
    assert torch.allclose(R.abs(), torch.full_like(R, 576**-0.5))
    # Without signs in front of H, Sylvester's first column would gather all of a constant.
    assert (torch.ones(576).double() @ R).abs().max() < 5
    same = rotation(576, torch.Generator().manual_seed(0))
    other = rotation(576, torch.Generator().manual_seed(1))
    assert torch.equal(R, same)
    assert not torch.equal(R, other)


def rotated(model: ModelFolder, path: Path, seed: int = 0) -> ModelFolder:
    rotate(model, path / "rotated", seed=seed)
    return ModelFolder(path / "rotated")


def logits(folder: ModelFolder, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        return load_dense(folder, CPU, dtype)(tokens).logits.double()


@pytest.mark.parametrize("case", MODELS)
def test_the_function_is_kept(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path, case: str
) -> None:
    model_type, changes = MODELS[case]
    model = make_model(model_type, dtype="float32", **changes)
    turned = rotated(model, tmp_path)
    expected = logits(model, tokens, torch.float64)
    error = logits(turned, tokens, torch.float64) - expected
    # What is left is the one rounding of every weight to float32.
    assert error.norm() < 1e-5 * expected.norm()
    assert all(turned.tensor(n).dtype == torch.float32 for n in turned.names)


def test_weights_are_those_of_the_formulas(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    """R1 and R2 as whole matrices: 2 value heads of 32, each read by 2 query heads."""
    model = make_model(
        "llama", dtype="float32", num_hidden_layers=2, attention_bias=True, mlp_bias=True
    )
    turned = rotated(model, tmp_path, seed=3)
    generator = torch.Generator().manual_seed(3)
    R1 = rotation(128, generator)
    expected = {}

    def read(name: str) -> Tensor:
        return model.tensor(name).double()

    expected["model.embed_tokens.weight"] = read("model.embed_tokens.weight") @ R1
    gain = read("model.norm.weight").diag()
    expected["lm_head.weight"] = read("model.embed_tokens.weight") @ gain @ R1
    for index in range(2):
        prefix = f"model.layers.{index}"
        first, second = (rotation(32, generator) for _ in range(2))
        assert not torch.equal(first, second)
        values, heads = (
            torch.block_diag(first, second),
            torch.block_diag(first, first, second, second),
        )
        before = read(f"{prefix}.input_layernorm.weight").diag() @ R1
        between = read(f"{prefix}.post_attention_layernorm.weight").diag() @ R1
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        for name, left, right in [
            (f"{attention}.q_proj", None, before),
            (f"{attention}.k_proj", None, before),
            (f"{attention}.v_proj", values.T, before),
            (f"{attention}.o_proj", R1.T, heads),
            (f"{mlp}.gate_proj", None, between),
            (f"{mlp}.up_proj", None, between),
            (f"{mlp}.down_proj", R1.T, None),
        ]:
            W, b = read(f"{name}.weight"), read(f"{name}.bias")
            W = W if right is None else W @ right
            expected[f"{name}.weight"] = W if left is None else left @ W
            expected[f"{name}.bias"] = b if left is None else left @ b
    norms = [name for name in turned.names if name.endswith("norm.weight")]
    assert len(norms) == 5
    expected |= {name: torch.ones(128).double() for name in norms}
    assert sorted(expected) == sorted(turned.names)
    for name, tensor in expected.items():
        torch.testing.assert_close(turned.tensor(name).double(), tensor, rtol=1e-6, atol=1e-7)


def with_outliers(path: Path, model: ModelFolder) -> ModelFolder:
    """A copy whose stream has two channels that readers and writers weigh far above the others."""
    shutil.copytree(model.path, path)
    tensors = load_file(path / "model.safetensors")
    for name, W in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
            W[:, [5, 77]] *= 40
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            W[[5, 77]] *= 40
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return ModelFolder(path)


def test_outliers_fall(make_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    model = with_outliers(tmp_path / "model", make_model("llama", dtype="float32"))
    turned = rotated(model, tmp_path)

    def shape(folder: ModelFolder, name: str) -> tuple[float, float]:
        """Kurtosis (3 for a normal distribution) and largest over root mean square, over rows."""
        W = folder.tensor(name).double()
        W = W.T if name.endswith(("o_proj.weight", "down_proj.weight")) else W
        rms = W.square().mean(1).sqrt()
        peak = (W.abs().amax(1) / rms).mean().item()
        return (W.pow(4).mean(1) / rms**4).mean().item(), peak

    for part in ("q_proj", "v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        kurtosis, peak = shape(model, name)
        assert kurtosis > 20
        assert peak > 7
        kurtosis, peak = shape(turned, name)
        assert kurtosis < 4
        assert peak < 4


def test_the_head_is_untied_and_transformers_reads_the_folder(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    turned = rotated(tiny, tmp_path)
    assert tiny.tied_head
    assert not turned.tied_head
    assert "lm_head.weight" in turned
    assert (turned.path / "tokenizer.json").exists()
    head, embedding = (turned.tensor(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    assert head.dtype == embedding.dtype == torch.bfloat16
    assert not torch.equal(head, embedding)
    theirs = AutoModelForCausalLM.from_pretrained(turned.path, dtype=torch.float32)
    with torch.inference_mode():
        found = theirs(tokens).logits.double()
    torch.testing.assert_close(found, logits(turned, tokens, torch.float32))
    expected = logits(tiny, tokens, torch.float32)
    # Rounding every weight to bf16 once more costs less than computing in bf16 does.
    noise = logits(tiny, tokens, torch.bfloat16) - expected
    assert (found - expected).norm() < noise.norm()


def test_the_seed_decides(tiny: ModelFolder, tmp_path: Path) -> None:
    first, again = (rotated(tiny, tmp_path / name) for name in ("a", "b"))
    other = rotated(tiny, tmp_path / "c", seed=1)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    report = rotate(tiny, tmp_path / "d", seed=1)
    assert report == {"seed": 1, "hidden_size": 128, "head_size": 32}


def test_what_cannot_be_rotated_is_refused(
    make_model: Callable[..., ModelFolder], tiny: ModelFolder, tmp_path: Path
) -> None:
    def changed(name: str, **config: object) -> ModelFolder:
        shutil.copytree(tiny.path, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**tiny.config, **config}))
        return ModelFolder(tmp_path / name)

    target = tmp_path / "out"
    for key in ("quantization_config", "compress_record"):
        with pytest.raises(UserError, match="is quantized already"):
            rotate(changed(key, **{key: {"version": 1}}), target)
    with pytest.raises(UserError, match="rotate does not apply to models of type gpt2"):
        rotate(changed("family", model_type="gpt2"), target)
    with pytest.raises(UserError, match="head size 18, for which no Hadamard"):
        rotate(make_model("llama", hidden_size=72), target)
    with pytest.raises(UserError, match="hidden size 92, for which no Hadamard"):
        rotate(make_model("llama", hidden_size=92, num_attention_heads=2), target)
    assert not target.exists()


def test_a_run_rotates_then_quantizes(tiny: ModelFolder, text_file: Path, tmp_path: Path) -> None:
    run = parse(
        compose_settings(
            [
                "recipe=rotate-int4-channel",
                f"model.source={tiny.path}",
                "data=text",
                f"data.source={text_file}",
                "data.sequences=4",
                "data.length=64",
                "eval=none",
                "speed=none",
            ]
        )
    )
    pipeline.check(run)
    metrics = pipeline.run_recipe(run, "rotate", tmp_path)
    assert list(metrics["compression"]["stage_seconds"]) == ["rotate", "quantize"]
    assert metrics["compression"]["rotate"] == {"seed": 0, "hidden_size": 128, "head_size": 32}
    checkpoint = ModelFolder(tmp_path / "checkpoint")
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.ones(128).bfloat16())
    assert "lm_head.weight" in checkpoint
