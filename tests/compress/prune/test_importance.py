"""Which structures stay, by hand."""

from __future__ import annotations

import pytest
import torch

from compress.prune.importance import (
    Sizes,
    activation_score,
    keep_heads,
    keep_structures,
    magnitude_score,
    random_score,
)
from compress.prune.regression import Regression, Surgery


def test_sizes_are_minitrons_aggregation() -> None:
    """Two sequences of two positions, two structures of two inputs."""
    X = torch.tensor([[[3.0, 4, 0, 1], [0, 0, 0, 1]], [[0, 0, 2, 0], [6, 8, 2, 0]]])
    sizes = Sizes(2, X.device)
    sizes.add(X[:1])
    sizes.add(X[1:])
    # Norms 5, 0 and 0, 10: means over positions 2.5, 5; root mean square over sequences.
    first = ((2.5**2 + 5**2) / 2) ** 0.5
    assert sizes.mean().tolist() == pytest.approx([first, ((1 + 4) / 2) ** 0.5])
    score = activation_score(sizes.mean(), 4)
    assert keep_structures(torch.arange(4).view(2, 2), 1, score).tolist() == [0]


def test_magnitudes_are_norms_of_all_weights() -> None:
    maker, reader = torch.tensor([[1.0, 2], [0, 0], [3, 0]]), torch.tensor([[0.0, 3, 1], [0, 4, 0]])
    score = magnitude_score([maker], reader)
    assert score(torch.tensor([[0], [1], [2]])).tolist() == pytest.approx([5**0.5, 5, 10**0.5])
    assert keep_structures(torch.tensor([[0], [1], [2]]), 2, score).tolist() == [1, 2]


def test_random_choices_follow_their_seed() -> None:
    def kept(seed: int) -> list[int]:
        score = random_score(torch.Generator().manual_seed(seed))
        return keep_structures(torch.arange(64).unsqueeze(1), 32, score).tolist()

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


def test_every_group_keeps_as_many_heads() -> None:
    """Four groups of three heads of two inputs: scores by head."""
    scores = torch.tensor([9.0, 8, 7, 1, 2, 3, 6, 6.5, 5, 0, 0, 0])
    groups = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    kept = keep_heads(
        groups, 2, left_groups=3, left_per_group=2, score=activation_score(scores, 24)
    )
    assert kept == [[0, 1], [4, 5], [6, 7], []]


def test_surgery_keeps_as_many_heads_too() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    found = Regression.zeros(24, 6, X.device)
    found.add(X, X @ torch.randn(24, 6, generator=generator), torch.ones(500))
    groups = [list(range(g * 3, g * 3 + 3)) for g in range(4)]
    kept = keep_heads(groups, 2, left_groups=3, left_per_group=2, score=Surgery(found.mean(), 1e-4))
    assert sorted(map(len, kept)) == [0, 2, 2, 2]
    assert all(set(left) <= set(group) for left, group in zip(kept, groups, strict=True))
