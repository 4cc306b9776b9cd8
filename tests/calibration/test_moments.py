"""Second moments against float64, and what they stand for."""

from __future__ import annotations

import pytest
import torch

import calibration.moments as moments_module
from calibration.moments import Collector, Moments, Tokens
from compress.errors import UserError


@pytest.mark.parametrize("rows", [16, 20, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "ROWS", rows)
    X = (torch.randn(3, 500, 48, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    moments = Moments.zeros(48, X.device)
    for batch in X:
        moments.add(batch)
    mean = moments.mean()
    exact = X.flatten(0, 1).double()
    H = exact.T @ exact / len(exact)
    # Inputs in bf16 lose nothing: their products are exact and the sums are in float32.
    assert ((mean.second - H).norm() / H.norm()) < 1e-6
    assert torch.allclose(mean.magnitude.double(), exact.abs().mean(0), rtol=1e-5)
    assert mean.tokens == 1500


def test_trace_is_the_output_error() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(300, 32, generator=generator)
    D = torch.randn(5, 32, generator=generator)
    moments = Moments.zeros(32, X.device)
    moments.add(X)
    H = moments.mean().second
    assert float(((D @ H) * D).sum()) == pytest.approx(
        float((X @ D.T).pow(2).sum(1).mean()), rel=1e-5
    )


def test_shared_inputs_are_counted_once() -> None:
    first, second = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    X = torch.randn(10, 8)
    collector = Collector({"a": first}, [("a", "b")])
    block = torch.nn.Sequential(first, torch.nn.Linear(4, 8), second)
    with collector.hooks():
        collector.run(block, X, {})
    found = collector.means()
    assert found["a"] is found["b"]
    assert found["a"].tokens == 10
    assert torch.allclose(found["a"].second, X.T @ X / 10, rtol=1e-5)
    first(X)
    assert collector.means()["a"].tokens == 10, "the hook must be gone after the context"


class Noting(torch.nn.Linear):
    """A linear that counts how often it ran."""

    runs = 0

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return super().forward(X)


def test_a_block_runs_no_further_than_asked() -> None:
    first, second, third = (Noting(8, 8) for _ in range(3))
    collector = Collector({"a": first, "b": second}, [("a",), ("b",)])
    with collector.hooks():
        collector.run(torch.nn.Sequential(first, second, third), torch.randn(10, 8), {})
    # The hook of the last one stops the block before that linear itself is computed.
    assert (first.runs, second.runs, third.runs) == (1, 0, 0)
    assert {name: m.tokens for name, m in collector.means().items()} == {"a": 10, "b": 10}


def test_a_linear_that_never_runs_is_a_broken_invariant() -> None:
    collector = Collector({"a": torch.nn.Linear(8, 8)}, [("a",)])
    with collector.hooks(), pytest.raises(AssertionError, match="did not reach"):
        collector.run(torch.nn.Linear(8, 8), torch.randn(3, 8), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_moments_against_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    original = torch.randn(4, 100, 24, generator=generator).to(dtype)
    X = (original + 0.3 * torch.randn(original.shape, generator=generator)).to(dtype)
    moments = Moments.zeros(24, X.device, cross=True)
    for batch, before in zip(X, original, strict=True):
        moments.add(batch, before)
    cross = moments.mean().cross
    assert cross is not None
    x, before = X.flatten(0, 1).double(), original.flatten(0, 1).double()
    expected = (before - x).T @ x / len(x)
    assert (cross - expected).norm() / expected.norm() < 1e-4
    # Rows are of the difference, columns of the inputs as they are: the transpose is another matrix.
    assert (cross - expected.T).norm() / expected.norm() > 0.1


def test_cross_moments_pair_the_copy_with_the_block() -> None:
    """The copy runs first; what its linear read is paired with the same tokens in the block."""
    torch.manual_seed(0)
    block, copy = (torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)) for _ in "ab")
    batches, originals = torch.randn(3, 20, 6), torch.randn(3, 20, 6)
    collector = Collector({"1": block[1]}, [("1",)], {"1": copy[1]})
    with collector.hooks(), torch.no_grad():
        for X, before in zip(batches, originals, strict=True):
            collector.run(copy, before, {})
            collector.run(block, X, {})
    with torch.no_grad():
        x, before = block[0](batches).flatten(0, 1), copy[0](originals).flatten(0, 1)
    found = collector.means()["1"]
    assert found.cross is not None
    assert torch.allclose(found.second, x.T @ x / 60, atol=1e-5)
    assert torch.allclose(found.cross, (before - x).T @ x / 60, atol=1e-5)


def test_scaling_moments_is_scaling_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    X, before = torch.randn(2, 50, 12, generator=generator)
    s = torch.rand(12, generator=generator) + 0.5
    found, expected = (Moments.zeros(12, X.device, cross=True) for _ in "ab")
    found.add(X, before)
    found.scale(s)
    expected.add(X * s, before * s)
    assert found.cross is not None
    assert expected.cross is not None
    assert torch.allclose(found.second, expected.second, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.magnitude, expected.magnitude, rtol=1e-5)
    assert torch.allclose(found.cross, expected.cross, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_tokens_give_the_sums_to_the_last_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    X, before = (30 * torch.randn(2, 3, 10, 96, generator=generator)).to(dtype)
    s = torch.rand(96, generator=generator) + 0.5
    kept = Moments.zeros(96, X.device, cross=True, threshold=6.0, tokens=30)
    sums = Moments.zeros(96, X.device, cross=True, threshold=6.0)
    found = []
    for moments in (kept, sums):
        for batch, original in zip(X, before, strict=True):
            moments.add(batch, original)
        mean = moments.mean()
        mean.scale(s)
        found.append(mean)
    ours, theirs = found
    assert isinstance(ours.H, Tokens)
    assert torch.equal(ours.second, theirs.second)
    cross = ours.summed().cross
    assert cross is not None
    assert theirs.cross is not None
    assert torch.equal(cross, theirs.cross)
    for name in ("magnitude", "largest"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.tokens == theirs.tokens == 30
    A = ours.H.root()
    assert A.shape == (30, 96)
    assert (A.T @ A - theirs.second).norm() < 1e-6 * theirs.second.norm()


def test_what_is_kept_is_a_copy_of_fewer_tokens_than_half_the_inputs() -> None:
    forms = [Moments.zeros(8, torch.device("cpu"), tokens=n).H for n in (3, 4)]
    assert [isinstance(H, Tokens) for H in forms] == [True, False]
    X = torch.ones(3, 8)
    moments = Moments.zeros(8, X.device, tokens=3)
    moments.add(X)
    X.zero_()
    assert torch.equal(moments.mean().second, torch.ones(8, 8))


@pytest.mark.parametrize("tokens", [None, 1])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_infinite_activations_are_refused(tokens: int | None, value: float) -> None:
    """Also those whose squares are."""
    moments = Moments.zeros(3, torch.device("cpu"), tokens=tokens)
    moments.add(torch.tensor([[1.0, value, 0.0]]))
    with pytest.raises(UserError, match="activations are not finite"):
        moments.mean()
