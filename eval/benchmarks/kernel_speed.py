"""Linears from packed weights against the library's matmul in bf16, on the shapes of real models.

    python -m eval.benchmarks.kernel_speed [--shapes llama-3.1-8b ...] [--linears qkv ...]
        [--formats w4-g128 ...] [--batches 1 4 16 64 128] [--fused] [--tune] [--out FILE.json]

All take turns as replayed graphs; what counts is the median over the rounds of the ratio within a round. Each
runs through copies of its weight that together exceed the cache several times. GB/s are the bytes of a weight
over its time; the share is of what a kernel that only reads reached in the same process. --fused adds what
surrounds the linear in a block to both sides: norm, gate, residual. --tune measures configurations first and
keeps them. Each result is compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.environment import environment
from compress.kernels import packed_linear, tuning
from compress.kernels.fusion import PLAIN, Fusion, around
from compress.kernels.packed_linear import TritonWeight, copies, copies_beyond_cache
from compress.model.folder import write_json
from compress.model.shapes import SHAPES, shape_config
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes
from compress.report.table import markdown
from eval.bandwidth import read_bandwidth
from eval.benchmarks.timing import measure

MODELS = ("llama-3.1-8b", "llama-3.2-1b", "llama-2-13b")
FORMATS = {
    "w4-g128": Scheme(4, 128, True),
    "w4-g64-asym": Scheme(4, 64),
    "w3-g128": Scheme(3, 128, True),
    "w2-g64": Scheme(2, 64, True),
    "w8": Scheme(8, "channel", True),
    "fp8": Scheme(8, "channel", True, "float"),
    "fp8-w8a8": Scheme(8, "channel", True, "float", InputScheme("float")),
}
SIXTEEN, LIBRARY = "w16", "library"
LINEARS = ("qkv", "o", "gate-up", "down", "head")
EPS = 1e-5
# What a rounded result may be off: bf16 keeps 8 bits, and a level of 8-bit inputs may fall the other way.
TOLERANCE = 0.01
# Quantized at once, in float32 for a moment.
ROWS_AT_ONCE = 2**14


def shape_of(model: str, name: str) -> tuple[int, int]:
    """Outputs and inputs."""
    config = shape_config(model)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    return {
        "qkv": ((heads + 2 * config["num_key_value_heads"]) * size, hidden),
        "o": (hidden, heads * size),
        "gate-up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (config["vocab_size"], hidden),
    }[name]


def fusion_of(name: str, K: int, device: torch.device) -> Fusion:
    """What stands before and after such a linear in a block."""
    if name in ("o", "down"):
        return PLAIN
    norm = torch.rand(K, device=device, dtype=torch.bfloat16) + 0.5
    return Fusion(norm, EPS, gated=name == "gate-up")


def quantized(W: Tensor, scheme: Scheme) -> QTensor:
    """W bf16 rounded to its grid, rows by rows: a head in float32 takes gigabytes."""
    parts = [
        to_codes(some.float(), make_grid(some.float(), scheme, W.dtype), scheme)
        for some in W.split(ROWS_AT_ONCE)
    ]
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
        inputs=scheme.inputs,
    )


def through(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """All calls in turn, as one."""

    def run() -> Tensor:
        for call in calls[:-1]:
            call()
        return calls[-1]()

    return run


class Bench:
    """One linear of a model at one batch: the candidates, checked and timed."""

    def __init__(self, model: str, name: str, batch: int, fused: bool, device: torch.device):
        self.N, self.K = shape_of(model, name)
        self.fusion = fusion_of(name, self.K, device) if fused else PLAIN
        bf16 = {"device": device, "dtype": torch.bfloat16}
        self.W = torch.randn(self.N, self.K, **bf16) * self.K**-0.5  # type: ignore[call-overload]
        self.x = torch.randn(batch, self.K, **bf16)  # type: ignore[call-overload]
        width = self.N // 2 if self.fusion.gated else self.N
        with_residual = fused and name in ("o", "down")
        self.residual = torch.randn(batch, width, **bf16) if with_residual else None  # type: ignore[call-overload]
        self.device = device
        self.runs: dict[str, Callable[[], Tensor]] = {}
        self.nbytes: dict[str, int] = {}
        self.many: dict[str, int] = {}
        self.configs: dict[str, tuning.Config] = {}

    def add_library(self) -> None:
        weights = [self.W]
        weights += [
            self.W.clone() for _ in range(copies_beyond_cache(self.W.nbytes, self.device) - 1)
        ]
        self._add(
            LIBRARY,
            self.W.nbytes,
            [
                lambda W=W: around(lambda x: linear(x, W), self.x, self.fusion, self.residual)  # type: ignore[misc]
                for W in weights
            ],
        )

    def add(self, name: str, tuned: bool) -> None:
        """A format. Raises RuntimeError if its result is wrong."""
        if name == SIXTEEN:
            weight = TritonWeight.dense(self.W)
            expected = around(
                lambda x: x @ self.W.float().T,
                self.x.float(),
                self.fusion.widened(),
                self._residual(),
            )
        else:
            q = quantized(self.W, FORMATS[name])
            if not packed_linear.supports(q, self.device, torch.bfloat16):
                raise SystemExit(f"no kernel for {name} runs on this {self.device.type}")
            weight = TritonWeight.pack(q, self.device)
            expected = packed_linear.reference(self.x, q, self.fusion, self.residual)
            del q
        y = weight.fused(self.x, self.fusion, self.residual)
        error = float((y.float() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise RuntimeError(
                f"{name} {self.N} x {self.K} is {error:.2%} off at batch {len(self.x)}"
            )
        if tuned:
            packed_linear.tune(weight, len(self.x), torch.bfloat16)
        _, processors = tuning.device_facts(self.device)
        self.configs[name] = tuning.table().config(
            weight.key(len(self.x), self.x.dtype), processors
        )
        weights = copies(weight, copies_beyond_cache(weight.nbytes, self.device))
        self._add(
            name,
            weight.nbytes,
            [lambda w=w: w.fused(self.x, self.fusion, self.residual) for w in weights],  # type: ignore[misc]
        )

    def _add(self, name: str, nbytes: int, calls: Sequence[Callable[[], Tensor]]) -> None:
        self.runs[name], self.nbytes[name] = through(calls), nbytes
        self.many[name] = len(calls)

    def _residual(self) -> Tensor | None:
        return None if self.residual is None else self.residual.float()

    def timed(self, bandwidth: float) -> dict[str, Any]:
        """Of each: microseconds and their quartiles, GB/s, share of the bandwidth, ratio to the library."""
        found = measure(self.runs, self.device)
        each = {name: [t / self.many[name] for t in times] for name, times in found.items()}
        result = {}
        for name, times in each.items():
            config = self.configs.get(name)
            us = statistics.median(times)
            ratios = [base / own for base, own in zip(each[LIBRARY], times, strict=True)]
            rate = self.nbytes[name] / (1e-6 * us)
            result[name] = {
                "us": us,
                "us_quartiles": statistics.quantiles(times, n=4)[::2],
                "gb_per_s": rate / 1e9,
                "share": rate / bandwidth,
                "speedup": statistics.median(ratios),
                "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "config": None if config is None else asdict(config),
            }
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(MODELS))
    parser.add_argument("--linears", nargs="*", choices=LINEARS, default=list(LINEARS))
    parser.add_argument("--formats", nargs="*", choices=[*FORMATS, SIXTEEN])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 128])
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernel_speed times kernels for a CUDA device, and there is none here")
    device = torch.device("cuda")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    formats = asked.formats or [*FORMATS, SIXTEEN]
    bandwidth = read_bandwidth(device)
    print(f"read bandwidth: {bandwidth / 1e9:.0f} GB/s")
    lines, points = [["model", "linear", "batch", "library µs", *formats]], []
    for model in asked.shapes:
        for name in asked.linears:
            for batch in asked.batches:
                bench = Bench(model, name, batch, asked.fused, device)
                bench.add_library()
                for each in formats:
                    bench.add(each, asked.tune)
                found = bench.timed(bandwidth)
                points.append({"model": model, "linear": name, "batch": batch, **found})
                cells = [
                    f"{found[f]['us']:.1f} µs, {found[f]['share']:.0%} ({found[f]['speedup']:.2f}x)"
                    for f in formats
                ]
                lines.append([model, name, str(batch), f"{found[LIBRARY]['us']:.1f}", *cells])
                print(" | ".join(lines[-1]), flush=True)
    print(markdown(lines))
    if asked.out:
        write_json(
            asked.out,
            {
                "environment": environment(device),
                "read_gb_per_s": bandwidth / 1e9,
                "fused": asked.fused,
                "tuned": asked.tune,
                "points": points,
            },
        )


if __name__ == "__main__":
    main()
