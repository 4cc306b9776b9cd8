"""Draws have the probabilities they should have."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UserError
from compress.runtime.sampling import Sampling


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    draws = sampling.pick(logits.expand(40_000, 4), generator)
    found = draws.bincount(minlength=4) / len(draws)
    wanted = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(found, wanted, atol=0.01)


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = Sampling(temperature=1, top_k=2).probabilities(logits)
    assert torch.allclose(kept, torch.tensor([[0, 4 / 7, 0, 3 / 7]]))
    # 0.4 + 0.3 reach 0.65; the first alone does not.
    nucleus = Sampling(temperature=1, top_p=0.65).probabilities(logits)
    assert (nucleus > 0).tolist() == [[False, True, False, True]]
    first = Sampling(temperature=1, top_p=0.01).probabilities(logits)
    assert (first > 0).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 2}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        Sampling(**wrong)
