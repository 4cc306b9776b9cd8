"""Hadamard matrices of any order that Sylvester's doubling and Paley's constructions reach."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.errors import UserError


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix, entries 1 and -1 with H H^T = order I: int8 (order, order).

    Sylvester's doubling of the smallest core that Paley's constructions give (core_order). Raises
    UserError if there is none.
    """
    core = core_order(order)
    if core is None:
        raise UserError(f"no Hadamard matrix of order {order} is known here")
    H = _paley(core) if core > 1 else torch.ones(1, 1, dtype=torch.int8)
    doubling = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(H) < order:
        H = torch.kron(doubling, H)
    return H


def core_order(order: int) -> int | None:
    """The smallest order whose doublings reach ``order``: 1, or one of Paley's; None if none does."""
    core = order
    while core > 1 and core % 2 == 0:
        core //= 2
    while core <= order:
        if core == 1 or _is_paley_1(core) or _is_paley_2(core):
            return core
        core *= 2
    return None


def _is_paley_1(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_2(order: int) -> bool:
    return order % 8 == 4 and _is_prime(order // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> Tensor:
    """Paley's constructions (On orthogonal matrices, 1933) over the integers modulo a prime q.

    Q[i, j] is 1 if i - j is a square modulo q, -1 if not, 0 on the diagonal; S is Q with a border of
    ones, and S S^T = q I. Order q + 1 with q = 3 modulo 4: S is skew, H = I + S. Order 2 (q + 1) with
    q = 1 modulo 4: S is symmetric; each of its entries becomes a 2 x 2 block.
    """
    first = _is_paley_1(order)
    q = order - 1 if first else order // 2 - 1
    n = torch.arange(q)
    squares = torch.full((q,), -1, dtype=torch.int8)
    squares[n * n % q] = 1
    squares[0] = 0
    S = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    S[0, 1:] = 1
    S[1:, 0] = -1 if first else 1
    S[1:, 1:] = squares[(n.unsqueeze(1) - n) % q]
    identity = torch.eye(q + 1, dtype=torch.int8)
    if first:
        return identity + S
    entry = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(S, entry) + torch.kron(identity, diagonal)
