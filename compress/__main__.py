"""The command line: recipes through Hydra, or one verb."""

from __future__ import annotations

import importlib
import logging
import re
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from compress import processes
from compress.commands import VERBS
from compress.compose import (
    RECIPES,
    check_flags,
    compose_settings,
    expand_shorthand,
    one_sentence,
    options,
    register,
)
from compress.config import parse, settings_of
from compress.disk import DiskError, check_free_bytes, writing
from compress.errors import UserError, one_line
from compress.run_folder import check_free, unfinished

USER_ERROR = 2
# A candidate costs more than the gate allows.
GATE_ERROR = 1
# Overrides that say where, how well and how fast, not what: they stay out of a run's name.
UNNAMED = re.compile(
    r"[+~]*((recipe|model|eval|context|speed|gate|serve|device|hydra)\b|data=text|data\.source)"
)


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
    """Run one recipe, or a sweep with -m; every combination is checked before the first one runs. Returns the
    exit code: 1 if a candidate costs more than the gate allows."""
    words = expand_shorthand(words)
    asked = get_args_parser().parse_args(words)
    combinations, more = _checked(asked)
    words += more
    register()
    finished: list[dict[str, Any]] = []
    limits: dict[str, float] = {}

    def task(config: DictConfig) -> None:
        from compress.pipeline import run_recipe

        choice = HydraConfig.get()
        out = Path(choice.runtime.output_dir)
        # As they were said: of a key that is set twice the first may name what is not there.
        words: Any = OmegaConf.to_container(choice.overrides.task, resolve=False)
        name = run_name(choice.runtime.choices["recipe"], words)
        goes_on = f"the same command with hydra.run.dir={out} goes on from there"
        try:
            last = len(finished) + 1 == len(combinations)
            run = parse(settings_of(config))
            with writing(out):
                finished.append(run_recipe(run, name, out, last=last))
            limits.update(run.settings.gate.limits)
        except UserError as error:
            # Hydra would print a traceback; SystemExit passes through it.
            mended = isinstance(error, DiskError | processes.Lost)
            then = f"; {goes_on}" if mended else ""
            print(f"compress: {one_line(error)}{then}", file=sys.stderr)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt as stop:
            stop.add_note(goes_on)
            raise

    sys.argv = [sys.argv[0], *words]
    hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")(task)()
    code = 0
    if finished:
        from compress.report.terminal import comparison, terminal_width
        from compress.report.verdict import passed

        print(comparison(finished, limits or None, terminal_width(sys.stdout.isatty())), end="")
        for run in finished:
            judged = run["candidate"].get("verdict")
            if not passed(judged):
                code = GATE_ERROR
                failed = "; ".join(judged["gate"]["failed"])
                print(f"compress: {run['name']} is outside the gate: {failed}", file=sys.stderr)
    return code


def _checked(asked: Namespace) -> tuple[list[list[str]], list[str]]:
    """The overrides of each job, every one checked, and what leads the same command to the run that it left
    unfinished, if it did; none where Hydra is only asked what it knows. Raises UserError."""
    check_flags(asked)
    if asked.help or asked.hydra_help:
        return [], []
    if asked.info or asked.cfg:
        # Before Hydra itself looks at what they say.
        for overrides in _combinations(asked.overrides, asked.multirun):
            compose_settings(overrides)
        return [], []
    from compress.pipeline import check

    _check_words(asked.overrides)
    run_dir = _check_output(asked.overrides)
    combinations = _combinations(asked.overrides, asked.multirun)
    found: Path | None = None
    for job in combinations:
        recipes = [o.removeprefix("recipe=") for o in job if o.startswith("recipe=")]
        if not recipes:
            raise UserError(f"recipe= is missing: choose one of {', '.join(options('recipe'))}")
        settings = compose_settings(job)
        if run_dir is None and not asked.multirun:
            words = [o for o in job if not o.startswith("hydra.")]
            found = unfinished(Path("outputs", settings.model.name, recipes[-1]), words)
        check(parse(settings), None if asked.multirun else found or run_dir)
    if found is None:
        return combinations, []
    print(f"compress: goes on in {found}, which was left unfinished", file=sys.stderr)
    return combinations, [f"hydra.run.dir='{found}'"]


def _check_words(overrides: list[str]) -> None:
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word} is neither a verb ({', '.join(VERBS)}) nor KEY=VALUE")


def _check_output(overrides: list[str]) -> Path | None:
    """The output folder, if one is named. Refuses one that cannot be written, or holds anything but an
    unfinished run, before Hydra touches it."""
    chosen = dict(o.split("=", 1) for o in overrides if o.startswith("hydra.") and "=" in o)
    run_dir = Path(chosen.get("hydra.run.dir", "outputs"))
    for folder in (run_dir, Path(chosen.get("hydra.sweep.dir", "outputs"))):
        _check_writable(folder)
    if "hydra.run.dir" in chosen:
        check_free(run_dir)
    # Where nothing is named, runs and sweeps are in one folder.
    named = [Path(chosen[key]) for key in ("hydra.run.dir", "hydra.sweep.dir") if key in chosen]
    for folder in named or [run_dir]:
        check_free_bytes(folder)
    return run_dir if "hydra.run.dir" in chosen else None


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
