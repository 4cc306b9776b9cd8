"""SmoothQuant: equation 4 by hand, the function is preserved, what sets a token's scale shrinks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compress.errors import UserError
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.quantize.inputs import InputScheme
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import open_block
from compress.quantize.transforms import Smooth
from compress.quantize.transforms.smooth import smoothing

SCHEME = Scheme(8, "channel", True, inputs=InputScheme())


def test_equation_four_by_hand() -> None:
    """max|x| 16 and 1, max|w| 1 and 4, alpha 1/2: s = 4, 1/2, made 2 sqrt(2) and its inverse."""
    s = smoothing(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5)
    assert s.tolist() == pytest.approx([8**0.5, 8**-0.5])
    # alpha 1 evens the inputs out, alpha 0 the weights.
    x, w = torch.tensor([9.0, 4.0, 1.0]), torch.tensor([1.0, 3.0, 2.0])
    assert (x / smoothing(x, w, 1.0)).tolist() == pytest.approx([3.0] * 3)
    assert (w * smoothing(x, w, 0.0)).tolist() == pytest.approx([3**0.5] * 3)


def test_dead_columns_stay_as_they_are() -> None:
    s = smoothing(torch.tensor([0.0, 8.0, 2.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert s[:2].tolist() == [1.0, 1.0]
    assert torch.equal(smoothing(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))


@pytest.mark.parametrize(
    ("model_type", "kv_heads"), [("llama", 2), ("llama", 4), ("qwen2", 4)], ids=str
)
def test_function_is_preserved(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    model_type: str,
    kv_heads: int,
) -> None:
    """A block computes the same with its transformed weights, while its inputs have come closer."""
    folder = make_model(model_type, num_key_value_heads=kv_heads)
    walk = Walk(folder, LLAMA, torch.device("cpu"))
    walk.embed(tokens)
    with walk.open(0) as module, torch.no_grad():
        block = open_block(module, walk.prefix(0), LLAMA, Schemes(SCHEME), folder.dtype)
        block.activations = walk.enter(0)
        block.observe(*LLAMA.inputs)
        spread = {
            shared.linears[0]: _spread(block.moments[shared.linears[0]].largest)
            for (shared,) in block.foldable()
        }
        hidden = block.activations.inputs.double()
        arguments = dict(block.activations.arguments)
        arguments["position_embeddings"] = tuple(
            t.double() for t in arguments["position_embeddings"]
        )
        before = module.double()(hidden, **arguments)
        module.to(folder.dtype)
        Smooth(alpha=0.8)(block)
        module.double()
        for name, W in block.weights.items():
            module.get_submodule(name).weight.data = W.double()
        after = module(hidden, **arguments)
        error = (after - before).norm() / before.norm()
        assert error < (2e-3 if model_type == "qwen2" else 1e-5)
        assert len(spread) == (4 if kv_heads == 4 else 3)
        for name, was in spread.items():
            assert _spread(block.moments[name].largest) < 0.7 * was


def _spread(largest: torch.Tensor) -> float:
    """How far the largest column is above the median one."""
    return float(largest.max() / largest.median())


def test_alpha_is_the_familys_unless_given(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    found = []
    for method in (Smooth(), Smooth(LLAMA.smooth_alpha), Smooth(0.1)):
        walk = Walk(tiny, LLAMA, torch.device("cpu"))
        walk.embed(tokens)
        with walk.open(0) as module, torch.no_grad():
            block = open_block(module, walk.prefix(0), LLAMA, Schemes(SCHEME), tiny.dtype)
            block.activations = walk.enter(0)
            method(block)
            found.append(block.weights["mlp.gate_proj"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_mistakes(alpha: float) -> None:
    with pytest.raises(UserError, match="choose 0 to 1, or null"):
        Smooth(alpha)
