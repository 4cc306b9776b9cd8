"""Decode attention over packed caches against 16 bits, on the shapes of an 8B model.

    python -m eval.benchmarks.kv_speed [--device cuda] [--contexts 1024 ...] [--batches 1 8 32]
    [--schemes int4 ...]
        [--out FILE.json] [--plot FILE.png]

One layer, one new token: 32 query heads over 8 key-value heads of 128. 16 bits is the fastest of
torch's scaled_dot_product_attention as a model calls it (grouped heads) and with the queries of a
head taken as rows, so that keys are read once. All take turns as replayed graphs; what counts is
the median over the rounds of the ratio within a round. Packed results of up to 65,536 tokens in all are
compared with the reference on the same store first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compress.compose import compose_settings
from compress.config import parse
from compress.environment import environment
from compress.kernels.decode_attention import attend, attend_reference, supported
from compress.kv_cache.cache import PackedLayer, Scales, Stored
from compress.kv_cache.scheme import CacheScheme
from compress.model.folder import write_json
from compress.report.table import markdown
from eval.benchmarks.timing import measure

QUERY_HEADS, HEADS, HEAD_DIM = 32, 8, 128
CONTEXTS = (1024, 4096, 16384, 32768, 65536)
SCHEMES = ("fp8", "int8", "int4", "int2")
SIXTEEN = "16 bits"
SCALING = HEAD_DIM**-0.5
# Rows whose store is made at once: quantizing needs several float32 copies.
TOKENS_AT_ONCE = 2**18


def store(scheme: CacheScheme, keys: Tensor, values: Tensor) -> tuple[Stored, int]:
    """A layer filled as a prompt and one token would, and its bytes."""
    one = torch.full((1,), 0.02, device=keys.device)
    layer = PackedLayer(
        scheme, dtype=keys.dtype, scales=Scales(one, one) if scheme.static else None
    )
    layer.fused = True
    step = max(1, TOKENS_AT_ONCE // len(keys))
    tokens = keys.shape[2]
    for start in range(0, tokens - 1, step):
        end = min(start + step, tokens - 1)
        layer.update(keys[:, :, start:end], values[:, :, start:end])
    stored, _ = layer.update(keys[:, :, -1:], values[:, :, -1:])
    return stored, layer.nbytes


def point(batch: int, context: int, schemes: list[str], device: torch.device) -> dict[str, Any]:
    """Microseconds of each, ratios to 16 bits within a round, bytes."""
    shape = (batch, HEADS, context, HEAD_DIM)
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, QUERY_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
    rows = q.view(batch, HEADS, -1, HEAD_DIM)
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, scale=SCALING, enable_gqa=True
        ),
        "sdpa by rows": lambda: scaled_dot_product_attention(rows, keys, values, scale=SCALING),
    }
    nbytes = {SIXTEEN: keys.nbytes + values.nbytes}
    for name in schemes:
        cache = parse(compose_settings(["recipe=kv-fp8", f"kv_cache={name}"])).cache
        assert cache is not None
        if not supported(cache, HEAD_DIM, device):
            raise SystemExit(f"no kernel for {name} runs on this {device.type}")
        stored, nbytes[name] = store(cache, keys, values)
        if batch * context <= 2**16:
            expected = attend_reference(q, stored, SCALING)
            error = float((attend(q, stored, SCALING).float() - expected).norm() / expected.norm())
            if not error < 0.02:
                raise RuntimeError(f"{name} is {error:.1%} off at batch {batch}, context {context}")
        calls[name] = lambda stored=stored: attend(q, stored, SCALING)  # type: ignore[misc]
    found = measure(calls, device)
    fastest = min(("sdpa", "sdpa by rows"), key=lambda name: statistics.median(found[name]))
    result: dict[str, Any] = {"batch": batch, "context": context, "fastest_16_bits": fastest}
    for name in calls:
        ratios = [base / own for base, own in zip(found[fastest], found[name], strict=True)]
        result[name] = {
            "us": statistics.median(found[name]),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "share_of_bytes": nbytes.get(name, nbytes[SIXTEEN]) / nbytes[SIXTEEN],
        }
    return result


def draw(points: list[dict[str, Any]], names: list[str], target: Path) -> None:
    """Write the PNG: time against context, a panel a batch."""
    batches = sorted({p["batch"] for p in points})
    figure = Figure(figsize=(4 * len(batches), 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        own = [p for p in points if p["batch"] == batch]
        for name in (SIXTEEN, *names):
            times = [p[p["fastest_16_bits"] if name == SIXTEEN else name]["us"] for p in own]
            axis.loglog([p["context"] for p in own], times, marker="o", label=name)
        axis.set(title=f"batch {batch}", xlabel="context", ylabel="µs a layer and token")
    axes[0].legend()
    figure.savefig(target, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.set_grad_enabled(False)
    lines, points = [["batch", "context", "16 bits µs", *asked.schemes]], []
    for batch in asked.batches:
        for context in asked.contexts:
            found = point(batch, context, asked.schemes, device)
            points.append(found)
            own = [f"{found[s]['us']:.1f} µs ({found[s]['speedup']:.2f}x)" for s in asked.schemes]
            base = found[found["fastest_16_bits"]]["us"]
            lines.append([str(batch), str(context), f"{base:.1f}", *own])
            print(" | ".join(lines[-1]), flush=True)
    print(markdown(lines))
    if asked.out:
        write_json(asked.out, {"environment": environment(device), "points": points})
    if asked.plot:
        draw(points, asked.schemes, asked.plot)


if __name__ == "__main__":
    main()
