"""Second moments against float64, and what they stand for."""

from __future__ import annotations

import pytest
import torch

from calibration.moments import Moments, collect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(dtype: torch.dtype) -> None:
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
    with collect({"a": first, "b": second}, [("a", "b")]) as found:
        first(X)
        second(X)
    assert found["a"] is found["b"]
    assert found["a"].tokens == 10
    first(X)
    assert found["a"].tokens == 10, "the hook must be gone after the context"


def test_infinite_activations_are_refused() -> None:
    moments = Moments.zeros(2, torch.device("cpu"))
    moments.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="not finite"):
        moments.mean()
