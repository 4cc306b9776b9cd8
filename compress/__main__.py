"""The command line: recipes through Hydra, or one verb."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress import processes
from compress.cluster import Ended, check_launcher, named
from compress.commands import VERBS
from compress.compose import (
    LAUNCHER,
    RECIPES,
    SERIAL,
    check_flags,
    compose_settings,
    expand_shorthand,
    is_hydra,
    launcher_of,
    one_sentence,
    options,
    register,
)
from compress.config import Run, parse, settings_of
from compress.disk import DiskError, check_free_bytes, writing
from compress.errors import USER_ERROR, UserError, one_line
from compress.model.folder import read_json
from compress.report.table import METRICS
from compress.run_folder import check_free, unfinished, unfinished_sweep

log = logging.getLogger(__name__)
T = TypeVar("T")

# Where recipes/config.yaml files runs and sweeps.
OUTPUTS = Path("outputs")
# A candidate costs more than the gate allows.
GATE_ERROR = 1
# A run of a sweep ended with an error that is no mistake of a person.
FAILED = 1
# Overrides that say where, how well and how fast, not what: they stay out of a run's name.
UNNAMED = re.compile(
    r"[+~]*((recipe|model|eval|context|speed|gate|serve|device|spill|hydra)\b|data=text|data\.source)"
)


class JobError(Exception):
    """A job broke, by its cause: no mistake of a person, and nothing of Hydra's own."""


def main() -> None:
    """Entry of ``compress`` and ``python -m compress``; of each process, where a launcher starts several."""
    # As Ctrl-C: what is unfinished is cleared away, child processes are ended.
    signal.signal(signal.SIGTERM, _stop)
    # A log that has no room is no reason for tracebacks: what the run writes next says so.
    logging.raiseExceptions = False
    try:
        # So that each sees when another one ends.
        processes.wait()
        code = _code(sys.argv[1:])
        if processes.count() > 1:
            # The first to end with an error makes the launcher end the rest, which are ending by themselves.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        processes.release(code)
    except processes.Lost as lost:
        print(f"compress: {lost}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt as stop:
        if processes.is_main():
            # How to go on, where there is a folder to go on in.
            said = ["compress: stopped", *getattr(stop, "__notes__", [])]
            print("; ".join(said), file=sys.stderr)
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    sys.exit(code)


def _code(words: list[str]) -> int:
    """Do what the words ask for, or, beside the main process, what that one hands out. Returns the exit
    code."""
    try:
        if not processes.is_main():
            from compress.stages import join

            return join()
        if words and words[0] in VERBS:
            verb = importlib.import_module(f"compress.commands.{words[0]}")
            return int(verb.main(words[1:]))
        return run_recipes(words or ["--help"])
    except UserError as error:
        # All processes of a stage stumble over the same mistake.
        if processes.is_main():
            print(f"compress: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:
        # Of argparse, or of Hydra after its traceback.
        if isinstance(stop.code, str):
            raise
        return stop.code or 0


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def run_recipes(words: list[str]) -> int:
    """Run one recipe, or a sweep with -m; every combination is checked before the first one runs, and what
    happens to one does not end the others. Returns the exit code: 1 if a candidate costs more than the gate
    allows, or a run of a sweep failed; 2 if one did by a mistake."""
    words = expand_shorthand(words)
    asked = get_args_parser().parse_args(words)
    jobs = _checked(asked)
    words += jobs.more
    register()
    finished: list[dict[str, Any]] = []
    begun = itertools.count(1)
    # A process that fails is ended with all others of its launcher.
    alone = not asked.multirun or processes.count() > 1

    def task(config: DictConfig) -> Ended:
        from compress.pipeline import run_recipe

        choice = HydraConfig.get()
        out = Path(choice.runtime.output_dir)
        # As they were said: of a key that is set twice the first may name what is not there.
        words: Any = OmegaConf.to_container(choice.overrides.task, resolve=False)
        name = run_name(choice.runtime.choices["recipe"], words)
        alike = f"the same command with hydra.run.dir={out} goes on from there"
        goes_on = f"the same command goes on in {out}" if asked.multirun else alike
        last = next(begun) == len(jobs.outs)
        try:
            if (known := jobs.finished.get(out.resolve())) is not None:
                log.info("%s: taken over from an earlier start", out)
                finished.append(known)
                return Ended(words, out)
            run = parse(settings_of(config))
            with writing(out):
                finished.append(run_recipe(run, name, out, last=last))
        except UserError as error:
            mended = isinstance(error, DiskError | processes.Lost)
            then = f"; {goes_on}" if mended else ""
            reason = f"{one_line(error)}{then}"
            if not alone:
                log.error("%s", reason)
                return Ended(words, out, reason, USER_ERROR)
            # SystemExit passes through Hydra.
            print(f"compress: {reason}", file=sys.stderr)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt as stop:
            stop.add_note(goes_on)
            raise
        except Exception as error:
            if alone:
                raise JobError from error
            log.exception("the run failed")
            return Ended(words, out, named(error), FAILED)
        return Ended(words, out)

    sys.argv = [sys.argv[0], *words]
    run = hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")(task)
    if jobs.outs and not alone:
        run = functools.partial(_swept, [*asked.overrides, *jobs.more], task)
    try:
        ends = _through_hydra(run, _place(words, asked.multirun))
    except JobError as broken:
        traceback.print_exception(broken.__cause__)
        return FAILED
    return _compared(finished) if ends is None else _told(ends)


def _place(words: list[str], multirun: bool) -> Path:
    """The folder that Hydra writes its own files in, or in folders of it."""
    chosen = dict(word.split("=", 1) for word in words if word.startswith("hydra.") and "=" in word)
    place = chosen.get("hydra.sweep.dir" if multirun else "hydra.run.dir", str(OUTPUTS))
    return Path(place.strip("'"))


def _swept(overrides: list[str], task: TaskFunction) -> list[Ended]:
    """What came of each job of a sweep, from whatever launcher; hydra.main would not hand it out."""
    version.setbase("1.3")
    sweep = Hydra.create_main_hydra2("compress", create_config_search_path(str(RECIPES)))
    try:
        batches = sweep.multirun("config", task, [*overrides, "hydra.mode=MULTIRUN"])
    except KeyboardInterrupt as stop:
        if not hasattr(stop, "__notes__"):
            stop.add_note("the same command goes on from there")
        raise
    finally:
        GlobalHydra.instance().clear()
    return [job.return_value for batch in batches for job in batch]


def _told(jobs: list[Ended]) -> int:
    """Print the table of a sweep, from what its runs left, and a line for each that failed. Returns the exit
    code."""
    code = _compared([read_json(job.folder / METRICS) for job in jobs if job.reason is None])
    for job in jobs:
        if job.reason is not None:
            code = max(code, job.code)
            # What tells it from the others.
            own = [word for word in job.words if any(word not in other.words for other in jobs)]
            words = " ".join(own or job.words)
            print(f"compress: {words} failed: {job.reason} ({job.folder})", file=sys.stderr)
    return code


def _compared(finished: list[dict[str, Any]]) -> int:
    """Print the table, and a line for each run that is outside the gate. Returns the exit code."""
    if not finished:
        return 0
    from compress.report.terminal import comparison, terminal_width
    from compress.report.verdict import passed

    code, limits = 0, dict[str, float]()
    for run in finished:
        gate = run["recipe"]["gate"].items()
        limits |= {key: limit for key, limit in gate if limit is not None}
    print(comparison(finished, limits or None, terminal_width(sys.stdout.isatty())), end="")
    for run in finished:
        judged = run["candidate"].get("verdict")
        if not passed(judged):
            code = GATE_ERROR
            failed = "; ".join(judged["gate"]["failed"])
            print(f"compress: {run['name']} is outside the gate: {failed}", file=sys.stderr)
    return code


def _through_hydra(run: Callable[[], T], place: Path) -> T:
    """Call what has Hydra call the task, which raises JobError or nothing, for each job. Raises UserError
    where Hydra cannot write its own files, the settings of a job and its log, in a folder of ``place``."""
    # It would print its errors itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with writing(place):
            try:
                return run()
            except ValueError as error:
                # As logging tells of a file that cannot be opened.
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise
    except OSError as error:
        file = place if error.filename is None else error.filename
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error, sys.argv[1:])) from error


@dataclass(frozen=True)
class _Jobs:
    """What a command asks for, and what an earlier start of it left.

    outs: the folder of each of its runs, None where Hydra makes a new one
    more: words that tell Hydra where they are; said: what was left, for a person
    finished: folder -> metrics.json of the runs of a sweep that are there already
    """

    outs: list[Path | None] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    said: str | None = None
    finished: dict[Path, dict[str, Any]] = field(default_factory=dict)


def _checked(asked: Namespace) -> _Jobs:
    """The runs, every one checked; none where Hydra is only asked what it knows. Raises UserError."""
    check_flags(asked)
    if asked.help or asked.hydra_help:
        return _Jobs()
    if asked.info or asked.cfg:
        # Before Hydra itself looks at what they say.
        for overrides in _combinations(asked.overrides, asked.multirun):
            compose_settings(overrides)
        return _Jobs()
    from compress.pipeline import check

    _check_words(asked.overrides)
    _check_launcher(launcher_of(asked.overrides), asked.multirun)
    chosen = _check_output(asked.overrides)
    jobs = [_job(words) for words in _combinations(asked.overrides, asked.multirun)]
    found = _sweep(jobs, chosen) if asked.multirun else _single(jobs[0], chosen)
    for job, out in zip(jobs, found.outs, strict=True):
        if out is None or out.resolve() not in found.finished:
            check(job.run, out)
    if found.said is not None:
        print(f"compress: {found.said}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class _Job:
    """One run of a command. own: its words but Hydra's"""

    run: Run
    recipe: str
    own: list[str]

    def folder(self, root: Path) -> Path:
        """Where its runs are filed by recipes/config.yaml."""
        return root / self.run.settings.model.name / self.recipe


def _job(words: list[str]) -> _Job:
    recipes = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    if not recipes:
        raise UserError(f"recipe= is missing: choose one of {', '.join(options('recipe'))}")
    own = [word for word in words if not is_hydra(word)]
    return _Job(parse(compose_settings(words)), recipes[-1], own)


def _single(job: _Job, chosen: dict[str, Path]) -> _Jobs:
    """chosen: what the command says of Hydra's own"""
    if "hydra.run.dir" in chosen:
        return _Jobs([chosen["hydra.run.dir"]])
    out = unfinished(job.folder(OUTPUTS), job.own)
    if out is None:
        return _Jobs([None])
    said = f"goes on in {out}, which was left unfinished"
    return _Jobs([out], [f"hydra.run.dir='{out}'"], said)


def _sweep(jobs: list[_Job], chosen: dict[str, Path]) -> _Jobs:
    """chosen: as for ``_single``"""
    from compress.pipeline import finished_before

    if "hydra.sweep.subdir" in chosen:
        return _Jobs([None] * len(jobs))
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    new = _Jobs([None] * len(jobs), _filed(now))
    root = chosen.get("hydra.sweep.dir", OUTPUTS)
    outs = unfinished_sweep([(job.folder(root), job.own) for job in jobs])
    if outs is None:
        return new
    finished: dict[Path, dict[str, Any]] = {}
    for job, out in zip(jobs, outs, strict=True):
        if not (out / METRICS).exists():
            continue
        try:
            finished[out.resolve()] = finished_before(job.run, out)
        except UserError as error:
            return replace(new, said=f"the sweep starts anew: {error}")
    began = outs[0].name.removesuffix("-0")
    said = f"goes on with the sweep of {began}: {len(finished)} of {len(jobs)} runs are finished"
    return _Jobs(list(outs), _filed(began), said, finished)


def _filed(began: str) -> list[str]:
    """Where Hydra files the runs of a sweep, all with one time: by ``now`` each would have its own."""
    folder = "${model.name}/${hydra:runtime.choices.recipe}"
    return [f"hydra.sweep.subdir='{folder}/{began}-${{hydra:job.num}}'"]


def _check_launcher(launcher: str, multirun: bool) -> None:
    """Raises UserError if jobs cannot be started by a launcher."""
    if launcher == SERIAL:
        return
    if not multirun:
        raise UserError(f"{LAUNCHER}={launcher} runs sweeps: add -m")
    if processes.count() > 1:
        raise UserError(f"{LAUNCHER}={launcher} is started by one process, not {processes.count()}")
    check_launcher(launcher)


def _check_words(overrides: list[str]) -> None:
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word} is neither a verb ({', '.join(VERBS)}) nor KEY=VALUE")


def _check_output(overrides: list[str]) -> dict[str, Path]:
    """What is said of Hydra's own, as paths. Refuses an output folder that cannot be written, or holds
    anything but an unfinished run, before Hydra touches it."""
    said = (word.split("=", 1) for word in overrides if word.startswith("hydra.") and "=" in word)
    chosen = {key: Path(value) for key, value in said}
    named = [chosen[key] for key in ("hydra.run.dir", "hydra.sweep.dir") if key in chosen]
    # Where nothing is named, runs and sweeps are in one folder.
    for folder in named or [OUTPUTS]:
        _check_writable(folder)
        check_free_bytes(folder)
    if "hydra.run.dir" in chosen:
        check_free(chosen["hydra.run.dir"])
    return chosen


def _check_writable(folder: Path) -> None:
    """Raises UserError if a folder cannot be made, or nothing can be written there."""
    try:
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        # Permissions say too little: of a full or read-only file system, or one like /proc.
        with tempfile.TemporaryDirectory(prefix=".compress-", dir=existing):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder} cannot be written ({reason}): choose another hydra.run.dir"
        ) from error


def _combinations(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job of a sweep; of the one job without -m. Raises UserError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if multirun:
            return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
        for override in parsed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} asks for a sweep: add -m")
    except HydraException as error:
        raise UserError(one_sentence(error, overrides)) from error
    return [overrides]


def run_name(recipe: str, overrides: list[str]) -> str:
    """The recipe and whatever was changed in it."""
    return " ".join([recipe, *(o for o in overrides if not UNNAMED.match(o))])


if __name__ == "__main__":
    main()
