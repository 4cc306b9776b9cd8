"""Divergence by position and greedy agreement, with readers whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eval.context import PIECE, agreement, by_position

VOCABULARY = 5


class Counting:
    """Says that t + 1 follows t; from the token ``wrong_from`` on it is ``sure`` of something else."""

    nbytes = 100

    def __init__(self, wrong_from: int = 10**9, sure: float = 0.0, wrong_to: int = 10**9):
        self.seen, self.wrong_from, self.sure, self.wrong_to = 0, wrong_from, sure, wrong_to

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        for i, column in enumerate(tokens.T.tolist()):
            for row, token in enumerate(column):
                logits[row, i, (token + 1) % VOCABULARY] = 2.0
                if self.wrong_from <= self.seen < self.wrong_to:
                    logits[row, i, (token + 2) % VOCABULARY] += self.sure
            self.seen += 1
        return logits

    def fork(self) -> Counting:
        raise AssertionError("nobody forks here")


def test_divergence_is_found_where_it_is() -> None:
    """A candidate that strays in the last quarter of its windows, by a known amount."""
    windows = [torch.arange(4 * PIECE) % VOCABULARY, torch.arange(1, 4 * PIECE + 1) % VOCABULARY]
    found = by_position(
        Counting,
        {"same": Counting, "late": lambda: Counting(3 * PIECE, 1.0)},
        windows,
        buckets=4,
    )
    weights = torch.tensor([math.e**2, 1, 1, 1, 1], dtype=torch.float64)
    other = torch.tensor([math.e**2, math.e, 1, 1, 1], dtype=torch.float64)
    p, q = weights / weights.sum(), other / other.sum()
    expected = float((p * (p / q).log()).sum())
    late = found["late"]
    assert late["bucket_kl"] == pytest.approx([0, 0, 0, expected], abs=1e-6)
    assert late["bucket_kl_stderr"] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert late["bucket_nll_difference"][3] == pytest.approx(float((p[0] / q[0]).log()), abs=1e-5)
    positions = 4 * PIECE - 1
    assert late["kl"] == pytest.approx(expected * (PIECE - 1) / positions, rel=1e-4)
    assert late["top1"] == 1
    assert late["tokens"] == 2 * positions
    assert late["cache_bytes"] == 100
    assert found["same"]["kl"] == pytest.approx(0, abs=1e-7)
    assert found["base"]["perplexity"] == pytest.approx(float(1 / p[0]), rel=1e-5)


def test_every_token_is_seen_once() -> None:
    """Windows that are no multiple of a piece."""
    found = by_position(Counting, {"x": Counting}, [torch.arange(PIECE + 7) % VOCABULARY], 1)
    assert found["x"]["tokens"] == PIECE + 6


@pytest.mark.parametrize("strays", [0, 1, 63, 64, 65, 99, 100])
def test_agreement_ends_at_the_first_difference(strays: int) -> None:
    """``wrong_from`` counts the prompt's tokens: its last one gives the first answer."""
    prompts = torch.arange(PIECE + 3).expand(2, -1) % VOCABULARY
    wrong_from = prompts.shape[1] - 1 + strays
    found = agreement(Counting, {"x": lambda: Counting(wrong_from, 5.0)}, prompts, 100)["x"]
    assert found["lengths"] == [strays, strays]
    assert found["median"] == found["mean"] == strays
    assert found["whole"] == (strays == 100)


def test_what_agrees_again_later_does_not_count() -> None:
    """One token that is another, in the second piece."""
    prompts = torch.arange(PIECE + 3).expand(2, -1) % VOCABULARY
    strays = prompts.shape[1] - 1 + PIECE + 5
    found = agreement(Counting, {"x": lambda: Counting(strays, 5.0, strays + 1)}, prompts, 150)["x"]
    assert found["lengths"] == [PIECE + 5] * 2
