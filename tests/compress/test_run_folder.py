"""The folder of a run: whole or not there, taken over or made, held by one process."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.run_folder import check_free, check_same, opened, step

DECISIVE = {"stages": ["a"], "data": {"seed": 0}}


def test_a_step_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(target: Path, state: Path) -> dict[str, Any]:
        assert not state.exists()
        assert not (tmp_path / "a.json").exists()
        target.mkdir()
        (target / "file").write_text("x")
        made.append(target.name)
        return {"found": 0.1}

    first = step(tmp_path, "a", make)
    again = step(tmp_path, "a", make)
    assert made == [f"a.{os.getpid()}.partial"]
    assert (first.taken, again.taken) == (False, True)
    assert first.report == again.report == {"found": 0.1}
    assert first.seconds == again.seconds > 0
    assert first.peak_rss == again.peak_rss > 0
    assert {file.name for file in tmp_path.iterdir()} == {"a", "a.json"}


def test_a_step_goes_on_from_its_state(tmp_path: Path) -> None:
    """The state outlives what stops the step, and goes when it is whole."""

    def make(target: Path, state: Path) -> dict[str, Any]:
        known = int((state / "count").read_text()) if state.exists() else 0
        state.mkdir(exist_ok=True)
        (state / "count").write_text(str(known + 1))
        target.mkdir()
        if known < 2:
            raise KeyboardInterrupt
        return {"starts": known + 1}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            step(tmp_path, "a", make)
        assert {file.name for file in tmp_path.iterdir()} == {"a.state"}
    assert step(tmp_path, "a", make).report == {"starts": 3}
    assert {file.name for file in tmp_path.iterdir()} == {"a", "a.json"}


def test_a_report_without_its_folder_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b").mkdir()
    assert not step(tmp_path, "a", lambda target, _: {"made": target.mkdir()}).taken
    with pytest.raises(UserError, match=r"b.json is missing"):
        step(tmp_path, "b", lambda *_: {})


def test_leftovers_of_killed_processes_are_cleared(tmp_path: Path) -> None:
    with opened(tmp_path, DECISIVE):
        pass
    (tmp_path / "a.1.partial").mkdir()
    (tmp_path / "a.1.partial" / "file").touch()
    (tmp_path / "b.json.2.partial").touch()
    (tmp_path / "a.state").mkdir()
    (tmp_path / "a.state" / "step-1.partial").touch()
    with opened(tmp_path, DECISIVE):
        assert {file.name for file in tmp_path.iterdir()} == {"run.json", "a.state"}
        assert (tmp_path / "a.state" / "step-1.partial").exists()


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path, DECISIVE):
        pass
    written = (tmp_path / "run.json").read_text()
    check_same(tmp_path, DECISIVE)
    with (
        pytest.raises(UserError, match=r"unfinished run with data.seed=0, this one has 1: choose"),
        opened(tmp_path, {**DECISIVE, "data": {"seed": 1}}),
    ):
        pass
    with pytest.raises(UserError, match=r"unfinished run with more=None, this one has 1: choose"):
        check_same(tmp_path, {**DECISIVE, "more": 1})
    (tmp_path / "run.json").write_text(written.replace('"version": 1', '"version": 0'))
    with pytest.raises(UserError, match=r"unfinished run with version=0, this one has 1: choose"):
        check_same(tmp_path, DECISIVE)
    # Killed between making the file and writing it.
    (tmp_path / "run.json").write_text("")
    check_same(tmp_path, {"stages": ["b"]})
    with opened(tmp_path, DECISIVE):
        pass
    assert (tmp_path / "run.json").read_text() == written
    assert json.loads(written) == {"version": 1, **DECISIVE}


def _try(out: Path, answers: Any) -> None:
    try:
        with opened(out, DECISIVE):
            answers.put("opened")
    except UserError as error:
        answers.put(str(error))


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()

    def ask() -> str:
        process = context.Process(target=_try, args=(tmp_path, answers))
        process.start()
        process.join(60)
        return str(answers.get(timeout=60))

    with opened(tmp_path, DECISIVE):
        (tmp_path / "a.1.partial").touch()
        assert ask().startswith(f"another process works in {tmp_path}: wait for it")
        assert (tmp_path / "a.1.partial").exists()
    assert ask() == "opened"


def test_what_is_no_unfinished_run_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "compress.log").touch()
    check_free(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty: choose another"):
        check_free(tmp_path)
    (tmp_path / "run.json").touch()
    check_free(tmp_path)
    (tmp_path / "metrics.json").touch()
    with pytest.raises(UserError, match="holds a finished run: choose another"):
        check_free(tmp_path)


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def fail(target: Path, _: Path) -> dict[str, Any]:
        target.mkdir()
        (target / "file").touch()
        return {"no number": 1 // 0}

    with pytest.raises(ZeroDivisionError):
        step(tmp_path, "a", fail)
    assert not list(tmp_path.iterdir())
