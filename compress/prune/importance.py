"""Which heads, groups, and neurons of a block stay: four ways to tell what matters.

``error``: those whose absence the others cannot make up for (see regression.py), one after the other.
``activation``: those with the largest outputs (Minitron, arXiv 2407.14679, section 2.2): the mean over
positions, the root of the mean square over sequences. ``magnitude``: those with the largest weights.
``random``: seeded, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.processes import ALONE, Team
from compress.prune.regression import Surgery
from compress.prune.shape import elements

IMPORTANCES = ("error", "activation", "magnitude", "random")
# Scores (structures,) of structures (structures, inputs of each).
Score = Callable[[Tensor], Tensor]


def keep_structures(structures: Tensor, count: int, score: Score | Surgery) -> Tensor:
    """The numbers of the ``count`` structures that stay, sorted."""
    if isinstance(score, Surgery):
        return score.thin(structures, count)
    return score(structures).topk(count).indices.sort().values


def keep_heads(
    groups: list[list[int]],
    head_dim: int,
    *,
    left_groups: int,
    left_per_group: int,
    score: Score | Surgery,
) -> list[list[int]]:
    """Which query heads stay, by group: whole groups go first, then heads, as many in every group that is
    left.

    groups: query heads that share keys and values, as many in each; a group that goes is returned empty
    """
    channels = torch.stack([elements(heads, head_dim) for heads in groups])
    stay = keep_structures(channels, left_groups, score).tolist()
    left = [list(heads) if g in stay else [] for g, heads in enumerate(groups)]
    if isinstance(score, Surgery):
        _thin_groups(score, left, head_dim, left_per_group)
        return left
    for g in stay:
        scores = score(torch.stack([elements([head], head_dim) for head in left[g]]))
        best = scores.topk(left_per_group).indices.sort().values
        left[g] = [left[g][i] for i in best.tolist()]
    return left


def _thin_groups(surgery: Surgery, left: list[list[int]], head_dim: int, count: int) -> None:
    """Take one head after the other, wherever it costs least, but leave ``count`` in every group."""
    while open_to := [head for heads in left if len(heads) > count for head in heads]:
        per_head = torch.stack([elements([head], head_dim) for head in open_to])
        least = int(surgery.costs(per_head).argmin())
        surgery.remove(per_head[least])
        next(heads for heads in left if open_to[least] in heads).remove(open_to[least])


class Sizes:
    """How large the outputs of structures are: Minitron's aggregation, L2 within a structure and over the
    sequences, mean over positions."""

    def __init__(self, structures: int, device: torch.device):
        self._squares = torch.zeros(structures, device=device, dtype=torch.float64)
        self._sequences = 0

    def add(self, x: Tensor) -> None:
        """x (sequences, length, in): equal parts of ``in`` are the structures, in order."""
        parts = x.float().unflatten(-1, (len(self._squares), -1))
        self._squares += parts.norm(dim=-1).mean(1).double().square().sum(0)
        self._sequences += len(x)

    def mean(self, team: Team = ALONE) -> Tensor:
        """(structures,). team: the processes that added sequences"""
        squares = team.sum(self._squares.clone())
        return (squares / sum(team.exchange(self._sequences))).sqrt()


def activation_score(sizes: Tensor, inputs: int) -> Score:
    """sizes: of the smallest structures, as ``Sizes`` gives them; larger ones take theirs together."""
    each = sizes.square().repeat_interleave(inputs // len(sizes))
    return lambda structures: each[structures].sum(1).sqrt()


def magnitude_score(rows: list[Tensor], columns: Tensor) -> Score:
    """The norm of all weights of a structure. rows: linears (structure inputs, in) that make it, columns
    (out, structure inputs): the linear that reads it."""
    squares = columns.double().square().sum(0)
    for W in rows:
        squares = squares + W.double().square().sum(1)
    return lambda structures: squares[structures].sum(1).sqrt()


def random_score(generator: torch.Generator) -> Score:
    return lambda structures: torch.rand(len(structures), generator=generator)
