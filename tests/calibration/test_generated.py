"""Text a model writes: whole length, seeded, with its own start, and the caller's randomness untouched."""

from __future__ import annotations

import torch

from calibration.generated import generated_tokens
from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense


def test_seeded_and_whole(tiny: ModelFolder) -> None:
    model = load_dense(tiny, torch.device("cpu"), torch.float32)
    before = torch.random.get_rng_state()
    made = [
        generated_tokens(model, sequences=5, length=20, prefix=[7], seed=seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert made[0].shape == (5, 20)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert (made[0][:, 0] == 7).all()
    assert len(made[0][:, 1].unique()) > 1, "the first token after the start is random"
    end = tiny.config["eos_token_id"]
    assert not (made[0][:, 2:] == end).any(), "a sequence that ends early would be padded"
