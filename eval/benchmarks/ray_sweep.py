"""A sweep on two workers of a local Ray beside the same sweep run serially, and once more with a job killed.

    python -m eval.benchmarks.ray_sweep [--recipes rtn-int4,...] [--threads 1] [--out NAME] [WORD ...]

Each sweep is the command, in a process and with a user cache of its own. Every job has the same number of
threads (``OMP_NUM_THREADS``). Compared is every file of a run but what tells of time
(``eval.faults.kills.differences``). In the third sweep the process of one job gets SIGKILL while it
compresses; then the same command is started again. WORDs replace or follow those of ``QUICK``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
import torch

from compress.environment import environment
from compress.model.folder import read_json, write_json
from compress.report.table import METRICS, markdown
from compress.run_folder import RUN
from eval.faults.kills import differences, files_of

RECIPES = "rtn-int4,awq-int4,gptq-int4,w8a16-int8"
QUICK = [
    "data=sotu",
    "data.sequences=8",
    "data.length=256",
    "eval.tokens=1024",
    "eval.window=256",
    "eval.block_tokens=null",
    "eval.generated=16",
    "eval.tasks=[]",
    "speed=none",
]
WORKERS = 2


def start(folder: Path, words: list[str], threads: int) -> subprocess.Popen[str]:
    """The command in a folder; what it says on standard error is in sweep.log there."""
    folder.mkdir(exist_ok=True)
    given = {"OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder / "cache")}
    # A list of fonts that takes seconds to make.
    given["MPLCONFIGDIR"] = mpl.get_cachedir()
    with (folder / "sweep.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "compress", "-m", *words, "hydra.sweep.dir=runs"],
            cwd=folder,
            env={**os.environ, **given},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def sweep(folder: Path, words: list[str], threads: int) -> dict[str, Any]:
    """Run the command to its end. Returns its seconds, exit code and table."""
    began = time.perf_counter()
    process = start(folder, words, threads)
    table, _ = process.communicate()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "code": process.returncode, "table": table}


def kill_one(folder: Path, recipe: str, process: subprocess.Popen[str]) -> None:
    """Kill the process that works on a recipe, once it quantizes. Raises RuntimeError if the sweep ends
    before."""
    while process.poll() is None:
        for state in (folder / "runs").glob(f"*/{recipe}/*/quantize.*"):
            held = state.parent / RUN
            for worker in psutil.process_iter():
                try:
                    if any(Path(file.path) == held for file in worker.open_files()):
                        worker.send_signal(signal.SIGKILL)
                        return
                except psutil.Error:
                    continue
        time.sleep(0.2)
    raise RuntimeError(f"{recipe} was not met at work: {folder / 'sweep.log'}")


def runs_of(folder: Path) -> dict[str, Path]:
    """Recipe -> the folder of its run."""
    return {run.parent.name: run for run in (folder / "runs").glob("*/*/*") if (run / RUN).exists()}


def compared(ours: Path, theirs: Path, recipes: list[str]) -> dict[str, Any]:
    """Of each recipe how many files of a run are compared, the names of those that differ, and in both sweeps
    its threads and seconds of compression."""
    found = {}
    for recipe in recipes:
        one, other = runs_of(ours)[recipe], runs_of(theirs)[recipe]
        metrics = [read_json(run / METRICS) for run in (one, other)]
        found[recipe] = {
            "files": len(files_of(one)),
            "different": differences(one, other),
            "threads": [m["environment"]["threads"] for m in metrics],
            "compression_seconds": [m["compression"]["seconds"] for m in metrics],
        }
    return found


def measure(work: Path, recipes: list[str], words: list[str], threads: int) -> dict[str, Any]:
    words = [f"recipe={','.join(recipes)}", *words]
    ray = ["hydra/launcher=ray", f"hydra.launcher.ray.init.num_cpus={WORKERS * threads}"]
    ray.append(f"hydra.launcher.ray.remote.num_cpus={threads}")
    serial, on_ray, killed = (work / name for name in ("serial", "ray", "killed"))
    found: dict[str, Any] = {
        "words": words,
        "threads": threads,
        "workers": WORKERS,
        "load_before": os.getloadavg()[0],
        "serial": sweep(serial, words, threads),
        "ray": sweep(on_ray, [*words, *ray], threads),
    }
    found["same"] = compared(on_ray, serial, recipes)
    victim = recipes[-1]
    process = start(killed, [*words, *ray], threads)
    kill_one(killed, victim, process)
    process.communicate()
    log = (killed / "sweep.log").read_text(encoding="utf-8")
    told = [line for line in log.splitlines() if line.startswith("compress: ") and "fail" in line]
    rest = compared(killed, serial, recipes[:-1])
    again = sweep(killed, [*words, *ray], threads)
    found["killed"] = {
        "recipe": victim,
        "code": process.returncode,
        "told": [line.replace(str(work), "") for line in told],
        "rest": rest,
        "again": {**again, "same": compared(killed, serial, [victim])[victim]},
    }
    return {**found, "environment": environment(torch.device("cpu"))}


def told(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    serial, ray, killed = found["serial"], found["ray"], found["killed"]
    rows = [["recipe", "files compared", "different", "seconds to compress, serial", "Ray"]]
    for recipe, same in found["same"].items():
        ours, theirs = same["compression_seconds"]
        cells = [str(same["files"]), str(len(same["different"])), f"{theirs:.1f}", f"{ours:.1f}"]
        rows.append([f"`{recipe}`", *cells])
    rest = sum(len(same["different"]) for same in killed["rest"].values())
    again, threads = killed["again"], f"{found['threads']} thread(s)"
    return "\n".join(
        [
            f"# {len(found['same'])} recipes, {found['workers']} workers of a local Ray, {threads} a job",
            "",
            markdown(rows),
            "",
            f"The serial sweep took {serial['seconds']:.0f} s (exit code {serial['code']}), that on Ray "
            f"{ray['seconds']:.0f} s (exit code {ray['code']}), its start included. The load of the machine "
            f"was {found['load_before']:.1f} before.",
            "",
            f"One job killed (`{killed['recipe']}`, SIGKILL while it quantized): exit code {killed['code']}; "
            f"of the other runs {rest} files differ from the serial sweep's. The same command again: exit "
            f"code {again['code']}; of the killed run {len(again['same']['different'])} files differ. "
            "What was said of it:",
            "",
            *(f"    {line}" for line in killed["told"]),
            "",
            f"`{' '.join(found['words'])}`",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser("ray_sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/ray-sweep"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        recipes = asked.recipes.split(",")
        found = measure(Path(work), recipes, [*QUICK, *asked.words], asked.threads)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.out.with_suffix(".json"), found)
    asked.out.with_suffix(".md").write_text(told(found), encoding="utf-8")
    print(told(found), end="")


if __name__ == "__main__":
    main()
