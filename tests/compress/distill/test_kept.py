"""States of a pruned model against those of its original: which block with which, which channels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.distill.kept import kept_of
from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.distill.student import open_student
from compress.distill.teacher import open_teacher
from compress.errors import UserError
from compress.model.folder import PRUNED, ModelFolder
from compress.runtime.load import load_dense
from tests.distill import CPU

KNOBS = Distill(steps=2, batch=2, micro_batch=2, kl=0.0, hidden=1.0, log_every=1)
CHANNELS = [*range(3, 128, 4), *range(0, 128, 2)]


@pytest.fixture
def pruned(make_model: Callable[..., ModelFolder], tmp_path: Path) -> Callable[..., ModelFolder]:
    """pruned(note, **shape): a model of this shape whose prune.json says this"""

    def make(note: dict[str, Any], **shape: Any) -> ModelFolder:
        source = make_model(dtype="float32", **shape)
        path = tmp_path / "pruned"
        path.mkdir()
        for file in source.path.iterdir():
            (path / file.name).symlink_to(file)
        (path / PRUNED).write_text(json.dumps(note))
        return ModelFolder(path)

    return make


@torch.no_grad()
def states_of(folder: ModelFolder, tokens: Tensor) -> list[Tensor]:
    """Of the embedding and after every block, without the final norm."""
    model, found = load_dense(folder, CPU, torch.float32), []
    model.model.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    states = model(tokens, output_hidden_states=True).hidden_states
    return [*states[:-1], *found]


@pytest.mark.parametrize(
    ("note", "shape", "compared"),
    [
        ({"layers": [0, 1, 2], "hidden": None}, {}, [1, 2, 3]),
        ({"layers": [0, 2], "hidden": None}, {"num_hidden_layers": 2}, [2, 3]),
        ({"layers": [1], "hidden": None}, {"num_hidden_layers": 1}, [3]),
        (
            {"layers": [0, 1], "hidden": CHANNELS},
            {"num_hidden_layers": 2, "hidden_size": 96, "head_dim": 32},
            [1, 3],
        ),
    ],
)
def test_states_are_compared_with_those_they_stand_for(
    make_model: Callable[..., ModelFolder],
    pruned: Callable[..., ModelFolder],
    tokens: Tensor,
    note: dict[str, Any],
    shape: dict[str, Any],
    compared: list[int],
) -> None:
    """compared: how many blocks of the original come before each of its states that is looked at"""
    original, source = make_model(dtype="float32"), pruned(note, **shape)
    channels = note["hidden"] or slice(None)
    ours, theirs = states_of(source, tokens)[1:], states_of(original, tokens)
    errors = []
    for state, index in zip(ours, compared, strict=True):
        S, T = state.double(), theirs[index][..., channels].double()
        errors.append(((S - T) ** 2).sum(-1) / (T**2).sum(-1))
    expected = torch.stack(errors).mean()

    teacher = open_teacher(original, kept_of(source, original, CPU), KNOBS, CPU)
    student = open_student(source, KNOBS, CPU)
    found = student(tokens, teacher(torch.arange(6), tokens))
    assert float(found.hidden) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(found.loss.detach(), found.hidden)


def test_a_block_that_was_not_pruned_is_already_there(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    original = make_model(dtype="float32")
    blocks = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(2))
    report = distill(original, original, tmp_path / "t", tmp_path / "s", blocks, KNOBS, CPU)
    assert report["curve"][0]["hidden"] < 1e-9


def test_the_note_goes_along(
    make_model: Callable[..., ModelFolder], pruned: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    note = {"layers": [0, 2], "hidden": None}
    source, original = pruned(note, num_hidden_layers=2), make_model(dtype="float32")
    blocks = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(2))
    distill(source, original, tmp_path / "t", tmp_path / "s", blocks, KNOBS, CPU)
    assert json.loads((tmp_path / "t" / PRUNED).read_text()) == note


def test_a_note_that_does_not_fit(
    make_model: Callable[..., ModelFolder], pruned: Callable[..., ModelFolder]
) -> None:
    source = pruned({"layers": [0], "hidden": None}, num_hidden_layers=2)
    with pytest.raises(UserError, match="keeps 1 x 128 blocks and channels, the model has 2 x 128"):
        kept_of(source, make_model(dtype="float32"), CPU)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"layers": [1, 3], "hidden": None}, "keeps block 3 of an original that has 3"),
        ({"layers": 2, "hidden": None}, "layers is no list of whole numbers"),
        ({"layers": ["0", 2], "hidden": None}, "layers is no list of whole numbers"),
        ({"layers": [0, 2], "hidden": [True] * 128}, "hidden is no list of whole numbers"),
        ({"layers": [-1, 2], "hidden": None}, "keeps block -1 of an original that has 3"),
        (
            {"layers": [0, 1], "hidden": [*range(95), 128]},
            "keeps channel 128 of an original that has 128",
        ),
    ],
)
def test_a_note_of_another_original(
    make_model: Callable[..., ModelFolder],
    pruned: Callable[..., ModelFolder],
    note: dict[str, Any],
    message: str,
) -> None:
    shape: dict[str, int] = {"num_hidden_layers": 2}
    if note["hidden"] is not None:
        shape |= {"hidden_size": 96, "head_dim": 32}
    with pytest.raises(UserError, match=message):
        kept_of(pruned(note, **shape), make_model(dtype="float32"), CPU)


def test_an_original_that_was_pruned_itself(pruned: Callable[..., ModelFolder]) -> None:
    """Its note travels to a model of its own shape, whose blocks and channels are all there."""
    source = pruned({"layers": [0, 2], "hidden": list(range(128))}, num_hidden_layers=2)
    found = kept_of(source, source, CPU)
    assert (found.layers, found.channels, found.compared) == ((0, 1), None, [0, 1])
