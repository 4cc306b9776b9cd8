"""Least squares and surgery against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.prune.regression import Regression, Surgery

DOUBLE = torch.float64


def observed(
    tokens: int = 400, inputs: int = 12, outputs: int = 5, dtype: torch.dtype = DOUBLE
) -> tuple[Regression, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=DOUBLE)
    X = (torch.randn(tokens, inputs, generator=generator, dtype=DOUBLE) @ mix).to(dtype)
    T = torch.randn(tokens, outputs, generator=generator, dtype=DOUBLE)
    T = (T + X[:, :outputs].double()).to(dtype)
    weight = torch.rand(tokens, generator=generator) + 0.1
    found = Regression.zeros(inputs, outputs, torch.device("cpu"))
    for x, t, w in zip(X.split(150), T.split(150), weight.split(150), strict=True):
        found.add(x, t, w)
    return found.mean(), X.double(), T.double(), weight.double()


def least(X: Tensor, T: Tensor, weight: Tensor, damping: float) -> tuple[Tensor, float]:
    """Weighted ridge regression towards 0, damped as Surgery is, and its damped error per unit of weight."""
    root = (weight / weight.sum()).sqrt().unsqueeze(1)
    H = (X * root).T @ (X * root)
    H = H + damping * torch.eye(len(H), dtype=DOUBLE)
    C = (T * root).T @ (X * root)
    W = torch.linalg.solve(H, C.T).T
    return W, float(((T * root) ** 2).sum() - (W * C).sum())


def test_by_hand() -> None:
    """Two tokens, one of them twice as heavy; x = 1 and 2, t = 1 and 0."""
    found = Regression.zeros(1, 1, torch.device("cpu"))
    found.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([2.0, 1.0]))
    found = found.mean()
    assert found.H.item() == pytest.approx((2 * 1 + 4) / 3)
    assert found.C.item() == pytest.approx(2 / 3)
    assert float(found.energy) == pytest.approx(2 / 3)
    every = torch.tensor([0])
    W = found.fit(torch.zeros(1, 1), every, 0.0)
    assert W.item() == pytest.approx(1 / 3)
    # Errors 2/3 and -2/3: (2 * 4/9 + 4/9) / 2 of the energy.
    assert found.error(W) == pytest.approx(2 / 3)
    # As much damping as second moment: half way from the old weight.
    assert found.fit(torch.ones(1, 1), every, 1.0).item() == pytest.approx((1 + 1 / 3) / 2)


def test_the_fit_is_the_weighted_least_squares_of_the_tokens() -> None:
    found, X, T, weight = observed()
    kept = torch.tensor([0, 3, 4, 7, 11])
    W = found.fit(torch.zeros(5, 12), kept, 0.0)
    expected = least(X[:, kept], T, weight, 0.0)[0]
    torch.testing.assert_close(W, expected, rtol=1e-4, atol=1e-5)
    lost = ((T - X[:, kept] @ W.T).square().sum(1) * weight).sum()
    energy = (T.square().sum(1) * weight).sum()
    assert found.error(W, kept) == pytest.approx(float(lost / energy), rel=1e-5)


def test_moments_of_bf16_tokens_are_exact_but_for_the_weights() -> None:
    found, X, _T, weight = observed(dtype=torch.bfloat16)
    H = (X * weight.unsqueeze(1)).T @ X / weight.sum()
    assert ((found.H - H).norm() / H.norm()) < 2e-3


@pytest.mark.parametrize("width", [1, 3])
def test_costs_are_what_a_refit_without_the_structure_loses(width: int) -> None:
    found, X, T, weight = observed()
    damping = 0.01 * float(found.H.diagonal().mean())
    surgery = Surgery(found, 0.01)
    structures = torch.arange(12).view(-1, width)
    for gone in (None, 2, 0):
        if gone is not None:
            surgery.remove(structures[gone])
        present = surgery.P.diagonal() > 0
        left = present.nonzero().squeeze(1)
        now = least(X[:, left], T, weight, damping)[1]
        alive = [s for s in range(len(structures)) if present[structures[s, 0]]]
        for s, cost in zip(alive, surgery.costs(structures[alive]), strict=True):
            rest = torch.tensor([i for i in left.tolist() if i not in structures[s].tolist()])
            assert float(cost) == pytest.approx(
                least(X[:, rest], T, weight, damping)[1] - now, rel=1e-3, abs=1e-5
            )


def test_thinning_takes_the_cheapest_each_time() -> None:
    found, X, T, weight = observed()
    damping = 0.01 * float(found.H.diagonal().mean())
    kept = Surgery(found, 0.01).thin(torch.arange(12).unsqueeze(1), 4).tolist()
    left = list(range(12))
    while len(left) > 4:
        errors = {i: least(X[:, [j for j in left if j != i]], T, weight, damping)[1] for i in left}
        left.remove(min(errors, key=lambda i: errors[i]))
    assert kept == left
    # Greedy is near the best of all 495 choices here.
    best = min(
        least(X[:, list(c)], T, weight, damping)[1] for c in itertools.combinations(range(12), 4)
    )
    assert least(X[:, kept], T, weight, damping)[1] < 1.1 * best


def test_an_input_that_others_repeat_costs_nothing() -> None:
    X = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    X[:, 3] = X[:, 0] - X[:, 1]
    found = Regression.zeros(4, 1, torch.device("cpu"))
    found.add(X, X[:, 3:] * 5, torch.ones(200))
    costs = Surgery(found.mean(), 1e-4).costs(torch.arange(4).unsqueeze(1))
    assert costs[3] < 2e-2
    found = Regression.zeros(4, 1, torch.device("cpu"))
    found.add(X, X[:, 2:3], torch.ones(200))
    costs = Surgery(found.mean(), 1e-4).costs(torch.arange(4).unsqueeze(1))
    assert costs.argmax() == 2
