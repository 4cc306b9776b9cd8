"""Repair of a model that lost neurons: what is trained, written, reported, refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from torch import Tensor

from calibration.tokens import held_out
from compress.distill import stage, training
from compress.distill.knobs import Distill
from compress.distill.stage import check_launch, distill, open_accelerator
from compress.distill.student import open_student
from compress.distill.teacher import open_teacher
from compress.distill.training import Text, Training
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense
from tests.distill import CPU, measured, narrowed

SHORT = Distill(steps=24, batch=4, micro_batch=2, rate=2e-3, log_every=8, save_every=10)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(256, (33, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair(
    make_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[ModelFolder, ModelFolder]]:
    """pair(model_type, **changes) -> (original, student)"""
    built: dict[str, tuple[ModelFolder, ModelFolder]] = {}

    def make(model_type: str = "llama", **changes: Any) -> tuple[ModelFolder, ModelFolder]:
        key = repr((model_type, sorted(changes.items())))
        if key not in built:
            original = make_model(model_type, **changes)
            path = tmp_path_factory.mktemp("narrowed") / "model"
            built[key] = original, narrowed(original, path)
        return built[key]

    return make


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {}),
        ("llama", {"dtype": "float32"}),
    ],
)
def test_the_student_comes_nearer(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
) -> None:
    original, student = pair(model_type, **changes)
    target = tmp_path / "target"
    report = distill(student, original, target, tmp_path / "state", blocks, SHORT, CPU)
    written = ModelFolder(target)

    assert written.config == student.config
    assert written.names == student.names
    assert {p.name for p in target.iterdir()} == {p.name for p in student.path.iterdir()}
    for name in student.names:
        old, new = student.tensor(name), written.tensor(name)
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert not torch.equal(old, new), name

    held = blocks[[15, 31]]
    start, end = measured(student, original, held), measured(written, original, held)
    assert end[0] < 0.9 * start[0]
    tolerance = 1e-3 if changes.get("dtype") == "float32" else 0.06
    for row, (kl, nll) in ((0, start), (-1, end)):
        assert report["held_out"][row]["kl"] == pytest.approx(kl, rel=tolerance)
        assert report["held_out"][row]["nll"] == pytest.approx(nll, rel=tolerance)
    own = measured(original, original, held)[1]
    assert report["original_nll"] == pytest.approx(own, rel=tolerance)


def test_held_out_text_is_told_of_at_temperature_1(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor, tmp_path: Path
) -> None:
    """Whatever is trained."""
    original, student = pair(dtype="float32")
    knobs = replace(SHORT, steps=1, temperature=3.0, ce=0.5)
    report = distill(student, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    kl, nll = measured(student, original, blocks[[15, 31]])
    assert report["held_out"][0]["kl"] == pytest.approx(kl, rel=1e-3)
    assert report["held_out"][0]["nll"] == pytest.approx(nll, rel=1e-3)
    assert report["held_out_top_k"] is None


def test_the_report(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor, tmp_path: Path
) -> None:
    original, student = pair()
    knobs = replace(SHORT, steps=None, tokens=20 * 4 * 24 + 1)
    report = distill(student, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    assert report["steps"] == 21
    assert report["tokens"] == 21 * 4 * 24
    assert report["epochs"] == pytest.approx(21 * 4 / 31)
    assert report["processes"] == 1
    assert report["held_out_sequences"] == 2
    weights = sum(student.tensor(name).numel() for name in student.names)
    assert report["parameters"] == weights
    assert [point["step"] for point in report["curve"]] == [8, 16, 21]
    assert [point["step"] for point in report["held_out"]] == [0, 6, 12, 18, 21]
    assert report["curve"][0]["loss"] > report["curve"][-1]["loss"]
    assert report["curve"][-1]["tokens"] == report["tokens"]
    for point in report["curve"]:
        assert point["kl"] == pytest.approx(point["loss"])
        assert point["ce"] > 0
        assert point["tokens_per_s"] > 0
    # Warmed up over one step, then down to a tenth.
    assert report["curve"][0]["rate"] < 2e-3
    assert report["curve"][-1]["rate"] == pytest.approx(2e-4, rel=0.1)
    assert 0 < report["seconds"] < 60


@pytest.mark.parametrize(
    ("weights", "falls"),
    [
        ({"kl": 0.0, "ce": 1.0}, "ce"),
        ({"kl": 0.0, "hidden": 1.0}, "hidden"),
        ({"kl": 1.0, "ce": 0.5, "hidden": 2.0}, "kl"),
    ],
)
def test_each_loss_is_lowered_by_its_weight(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    weights: dict[str, float],
    falls: str,
) -> None:
    original, student = pair(dtype="float32")
    # Few sequences: the text is random, only what was seen can be told.
    knobs = replace(SHORT, **weights, steps=30, log_every=5)
    report = distill(student, original, tmp_path / "t", tmp_path / "s", blocks[:9], knobs, CPU)
    first, last = report["curve"][0], report["curve"][-1]
    assert last[falls] < 0.9 * first[falls]
    for point in report["curve"]:
        parts = knobs.kl * point["kl"] + knobs.ce * point["ce"] + knobs.hidden * point["hidden"]
        assert point["loss"] == pytest.approx(parts, rel=1e-5)
    assert (first["hidden"] > 0) == (knobs.hidden > 0)


def training_of(original: ModelFolder, student: ModelFolder, text: Tensor, knobs: Distill) -> Any:
    model = open_student(student, knobs, CPU)
    teacher = open_teacher(original, None, knobs, CPU)
    return Training(model, teacher, Text(text, *held_out(len(text))), knobs, open_accelerator(CPU))


def gradient_of(run: Any, rows: Tensor) -> Tensor:
    run.gradients(rows)
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def test_pieces_of_a_batch_are_one_batch(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor
) -> None:
    """The gradient of a batch in pieces of 1, 3 and 8 sequences, and that of autograd over all logits."""
    original, student = pair(dtype="float32", tie_word_embeddings=False)
    rows = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    found = []
    for size in (1, 3, 8):
        knobs = replace(SHORT, micro_batch=size, ce=0.5)
        run = training_of(original, student, blocks, knobs)
        found.append(gradient_of(run, rows))

    model = run.model
    model.zero_grad()
    tokens = blocks[rows]
    with torch.no_grad():
        log_p = run.teacher.model(tokens).logits.log_softmax(-1)
    log_q = model.model(tokens).logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    nll = -log_q[:, :-1].gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
    (kl + 0.5 * nll).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    for gradient in found:
        assert (gradient - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_steps_are_those_of_a_plain_loop(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor, clip: float
) -> None:
    """Three steps, each with another rate, against AdamW on autograd's own gradients, clipped or not."""
    original, student = pair(dtype="float32")
    knobs = replace(SHORT, clip=clip)
    run = training_of(original, student, blocks, knobs)
    plain = load_dense(student, CPU, torch.float32).requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, rate in enumerate((1e-3, 2e-3, 5e-4)):
        rows = torch.arange(4) + 4 * step
        run.gradients(rows)
        run.update(rate)
        with torch.no_grad():
            log_p = run.teacher.model(blocks[rows]).logits.log_softmax(-1)
        log_q = plain(blocks[rows]).logits.log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    start = load_dense(student, CPU, torch.float32)
    for name, expected in plain.named_parameters():
        found = run.model.model.get_parameter(name).detach()
        moved = (expected - start.get_parameter(name)).norm()
        assert moved > 0
        assert (found - expected).norm() < 0.02 * moved, name


@torch.no_grad()
def test_a_look_has_logits_in_float32(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor
) -> None:
    """The states are those of a training in 16 bits, their distributions are not rounded again."""
    original, student = pair()
    run = training_of(original, student, blocks, SHORT)
    tokens = blocks[run.text.held]
    with torch.autocast("cpu", torch.bfloat16):
        H = run.model.model.model(input_ids=tokens).last_hidden_state
    theirs = run.teacher.states(tokens)
    log_q = (H.double() @ run.model.model.lm_head.weight.double().T).log_softmax(-1).flatten(0, 1)
    log_p = (theirs.states.double() @ theirs.head.double().T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert run._held_out()[0] == pytest.approx(float(kl), rel=1e-5)


def test_checkpointing_changes_nothing(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor
) -> None:
    original, student = pair()
    found = [
        gradient_of(
            training_of(original, student, blocks, replace(SHORT, checkpointing=again)),
            torch.arange(4),
        )
        for again in (False, True)
    ]
    assert torch.equal(*found)


def test_only_matrices_decay(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor
) -> None:
    original, student = pair("qwen2")
    run = training_of(original, student, blocks, replace(SHORT, weight_decay=0.1))
    decays = {
        p: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]
    }
    for name, p in run.model.named_parameters():
        assert decays[p] == (0.0 if "norm" in name or "bias" in name else 0.1), name


def test_a_worse_end_is_told(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original, _ = pair()
    knobs = replace(SHORT, steps=2, rate=0.5, kl=0.0, ce=1.0)
    report = distill(original, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    # The same model, but for where bf16 rounds.
    assert report["held_out"][0]["kl"] < 0.02
    assert "distill made held-out text worse: kl" in caplog.text


def test_a_loss_that_is_not_finite(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]], blocks: Tensor, tmp_path: Path
) -> None:
    original, student = pair(dtype="float32")
    knobs = replace(SHORT, rate=1e30)
    with pytest.raises(UserError, match=r"not finite at step 8: lower distill\.rate"):
        distill(student, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    assert not (tmp_path / "t").exists()


def test_what_is_refused(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    make_model: Callable[..., ModelFolder],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    original, student = pair()
    half, other = make_model(dtype="float16"), make_model(vocab_size=352)
    fewer = make_model(num_hidden_layers=2)
    exported = ModelFolder(original.path)
    exported.config = {**original.config, "quantization_config": {}}
    for folder, text, knobs, message in (
        (half, blocks, SHORT, "bfloat16 or float32"),
        (other, blocks, SHORT, "vocabulary of 352, the original one of 320"),
        (student, blocks[:1], SHORT, "out of 1: choose a longer text"),
        (student, blocks, replace(SHORT, optimizer="adamw8bit"), "needs a CUDA device"),
        (exported, blocks, SHORT, "exported checkpoint"),
        (student, torch.zeros(4, 257, dtype=torch.int64), SHORT, r"length=257 .* takes 256"),
        (fewer, blocks, replace(SHORT, hidden=1.0), r"has 2 x 128, the original 3 x 128"),
    ):
        with pytest.raises(UserError, match=message):
            distill(folder, original, tmp_path / "t", tmp_path / "s", text, knobs, CPU)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"batch=4 cannot be shared by 3 processes"):
        SHORT.check(original, CPU, blocks, processes=3)


@pytest.mark.parametrize(
    ("kind", "fsdp2", "knobs", "message"),
    [
        (DistributedType.FSDP, False, SHORT, r"launched under FSDP: choose one process, several"),
        (DistributedType.DEEPSPEED, False, SHORT, r"launched under DEEPSPEED: choose one process"),
        (DistributedType.FSDP, True, replace(SHORT, optimizer="adamw8bit"), "cannot be sharded"),
        (DistributedType.FSDP, True, SHORT, None),
        (DistributedType.MULTI_GPU, False, replace(SHORT, optimizer="adamw8bit"), None),
        (DistributedType.MULTI_CPU, False, SHORT, None),
        (DistributedType.NO, False, SHORT, None),
    ],
)
def test_ways_to_be_launched(kind: Any, fsdp2: bool, knobs: Distill, message: str | None) -> None:
    launched = SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_launch(launched, knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "distill needs a budget: choose one of tokens, steps, minutes"),
        ({"steps": 1, "tokens": 2}, "distill.tokens and distill.steps are two budgets"),
        ({"steps": 0}, r"distill.steps=0 is not allowed: choose more than 0"),
        ({"minutes": -1.0}, r"distill.minutes=-1.0 is not allowed"),
        ({"steps": 1, "batch": 0}, "distill.batch=0"),
        ({"steps": 1, "length": 1}, "distill.length=1 is not allowed: choose 2 or more"),
        ({"steps": 1, "rate": 0.0}, "distill.rate=0.0"),
        ({"steps": 1, "ce": -1.0}, "distill.ce=-1.0 is not allowed: choose 0 or more"),
        ({"steps": 1, "warmup": 1.5}, "distill.warmup=1.5 is not allowed: choose 0 to 1"),
        ({"steps": 1, "optimizer": "sgd"}, "choose adamw, adamw8bit"),
        ({"steps": 1, "teacher": "dead"}, "choose live, cached"),
        ({"steps": 1, "kl": 0.0}, "distill has no loss"),
        ({"steps": 1, "hidden": 1.0, "teacher": "cached"}, "set distill.teacher=live"),
        ({"minutes": 1.0, "teacher": "cached"}, r"set distill.tokens or distill.steps"),
    ],
)
def test_wrong_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distill(**knobs)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def let(self, patch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Let a call of this take so long."""
        before = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.time += seconds
            return before(*args, **kwargs)

        patch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("minutes", "save_every"), [(5.0, 1000), (5.0, 2), (0.4, 1000), (0.1, 1000)]
)
def test_minutes(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    save_every: int,
) -> None:
    """What takes 4 s a step, 3 s a look and 6 s a save ends within the minutes, and not long before."""
    clock = Clock()
    monkeypatch.setattr(training, "now", clock)
    clock.let(monkeypatch, stage, "open_student", 2.0)
    clock.let(monkeypatch, Training, "gradients", 3.0)
    clock.let(monkeypatch, Training, "update", 1.0)
    clock.let(monkeypatch, Training, "_held_out", 3.0)
    clock.let(monkeypatch, training.State, "save", 6.0)
    original, student = pair()
    knobs = replace(SHORT, steps=None, minutes=minutes, save_every=save_every)
    start = clock()
    report = distill(student, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    spent = clock() - start
    assert report["seconds"] == pytest.approx(spent)
    if minutes == 5.0:
        assert 0.85 * 300 < spent <= 300
        # Looks and saves are not of the speed.
        assert report["tokens_per_s"] == pytest.approx(4 * 24 / 4, rel=0.001)
    else:
        # Too short for more than the first steps.
        assert report["steps"] <= 3
    assert report["curve"][-1]["step"] == report["held_out"][-1]["step"] == report["steps"]


def test_what_happens_once_is_no_cost_of_a_look(
    pair: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one takes a minute more than the others: the original's pass, what is compiled."""
    clock = Clock()
    monkeypatch.setattr(training, "now", clock)
    clock.let(monkeypatch, Training, "gradients", 4.0)
    look = Training._held_out

    def first_slow(self: Training) -> tuple[float, float]:
        clock.time += 3.0 if self._held else 63.0
        return look(self)

    monkeypatch.setattr(Training, "_held_out", first_slow)
    original, student = pair()
    knobs, start = replace(SHORT, steps=None, minutes=5.0, save_every=1000), clock()
    distill(student, original, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)
    assert 0.85 * 300 < clock() - start <= 300
