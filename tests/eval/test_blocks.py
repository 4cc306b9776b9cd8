"""The harm of each block alone is what swapping it into the original does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense
from eval.blocks import block_divergence


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_against_whole_models(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, model_type: str
) -> None:
    base = load_dense(make_model(model_type), torch.device("cpu"), torch.float32)
    other = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, block in enumerate(other.model.layers):
            # The first block stays as it is.
            for p in block.mlp.parameters():
                p += 0.05 * i * p.abs().mean() * torch.randn(p.shape, generator=generator)
    norm, head = base.get_submodule(LLAMA.final_norm), base.get_output_embeddings()
    found = block_divergence(
        base,
        list(base.model.layers),
        list(other.model.layers),
        lambda hidden: head(norm(hidden)),
        tokens[:2],
    )
    expected = []
    for i in range(len(base.model.layers)):
        swapped = copy.deepcopy(base)
        swapped.model.layers[i] = other.model.layers[i]
        with torch.no_grad():
            p = base(tokens[:2]).logits[:, :-1].double().log_softmax(-1)
            q = swapped(tokens[:2]).logits[:, :-1].double().log_softmax(-1)
        expected.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert min(expected[1:]) > 1e-4, "the case must show something"
    assert found[1:] == pytest.approx(expected[1:], rel=1e-3)
