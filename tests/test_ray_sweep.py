"""Sweeps elsewhere: two workers of a local Ray, processes of submitit, beside the same sweep run serially."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compress import cluster
from compress.cluster import Ended, Job, Local, RayInit, RayWords, on_ray, on_submitit

TINY = [
    "scheme.group_size=32",
    "data.sequences=4",
    "data.length=64",
    "eval.tokens=512",
    "eval.window=128",
    "eval.block_tokens=128",
    "eval.generated=8",
    "eval.tasks=[]",
    "speed=none",
]
RAY = ["hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2"]


@dataclass
class Sweep:
    """models, outputs: folders; code, out, err: what the command ended with and said"""

    models: Path
    outputs: Path
    code: int
    out: str
    err: str

    def run(self, model: str, recipe: str) -> Path:
        (found,) = (self.outputs / model / recipe).iterdir()
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, the same with a weight that is no number, which only the run finds, and a text."""
    import torch
    from safetensors.torch import load_file, save_file

    from eval.faults.tiny import write_text, write_tiny_model

    folder = tmp_path_factory.mktemp("models")
    good, bad = (write_tiny_model(folder / name) for name in ("good", "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    return good, bad, write_text(folder / "prose.txt")


def sweep(folder: Path, models: tuple[Path, Path, Path], *words: str) -> Sweep:
    """The command, in this process; its cache is its own."""
    import matplotlib as mpl
    import torch

    from compress.__main__ import _code

    good, bad, text = models
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # Its list of fonts takes seconds to make.
        patch.setenv("MPLCONFIGDIR", mpl.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        patch.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _code(
                ["-m", f"model={good},{bad}", f"data={text}", f"eval.texts=[{text}]", *TINY, *words]
            )
    return Sweep(good.parent, folder / "outputs", code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def serial(models: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory.mktemp("serial"), models, "recipe=rtn-int4,awq-int4")


@pytest.fixture(scope="module")
def on_two(models: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory.mktemp("ray"), models, "recipe=rtn-int4,awq-int4", *RAY)


def check_failures(done: Sweep, recipes: tuple[str, ...]) -> None:
    """Of each recipe the run of the broken model failed and is told in a line, the other is in the table."""
    assert done.code == 2, done.err
    told = [line for line in done.err.splitlines() if line.startswith("compress: ")]
    assert len(told) == len(recipes), done.err
    for recipe, line in zip(recipes, told, strict=True):
        out = done.run("bad", recipe)
        source = f"model.source={done.models / 'bad'}"
        own = source if len(recipes) == 1 else f"{source} recipe={recipe}"
        assert line.startswith(
            f"compress: {own} failed: {done.models / 'bad' / 'model.safetensors'}: tensor model.layers.2."
        )
        assert line.endswith(f"holds NaN or Inf ({out})")
        assert "holds NaN or Inf" in (out / "compress.log").read_text()
        assert not (out / "metrics.json").exists()
        assert (done.run("good", recipe) / "metrics.json").exists()
        assert f"\n{recipe} " in done.out
    assert done.out.count("(original)") == 1


def test_a_failed_run_of_a_serial_sweep_does_not_end_the_others(serial: Sweep) -> None:
    check_failures(serial, ("rtn-int4", "awq-int4"))


def test_two_workers_of_ray_leave_what_a_serial_sweep_leaves(serial: Sweep, on_two: Sweep) -> None:
    from eval.faults.kills import differences, files_of

    check_failures(on_two, ("rtn-int4", "awq-int4"))
    for recipe in ("rtn-int4", "awq-int4"):
        ours, theirs = on_two.run("good", recipe), serial.run("good", recipe)
        assert {"metrics.json", "checkpoint/model.safetensors"} <= files_of(ours)
        assert differences(ours, theirs) == []
        assert "compressed and audited" in (ours / "compress.log").read_text()
    assert on_two.out == serial.out


def test_processes_of_submitit_leave_the_same(
    serial: Sweep, models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    from eval.faults.kills import differences

    done = sweep(tmp_path, models, "recipe=rtn-int4", "hydra/launcher=submitit_local")
    check_failures(done, ("rtn-int4",))
    assert differences(done.run("good", "rtn-int4"), serial.run("good", "rtn-int4")) == []
    assert list((done.outputs / ".submitit").iterdir())


def dying(words: list[str], folder: Path, place: Path, environ: dict[str, str]) -> tuple[int, str]:
    """In place of a run."""
    if words == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    return 0, ""


def jobs_of(started: str, jobs: list[Job], folder: Path) -> Iterator[Ended]:
    if started == "ray":
        return on_ray(jobs, RayWords(RayInit(num_cpus=2)))
    return on_submitit(jobs, Local(array_parallelism=2), folder / "logs")


@pytest.mark.parametrize("started", ["ray", "submitit"])
def test_a_killed_process_is_told_of_its_job_alone(
    started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "work", dying)
    jobs = [Job([word], tmp_path / str(number)) for number, word in enumerate(("a", "die", "b"))]
    found = {done.words[0]: done for done in jobs_of(started, jobs, tmp_path)}
    assert found.keys() == {"a", "die", "b"}
    assert (found["a"].reason, found["b"].reason) == (None, None)
    assert "its process is gone" in str(found["die"].reason)
    assert found["die"].code == 1
