"""The original kept on disk: what is read is what it said, training goes as with it; done once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.distill import teacher as module
from compress.distill.knobs import Distill
from compress.distill.losses import States, Top
from compress.distill.stage import distill, open_accelerator
from compress.distill.teacher import CachedTeacher, Rows, fill_cache, open_teacher
from compress.errors import UserError
from compress.model.folder import ModelFolder
from tests.distill import CPU, measured, narrowed, same_weights

KNOBS = Distill(
    steps=12, batch=4, micro_batch=2, rate=2e-3, log_every=4, teacher="cached", top_k=20
)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(256, (17, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair(
    make_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelFolder, ModelFolder]:
    original = make_model(dtype="float32")
    return original, narrowed(original, tmp_path_factory.mktemp("narrowed") / "model")


def test_what_is_read_is_what_it_said(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path, monkeypatch: Any
) -> None:
    """Rows in any order, from several files."""
    monkeypatch.setattr(module, "GROUP", 3)
    original, _ = pair
    knobs = replace(KNOBS, temperature=2.0)
    rows = Rows(torch.tensor([16, 3, 9, 0, 12, 5, 7]), torch.tensor([2, 11]))
    fill_cache(tmp_path / "c", original, blocks, rows, knobs, open_accelerator(CPU), CPU)
    assert len(list((tmp_path / "c").glob("group-*.safetensors"))) == 4
    asked = torch.tensor([7, 16, 0])
    goal = CachedTeacher(tmp_path / "c", rows, CPU)(asked, blocks[asked]).goal
    assert isinstance(goal, Top)
    live = open_teacher(original, None, knobs, CPU)(asked, blocks[asked]).goal
    assert isinstance(live, States)
    logits = live.states @ live.head.T
    log_p, tokens = (logits / 2).log_softmax(-1).topk(20)
    assert torch.equal(goal.tokens.long(), tokens)
    assert torch.allclose(goal.log_p, log_p, atol=1e-5)
    assert torch.allclose(goal.log_tail.exp(), 1 - log_p.exp().sum(-1), atol=1e-5)
    labels = torch.nn.functional.pad(blocks[asked][:, 1:], (0, 1), value=-100).flatten()
    assert torch.allclose(goal.nll(labels), live.nll(labels), rtol=1e-5)
    # What is looked at is kept at temperature 1.
    held = CachedTeacher(tmp_path / "c", rows, CPU)(rows.held, blocks[rows.held]).goal
    live = open_teacher(original, None, knobs, CPU)(rows.held, blocks[rows.held]).goal
    assert isinstance(held, Top)
    assert isinstance(live, States)
    log_p = (live.states @ live.head.T).log_softmax(-1).topk(20).values
    assert torch.allclose(held.log_p, log_p, atol=1e-5)


def test_what_is_told_of_held_out_text(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path
) -> None:
    """The divergence at temperature 1, or what of it the kept tokens show, and which of the two."""
    original, student = pair
    knobs = replace(KNOBS, steps=1, temperature=2.0)
    exact = measured(student, original, blocks[[15]])[0]
    found = []
    for k in (320, 20):
        target, state = tmp_path / f"t{k}", tmp_path / f"s{k}"
        report = distill(student, original, target, state, blocks, replace(knobs, top_k=k), CPU)
        assert report["held_out_top_k"] == k
        found.append(report["held_out"][0]["kl"])
    assert found[0] == pytest.approx(exact, rel=1e-3)
    assert found[1] < 0.99 * exact


@pytest.mark.parametrize("left", [None, "", '{"text": '])
def test_a_kill_while_the_cache_began(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path, left: str | None
) -> None:
    """No fingerprint, an empty or a broken one: it is made anew, without what was half written."""
    original, student = pair
    folder = tmp_path / "s" / "teacher"
    folder.mkdir(parents=True)
    if left is not None:
        (folder / "fingerprint.json").write_text(left)
    knobs = replace(KNOBS, steps=1)
    distill(student, original, tmp_path / "a", tmp_path / "s", blocks, knobs, CPU)
    (folder / "group-00000.123.partial").write_text("half")
    distill(student, original, tmp_path / "b", tmp_path / "s", blocks, knobs, CPU)
    names = {file.name for file in folder.iterdir()}
    assert names == {"fingerprint.json", "group-00000.safetensors", "group-00001.safetensors"}
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_with_all_tokens_it_is_the_live_training(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path
) -> None:
    original, student = pair
    reports = [
        distill(student, original, tmp_path / name, tmp_path / f"{name}-s", blocks, knobs, CPU)
        for name, knobs in (
            ("live", replace(KNOBS, teacher="live", log_every=1)),
            ("all", replace(KNOBS, top_k=320, log_every=1)),
            ("few", replace(KNOBS, log_every=1)),
        )
    ]
    live, whole, few = ([point["kl"] for point in report["curve"]] for report in reports)
    # The first step is taken from the same weights; Adam makes more of the last bits from step to step.
    assert whole[0] == pytest.approx(live[0], rel=1e-6)
    assert whole[1:4] == pytest.approx(live[1:4], rel=0.02)
    # A lower bound, and a training that works.
    assert few[0] < live[0]
    assert few[-1] < 0.8 * few[0]
    nlls = [report["original_nll"] for report in reports]
    assert nlls == pytest.approx([nlls[0]] * 3, rel=1e-5)


def test_the_cache_is_made_once(
    pair: tuple[ModelFolder, ModelFolder],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A second training with the same state folder does not run the original; another text makes it anew."""
    monkeypatch.setattr(module, "GROUP", 4)
    original, student = pair
    state = tmp_path / "s"
    distill(student, original, tmp_path / "a", state, blocks, KNOBS, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_teacher", None)
        distill(student, original, tmp_path / "b", state, blocks, KNOBS, CPU)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    # What a killed process left out is filled in.
    files = sorted((state / "teacher").glob("group-*.safetensors"))
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    distill(student, original, tmp_path / "c", state, blocks, KNOBS, CPU)
    assert [file.read_bytes() for file in files] == before
    assert "made anew" not in caplog.text
    distill(student, original, tmp_path / "d", state, blocks + 1, KNOBS, CPU)
    assert "is not of this run: it is made anew" in caplog.text
    assert files[1].read_bytes() != before[1]


def test_only_what_the_budget_sees_is_kept(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "GROUP", 1)
    original, student = pair
    knobs = replace(KNOBS, steps=2)
    distill(student, original, tmp_path / "a", tmp_path / "s", blocks, knobs, CPU)
    # Two batches of 4, and the sequence that is held out.
    assert len(list((tmp_path / "s" / "teacher").glob("group-*.safetensors"))) == 9


def test_more_than_the_vocabulary_is_refused(
    pair: tuple[ModelFolder, ModelFolder], blocks: Tensor, tmp_path: Path
) -> None:
    original, student = pair
    knobs = replace(KNOBS, top_k=321)
    with pytest.raises(UserError, match=r"top_k=321 is not allowed: choose at most the 320"):
        distill(student, original, tmp_path / "a", tmp_path / "s", blocks, knobs, CPU)
