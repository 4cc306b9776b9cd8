"""Fewer heads of keys and values for the same query heads: several become one.

Mean-pooling them (GQA, Ainslie et al., arXiv 2305.13245, section 2.1) adds up channels that have nothing to
do with each other. Heads are aligned first (Jin et al., arXiv 2412.20677): values by any linear map, which
the linear that reads them takes back; keys by what commutes with the rotary embedding, a turn and a factor
for each pair of channels, which the queries take. Where that paper looks for rotations and pools by the
mean, the first principal component of the aligned heads does both at once: of all single heads it loses the
least of what the queries (and the output linear) read from the old ones.

Heads are (heads, head size, in); V second moment of all values (kv heads * head size, same)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """groups: old heads of keys and values that are one now, and weights of every query head and old key
        and value
    head: those of a group are equal."""

    groups: list[list[int]]
    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


def group_heads(similar: Tensor, size: int) -> list[list[int]]:
    """Groups of ``size`` heads that are most alike, greedily. similar: (heads, heads), larger is more."""
    free, groups = list(range(len(similar))), []
    while free:
        first = free.pop(0)
        nearest = sorted(free, key=lambda h: -float(similar[first, h]))[: size - 1]
        free = [h for h in free if h not in nearest]
        groups.append(sorted([first, *nearest]))
    return groups


def merge_values(V: Tensor, outputs: Tensor, group: list[int]) -> tuple[Tensor, Tensor]:
    """One head for the values of a group: v' = A [v_1; v_2; ...], v_j ~ B_j v'.

    V: second moments of all values; outputs: (kv heads, head size, head size), O^T O of the output linear's
    columns summed over the query heads that read a head: what an error of the values costs. Returns A (head
    size, group * head size) and B (group, head size, head size).
    """
    size = outputs.shape[1]
    rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in group]).to(V.device)
    S = V.double()[rows][:, rows]
    L = torch.block_diag(*[_root(outputs[h].double()) for h in group])
    inverse = torch.linalg.inv(L)
    vectors = torch.linalg.eigh(L @ S @ L.T)[1][:, -size:]
    return vectors.T @ L, (inverse @ vectors).unflatten(0, (len(group), size))


def _root(M: Tensor) -> Tensor:
    """The symmetric square root of a positive matrix, its small eigenvalues raised: it must have an
    inverse."""
    values, vectors = torch.linalg.eigh(M)
    values = values.clamp(min=float(values.max()) * 1e-4)
    return vectors @ values.sqrt().diag() @ vectors.T


def merge_keys(K: Tensor, queries: Tensor, group: list[int]) -> tuple[Tensor, Tensor]:
    """One head for the keys of a group: k'_f = sum_j a_jf k_jf, k_jf ~ b_jf k'_f in complex pairs of
    channels.

    K: second moments of all keys before the rotary embedding; queries: (kv heads, head size / 2), mean
    |q_f|^2 of the query heads that read a head. Returns a and b, complex (group, head size / 2).
    """
    heads, half = queries.shape
    M = complex_moments(K.double(), heads, half)[group][:, group]
    weight = queries.double()[group].sqrt().clamp(min=1e-8)
    M = M * weight.unsqueeze(0) * weight.unsqueeze(1)
    vectors = torch.linalg.eigh(M.permute(2, 0, 1))[1][:, :, -1].T
    return vectors.conj() * weight, vectors / weight


def complex_moments(K: Tensor, heads: int, half: int) -> Tensor:
    """E k_if conj(k_jf), (heads, heads, pairs), from the real second moments: a pair is (f, f + half)."""
    parts = K.unflatten(0, (heads, 2, half)).unflatten(3, (heads, 2, half))
    f = torch.arange(half, device=K.device)
    same = parts[:, :, f, :, :, f].permute(1, 3, 2, 4, 0)
    real = same[:, :, 0, 0] + same[:, :, 1, 1]
    imaginary = same[:, :, 1, 0] - same[:, :, 0, 1]
    return torch.complex(real, imaginary)


def as_pairs(rows: Tensor) -> Tensor:
    """Rows of one head (head size, ...) as complex ones (head size / 2, ...)."""
    first, second = rows.double().chunk(2)
    return torch.complex(first, second)


def as_rows(pairs: Tensor) -> Tensor:
    return torch.cat([pairs.real, pairs.imag])


def merge_heads(
    weights: dict[str, Tensor],
    *,
    count: int,
    kv_heads: int,
    moments: dict[str, Tensor],
    method: str = "principal",
) -> Merged:
    """Merge the heads of keys and values of a block to ``count``.

    weights: "queries", "keys", "values" (heads * head size, in), a bias as a last column; "output"
        (out, heads * head size)
    moments: second moments of "keys" and "values" over calibration tokens, before positions; of "queries" the
        diagonal alone
    method: principal, or mean, which pools heads as they are
    """
    size = weights["keys"].shape[0] // kv_heads
    q, k, v = (weights[n].double().unflatten(0, (-1, size)) for n in ("queries", "keys", "values"))
    out = weights["output"].double().unflatten(1, (-1, size)).clone()
    q, k, v = q.clone(), k.clone(), v.clone()
    per_group = len(q) // kv_heads
    half = size // 2
    Q = moments["queries"].double().unflatten(0, (kv_heads, per_group, 2, half))
    heard = Q.sum((1, 2))
    per_head = torch.einsum("ohi,ohj->hij", out, out)
    costs = per_head.unflatten(0, (kv_heads, per_group)).sum(1)
    K = complex_moments(moments["keys"].double(), kv_heads, half)
    diagonal = K.diagonal(dim1=0, dim2=1).real.clamp(min=1e-12).sqrt().T
    similar = (K.abs() / (diagonal.unsqueeze(0) * diagonal.unsqueeze(1))).mean(-1)
    groups = group_heads(similar, kv_heads // count)
    for group in groups:
        if method == "mean":
            k[group], v[group] = k[group].mean(0), v[group].mean(0)
            continue
        a, b = merge_keys(moments["keys"], heard, group)
        keys = torch.stack([a[i].unsqueeze(1) * as_pairs(k[h]) for i, h in enumerate(group)])
        A, B = merge_values(moments["values"], costs, group)
        values = A @ v[group].flatten(0, 1)
        for i, h in enumerate(group):
            k[h], v[h] = as_rows(keys.sum(0)), values
            for reader in range(h * per_group, (h + 1) * per_group):
                q[reader] = as_rows(b[i].conj().unsqueeze(1) * as_pairs(q[reader]))
                out[:, reader] = out[:, reader] @ B[i]
    return Merged(groups, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out.flatten(1))
