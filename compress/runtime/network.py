"""The decoder of a checkpoint as the engine runs it: a block is four linears and attention.

Linears that read the same inputs are one (queries, keys and values; gate and up); the norm before a linear
and the gate or residual after it belong to it, so that a kernel may do all of it in one go. Weights lie in
the layout of their kernels; there is no other copy of them.

tokens (batch, n); x (batch, n, hidden), in a step (batch, hidden); qkv (..., (heads + 2 kv_heads) * head_dim)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compress.kernels.fusion import Fusion
from compress.kv_cache.cache import Rotary, turn
from compress.runtime.weights import PackedWeight

# (layer, qkv) -> (..., heads * head_dim)
Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A weight and what surrounds its product."""

    weight: PackedWeight
    fusion: Fusion

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.weight.fused(x, self.fusion, residual)


@dataclass(frozen=True)
class Block:
    """attention's input (queries, keys, values) and output, the MLP's input (gate, up) and output."""

    qkv: Linear
    attention_output: Linear
    gate_up: Linear
    mlp_output: Linear


@dataclass(frozen=True)
class Heads:
    """Attention's sizes. windows: tokens each layer's queries see, themselves included; None: all"""

    queries: int
    keys: int
    size: int
    scaling: float
    windows: Sequence[int | None]


@dataclass(frozen=True)
class Network:
    """embed: tokens -> x; head: the final norm before it; rotary: positions (batch, n) -> cos and
    sin float32 (batch, n, head_dim)"""

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[Block]
    head: Linear
    heads: Heads
    rotary: Rotary

    @property
    def linears(self) -> list[Linear]:
        """Those of the blocks in their order, and the head."""
        blocks = [
            (block.qkv, block.attention_output, block.gate_up, block.mlp_output)
            for block in self.blocks
        ]
        return [*itertools.chain(*blocks), self.head]

    def step(self, tokens: Tensor, attend: Attend) -> Tensor:
        """tokens (batch,), one a row -> logits (batch, vocabulary)."""
        return self.head(self._blocks(self.embed(tokens), attend))

    def prompt(
        self,
        tokens: Tensor,
        fill: Callable[[int, Tensor, Tensor], Any],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Reads tokens (batch, n) -> logits (batch, vocabulary) behind the last.

        fill(layer, keys, values) is handed the keys, turned by position, and the values, (batch, kv_heads,
        n, head_dim); padding: int64 (batch,) tokens on the left of a row that are none
        """
        batch, n = tokens.shape
        places = torch.arange(n, device=tokens.device)
        positions = places.expand(batch, n)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        cos, sin = (angles.unsqueeze(1) for angles in self.rotary(positions))
        masks = {window: _mask(n, window, padding, tokens.device) for window in self.heads.windows}

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.heads_of(qkv)
            q, k = (turn(x.float(), cos, sin).to(x.dtype) for x in (q, k))
            fill(layer, k, v)
            mask = masks[self.heads.windows[layer]]
            shared = self.heads.queries // self.heads.keys
            if mask is not None and shared > 1:
                # Together they would take the path that writes out all scores.
                k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.heads.scaling,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            return out.transpose(1, 2).flatten(2)

        return self.head(self._blocks(self.embed(tokens), attend)[:, -1])

    def _blocks(self, x: Tensor, attend: Attend) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block.attention_output(attend(layer, block.qkv(x)), residual=x)
            x = block.mlp_output(block.gate_up(x), residual=x)
        return x

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (batch, n, ...) -> queries, keys, values (batch, heads, n, head_dim)."""
        heads = self.heads
        parts = qkv.unflatten(-1, (-1, heads.size)).transpose(1, 2)
        q, k, v = parts.split([heads.queries, heads.keys, heads.keys], dim=1)
        return q, k, v


def _mask(
    n: int, window: int | None, padding: Tensor | None, device: torch.device
) -> Tensor | None:
    """What tokens of a prompt see, bool (batch or 1, 1, n, n); None: all before them and themselves.

    A token of the padding sees itself: a row of nothing would have no softmax.
    """
    if padding is None and (window is None or window >= n):
        return None
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    if window is not None:
        seen &= ~seen.tril(-window)
    if padding is None:
        return seen[None, None]
    real = torch.arange(n, device=device) >= padding[:, None]
    own = torch.eye(n, dtype=torch.bool, device=device)
    return ((seen & real[:, None]) | own)[:, None]
