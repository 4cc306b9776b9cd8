"""A disk that fills up under a run: one sentence, nothing half-written, and with more space it goes on."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from compress import pipeline
from compress.__main__ import USER_ERROR, _code
from compress.compose import compose_settings
from compress.config import Run, parse
from compress.disk import DiskError, check_free_bytes, writing
from compress.model.folder import ModelFolder, save_tensors, write_json
from tests.exported import checkpoint_bytes


def mounted(folder: Path, size: int, *more: str) -> bool:
    options = ",".join([*more, f"size={size}"])
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    return done.returncode == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of its own; ``mounted(folder, size, "remount")`` changes its size."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or not mounted(folder, 2**20):
        pytest.skip("a file system of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_of(tiny: ModelFolder, text_file: Path) -> Run:
    words = ["recipe=awq-int4", f"model.source={tiny.path}", "data=text", "speed=none"]
    words += [f"data.source={text_file}", "data.sequences=4", "data.length=64"]
    words += ["scheme.group_size=32", f"eval.texts=[{text_file}]", "eval.tasks=[]"]
    words += ["eval.tokens=512", "eval.window=128", "eval.block_tokens=null"]
    return parse(compose_settings(words))


def test_a_run_on_a_disk_that_is_full_again_and_again(
    tiny: ModelFolder, text_file: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tiny, text_file)
    once = pipeline.run_recipe(run, "awq", tmp_path / "once")
    out = small / "run"
    monkeypatch.setattr(pipeline, "check_room", lambda *_: None)
    named = set()
    size = 2**16
    for _ in range(60):
        assert mounted(small, size, "remount")
        try:
            pipeline.run_recipe(run, "awq", out)
            break
        except DiskError as error:
            said = str(error)
            assert said.startswith(str(out))
            assert "cannot be written: no space left on device, " in said
            assert said.endswith(" free there: make space")
            assert ".partial" not in said
            assert not list(out.glob("*.partial"))
            assert not (out / "metrics.json").exists()
            # What has its name is whole.
            for name in ("quantize", "checkpoint"):
                if (out / name).exists():
                    expected = {f.name for f in (tmp_path / "once" / name).iterdir()}
                    assert {f.name for f in (out / name).iterdir()} >= expected - {"README.md"}
            named.add(said.split(" cannot")[0].removeprefix(f"{out}/"))
        size += 2**17
    # It was full while the record, the checkpoint and what was measured were written, among others.
    assert {name.split("/")[0].removesuffix(".state") for name in named} >= {
        "quantize",
        "checkpoint",
    }
    assert checkpoint_bytes(out) == checkpoint_bytes(tmp_path / "once")
    tokens = "accuracy.safetensors"
    assert (out / tokens).read_bytes() == (tmp_path / "once" / tokens).read_bytes()
    assert pipeline.read_json(out / "metrics.json")["candidate"] == once["candidate"]


def test_what_certainly_does_not_fit_is_refused(
    tiny: ModelFolder, text_file: Path, small: Path
) -> None:
    run = run_of(tiny, text_file)
    assert mounted(small, 2**19, "remount")
    with pytest.raises(DiskError, match=r"has no room for what this run writes: it takes at least"):
        pipeline.run_recipe(run, "awq", small / "run")
    assert {f.name for f in (small / "run").iterdir()} == {"run.json"}
    # What is predicted is less than what it takes.
    assert mounted(small, 2**24, "remount")
    pipeline.run_recipe(run, "awq", small / "run")
    with pytest.raises(DiskError, match=r"no room for a run: it takes at least 99.00 GB"):
        check_free_bytes(small, 99e9)


def test_the_command_ends_with_one_sentence(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    words = ["recipe=rtn-int4", f"model={tiny.path}", "scheme.group_size=32", "eval=none"]
    done = subprocess.run(
        [sys.executable, "-m", "compress", *words, "speed=none", "hydra.run.dir=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000)),
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("compress: ")]
    out = tmp_path / "out"
    assert len(said) == 1
    assert said[0].startswith(f"compress: {out}/quantize")
    assert "cannot be written: file too large" in said[0]
    assert said[0].endswith(
        f"allow larger files (ulimit -f); the same command with hydra.run.dir={out} goes on from there"
    )
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on device, "),
        (OSError(errno.EDQUOT, "x"), "within the quota"),
        (OSError(errno.EROFS, "x"), "choose another hydra.run.dir"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "make space"),
    ],
)
def test_refusals_of_the_disk(error: Exception, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.123.partial" / "y.safetensors"
    with pytest.raises(DiskError, match=said) as caught, writing(file):
        raise error
    assert str(caught.value).startswith(f"{tmp_path / 'x' / 'y.safetensors'} cannot be written: ")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "x", "file"),
        PermissionError(errno.EACCES, "x", "/somewhere/else"),
        SafetensorError("header too small"),
        RuntimeError("shapes differ"),
    ],
)
def test_other_errors_are_left_alone(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path / "x"):
        raise error
    assert caught.value is error


def test_writers_name_their_file(tmp_path: Path) -> None:
    gone = tmp_path / "file"
    gone.mkdir()
    os.chmod(tmp_path, 0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(DiskError, match=r"a.json cannot be written: permission denied"):
            write_json(tmp_path / "a.json", {})
        with pytest.raises(DiskError, match=r"a.safetensors cannot be written"):
            save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    finally:
        os.chmod(tmp_path, 0o755)


@pytest.fixture
def as_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as ``main`` has it; what Hydra does to it is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(logging, "raiseExceptions", False)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def words_of(tiny: ModelFolder, out: Path) -> list[str]:
    words = ["recipe=rtn-int4", f"model.source={tiny.path}", "model.name=x", "eval=none"]
    return [*words, "speed=none", "device=cpu", "scheme.group_size=32", f"hydra.run.dir={out}"]


@pytest.mark.usefixtures("as_started")
def test_a_limit_on_the_first_files_of_a_run(
    tiny: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra writes the settings before anything of ours runs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = _code(words_of(tiny, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()
    assert code == USER_ERROR
    assert f"{tmp_path / 'out'} cannot be written: file too large" in said[-1]
    assert not any("Traceback" in line for line in said)


@pytest.mark.usefixtures("as_started")
@pytest.mark.parametrize("name", ["compress.log", ".hydra"])
def test_a_run_whose_first_files_cannot_be_written(
    tiny: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What an earlier start leaves lies in the way: a folder for the log, a file for the settings."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).mkdir() if name == "compress.log" else (out / name).touch()
    assert _code(words_of(tiny, out)) == USER_ERROR
    said = capsys.readouterr().err.splitlines()
    assert f"{out / name} cannot be written: " in said[-1]
    assert not any("Traceback" in line for line in said)


@pytest.mark.usefixtures("as_started")
def test_a_broken_job_keeps_its_traceback_and_lets_the_others_run(
    tiny: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even one that looks like a file that could not be written: that is said where it is written."""
    ran = []

    def run_recipe(run: Run, name: str, out: Path, *, last: bool) -> dict[str, Any]:
        ran.append(name)
        raise FileExistsError(errno.EEXIST, "broken")

    monkeypatch.setattr(pipeline, "run_recipe", run_recipe)
    words = [w for w in words_of(tiny, tmp_path) if not w.startswith(("hydra", "scheme"))]
    sweep = ["scheme.group_size=32,64", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert _code(["-m", *words, *sweep]) == 1
    assert len(ran) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "FileExistsError: [Errno 17] broken" in said
