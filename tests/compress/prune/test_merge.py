"""Merging heads of keys and values: nothing is lost where they say the same, and less than by their mean
where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.prune.merge import as_pairs, as_rows, complex_moments, group_heads, merge_heads

HEADS, KV, SIZE, IN, OUT = 6, 3, 8, 20, 16


def rotary(x: Tensor, position: int) -> Tensor:
    """Channels (f, f + half) of one head turned by its position, as transformers does."""
    angles = position * 10.0 ** -torch.arange(SIZE // 2, dtype=x.dtype)
    first, second = x.chunk(2)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    )


def attention(weights: dict[str, Tensor], X: Tensor) -> Tensor:
    """Plain grouped attention of one sequence, causal. X (tokens, in)"""
    q, k, v = ((X @ weights[n].T).unflatten(1, (-1, SIZE)) for n in ("queries", "keys", "values"))
    out = []
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        Q = torch.stack([rotary(x, i) for i, x in enumerate(q[:, head])])
        K = torch.stack([rotary(x, i) for i, x in enumerate(k[:, group])])
        scores = (Q @ K.T / SIZE**0.5).masked_fill(torch.ones(len(X), len(X)).triu(1).bool(), -1e9)
        out.append(scores.softmax(-1) @ v[:, group])
    return torch.cat(out, -1) @ weights["output"].T


def moments(weights: dict[str, Tensor], X: Tensor) -> dict[str, Tensor]:
    made = {name: X @ weights[name].T for name in ("queries", "keys", "values")}
    found = {name: Y.T @ Y / len(Y) for name, Y in made.items()}
    return {**found, "queries": found["queries"].diagonal()}


def random_weights(noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """Heads 0 and 2 say the same but for a turn and a factor of each pair of the keys' channels, a linear
    map of the values, and noise; head 1 is another."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v = draw(KV, SIZE, IN), draw(KV, SIZE, IN)
    turn = torch.complex(draw(SIZE // 2, 1), draw(SIZE // 2, 1))
    k[2] = as_rows(turn * as_pairs(k[0])) + noise * draw(SIZE, IN)
    v[2] = draw(SIZE, SIZE) @ v[0] + noise * draw(SIZE, IN)
    weights = {
        "queries": draw(HEADS * SIZE, IN) / 4,
        "keys": k.flatten(0, 1),
        "values": v.flatten(0, 1),
        "output": draw(OUT, HEADS * SIZE),
    }
    return weights, draw(50, IN)


def merged(weights: dict[str, Tensor], X: Tensor, method: str) -> dict[str, Tensor]:
    seen = moments(weights, X)
    found = merge_heads(weights, count=1, kv_heads=KV, moments=seen, method=method)
    return {name: getattr(found, name) for name in weights}


def test_heads_that_say_the_same_are_one_without_a_loss() -> None:
    weights, X = random_weights(0.0)
    # The two alike, as a model of two heads that become one.
    pairs = [0, 2]
    two = {
        "queries": weights["queries"].unflatten(0, (KV, -1))[pairs].flatten(0, 1),
        "keys": weights["keys"].unflatten(0, (KV, -1))[pairs].flatten(0, 1),
        "values": weights["values"].unflatten(0, (KV, -1))[pairs].flatten(0, 1),
        "output": weights["output"].unflatten(1, (KV, -1))[:, pairs].flatten(1),
    }
    found = merge_heads(two, count=1, kv_heads=2, moments=moments(two, X))
    k, v = (getattr(found, n).unflatten(0, (2, SIZE)) for n in ("keys", "values"))
    assert torch.equal(k[0], k[1])
    assert torch.equal(v[0], v[1])
    expected = attention(two, X)
    ours = attention({n: getattr(found, n) for n in two}, X)
    assert ((ours - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_principal_components_lose_less_than_the_mean(noise: float) -> None:
    weights, X = random_weights(noise)
    expected = attention(weights, X)
    errors = {
        method: float((attention(merged(weights, X, method), X) - expected).norm())
        for method in ("principal", "mean")
    }
    assert errors["principal"] < 0.8 * errors["mean"]


def test_the_mean_is_the_mean() -> None:
    weights, X = random_weights(1.0)
    found = merged(weights, X, "mean")
    k = weights["keys"].unflatten(0, (KV, SIZE)).mean(0)
    assert torch.equal(found["keys"].unflatten(0, (KV, SIZE))[1], k)
    assert torch.equal(found["queries"], weights["queries"])


def test_complex_moments_are_those_of_the_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(30, KV * SIZE, generator=generator, dtype=torch.float64)
    pairs = torch.stack([as_pairs(row) for row in k.unflatten(1, (KV, SIZE)).flatten(0, 1)])
    pairs = pairs.unflatten(0, (30, KV))
    expected = torch.einsum("tif,tjf->ijf", pairs, pairs.conj())
    torch.testing.assert_close(complex_moments(k.T @ k, KV, SIZE // 2), expected)


def test_groups_are_of_heads_that_are_alike() -> None:
    similar = torch.tensor(
        [[1.0, 0.2, 0.9, 0.1], [0.2, 1, 0.1, 0.3], [0.9, 0.1, 1, 0], [0.1, 0.3, 0, 1]]
    )
    assert group_heads(similar, 2) == [[0, 2], [1, 3]]
    assert group_heads(similar, 4) == [[0, 1, 2, 3]]
