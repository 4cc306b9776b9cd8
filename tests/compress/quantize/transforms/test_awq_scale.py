"""AWQ scales: the function is preserved, the search is the textbook's on the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from calibration.moments import Moments
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import open_block
from compress.quantize.transforms import AwqScale
from compress.quantize.transforms.awq_scale import Readers

SCHEME = Scheme(3, 32)


def textbook_search(W: torch.Tensor, X: torch.Tensor, grid: int) -> list[float]:
    """Mean squared output error of every exponent, token by token, in float64 (scales in bf16)."""
    errors = []
    x = X.abs().mean(0)
    for i in range(grid):
        s = (x ** (i / grid)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        Wq = torch.empty_like(W)
        for row in range(W.shape[0]):
            for g in range(0, W.shape[1], 32):
                w = W[row, g : g + 32] * s[g : g + 32]
                low, high = min(w.min().item(), 0.0), max(w.max().item(), 0.0)
                scale = torch.tensor((high - low) / 7, dtype=torch.float32).bfloat16().double()
                zero = (-low / scale).round().clamp(0, 7)
                Wq[row, g : g + 32] = ((w / scale + zero).round().clamp(0, 7) - zero) * scale
        errors.append(float((X @ (Wq / s - W).T).pow(2).sum(1).mean()))
    return errors


def test_search_equals_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 96, generator=generator) * torch.randn(96, generator=generator).exp()
    W = torch.randn(6, 96, generator=generator)
    errors = textbook_search(W.double(), X.double(), 8)
    magnitude, largest = X.abs().mean(0), X.abs().amax(0)
    moments = Moments((X.T @ X) / len(X), magnitude, largest, tokens=len(X))
    s, exponent, ratio = AwqScale(grid=8).search([Readers([W], moments, SCHEME)], torch.bfloat16)
    best = min(range(8), key=errors.__getitem__)
    assert exponent == best / 8
    assert best > 0, "the case must need scaling, or the test shows nothing"
    assert ratio == pytest.approx(errors[best] / errors[0], rel=1e-3)
    expected = X.abs().mean(0) ** (best / 8)
    assert torch.allclose(s, expected / (expected.max() * expected.min()).sqrt(), rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "dtype"),
    [
        ("llama", 2, "bfloat16"),
        ("llama", 4, "bfloat16"),
        ("qwen2", 4, "bfloat16"),
        ("llama", 4, "float32"),
    ],
)
def test_function_is_preserved(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    model_type: str,
    kv_heads: int,
    dtype: str,
) -> None:
    """A block computes the same with its transformed weights, before anything is rounded."""
    folder = make_model(model_type, num_key_value_heads=kv_heads, dtype=dtype)
    walk = Walk(folder, LLAMA, torch.device("cpu"))
    walk.embed(tokens)
    with walk.open(0) as module:
        block = open_block(module, walk.prefix(0), LLAMA, Schemes(SCHEME), folder.dtype)
        block.activations = walk.enter(0)
        block.observe(*LLAMA.inputs)
        hidden = block.activations.inputs.double()
        arguments = dict(block.activations.arguments)
        arguments["position_embeddings"] = tuple(
            t.double() for t in arguments["position_embeddings"]
        )
        with torch.no_grad():
            before = module.double()(hidden, **arguments)
            module.to(folder.dtype)
            AwqScale()(block)
            module.double()
            for name, W in block.weights.items():
                module.get_submodule(name).weight.data = W.double()
            after = module(hidden, **arguments)
    scaled = {note.removeprefix("awq_scale.") for note in block.notes}
    assert any(note["exponent"] > 0 for note in block.notes.values())
    # Under grouped-query attention o_proj reads more columns than v_proj makes.
    assert ("self_attn.o_proj" in scaled) == (kv_heads == 4)
    error = (after - before).norm() / before.norm()
    # Norms in bf16 are compensated exactly; what is left is float32 rounding, and the bf16 bias of
    # v.
    assert error < (2e-3 if model_type == "qwen2" else 1e-5)


def test_moments_follow_the_fold(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    """After a fold the moments are those of the new inputs: W x is the same for every reader."""
    walk = Walk(tiny, LLAMA, torch.device("cpu"))
    walk.embed(tokens)
    with walk.open(0) as module, torch.no_grad():
        block = open_block(module, walk.prefix(0), LLAMA, Schemes(SCHEME), tiny.dtype)
        block.activations = walk.enter(0)
        block.observe(*LLAMA.inputs)
        name = "mlp.gate_proj"
        W, H = block.weights[name].clone(), block.moments[name].second.clone()
        block.fold(LLAMA.inputs[2:3], torch.rand(W.shape[1]) + 0.5)
        assert not torch.allclose(block.weights[name], W)
        expected = ((W @ H) * W).sum()
        got = ((block.weights[name] @ block.moments[name].second) * block.weights[name]).sum()
        assert got == pytest.approx(float(expected), rel=1e-4)
