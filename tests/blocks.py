"""Blocks to try methods on: a toy of two linears in numbers one can follow, and those of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.model.families import LLAMA, Input, family_of
from compress.model.folder import ModelFolder
from compress.model.walk import Activations, Walk
from compress.quantize.block import Block, Rounding
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import open_block, round_block

CPU = torch.device("cpu")
PAIR = replace(LLAMA, name="pair", inputs=(Input(("a", "b"), None),), attention_output="")


class Pair(nn.Module):
    """Two linears that read the same tensor."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name, W in weights.items():
            linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
            linear.weight = nn.Parameter(W.clone(), requires_grad=False)
            self.add_module(name, linear)

    def forward(self, X: Tensor) -> Tensor:
        self.a(X), self.b(X)
        return X


def pair_block(
    W: Tensor, X: Tensor, scheme: Scheme, original: Tensor | None = None, split: int | None = None
) -> Block:
    """A float32 block whose two linears hold the first ``split`` rows of W and the others.

    X (sequences, length, in): its inputs; original: the same tokens in the original model.
    """
    split = len(W) // 2 if split is None else split
    weights = {"a": W[:split].clone(), "b": W[split:].clone()}
    block = Block(Pair(weights), PAIR, dict.fromkeys(weights, scheme), W.dtype, weights)
    block.activations = Activations(X, original, original, {}, rows=2)
    return block


def stacked(quantized: dict[str, QTensor]) -> QTensor:
    """The two linears of a pair as one."""
    a, b = quantized["a"], quantized["b"]
    zero = None if a.zero is None or b.zero is None else torch.cat([a.zero, b.zero])
    return QTensor(torch.cat([a.codes, b.codes]), torch.cat([a.scale, b.scale]), zero, a.bits)


def quantized_blocks(
    folder: ModelFolder,
    tokens: Tensor,
    roundings: Sequence[Rounding],
    scheme: Scheme,
    original: bool = False,
) -> Iterator[tuple[Block, dict[str, QTensor], Tensor]]:
    """Quantize a model as the stage does; yields each block, its integers, and its outputs after.

    original: carry the original's states even if no method asks for them
    """
    family = family_of(folder.config)
    original = original or any(method.needs_original for method in roundings)
    walk = Walk(folder, family, CPU)
    walk.embed(tokens, original=original)
    for index in range(len(walk)):
        with walk.open(index) as module, torch.no_grad():
            block = open_block(module, walk.prefix(index), family, Schemes(scheme), folder.dtype)
            block.activations = walk.enter(index)
            quantized = round_block(block, roundings)
            for name, q in quantized.items():
                block.place(name, q.dequantize(block.dtype))
            with block.attention_once():
                walk.leave(index, block.activations)
            assert walk.hidden is not None
            yield block, quantized, walk.hidden
