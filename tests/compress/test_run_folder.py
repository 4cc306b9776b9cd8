"""The folder of a run: whole or not there, taken over or made, held by one process."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from compress import run_folder
from compress.errors import UserError
from compress.run_folder import (
    check_free,
    check_unheld,
    keep_same,
    opened,
    step,
    unfinished,
    unfinished_sweep,
)
from compress.saved import Saved

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


def test_run_json_says_what_is_made_there_now(tmp_path: Path) -> None:
    with opened(tmp_path, DECISIVE):
        check_said(tmp_path, DECISIVE)
    (tmp_path / "run.json").write_text("ha")
    other = {**DECISIVE, "data": {"seed": 1}}
    with opened(tmp_path, other):
        check_said(tmp_path, other)


def check_said(out: Path, decisive: dict[str, Any]) -> None:
    assert json.loads((out / "run.json").read_text()) == decisive


def chain(**bits: int) -> dict[str, dict[str, Any]]:
    """Fingerprints of steps, each with a setting, and with what is before it."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in bits.items():
        found[name] = {"scheme": {"bits": value}, "after": json.dumps(found)}
    return found


def made(out: Path, steps: dict[str, dict[str, Any]]) -> list[str]:
    """Which of the steps were made anew."""
    keep_same(out, steps)
    names: list[str] = []

    def make(target: Path, state: Path) -> dict[str, Any]:
        assert not state.exists()
        names.append(target.name.partition(".")[0])
        target.mkdir()
        return {}

    for name, fingerprint in steps.items():
        step(out, name, make, fingerprint)
    return names


def test_the_first_step_that_differs_starts_anew_with_all_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert made(tmp_path, chain(a=4, b=4, c=4)) == ["a", "b", "c"]
    assert made(tmp_path, chain(a=4, b=4, c=4)) == []
    (tmp_path / "c.state").mkdir()
    assert made(tmp_path, chain(a=4, b=3, c=4)) == ["b", "c"]
    assert caplog.messages == ["b starts anew: scheme.bits was 4, is 3"]
    # A stage more, one less; what is no step of ours stays.
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots.json").write_text("{}")
    assert made(tmp_path, chain(a=4, new=1, b=3)) == ["new", "b"]
    assert made(tmp_path, chain(a=4)) == []
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"a", "a.json", "plots", "plots.json"}


def test_a_format_more_of_the_same_stays(tmp_path: Path) -> None:
    steps = chain(a=4)
    both = {**steps, "checkpoint": {"after": "a"}, "checkpoint-gguf": {"after": "a"}}
    assert made(tmp_path, both) == ["a", "checkpoint", "checkpoint-gguf"]
    del both["checkpoint-gguf"]
    assert made(tmp_path, both) == []
    assert (tmp_path / "checkpoint-gguf").exists()
    other = {**chain(a=3), "checkpoint": {"after": "b"}}
    assert made(tmp_path, other) == ["a", "checkpoint"]
    assert not (tmp_path / "checkpoint-gguf").exists()


def test_a_step_of_before_fingerprints_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, chain(a=4))
    report = json.loads((tmp_path / "a.json").read_text())
    del report["fingerprint"]
    (tmp_path / "a.json").write_text(json.dumps(report))
    # As it stands, it is taken over by who does not ask: exports of finished runs.
    assert step(tmp_path, "a", lambda *_: {}).taken
    assert made(tmp_path, chain(a=4)) == ["a"]
    assert "a starts anew: another version of this program made it" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"report": {}, "seconds": 1, "other": 2}'])
def test_a_report_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """Its step starts anew; who does not ask for a step of this kind is told of the file."""
    made(tmp_path, chain(a=4, b=4))
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/a.json "):
        step(tmp_path, "a", lambda *_: {})
    assert made(tmp_path, chain(a=4, b=4)) == ["a", "b"]
    assert f"a starts anew: its report cannot be read: {tmp_path}/a.json" in caplog.text
    (tmp_path / "b.json").write_text(text)
    # Of no step of these, and nobody knows of which.
    assert made(tmp_path, chain(a=4)) == []
    assert (tmp_path / "b").exists()


def test_the_state_of_a_stage_that_is_no_more_goes(tmp_path: Path) -> None:
    made(tmp_path, chain(a=4))
    for name in ("gone.state", "next.state", "measured.state"):
        (tmp_path / name).mkdir()
    keep_same(tmp_path, chain(a=4, next=1))
    assert {file.name for file in tmp_path.glob("*.state")} == {"next.state", "measured.state"}


def test_a_kill_while_discarding_leaves_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, DECISIVE):
        made(tmp_path, chain(a=4, b=4))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_same(tmp_path, chain(a=3, b=4))
    assert not (tmp_path / "a").exists()
    # b is still of the first run, whose a is gone: it goes when a second one asks.
    with opened(tmp_path, DECISIVE):
        assert made(tmp_path, chain(a=3, b=4)) == ["a", "b"]


def test_what_a_state_cost_is_in_the_report(tmp_path: Path) -> None:
    def make(target: Path, state: Path) -> dict[str, Any]:
        Saved(state / "part").save({})
        target.mkdir()
        return {}

    found = step(tmp_path, "a", make)
    assert found.state is not None
    assert found.state["saves"] == 1
    assert found.state["bytes"] > 0
    assert 0 < found.state["seconds"] < found.seconds
    assert not (tmp_path / "a.state").exists()


def _try(out: Path, answers: Any) -> None:
    try:
        if (out / "run.json").exists():
            check_unheld(out)
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


def test_a_run_that_ended_in_the_meantime_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = run_folder._lock

    def late(file: Any, out: Path) -> None:
        (out / "metrics.json").touch()
        lock(file, out)

    monkeypatch.setattr(run_folder, "_lock", late)
    with pytest.raises(UserError, match="holds a finished run"), opened(tmp_path, DECISIVE):
        pass
    assert (tmp_path / "run.json").read_text() == ""


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def fail(target: Path, _: Path) -> dict[str, Any]:
        target.mkdir()
        (target / "file").touch()
        return {"no number": 1 // 0}

    with pytest.raises(ZeroDivisionError):
        step(tmp_path, "a", fail)
    assert not list(tmp_path.iterdir())


def left(run: Path, asked: list[str] | None, *files: str) -> Path:
    """A folder of a run that these words asked for."""
    (run / ".hydra").mkdir(parents=True)
    if asked is not None:
        text = "".join(f"- {word}\n" for word in asked) or "[]\n"
        (run / ".hydra" / "overrides.yaml").write_text(text)
    for file in files:
        (run / file).touch()
    return run


def test_the_newest_unfinished_run_of_the_same_words_is_found(tmp_path: Path) -> None:
    words = ["recipe=awq-int4", "scheme.bits=3"]
    assert unfinished(tmp_path / "none", words) is None

    left(tmp_path / "1", words, "run.json")
    newest = left(tmp_path / "2", words, "run.json")
    left(tmp_path / "3", words)
    left(tmp_path / "4", words, "run.json", "metrics.json")
    left(tmp_path / "5", [*reversed(words)], "run.json")
    left(tmp_path / "6", None, "run.json")
    harmed = left(tmp_path / "7", words, "run.json")
    for content in (b"[\0", b"\xff", b"- [", b"", b"- 1", b"a: 1"):
        (harmed / ".hydra" / "overrides.yaml").write_bytes(content)
        assert unfinished(tmp_path, words) == newest
    assert unfinished(tmp_path, words) == newest
    # Where hidden states were kept decides nothing.
    assert unfinished(tmp_path, [words[0], "spill=true", words[1]]) == newest
    # One that another process works on is left alone.
    with opened(newest, DECISIVE):
        assert unfinished(tmp_path, words) == tmp_path / "1"


def test_the_newest_unfinished_sweep_of_the_same_words_is_found(tmp_path: Path) -> None:
    a, b, words = tmp_path / "a", tmp_path / "b", [["recipe=a"], ["recipe=b"], ["recipe=a", "x=2"]]
    jobs = list(zip((a, b, a), words, strict=True))
    assert unfinished_sweep(jobs) is None
    done = ("run.json", "metrics.json")
    # Finished; killed in the second run; in the first; of other words.
    for number, (folder, asked) in enumerate(jobs):
        left(folder / f"1-{number}", asked, *done)
    left(a / "2-0", words[0], *done)
    left(b / "2-1", words[1], "run.json")
    left(a / "3-0", words[0], "run.json")
    left(a / "4-0", words[0], *done)
    left(b / "4-1", ["recipe=b", "x=3"], "run.json")
    # No sweep at all.
    left(a / "5", words[0], "run.json")
    assert unfinished_sweep(jobs) == [a / "3-0", b / "3-1", a / "3-2"]
    with opened(a / "3-0", DECISIVE):
        second = unfinished_sweep(jobs)
        assert second == [a / "2-0", b / "2-1", a / "2-2"]
        with opened(second[1], DECISIVE):
            assert unfinished_sweep(jobs) is None


def test_a_step_whose_weights_were_damaged_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(target: Path, _: Path) -> dict[str, Any]:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "README.md").write_text("a card")
        return {}

    fingerprints = {"quantize": {"bits": 4}, "checkpoint": {"after": "quantize"}}
    for name, fingerprint in fingerprints.items():
        step(tmp_path, name, make, fingerprint)
    # A card is completed later.
    (tmp_path / "quantize" / "README.md").write_text("another")
    keep_same(tmp_path, fingerprints)
    assert (tmp_path / "quantize").exists()
    (tmp_path / "quantize" / "model.safetensors").write_bytes(b"weighty")
    keep_same(tmp_path, fingerprints)
    assert not (tmp_path / "quantize").exists()
    assert not (tmp_path / "checkpoint").exists()
    assert "quantize starts anew" in caplog.text
    assert "model.safetensors does not hold the bytes that were written" in caplog.text
