"""Least squares between what a linear now reads and what it should give, and which inputs it can do
without.

What a linear should give for a token is t (out), what it reads x (in). Over the tokens, weighted, H = E x
x^T (in, in), C = E t x^T (out, in), energy = E |t|^2. The error of weights W (out, in) is E |t - W x|^2 =
energy - 2 tr(W C^T) + tr(W H W^T).

Taking inputs away one structure after the other, the rest refitted every time, is optimal brain surgery on
whole structures (Kurtic et al., ZipLM, arXiv 2302.04089, section 3.1; SlimGPT, 2412.18110), with the
original's stream as the goal instead of the linear's own output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.moments import exact_products
from compress.errors import UserError
from compress.processes import ALONE, Team

# How many steps a removal of many single inputs takes: within one step the rest is not refitted. Inputs that
# stand in for each other, with a squared partial correlation above APART, do not go in one step.
STEPS, APART = 192, 0.25


@dataclass
class Regression:
    """Running sums over tokens; ``mean`` makes them means in float64 on the CPU's or the GPU's memory."""

    H: Tensor
    C: Tensor
    energy: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> Regression:
        return cls(
            torch.zeros(inputs, inputs, device=device),
            torch.zeros(outputs, inputs, device=device),
            torch.zeros((), device=device, dtype=torch.float64),
            torch.zeros((), device=device, dtype=torch.float64),
        )

    def add(self, x: Tensor, t: Tensor, weight: Tensor) -> None:
        """Add tokens: x (..., in), t (..., out) in the model's dtype, weight (...) of each."""
        root = weight.flatten().sqrt().unsqueeze(1)
        with exact_products(x.dtype):
            # Rounded to the model's dtype once more: the matrix units then multiply without loss.
            X = (x.flatten(0, -2).float() * root).to(x.dtype).float()
            T = (t.flatten(0, -2).float() * root).to(x.dtype).float()
            self.H.addmm_(X.T, X)
            self.C.addmm_(T.T, X)
        self.energy += T.double().square().sum()
        self.weight += weight.double().sum()

    def mean(self, team: Team = ALONE) -> Regression:
        """team: the processes that added tokens"""
        for sums in (self.H, self.C, self.energy, self.weight):
            team.sum(sums)
        H, C = (sums.double() / self.weight for sums in (self.H, self.C))
        return Regression(H, C, self.energy / self.weight, torch.ones_like(self.weight))

    def error(self, W: Tensor, kept: Tensor | None = None) -> float:
        """The error of W, which reads the inputs ``kept`` (all of them if None), relative to the energy."""
        H, C = self.H, self.C
        if kept is not None:
            H, C = H[kept][:, kept], C[:, kept]
        W = W.to(H)
        lost = self.energy - 2 * (W * C).sum() + ((W @ H) * W).sum()
        return float(lost / self.energy) if self.energy > 0 else 0.0

    def fit(self, W: Tensor, kept: Tensor, damping: float) -> Tensor:
        """The weights on the inputs ``kept`` with the least error, held to W (out, in) by damping.

        damping: of the mean of H's diagonal; it is |W' - W|^2 that costs, so W stays where data says nothing
        """
        W = W.to(self.H)[:, kept]
        H = self.H[kept][:, kept]
        lacking = self.C[:, kept] - W @ H
        return W + torch.cholesky_solve(lacking.T, _cholesky(H, damping)).T


def _cholesky(H: Tensor, damping: float) -> Tensor:
    """The factor of H with a share of its mean diagonal added to the diagonal."""
    ridge = damping * H.diagonal().mean().clamp(min=1e-12)
    L, failed = torch.linalg.cholesky_ex(H + ridge * torch.eye(len(H)).to(H))
    if failed:
        raise UserError(
            f"prune.damping={damping:g} is too little for this calibration text: choose more, or raise "
            "data.sequences"
        )
    return L


class Surgery:
    """Removes structures of inputs, those first whose loss the others make up for best.

    W (out, in): the best weights on what is left; P (in, in): the inverse of H there
    """

    def __init__(self, found: Regression, damping: float):
        self.P = torch.cholesky_inverse(_cholesky(found.H, damping))
        self.W = found.C @ self.P

    def costs(self, structures: Tensor) -> Tensor:
        """How much the error grows if a structure goes. structures: (n, inputs of each) -> (n,)"""
        W = self.W[:, structures]
        if structures.shape[1] == 1:
            return W.squeeze(-1).square().sum(0) / self.P.diagonal()[structures[:, 0]]
        P = self.P[structures.unsqueeze(2), structures.unsqueeze(1)]
        per_structure = W.transpose(0, 1)
        return (torch.linalg.solve(P, per_structure.mT) * per_structure.mT).sum((1, 2))

    def remove(self, inputs: Tensor) -> None:
        """Take inputs (m,) away and refit the others."""
        block = self.P[inputs][:, inputs]
        rows = torch.linalg.solve(block, self.P[inputs])
        self.W -= self.W[:, inputs] @ rows
        self.P -= self.P[:, inputs] @ rows
        # What is left of these rows is noise around 0.
        self.W[:, inputs] = 0
        self.P[inputs], self.P[:, inputs] = 0, 0

    def thin(self, structures: Tensor, count: int) -> Tensor:
        """Remove all but ``count`` structures; returns which stay, sorted."""
        stays = torch.ones(len(structures), dtype=torch.bool)
        at_once = -(-(len(structures) - count) // STEPS) if structures.shape[1] == 1 else 1
        while (left := int(stays.sum())) > count:
            alive = stays.nonzero().squeeze(1)
            order = alive[self.costs(structures[alive]).argsort(stable=True).cpu()]
            gone = self._apart(structures, order, min(at_once, left - count))
            self.remove(structures[gone].flatten())
            stays[gone] = False
        return stays.nonzero().squeeze(1)

    def _apart(self, structures: Tensor, order: Tensor, count: int) -> Tensor:
        """The first structures of an order, without those that an earlier one stands in for."""
        if count == 1:
            return order[:1]
        candidates = order[: 4 * count]
        inputs = structures[candidates, 0]
        P = self.P[inputs][:, inputs]
        alike = (P.square() / P.diagonal() / P.diagonal().unsqueeze(1) > APART).cpu()
        chosen: list[int] = []
        for i in range(len(candidates)):
            if len(chosen) < count and not alike[i, chosen].any():
                chosen.append(i)
        return candidates[chosen]
