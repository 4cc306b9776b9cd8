"""The losses and their gradients against autograd in float64, whole and in chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compress.distill import losses as module
from compress.distill.losses import (
    NONE,
    States,
    Top,
    Weights,
    losses,
    next_tokens,
    relative_error,
    top_of,
)

N, HIDDEN, VOCABULARY = 23, 12, 40


def make(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Student and original differ in hidden size and head; two positions have no label."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    labels = torch.randint(VOCABULARY, (N,), generator=generator)
    labels[[7, N - 1]] = NONE
    return {
        "H": draw(N, HIDDEN),
        "E": draw(VOCABULARY, HIDDEN) / 2,
        "states": draw(N, HIDDEN + 4),
        "head": draw(VOCABULARY, HIDDEN + 4) / 3,
        "labels": labels,
    }


def oracle(found: dict[str, Tensor], weights: Weights, top_k: int | None = None) -> list[Tensor]:
    """Loss, KL, CE and the gradients by H and E, as a textbook has them."""
    H, E = (found[name].double().requires_grad_() for name in ("H", "E"))
    x, y = H @ E.T, found["states"].double() @ found["head"].double().T
    T = weights.temperature
    p, q = (y / T).softmax(-1), (x / T).softmax(-1)
    if top_k is not None:
        order = p.argsort(-1, descending=True)
        p, q = p.gather(1, order), q.gather(1, order)
        p, q = (
            torch.cat([t[:, :top_k], t[:, top_k:].sum(-1, keepdim=True)], 1)
            if top_k < VOCABULARY
            else t
            for t in (p, q)
        )
    kl = T**2 * (p * (p.log() - q.log())).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(x, found["labels"], ignore_index=NONE)
    loss = weights.kl * kl + weights.ce * ce
    loss.backward()
    assert H.grad is not None
    assert E.grad is not None
    return [loss.detach(), kl.detach(), ce.detach(), H.grad, E.grad]


def top(found: dict[str, Tensor], k: int, T: float) -> Top:
    """What a cache would hold of the original."""
    return top_of(States(found["states"], found["head"]), found["labels"], k, T)


def run(found: dict[str, Tensor], goal: module.Goal, weights: Weights) -> list[Tensor]:
    H, E = (found[name].clone().requires_grad_() for name in ("H", "E"))
    loss, kl, ce = losses(H, E, found["labels"], goal, weights)
    (2 * loss).backward()
    assert H.grad is not None
    assert E.grad is not None
    assert not kl.requires_grad
    return [loss.detach(), kl, ce, H.grad / 2, E.grad / 2]


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of positions, the last of them short; slices of the head."""
    monkeypatch.setitem(module.ROWS, "cpu", 9)
    monkeypatch.setattr(module, "SLICE", 16)


CASES = [
    Weights(),
    Weights(kl=0.5, ce=2.0),
    Weights(kl=0.0, ce=1.0),
    Weights(temperature=2.5),
    Weights(kl=0.7, ce=0.3, temperature=0.5),
]


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("weights", CASES)
@pytest.mark.parametrize("k", [None, 1, 6, VOCABULARY])
def test_against_the_textbook(weights: Weights, k: int | None) -> None:
    found = make(torch.float64)
    goal = (
        States(found["states"], found["head"]) if k is None else top(found, k, weights.temperature)
    )
    for ours, theirs in zip(run(found, goal, weights), oracle(found, weights, k), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("k", [None, 6])
def test_gradcheck(k: int | None) -> None:
    found, weights = make(torch.float64), Weights(kl=0.7, ce=0.3, temperature=1.5)
    goal = States(found["states"], found["head"]) if k is None else top(found, k, 1.5)
    H, E = (found[name].requires_grad_() for name in ("H", "E"))
    assert torch.autograd.gradcheck(
        lambda H, E: losses(H, E, found["labels"], goal, weights)[0], (H, E)
    )


def test_worked_by_hand() -> None:
    # One position, two tokens: the original says 3 to 1, the student 1 to 1; the second comes next.
    E = torch.eye(2)
    goal = States(torch.tensor([[3.0, 1.0]]).log(), E)
    H = torch.zeros(1, 2, requires_grad=True)
    loss, kl, ce = losses(H, E, torch.tensor([1]), goal, Weights(kl=1.0, ce=0.1))
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert torch.allclose(kl, expected)
    assert torch.allclose(ce, torch.tensor(2.0).log())
    loss.backward()
    assert H.grad is not None
    by_hand = torch.tensor([[0.5 - 0.75, 0.5 - 0.25]]) + 0.1 * torch.tensor([[0.5, 0.5 - 1]])
    assert torch.allclose(H.grad, by_hand)


@pytest.mark.usefixtures("in_chunks")
def test_under_autocast() -> None:
    """Products in bf16, all else in float32: close to the textbook, the gradients in the parameters' type."""
    found, weights = make(torch.float32), Weights(kl=1.0, ce=0.5)
    found |= {name: found[name].bfloat16().float() for name in ("H", "E")}
    goal = States(found["states"].bfloat16(), found["head"].bfloat16())
    expected = oracle(found | {"states": goal.states, "head": goal.head}, weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(found, goal, weights)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_less_kept_bounds_it_from_below() -> None:
    found = make(torch.float64)
    exact = run(found, States(found["states"], found["head"]), Weights())[1]
    bounds = [run(found, top(found, k, 1.0), Weights())[1] for k in (1, 4, 16, VOCABULARY)]
    assert all(a < b for a, b in pairwise(bounds))
    assert torch.allclose(bounds[-1], exact, rtol=1e-12)


def test_a_frozen_head_gets_no_gradient() -> None:
    found = make(torch.float32)
    H = found["H"].requires_grad_()
    loss, _, _ = losses(
        H, found["E"], found["labels"], States(found["states"], found["head"]), Weights()
    )
    loss.backward()
    assert H.grad is not None
    assert found["E"].grad is None


def test_the_originals_own_loss() -> None:
    found = make(torch.float64)
    expected = torch.nn.functional.cross_entropy(
        found["states"] @ found["head"].T, found["labels"], ignore_index=NONE
    )
    for goal in (States(found["states"], found["head"]), top(found, 3, 2.0)):
        assert torch.allclose(goal.nll(found["labels"]), expected)


@pytest.mark.usefixtures("in_chunks")
def test_states_in_16_bits_have_logits_in_32() -> None:
    found = {name: t.bfloat16() for name, t in make(torch.float32).items() if name != "labels"}
    labels = make(torch.float32)["labels"]
    logits = found["states"].double() @ found["head"].double().T
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=NONE)
    nll = States(found["states"], found["head"]).exact().nll(labels)
    assert float(nll) == pytest.approx(float(expected), rel=1e-6)


def test_no_label_at_the_end_of_a_sequence() -> None:
    assert next_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [2, 3, NONE, 5, 6, NONE]


def test_relative_error() -> None:
    T = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    # Half of the size off at the small token, nothing at the large one.
    S = torch.tensor([[[1.5, 2.0], [300.0, 400.0]]], requires_grad=True)
    error = relative_error(S, T)
    assert torch.allclose(error, torch.tensor(0.125))
    error.backward()
    assert S.grad is not None
    assert torch.allclose(S.grad[0, 0], (torch.tensor([1.5, 2.0]) - torch.tensor([3.0, 4.0])) / 25)
