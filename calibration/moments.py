"""Second moments of the inputs of linear layers: all that a weight-only search needs to know of the data.

For a linear y = W x and a changed weight W + D, the mean squared output error over the calibration
tokens is exactly tr(D H D^T) with H = mean of x x^T. H does not grow with the number of tokens, so a
search over many candidate weights costs the same for 64 sequences as for 4096.

X (tokens, in); H (in, in)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Moments:
    """Running sums over the tokens that passed a linear's input.

    second: float32 (in, in), mean of x x^T once ``mean()`` was called, a sum before
    magnitude: float32 (in,), mean |x| per input column, likewise
    tokens: how many rows were added
    """

    second: Tensor
    magnitude: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> Moments:
        return cls(
            torch.zeros(in_features, in_features, device=device),
            torch.zeros(in_features, device=device),
        )

    def add(self, X: Tensor) -> None:
        """Add tokens X (..., in)."""
        X = X.flatten(0, -2)
        with _exact_products(X.dtype):
            Xf = X.float()
            self.second.addmm_(Xf.T, Xf)
        self.magnitude += X.abs().sum(0, dtype=torch.float32)
        self.tokens += X.shape[0]

    def mean(self) -> Moments:
        """The means over all tokens. Raises ValueError if a sum is not finite."""
        if not torch.isfinite(self.second).all():
            raise ValueError("the calibration activations are not finite")
        return Moments(self.second / self.tokens, self.magnitude / self.tokens, self.tokens)


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matmuls use the bf16 (CPU) or tf32 (GPU) units where that loses nothing.

    A product of two bf16 numbers is exact in float32 and the units accumulate in float32, so inputs
    that came from bf16 give the same sums, three to five times faster.
    """
    if dtype != torch.bfloat16:
        yield
        return
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    cuda = torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


@contextmanager
def collect(
    linears: Mapping[str, nn.Linear], shared: Iterable[tuple[str, ...]]
) -> Iterator[dict[str, Moments]]:
    """Collect the moments of the inputs of ``linears`` while the block runs inside the context.

    shared: names that read the same tensor (q, k, v ...): counted once, at the first of them.
    Yields name -> Moments (sums); names that share an input share the object.
    """
    found: dict[str, Moments] = {}
    with ExitStack() as hooks:
        for names in shared:
            first = linears[names[0]]
            moments = Moments.zeros(first.in_features, first.weight.device)
            found |= dict.fromkeys(names, moments)

            def hook(_: nn.Module, args: tuple[Tensor], moments: Moments = moments) -> None:
                moments.add(args[0])

            hooks.callback(first.register_forward_pre_hook(hook).remove)
        yield found
