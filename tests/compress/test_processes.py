"""Runs that torchrun or accelerate start with two processes on the CPU: real processes, a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import __main__ as command_line
from compress import processes, stages
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.pipeline import run_recipe
from tests.exported import checkpoint_bytes

# quantize as a stage that trains with several processes, and rotate as one of the main process's alone.
SCRIPT = """
import os, signal, torch
from compress import stages
from compress.__main__ import main

quantize, rotate = stages._STAGES["quantize"], stages._STAGES["rotate"]

def together(work):
    seen = torch.ones(1)
    torch.distributed.all_reduce(seen)
    main = os.environ["RANK"] == "0"
    assert work.source.path.name in ("rotate", "model")
    return quantize(work) | {"processes": int(seen)} if main else {}

def failing_together(work):
    if os.environ["RANK"] == "0":
        raise RuntimeError("a stage that fails")
    torch.distributed.all_reduce(torch.ones(1))

def failing(work):
    if os.environ["FAIL"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a stage that fails")

stages.DISTRIBUTED = frozenset({"quantize"})
stages._STAGES["quantize"] = failing_together if os.environ.get("FAIL") == "quantize" else together
stages._STAGES["rotate"] = failing if os.environ.get("FAIL") in ("rotate", "killed") else rotate
main()
"""
WORDS = ["scheme.group_size=32", "eval=none", "speed=none", "data.sequences=4", "data.length=64"]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(
    launcher: list[str], words: list[str], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    # One thread each, as launchers choose: sums in another order would be other bytes.
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


def test_one_process_makes_no_group() -> None:
    assert (processes.count(), processes.is_main()) == (1, True)
    assert processes.from_main("word") == "word"
    processes.wait()
    processes.release(3)
    processes.alone()
    assert not torch.distributed.is_initialized()


def test_two_processes_leave_the_folder_and_the_bytes_of_one(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    """They share the calibration text: two batches of it, so that each runs one that one process has too."""
    words = ["recipe=awq-int4", f"model={tiny.path}", f"data={text_file}", *WORDS]
    words += ["data.sequences=32", "data.length=256"]
    two = launched([*LAUNCH, "-m", "compress"], words, tmp_path)
    assert two.returncode == 0, two.stderr
    assert "Traceback" not in two.stderr
    one = launched(["compress"], [*words, "hydra.run.dir=one"], tmp_path)
    assert one.returncode == 0, one.stderr
    (run,) = tmp_path.glob("outputs/*/*/*")
    assert {file.name for file in run.iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}
    assert checkpoint_bytes(run) == checkpoint_bytes(tmp_path / "one")
    assert one.stdout == two.stdout, "one table, of the main process"
    compression = json.loads((run / "metrics.json").read_text())["compression"]
    assert compression["processes"] == 2


def test_all_processes_join_in_a_stage_that_trains_with_several(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, script: Path
) -> None:
    """In a sweep too, and with one process as with two."""
    words = ["-m", "recipe=rtn-int4,rtn-int3", "stages=[rotate,quantize]", f"model={tiny.path}"]
    done = launched([*TORCHRUN, str(script)], [*words, *WORDS], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    runs = sorted(tmp_path.glob("outputs/*/*/*"))
    assert [run.parent.name for run in runs] == ["rtn-int3", "rtn-int4"]
    for run in runs:
        found = json.loads((run / "metrics.json").read_text())["compression"]
        assert found["processes"] == 2
        assert not list(run.glob("*.partial"))
        assert not list(run.glob("*.state"))


@pytest.mark.parametrize("fail", ["rotate", "killed", "quantize"])
def test_no_process_waits_for_a_main_one_that_failed(
    tiny: ModelFolder, tmp_path: Path, script: Path, fail: str
) -> None:
    """In a stage of its own, without a word, and in a stage of all."""
    words = ["recipe=rtn-int4", "stages=[rotate,quantize]", f"model={tiny.path}", *WORDS]
    began = time.monotonic()
    done = launched([*TORCHRUN, str(script)], [*words, "hydra.run.dir=out"], tmp_path, FAIL=fail)
    assert time.monotonic() - began < 120
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: a stage that fails") == (fail != "killed")
    if fail != "quantize":
        # The process that waited has nothing to say.
        assert "Connection closed" not in done.stderr
    left = {file.name for file in (tmp_path / "out").iterdir() if file.is_dir()}
    assert left == {".hydra"} | ({"rotate"} if fail == "quantize" else set())


def test_processes_distill_together_as_one_alone(
    make_model: Callable[..., ModelFolder], text_file: Path, tmp_path: Path
) -> None:
    """From the command line to a checkpoint: the weights but for the order of sums."""
    original = make_model(dtype="float32")
    words = ["recipe=prune-width-distill", "prune=sizes", "prune.mlp=192", "data.sequences=8"]
    words += ["data.length=32", "distill.steps=4", "distill.length=32", "distill.micro_batch=2"]
    words += [f"model.source={original.path}", "data=text", f"data.source={text_file}"]
    words += ["eval=none", "speed=none"]
    two = launched([*LAUNCH, "-m", "compress"], [*words, "hydra.run.dir=two"], tmp_path)
    assert two.returncode == 0, two.stderr
    assert "Traceback" not in two.stderr
    run = parse(compose_settings(words))
    one = run_recipe(run, "one", tmp_path / "one")["compression"]["distill"]
    report = json.loads((tmp_path / "two" / "metrics.json").read_text())["compression"]["distill"]
    assert (report["processes"], one["processes"]) == (2, 1)
    for ours, theirs in zip(report["held_out"], one["held_out"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    a, b = (ModelFolder(tmp_path / name / "checkpoint") for name in ("one", "two"))
    pruned = ModelFolder(tmp_path / "two" / "prune")
    assert a.names == b.names
    for name in a.names:
        moved = (a.tensor(name) - pruned.tensor(name)).norm()
        assert moved > 0
        assert (b.tensor(name) - a.tensor(name)).norm() < 1e-2 * moved, name


@pytest.mark.parametrize("main", [True, False])
def test_a_mistake_within_a_stage_is_told_by_the_main_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: bool
) -> None:
    def mistaken(*_: Any) -> int:
        raise UserError("lower distill.rate")

    monkeypatch.setattr(processes, "is_main", lambda: main)
    monkeypatch.setattr(command_line, "run_recipes", mistaken)
    monkeypatch.setattr(stages, "join", mistaken)
    assert command_line._code(["recipe=x"]) == 2
    assert capsys.readouterr().err == ("compress: lower distill.rate\n" if main else "")


def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path) -> None:
    words = ["recipe=rtn-int4", "scheme.bits=9"]
    done = launched([*TORCHRUN, "-m", "compress"], words, tmp_path)
    assert done.stderr.count("scheme.bits=9 is not allowed: choose 2 to 8") == 1
    ends = [line.split()[2] for line in done.stderr.splitlines() if "  exitcode  :" in line]
    assert ends == ["2", "2"]
    assert not list(tmp_path.iterdir())
