"""LLM.int8 with fixed outlier columns against bitsandbytes' int8 and against 16 bits, linear by linear.

    python -m eval.benchmarks.int8_speed [--device DEVICE] [--sizes 768 ...] [--batches 1 16] [--out FILE]

One square linear a size, in a process with as many threads as torch takes. All get the same weight and the
same tokens in bf16, of which 2 % of the columns reach beyond the threshold of 6; bitsandbytes runs in its
own layer, as transformers puts it into a model. The three take turns for many rounds; what counts is the
median over the rounds of the ratio within a round, and the quartiles beside it. On CUDA each call is
a replayed graph where the library allows capture.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.environment import environment
from compress.model.folder import write_json
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes
from compress.runtime.weights import pack
from eval.benchmarks.timing import measure

SIZES = (768, 1024, 2048, 4096, 8192)
THEIRS, DENSE = "bitsandbytes", "16 bits"
# Share of input columns with outliers: what the calibrated rule keeps on the demo model.
OUTLIERS = 0.02


def candidates(size: int, batch: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Each as a call without arguments on the same weight and tokens."""
    # Once a call it says that it casts to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator) * size**-0.5
    x = torch.randn(batch, size, generator=generator).clamp(-4, 4)
    columns = torch.randperm(size, generator=generator)[: max(1, round(OUTLIERS * size))]
    columns = columns.sort().values
    x[:, columns] *= 20
    W, x = W.to(torch.bfloat16), x.to(torch.bfloat16)

    scheme = Scheme(8, "channel", True, inputs=InputScheme(outliers="static"))
    q = to_codes(W.float(), make_grid(W.float(), scheme, W.dtype), scheme)
    q = replace(q, inputs=scheme.inputs, columns=columns, kept=W[:, columns])
    found = pack(q, device, torch.bfloat16)
    if found is None:
        raise SystemExit(f"no kernel for LLM.int8 with fixed columns runs on this {device.type}")
    kernel, ours = found
    theirs = Linear8bitLt(size, size, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = Int8Params(W.half(), requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to(device)
    W, x = W.to(device), x.to(device)
    calls = {kernel: lambda: ours.matmul(x), THEIRS: lambda: theirs(x), DENSE: lambda: x @ W.T}
    check(calls, q, x)
    return calls


def check(calls: Mapping[str, Callable[[], Tensor]], q: QTensor, x: Tensor) -> None:
    """All compute the same product, up to their rounding. Raises RuntimeError."""
    wanted = x.float().cpu() @ q.dequantize(torch.float32).T
    for name, call in calls.items():
        error = float((call().float().cpu() - wanted).norm() / wanted.norm())
        if not error < 0.03:
            raise RuntimeError(f"{name} is {error:.1%} off")


def row(size: int, batch: int, found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratios of the others' time to ours within a round with their quartiles."""
    ours = next(iter(found))
    result: dict[str, Any] = {"size": size, "batch": batch, "kernel": ours, "rounds": dict(found)}
    result["microseconds"] = {name: statistics.median(values) for name, values in found.items()}
    for other in (THEIRS, DENSE):
        ratios = [b / a for a, b in zip(found[ours], found[other], strict=True)]
        result[f"times faster than {other}"] = statistics.quantiles(ratios, n=4)
    return result


def verdict(rows: list[dict[str, Any]]) -> str:
    """Where the fixed columns win and where not; a win is one in three quarters of the rounds."""
    lines = []
    for other in (THEIRS, DENSE):
        ratios = {(r["size"], r["batch"]): r[f"times faster than {other}"] for r in rows}
        lost = [f"{size} at batch {batch}" for (size, batch), q in ratios.items() if q[0] <= 1]
        medians = [quartiles[1] for quartiles in ratios.values()]
        lines.append(
            f"Against {other}: {min(medians):.2f}x to {max(medians):.2f}x, "
            + (f"not faster at {', '.join(lost)}." if lost else "faster at every size.")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usable, choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    rows = []
    names: list[str] = []
    with torch.inference_mode():
        for size in asked.sizes:
            for batch in asked.batches:
                found = measure(candidates(size, batch, device), device)
                rows.append(row(size, batch, found))
                if not names:
                    names = list(found)
                    print(
                        f"| size | batch | {' us | '.join(names)} us | "
                        + " | ".join(f"faster than {other}" for other in (THEIRS, DENSE))
                        + " |\n"
                        + "|---" * (len(names) + 4)
                        + "|"
                    )
                times = [f"{rows[-1]['microseconds'][name]:.0f}" for name in names]
                quartiles = [rows[-1][f"times faster than {other}"] for other in (THEIRS, DENSE)]
                times += [f"{q[1]:.2f}x ({q[0]:.2f} to {q[2]:.2f})" for q in quartiles]
                print(f"| {size} | {batch} | {' | '.join(times)} |", flush=True)
    print(verdict(rows))
    if asked.out:
        write_json(
            asked.out, {"environment": environment(device), "rows": rows, "verdict": verdict(rows)}
        )


if __name__ == "__main__":
    main()
