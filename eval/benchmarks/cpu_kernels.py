"""The CPU kernels for one token beside torch's own, as a share of what memory gives.

    python -m eval.benchmarks.cpu_kernels [--shapes 960x576 ...] [--tokens 1] [--out FILE]

Weights of each format take turns so that none is in the caches when its turn comes again. So do the kernels,
for many rounds; what counts is the median over the rounds. The share is of the bandwidth that one pass over a
large tensor reaches in the same round. torch takes as many threads as it likes; OMP_NUM_THREADS says
otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.environment import environment
from compress.kernels import cpu_library
from compress.kernels.cpu_linear import CpuWeight, name
from compress.kernels.int4_cpu import Int4Weight
from compress.kernels.int8_cpu import Int8Weight
from compress.model.folder import write_json
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes
from compress.report.table import markdown
from eval.benchmarks.timing import measure

# The demo model's linears with merged projections and its head, and an 8B model's output and gate.
SHAPES = ("960x576", "576x576", "3072x576", "576x1536", "49152x576", "4096x4096", "14336x4096")
GROUP = 64
# Several times a third-level cache.
BYTES = 2**27
READ = "read"
SCHEMES = (
    Scheme(2, GROUP),
    Scheme(3, GROUP),
    Scheme(4, GROUP),
    Scheme(8, "channel", symmetric=True),
    Scheme(8, "channel", symmetric=True, type="float"),
)


@dataclass(frozen=True)
class Candidate:
    """call: the product with the next of the weights that take turns; nbytes: of one of them"""

    call: Callable[[], Any]
    nbytes: int


@dataclass(frozen=True)
class TorchLinear:
    """What torch does with a weight in 16 bits."""

    weight: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def candidate(weight: Any, large: str, x: Tensor) -> Candidate:
    """large: the field of the weight that memory is read for, of which there are copies"""
    codes = getattr(weight, large)
    tensors = [getattr(weight, f.name) for f in fields(weight)]
    nbytes = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    count = max(2, -(-BYTES // nbytes))
    turns = itertools.cycle([replace(weight, **{large: codes.clone()}) for _ in range(count)])
    return Candidate(lambda: next(turns).matmul(x), nbytes)


def candidates(out_features: int, in_features: int, tokens: int) -> dict[str, Candidate]:
    """Each kernel with weights of this shape."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    x = torch.randn(tokens, in_features, generator=generator).to(torch.bfloat16)
    found = {}
    for scheme in SCHEMES:
        q = to_codes(W, make_grid(W, scheme, torch.bfloat16), scheme)
        ours = CpuWeight.pack(q)
        check(ours.matmul(x), x, q)
        found[name(q)] = candidate(ours, "codes", x)
        if (scheme.type, scheme.bits) == ("int", 4):
            found["torch int4"] = candidate(Int4Weight.pack(q), "packed", x)
        if (scheme.type, scheme.bits) == ("int", 8):
            found["torch int8"] = candidate(Int8Weight.pack(q), "weight", x)
    wide = W.to(torch.bfloat16)
    found["bf16-avx512"] = candidate(CpuWeight.dense(wide), "codes", x)
    found["torch bf16"] = candidate(TorchLinear(wide), "weight", x)
    buffer = torch.ones(BYTES // 4)
    found[READ] = Candidate(lambda: torch.ops.compress.read.default(buffer), buffer.nbytes)
    return found


def check(y: Tensor, x: Tensor, q: QTensor) -> None:
    """What is timed is right. Raises RuntimeError."""
    wanted = x.float() @ q.dequantize(torch.float32).T
    error = float((y.float() - wanted).norm() / wanted.norm())
    if not error < 0.01:
        raise RuntimeError(f"{name(q)} is {error:.1%} off")


def row(shape: str, tokens: int, found: dict[str, Candidate]) -> dict[str, Any]:
    """Medians: microseconds, GB/s of the weight, and its share of the round's read."""
    times = measure({kernel: c.call for kernel, c in found.items()}, torch.device("cpu"))
    rates = {kernel: [found[kernel].nbytes / t / 1e3 for t in times[kernel]] for kernel in times}
    shares = {
        kernel: statistics.median(a / b for a, b in zip(rates[kernel], rates[READ], strict=True))
        for kernel in rates
    }
    return {
        "shape": shape,
        "tokens": tokens,
        "rounds": times,
        "microseconds": {kernel: statistics.median(values) for kernel, values in times.items()},
        "fastest": {kernel: min(values) for kernel, values in times.items()},
        "gigabytes_per_second": {k: statistics.median(values) for k, values in rates.items()},
        "share": shares,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds and the share of what memory gives, a line a shape."""
    kernels = [kernel for kernel in rows[0]["share"] if kernel != READ]
    lines = [["shape", "read GB/s", *(f"{kernel} us" for kernel in kernels)]]
    for r in rows:
        cells = [f"{r['microseconds'][k]:.1f} ({r['share'][k]:.0%})" for k in kernels]
        lines.append([r["shape"], f"{r['gigabytes_per_second'][READ]:.1f}", *cells])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not cpu_library.available():
        raise SystemExit("the kernels need AVX-512 with bf16 instructions, and a C++ compiler")
    rows = []
    with torch.inference_mode():
        for shape in asked.shapes:
            out_features, in_features = map(int, shape.split("x"))
            rows.append(
                row(shape, asked.tokens, candidates(out_features, in_features, asked.tokens))
            )
            print(f"{shape} done", flush=True)
    print(table(rows))
    if asked.out:
        write_json(asked.out, {"environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
