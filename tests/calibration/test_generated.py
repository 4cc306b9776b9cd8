"""Text a model writes: whole length, seeded, with its own start, and the caller's randomness untouched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibration.generated import _continued, generated_tokens
from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense


class Starting:
    """Stands for a tokenizer of 40 tokens whose texts begin with token 7."""

    bos_token_id = 7

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[7, 1])

    def __len__(self) -> int:
        return 40


def test_seeded_and_whole(tiny: ModelFolder) -> None:
    model = load_dense(tiny, torch.device("cpu"), torch.float32)
    before = torch.random.get_rng_state()
    made = [
        generated_tokens(model, sequences=5, length=20, tokenizer=Starting(), seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert made[0].shape == (5, 20)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert (made[0][:, 0] == 7).all()
    assert len(made[0][:, 1].unique()) > 1, "the first token after the start is random"
    assert (made[0][:, 1] < 40).all(), "rows beyond the tokenizer's are untrained"
    end = tiny.config["eos_token_id"]
    assert not (made[0][:, 2:] == end).any(), "a sequence that ends early would be padded"


@pytest.mark.parametrize("length", [1, 2])
def test_no_room_to_write(tiny: ModelFolder, length: int) -> None:
    model = load_dense(tiny, torch.device("cpu"), torch.float32)
    made = generated_tokens(model, sequences=3, length=length, tokenizer=Starting(), seed=0)
    assert made.shape == (3, length)


def test_tokens_follow_the_models_distribution(tiny: ModelFolder) -> None:
    """The frequencies of what comes next, against the softmax."""
    model = load_dense(tiny, torch.device("cpu"), torch.float32)
    end = tiny.config["eos_token_id"]
    rows = torch.tensor([[65, 66]]).expand(20_000, 2)
    made = _continued(model, rows, 3, torch.Generator().manual_seed(0))
    logits = model(rows[:1]).logits[0, -1]
    logits[end] = -torch.inf
    expected = logits.softmax(-1)
    counts = made[:, 2].bincount(minlength=len(expected))
    assert counts[end] == 0
    spread = (expected * (1 - expected) / len(rows)).sqrt().clamp(min=1e-4)
    assert ((counts / len(rows) - expected).abs() < 5 * spread).all()
    assert expected.max() > 0.02, "a flat distribution would show nothing"
