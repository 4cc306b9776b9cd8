"""Where the loss comes from: each block of a candidate alone in its original.

KL(original || original with block i of the candidate). A block's inputs are then the original's, so
the figure is the harm that this block does by itself, without what others pass on to it.

tokens (1, window); hidden states (1, window, hidden)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.walk import run
from eval.parts import Once, always
from eval.text import ROWS, token_kl


@torch.no_grad()
def block_divergence(
    base: Any,
    base_blocks: Sequence[nn.Module],
    candidate_blocks: Sequence[nn.Module],
    logits_of: Callable[[Tensor], Tensor],
    windows: Iterable[Tensor],
    once: Once = always,
) -> list[float]:
    """The mean KL of every block in nats per token, over all positions but the last of a window.

    base: the original model, called with tokens; base_blocks: its decoder blocks, in order;
    candidate_blocks: those of the candidate, which must read and write the same hidden states
    logits_of: final hidden states (before the final norm) -> logits, in the original
    A block on a window is a part of ``once``.
    """
    totals, count = [0.0] * len(base_blocks), 0
    for w, tokens in enumerate(windows):
        read = _Window(base, base_blocks, tokens)
        count += len(tokens) - 1
        for i, block in enumerate(candidate_blocks):
            part = functools.partial(read.divergence, i, block, logits_of)
            totals[i] += once(f"window {w}, block {i}", part)
    return [total / count for total in totals]


class _Window:
    """What the original makes of a window, computed when it is first asked for."""

    def __init__(self, base: Any, blocks: Sequence[nn.Module], tokens: Tensor):
        self._base, self._blocks, self._tokens = base, blocks, tokens

    @functools.cached_property
    def _calls(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return block_calls(self._base, self._blocks, self._tokens.unsqueeze(0))

    @functools.cached_property
    def _last(self) -> Tensor:
        X, arguments = self._calls[-1]
        return run(self._blocks[-1], X, arguments)

    def divergence(self, i: int, block: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> float:
        """The sum over positions with ``block`` in place of block i."""
        last, (X, arguments) = self._last, self._calls[i]
        X = run(block, X, arguments)
        for other, (_, arguments) in zip(self._blocks[i + 1 :], self._calls[i + 1 :], strict=True):
            X = run(other, X, arguments)
        return _divergence(last[0, :-1], X[0, :-1], logits_of)


def block_calls(
    model: Any, blocks: Sequence[nn.Module], tokens: Tensor
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each block is called with: hidden states and the rest."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Tensor], arguments: dict[str, Any]) -> None:
        calls.append((args[0], arguments))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _divergence(base: Tensor, X: Tensor, logits_of: Callable[[Tensor], Tensor]) -> float:
    """Sum of KL over positions, a part of them at a time."""
    total = 0.0
    for theirs, ours in zip(base.split(ROWS), X.split(ROWS), strict=True):
        base_log_probs = logits_of(theirs).float().log_softmax(-1)
        total += float(token_kl(base_log_probs, logits_of(ours).float().log_softmax(-1)).sum())
    return total
