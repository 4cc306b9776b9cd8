"""Runs that are killed at random moments, started again with the same command until they end, and compared
with a run that nobody killed, byte by byte.

    OMP_NUM_THREADS=1 python -m eval.faults.kills [--kills 50] [--seed 0] [--out eval/results/kills]

Recipes take turns on a tiny model (``eval.faults.tiny``). A start is a process of its own, forked from this
one, which has imported everything, so that kills fall into work and not into imports. What is to be killed is
chosen among the phases that are left of a run, each as likely as another, and then a moment of it: by time
alone, writing a checkpoint would hardly be met. Of ten kills about eight are SIGKILL, the others SIGINT and
SIGTERM. --times: how many times as long as a save the work before it
must be (``compress.saved``); 0, as here, saves after every part: tiny runs have something to go on from.

Compared is every file of the run's folder but what tells of time: the log, pictures of speed, the model card
with its date; of metrics.json and the reports of steps all but seconds, peaks, dates, speed, and what was
taken over from where.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress import __main__ as command
from compress import saved
from compress.environment import environment
from compress.export.audit import CHECKPOINT, MANIFEST
from compress.model.card import CARD
from compress.model.folder import read_json, write_json
from compress.order import STAGES
from compress.report.table import METRICS, markdown
from compress.run_folder import RUN
from eval.faults.tiny import write_text, write_tiny_model

QUICK = [
    "data.sequences=8",
    "data.length=64",
    "eval.tokens=2048",
    "eval.window=128",
    "eval.block_tokens=256",
    "eval.generated=16",
    "eval.tasks=[packaged_openbookqa]",
    "eval.limit=24",
    "eval.batch_size=4",
]
GROUPS = "scheme.group_size=32"
DISTILL = [
    "distill.length=64",
    "distill.batch=2",
    "distill.micro_batch=2",
    "distill.tokens=null",
    "distill.steps=12",
    "distill.save_every=2",
    "distill.log_every=2",
]
AT_LENGTH = [
    "context.tokens=256",
    "context.windows=4",
    "context.lengths=[]",
    "context.prompts=2",
    "context.prompt_tokens=64",
    "context.generated=16",
]
CASES = {
    "awq-int4": ["recipe=awq-int4", GROUPS, "speed=none"],
    "prune-width-distill": ["recipe=prune-width-distill", *DISTILL, "speed=none"],
    "kv-fp8": ["recipe=kv-fp8", *AT_LENGTH, "speed=none"],
    "gptq-int4 with search": ["recipe=gptq-int4", GROUPS, "search=average", "speed=none"],
    "rtn-int4 with speed": [
        "recipe=rtn-int4",
        GROUPS,
        # A start that measures opens two processes, which import for themselves: nothing else is measured.
        "eval.texts=[]",
        "eval.tasks=[]",
        "speed.patterns=[[8,4],[4,4]]",
        "speed.repeats=2",
    ],
}

# So that no start has to.
IMPORTED = (
    "compress.pipeline",
    "compress.report.terminal",
    "compress.report.distillation",
    "accelerate",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "matplotlib.pyplot",
)
# The shares of kills that let a process clear away behind itself.
SIGNALS = {signal.SIGKILL: 0.8, signal.SIGINT: 0.1, signal.SIGTERM: 0.1}
# What a run that a signal stopped ends with.
STOPPED = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}
# A run that was killed so often is let go on to its end.
MOST = 8
# Phases of the log's last lines, while the checkpoint is there and metrics.json is not.
MEASURING = {
    "measuring decode speed": "measuring speed",
    "measuring accuracy at length": "measuring at length",
    "scoring ": "measuring tasks",
}
# Files that tell of time alone, and keys of JSON that do.
TIMED_FILES = ("compress.log", "table.md", "distillation.png", CARD)
TIMED_KEYS = {
    "seconds", "stage_seconds", "peak_rss", "peak_cuda", "start_rss", "date", "resumed", "state", "cached",
    "measuring", "speed", "predicted", "tokens_per_s",
}  # fmt: skip


@dataclass
class Tally:
    """What came of one recipe. kills: (phase, signal) -> how many"""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    files: int = 0
    seconds: float = 0.0
    different: list[str] = field(default_factory=list)


def start(words: list[str], log: Path, times: float) -> int:
    """Begin ``compress WORDS`` in a process forked from this one. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    # What it starts itself is ended with it.
    os.setsid()
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        saved.TIMES = times  # type: ignore[assignment]
        sys.argv = ["compress", *words]
        command.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def phase(out: Path) -> str:
    """What a run that works in the folder is doing, by what is there."""
    if not (out / RUN).exists():
        return "reading"
    names = {file.name for file in out.iterdir()}
    if METRICS in names:
        return "done"
    for step in ("generate", *STAGES, CHECKPOINT):
        begun = [n for n in names if n == f"{step}.state" or n.startswith(f"{step}.")]
        if step not in names and any(n.endswith((".partial", ".state")) for n in begun):
            return "writing the checkpoint" if step == CHECKPOINT else step
    if CHECKPOINT not in names:
        return "reading"
    # Of this start: those before it ended where they were killed.
    lines = (out / "compress.log").read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        for said, doing in MEASURING.items():
            if said in line:
                return doing
        if "compressed and audited" in line:
            break
    return "measuring texts"


def is_doing(out: Path, doing: str) -> bool:
    return phase(out) == doing


def wait(process: int, seconds: float, reached: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code of a process, negative a signal; None if it is still there after so many seconds, or once
    something is reached."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until or reached():
            return None
        time.sleep(0.005)


def end_group(process: int) -> None:
    """With what the process had started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def finish(words: list[str], out: Path, log: Path, times: float) -> dict[str, float]:
    """Run to the end; seconds of its phases. Raises RuntimeError with the end of the log if it fails."""
    seconds: dict[str, float] = {}
    last = time.monotonic()

    def look() -> bool:
        nonlocal last
        doing, now = phase(out), time.monotonic()
        seconds[doing] = seconds.get(doing, 0.0) + now - last
        last = now
        return False

    process = start(words, log, times)
    code = wait(process, 3600, look)
    if code != 0:
        end_group(process)
        raise RuntimeError(f"ended with {code}:\n{log.read_text()[-3000:]}")
    seconds.pop("done", None)
    return seconds


def killed_run(
    words: list[str],
    out: Path,
    log: Path,
    asked: argparse.Namespace,
    tally: Tally,
    left: int,
    took: dict[str, float],
) -> int:
    """One run in ``out``, killed at most ``left`` times, to its end. Returns how often it was killed."""
    choose: random.Random = asked.choose
    kills, behind = 0, 0
    while kills < min(left, MOST):
        process = start(words, log, asked.times)
        tally.starts += 1
        aim = choose.choice(["reading", *list(took)[behind:]])
        code = wait(process, 3600, functools.partial(is_doing, out, aim))
        if code is None:
            code = wait(process, choose.uniform(0, took[aim]))
        if code is None:
            number = choose.choices(list(SIGNALS), list(SIGNALS.values()))[0]
            doing = phase(out)
            if doing in took:
                behind = max(behind, list(took).index(doing))
            os.kill(process, number)
            code = wait(process, 120)
            end_group(process)
            if code == -number or (code is not None and code == STOPPED.get(number)):
                tally.kills[doing, signal.Signals(number).name] += 1
                kills += 1
                continue
        if code != 0:
            raise RuntimeError(f"ended with {code}:\n{log.read_text()[-3000:]}")
        return kills
    if not (out / METRICS).exists():
        finish(words, out, log, asked.times)
        tally.starts += 1
    return kills


def untimed(value: Any) -> Any:
    """JSON without what tells of time."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED_KEYS}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def content(out: Path, name: str) -> Any:
    """What of a file of a run must be the same in every run."""
    file = out / name
    # What stages and formats write tells of no time but in the manifest.
    if file.suffix != ".json" or (file.parent != out and file.name != MANIFEST):
        return file.read_bytes()
    found = json.loads(file.read_text(encoding="utf-8"))
    if file.name == MANIFEST:
        found["files"].pop(CARD, None)
    # As text: NaN is the same as NaN.
    return json.dumps(untimed(found))


def files_of(out: Path) -> set[str]:
    inner = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    return {n for n in inner if Path(n).name not in TIMED_FILES and not n.startswith(".hydra")}


def differences(out: Path, expected: Path) -> list[str]:
    """Names of the files that are not the same in both runs."""
    ours, theirs = files_of(out), files_of(expected)
    both = sorted(ours & theirs)
    return [f"{name} is in one alone" for name in sorted(ours ^ theirs)] + [
        name for name in both if content(out, name) != content(expected, name)
    ]


def forget_figures(cache: Path) -> None:
    """Every run begins with no figures of the original in the user cache."""
    for kind in ("noise", "task-scores"):
        shutil.rmtree(cache / "compress" / kind, ignore_errors=True)


def try_all(work: Path, asked: argparse.Namespace) -> dict[str, Tally]:
    model, text = write_tiny_model(work / "model"), write_text(work / "prose.txt")
    cache = work / "cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    common = [f"model={model}", f"data={text}", f"eval.texts=[{text}]", f"context.text={text}"]
    tallies: dict[str, Tally] = {}
    took: dict[str, dict[str, float]] = {}
    cases = {name: CASES[name] for name in asked.cases}
    words = {
        name: [*common[: 4 if "kv" in name else 3], *QUICK, *own] for name, own in cases.items()
    }
    if "none" in asked.tasks:
        words = {name: [*own, "eval.tasks=[]"] for name, own in words.items()}
    for number in range(10_000):
        done = sum(sum(t.kills.values()) for t in tallies.values())
        if done >= asked.kills:
            break
        name = list(cases)[number % len(cases)]
        tally = tallies.setdefault(name, Tally())
        log = work / f"{name}.log"
        twin = work / name / "once"
        if name not in took:
            forget_figures(cache)
            took[name] = finish([*words[name], f"hydra.run.dir={twin}"], twin, log, asked.times)
            said = ", ".join(f"{doing} {s:.1f}" for doing, s in took[name].items())
            print(f"{name}, undisturbed, seconds: {said}", flush=True)
        forget_figures(cache)
        began, out = time.monotonic(), work / name / f"killed-{number}"
        left = asked.kills - done
        kills = killed_run(
            [*words[name], f"hydra.run.dir={out}"], out, log, asked, tally, left, took[name]
        )
        found = differences(out, twin)
        tally.runs += 1
        tally.files += len(files_of(out))
        tally.seconds += time.monotonic() - began
        tally.different += [f"{out.name}: {line}" for line in found]
        print(f"{name}: {kills} kills, {len(found)} files differ {found[:5]}", flush=True)
        if not found:
            shutil.rmtree(out)
    return tallies


def report(tallies: dict[str, Tally], asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "times": asked.times,
        "seconds": seconds,
        "recipes": {
            name: {
                "seed": asked.seed,
                "kills": [
                    {"phase": doing, "signal": number, "count": count}
                    for (doing, number), count in sorted(t.kills.items())
                ],
                "runs": t.runs,
                "starts": t.starts,
                "files_compared": t.files,
                "seconds": t.seconds,
                "different": t.different,
            }
            for name, t in tallies.items()
        },
        "environment": environment(torch.device("cpu")),
    }


def joined(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """With the recipes that an earlier call left in OUT.json, if they are others."""
    if not out.exists():
        return found
    earlier = read_json(out)
    seconds = earlier["seconds"] + found["seconds"]
    return {**found, "seconds": seconds, "recipes": {**earlier["recipes"], **found["recipes"]}}


def told(found: dict[str, Any]) -> str:
    """The report as Markdown: kills by phase, and what was compared."""
    recipes = found["recipes"]
    phases = sorted({k["phase"] for recipe in recipes.values() for k in recipe["kills"]})
    counts = Counter[tuple[str, str]]()
    for name, recipe in recipes.items():
        for kill in recipe["kills"]:
            counts[kill["phase"], name] += kill["count"]
    rows = [["killed while", *recipes, "all"]]
    for doing in phases:
        each = [counts[doing, name] for name in recipes]
        rows.append([doing, *map(str, each), str(sum(each))])
    each = [sum(kill["count"] for kill in recipe["kills"]) for recipe in recipes.values()]
    rows.append(["all", *map(str, each), str(sum(each))])
    for key in ("runs", "starts", "files_compared"):
        each = [recipe[key] for recipe in recipes.values()]
        rows.append([key.replace("_", " "), *map(str, each), str(sum(each))])
    each = [len(recipe["different"]) for recipe in recipes.values()]
    rows.append(["files that differ", *map(str, each), str(sum(each))])
    signals = Counter[str]()
    for recipe in recipes.values():
        for kill in recipe["kills"]:
            signals[kill["signal"]] += kill["count"]
    said = ", ".join(f"{count} {name}" for name, count in sorted(signals.items()))
    seeds, facts = [str(recipe["seed"]) for recipe in recipes.values()], found["environment"]
    return (
        f"# Kills\n\n{markdown(rows)}\n\nSignals: {said}. Seeds {', '.join(seeds)}; work is saved that took "
        f"{found['times']:g} times as long as its save. {facts['device']}, {facts['threads']} thread(s), "
        f"torch {facts['versions']['torch']}, {facts['date']}, commit {facts['commit']}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser("kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=float, default=0.0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tasks", choices=("packaged", "none"), default="packaged")
    parser.add_argument(
        "--work", type=Path, help="a new folder for the runs, kept; else a temporary one"
    )
    parser.add_argument(
        "--out", type=Path, help="writes OUT.json and OUT.md, beside other recipes in them"
    )
    asked = parser.parse_args()
    asked.choose = random.Random(asked.seed)
    # A process is forked: it may have no other threads.
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in IMPORTED:
        importlib.import_module(name)
    # lm-eval adds a list of all installed packages to every result, which takes seconds.
    sys.modules["lm_eval.evaluator"].add_env_info = lambda results: None  # type: ignore[attr-defined]
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if asked.work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            work = asked.work
            work.mkdir(parents=True)
        found = report(try_all(work, asked), asked, time.monotonic() - began)
    failed = any(recipe["different"] for recipe in found["recipes"].values())
    if asked.out is not None:
        found = joined(found, asked.out.with_suffix(".json"))
        write_json(asked.out.with_suffix(".json"), found)
    text = told(found)
    print(text)
    if asked.out is not None:
        asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
