"""Several processes that accelerate launches train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.distill.training import Training
from compress.model.folder import ModelFolder
from tests.distill import CPU, narrowed
from tests.distill_run import note_norms

# Float32: in 16 bits sums in another order would hide what matters.
KNOBS = {"steps": 6, "batch": 6, "micro_batch": 2, "rate": 1e-3, "log_every": 2, "save_every": 4}
# Without a GPU its --multi_gpu starts processes that go by themselves onto the CPU; its --cpu starts one.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"


def launch(folders: list[Path], knobs: dict[str, Any], *more: str) -> int:
    """The exit status of a training in two processes."""
    command = [sys.executable, *LAUNCH.split(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "tests.distill_run", *map(str, folders), json.dumps(knobs), *more]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one(make_model: Any, tmp_path: Path, sharded: bool) -> None:
    """The same losses, and the weights but for the order of sums, where the two were stopped once."""
    original = make_model(dtype="float32")
    student = narrowed(original, tmp_path / "student")
    blocks = torch.randint(256, (17, 16), generator=torch.Generator().manual_seed(2))
    torch.save(blocks, tmp_path / "blocks.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "update", Training.update)
        norms = note_norms()
        one = distill(
            student, original, tmp_path / "one", tmp_path / "s", blocks, Distill(**KNOBS), CPU
        )
    folders = [student.path, original.path, tmp_path, tmp_path / "blocks.pt"]
    how = ["--fsdp"] if sharded else []
    assert launch(folders, KNOBS, "--stop-at", "5", *how) == 0

    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    for report in reports:
        assert report["processes"] == 2
        assert report["parameters"] == one["parameters"]
        # Where the two went on from a state they did a step again.
        assert report["norms"][:5] == pytest.approx(norms[:5], rel=1e-3)
        for ours, theirs in zip(report["curve"], one["curve"], strict=True):
            for name in ("step", "tokens", "loss", "kl", "ce", "rate"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        for ours, theirs in zip(report["held_out"], one["held_out"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    a, b = ModelFolder(tmp_path / "one"), ModelFolder(tmp_path / "target")
    assert a.names == b.names
    for name in a.names:
        start, ours, theirs = (folder.tensor(name) for folder in (student, b, a))
        assert (ours - theirs).norm() < 1e-2 * (theirs - start).norm(), name
