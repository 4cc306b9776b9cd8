"""Repair: the loss and its gradient against autograd in float64, and what may change in a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export import compressed_tensors
from compress.export.audit import audit
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.repair import ROWS, Kl, ScaledNorm, ScaledWeight, divergence
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense

CPU = torch.device("cpu")


def test_divergence_worked_by_hand() -> None:
    # One position, two tokens: the original says 3 to 1, the candidate 1 to 1.
    E = torch.eye(2)
    goal = torch.tensor([[[3.0, 1.0]]]).log()
    loss, gradient = divergence(torch.zeros(1, 1, 2), E, goal, E)
    assert loss == pytest.approx(0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log())
    assert torch.allclose(gradient, torch.tensor([[[0.5 - 0.75, 0.5 - 0.25]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_against_autograd(dtype: torch.dtype) -> None:
    """More positions than have logits at the same time; the two heads differ."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    length = ROWS // 2 - 9
    H, goal, E, goal_head = make(3, length, 16), make(3, length, 16), make(40, 16), make(40, 16)
    loss, gradient = divergence(H, E, goal, goal_head)
    exact = H.double().requires_grad_()
    ours = (exact @ E.double().T).log_softmax(-1)
    theirs = (goal.double() @ goal_head.double().T).log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss == pytest.approx(float(expected.detach()), rel=tolerance)
    assert gradient.dtype == dtype
    assert exact.grad is not None
    assert (gradient.double() - exact.grad).norm() < tolerance * exact.grad.norm()


@pytest.fixture(scope="module")
def decided(
    make_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[ModelFolder, ModelFolder]]:
    """decided(symmetric) -> (original, record) in 3 bits."""
    built: dict[bool, tuple[ModelFolder, ModelFolder]] = {}

    def make(symmetric: bool) -> tuple[ModelFolder, ModelFolder]:
        if symmetric not in built:
            original = make_model("qwen2" if symmetric else "llama")
            target = tmp_path_factory.mktemp("repair") / "record"
            quantize(
                original,
                target,
                tokens=None,
                schemes=Schemes(Scheme(3, 32, symmetric)),
                transforms=[],
                roundings=[Nearest()],
                device=CPU,
            )
            built[symmetric] = original, ModelFolder(target)
        return built[symmetric]

    return make


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_a_scale(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]], symmetric: bool
) -> None:
    source, name = decided(symmetric)[1], "model.layers.1.mlp.down_proj"
    q = record.read_linear(source, name)
    part = ScaledWeight(nn.Linear(q.shape[1], q.shape[0], dtype=torch.bfloat16), source, name)
    part.factor.data.uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(0))
    part.place()
    G = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    part.module.weight.grad = G.clone()
    part.collect()

    factor = part.factor.detach().double().requires_grad_()
    zero = 4 if q.zero is None else q.zero.double().unsqueeze(-1)
    levels = q.codes.double().unflatten(1, (q.scale.shape[1], -1)) - zero
    scale = q.scale.double().unsqueeze(-1) * factor
    weight = (levels * scale).flatten(1)
    (weight * G.double()).sum().backward()
    assert torch.allclose(part.module.weight.double(), weight, rtol=2**-7)
    assert part.module.weight.grad is None, "the next pass must start from nothing"
    assert part.factor.grad is not None
    assert factor.grad is not None
    # Products in bf16, as the weight's own gradient is.
    error = (part.factor.grad.double() - factor.grad).norm() / factor.grad.norm()
    assert error < 2e-2
    stored = part.tensors()[f"{name}.scale"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, scale.squeeze(-1).float().bfloat16())


def test_the_gradient_of_a_norm() -> None:
    norm = nn.RMSNorm(8, dtype=torch.float32)
    norm.weight.data = torch.arange(8.0) - 3
    part = ScaledNorm(norm, "norm")
    part.factor.data.fill_(1.5)
    part.place()
    assert torch.equal(norm.weight, 1.5 * (torch.arange(8.0) - 3))
    norm.weight.grad = torch.full((8,), 2.0)
    part.collect()
    assert torch.equal(part.factor.grad, 2 * (torch.arange(8.0) - 3))
    assert torch.equal(part.tensors()["norm.weight"], norm.weight)


@pytest.fixture(scope="module")
def repaired(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]],
    tokens: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ModelFolder, ModelFolder, ModelFolder, dict[str, Any]]:
    """original, record before, record after, report of a short training."""
    original, before = decided(False)
    target = tmp_path_factory.mktemp("repaired") / "record"
    report = Kl(epochs=4, rate=5e-3, batch=4)(before, original, target, tokens, CPU)
    return original, before, ModelFolder(target), report


def kl(original: ModelFolder, candidate: ModelFolder, tokens: Tensor) -> float:
    """KL of the predictions on these tokens, in float32."""
    with torch.no_grad():
        theirs, ours = (
            load_dense(folder, CPU, torch.float32)(tokens).logits.log_softmax(-1)
            for folder in (original, candidate)
        )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_only_scales_and_norms_change(
    repaired: tuple[ModelFolder, ModelFolder, ModelFolder, dict[str, Any]],
) -> None:
    _, before, after, _ = repaired
    assert set(after.names) == set(before.names)
    assert after.config == before.config
    changed = set()
    for name in before.names:
        old, new = before.tensor(name), after.tensor(name)
        assert (old.dtype, old.shape) == (new.dtype, new.shape), name
        if not torch.equal(old, new):
            changed.add(name)
    scales = {name for name in before.names if name.endswith(".scale")}
    norms = {name for name in before.names if name.endswith("norm.weight")}
    assert len(scales) == 21
    assert len(norms) == 7
    assert changed == scales | norms


def test_the_model_comes_nearer_to_the_original(
    repaired: tuple[ModelFolder, ModelFolder, ModelFolder, dict[str, Any]], tokens: Tensor
) -> None:
    original, before, after, report = repaired
    start, end = kl(original, before, tokens), kl(original, after, tokens)
    assert end < 0.9 * start
    assert len(report["kl"]) == 4
    assert report["kl"][-1] < report["kl"][0]
    # The first pass is measured while the factors still move away from 1.
    assert end < report["kl"][0] < kl(original, before, tokens[:-1]) * 1.05
    assert report["tokens"] == 4 * tokens[:-1].numel()
    # Batches of 4 rows and 1.
    assert report["steps"] == 8


def test_a_step_of_next_to_nothing_measures_the_model_as_it_is(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]], tokens: Tensor, tmp_path: Path
) -> None:
    """The reported KL is the model's own, whatever the sizes of the batches."""
    original, before = decided(True)
    report = Kl(epochs=1, rate=1e-9, batch=5)(before, original, tmp_path / "r", tokens, CPU)
    assert report["kl"] == [pytest.approx(kl(original, before, tokens[:-1]), rel=0.05)]
    held = kl(original, before, tokens[-1:])
    assert report["held_out_kl"] == [pytest.approx(held, rel=0.05)] * 2
    after = ModelFolder(tmp_path / "r")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


def test_the_state_that_is_best_outside_is_kept(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]],
    tokens: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Steps that are far too large make it worse: the record stays as it was, and a warning tells."""
    original, before = decided(True)
    report = Kl(epochs=2, rate=20.0)(before, original, tmp_path / "r", tokens, CPU)
    assert report["kept"] == 0
    assert report["held_out_kl"][0] == min(report["held_out_kl"])
    after = ModelFolder(tmp_path / "r")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)
    assert "the state after pass 0 was better" in caplog.text


def test_seeds_make_other_trainings(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]], tokens: Tensor, tmp_path: Path
) -> None:
    original, before = decided(True)
    found = []
    for i, seed in enumerate((0, 0, 1)):
        method = Kl(epochs=1, batch=1, seed=seed)
        method(before, original, tmp_path / str(i), tokens, CPU)
        found.append(ModelFolder(tmp_path / str(i)).tensor("model.norm.weight"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_repaired_record_is_exported(
    repaired: tuple[ModelFolder, ModelFolder, ModelFolder, dict[str, Any]],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    _, before, after, _ = repaired
    assert record.schemes_of(after) == record.schemes_of(before)
    assert record.linears(after) == record.linears(before)
    compressed_tensors.write(after, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    assert audit(after, exported)["linears"] == 21
    with torch.inference_mode():
        logits = [load_dense(f, CPU, torch.bfloat16)(tokens).logits for f in (after, exported)]
    assert torch.equal(*logits)


def test_float16_is_refused(
    make_model: Callable[..., ModelFolder], tokens: Tensor, tmp_path: Path
) -> None:
    half = make_model(dtype="float16")
    with pytest.raises(UserError, match="bfloat16 or float32"):
        Kl()(half, half, tmp_path / "r", tokens, CPU)


def test_one_sequence_is_too_few(
    decided: Callable[[bool], tuple[ModelFolder, ModelFolder]], tokens: Tensor, tmp_path: Path
) -> None:
    original, before = decided(True)
    with pytest.raises(UserError, match=r"set data\.sequences to 2 or more"):
        Kl()(before, original, tmp_path / "r", tokens[:1], CPU)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("knobs", [{"epochs": 0}, {"rate": 0.0}, {"batch": 0}])
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"repair.kl.* is not allowed: choose more than 0"):
        Kl(**knobs)
