"""Errors of a packed cache head by head: what the last tokens of a text read, beside what they should."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.runtime.cached import Caches

PROBE = "compress-probe"
# Tokens at the end whose attention is compared, where the scheme does not say.
LAST = 64


@torch.no_grad()
def head_errors(model: Any, caches: Caches, tokens: Tensor) -> dict[str, list[list[float]]]:
    """Relative squared errors of each layer, a row, and head: ``keys`` and ``values`` by key-value head over
    all of the store, ``output`` of attention by query head over the last tokens.

    tokens (n,). Every layer gets its original inputs: an error is that of its own cache alone.
    """
    scheme = caches.scheme
    assert scheme is not None
    last = min(scheme.step if scheme.window else LAST, len(tokens) // 2)
    found: dict[str, list[list[float]]] = {"keys": [], "values": [], "output": []}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        layer = caches.new().layers[module.layer_idx]
        layer.update(key[:, :, :-last], value[:, :, :-last])
        keys, values = layer.update(key[:, :, -last:], value[:, :, -last:])
        # A sliding window leaves what is out of sight behind.
        seen = keys.shape[2]
        for name, exact, stored in (("keys", key, keys), ("values", value, values)):
            found[name].append(_relative(exact[:, :, -seen:], stored))
        causal = torch.ones(last, seen, dtype=torch.bool, device=query.device).tril(seen - last)
        if layer.sliding_window is not None:
            causal &= ~causal.tril(seen - last - layer.sliding_window)
        rest = {**arguments, "is_causal": False}
        exact, stored = (
            sdpa_attention_forward(module, query[:, :, -last:], k, v, causal[None, None], **rest)[0]
            for k, v in ((key[:, :, -seen:], value[:, :, -seen:]), (keys, values))
        )
        found["output"].append(_relative(exact.transpose(1, 2), stored.transpose(1, 2)))
        return sdpa_attention_forward(module, query, key, value, mask, **arguments)

    AttentionInterface.register(PROBE, attention)
    AttentionMaskInterface.register(PROBE, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(PROBE)
    try:
        model(tokens.unsqueeze(0).to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return found


def _relative(exact: Tensor, stored: Tensor) -> list[float]:
    """Squared error over squared size of each head, (1, heads, tokens, head_dim)."""
    error = (stored.float() - exact.float()).square().sum((0, 2, 3))
    return (error / exact.float().square().sum((0, 2, 3))).tolist()
