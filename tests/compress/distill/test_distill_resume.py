"""A killed training goes on to the same weights, bit for bit; another one starts anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.distill import training
from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.distill.state import PROGRESS
from compress.distill.training import Training
from compress.model.folder import ModelFolder
from tests.distill import CPU, narrowed, same_weights

KNOBS = Distill(steps=11, batch=4, micro_batch=2, rate=2e-3, log_every=3, save_every=4)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(256, (17, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def student(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return narrowed(tiny, tmp_path_factory.mktemp("narrowed") / "model")


@pytest.fixture(scope="module")
def whole(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """What a training that nobody disturbs ends with."""
    path = tmp_path_factory.mktemp("whole")
    return path / "t", distill(student, tiny, path / "t", path / "s", blocks, KNOBS, CPU)


def kill_in(step: int, patch: pytest.MonkeyPatch, name: str = "update") -> None:
    """Let the training end with an exception in this step."""
    before = getattr(Training, name)

    def deadly(self: Training, *args: Any) -> Any:
        if self.progress.step == step:
            raise Killed
        return before(self, *args)

    patch.setattr(Training, name, deadly)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a clock says."""
    curve = [{k: v for k, v in p.items() if k != "tokens_per_s"} for p in report["curve"]]
    rest = {k: v for k, v in report.items() if k not in ("seconds", "tokens_per_s", "curve")}
    return rest | {"curve": curve}


@pytest.mark.parametrize("step", [2, 4, 10])
def test_a_killed_training_goes_on(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    step: int,
) -> None:
    target, state = tmp_path / "t", tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(step, patch)
        with pytest.raises(Killed):
            distill(student, tiny, target, state, blocks, KNOBS, CPU)
    assert not target.exists()
    saved = step // 4 * 4
    assert [p.name for p in state.glob("step-*")] == ([f"step-{saved}"] if saved else [])
    caplog.set_level("INFO")
    report = distill(student, tiny, target, state, blocks, KNOBS, CPU)
    assert (f"goes on after step {saved} of 11" in caplog.text) == (saved > 0)
    assert same_weights(target, whole[0])
    assert timeless(report) == timeless(whole[1])


def test_a_process_that_is_killed(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """By SIGKILL, while a state is half written besides."""
    torch.save(blocks, tmp_path / "blocks.pt")
    knobs = {f: getattr(KNOBS, f) for f in ("steps", "batch", "micro_batch", "rate", "log_every")}
    folders = [student.path, tiny.path, tmp_path, tmp_path / "blocks.pt"]
    command = [sys.executable, "-m", "tests.distill_run", *map(str, folders)]
    command += [json.dumps(knobs | {"save_every": 4}), "--kill-at", "9"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    state = tmp_path / "state"
    assert [p.name for p in state.glob("step-*")] == ["step-8"]
    (state / "step-12.partial").mkdir()
    (state / "step-4").mkdir()
    report = distill(student, tiny, tmp_path / "t", state, blocks, KNOBS, CPU)
    assert same_weights(tmp_path / "t", whole[0])
    assert timeless(report) == timeless(whole[1])
    assert [p.name for p in state.glob("step-*")] == ["step-8"]


def test_another_training_starts_anew(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With other knobs, or other text."""
    state = tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(5, patch)
        with pytest.raises(Killed):
            distill(student, tiny, tmp_path / "t", state, blocks + 1, replace(KNOBS, seed=1), CPU)
    distill(student, tiny, tmp_path / "t", state, blocks, KNOBS, CPU)
    assert "distill starts anew: blocks is another, knobs.seed was 1, is 0" in caplog.text
    assert same_weights(tmp_path / "t", whole[0])


def flipped(content: bytes) -> bytes:
    """With one bit other than it was, in the middle."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", lambda content: content[:-1]),
        ("model.safetensors", flipped),
        ("optimizer.bin", flipped),
        ("optimizer.bin", None),
        (PROGRESS, lambda _: b"{}"),
        (PROGRESS, lambda content: content.replace(b'"curve"', b'"bend"')),
    ],
)
def test_a_harmed_state_starts_anew(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    harm: Callable[[bytes], bytes] | None,
) -> None:
    state = tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(5, patch)
        with pytest.raises(Killed):
            distill(student, tiny, tmp_path / "t", state, blocks, KNOBS, CPU)
    file = state / "step-4" / name
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(file.read_bytes()))
    distill(student, tiny, tmp_path / "t", state, blocks, KNOBS, CPU)
    assert "distill starts anew: its state cannot be read" in caplog.text
    assert same_weights(tmp_path / "t", whole[0])


def test_what_decides_nothing_may_change(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    state = tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(9, patch)
        with pytest.raises(Killed):
            distill(student, tiny, tmp_path / "t", state, blocks, KNOBS, CPU)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        update = Training.update
        patch.setattr(
            Training, "update", lambda self, r: (seen.append(self.progress.step), update(self, r))
        )
        knobs = replace(KNOBS, save_every=100, log_every=1)
        distill(student, tiny, tmp_path / "t", state, blocks, knobs, CPU)
    assert seen == [8, 9, 10]
    assert same_weights(tmp_path / "t", whole[0])


def test_a_point_is_the_mean_of_its_steps(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Whatever is saved in between."""
    knobs = replace(KNOBS, log_every=1)
    steps = distill(student, tiny, tmp_path / "t", tmp_path / "s", blocks, knobs, CPU)["curve"]
    for point in whole[1]["curve"]:
        last = int(point["step"])
        of_it = steps[(last - 1) // 3 * 3 : last]
        for name in ("loss", "kl", "ce"):
            mean = sum(step[name] for step in of_it) / len(of_it)
            assert point[name] == pytest.approx(mean, rel=1e-5)


def test_minutes_stay_settled(
    tiny: ModelFolder,
    student: ModelFolder,
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A training that was settled to a number of steps keeps it, however slow the process that goes on."""
    time = [0.0]
    monkeypatch.setattr(training, "now", lambda: time[0])
    gradients, pace = Training.gradients, [10.0]

    def slow(self: Training, rows: Tensor) -> Tensor:
        time[0] += pace[0]
        return gradients(self, rows)

    monkeypatch.setattr(Training, "gradients", slow)
    knobs, state = replace(KNOBS, steps=None, minutes=3.0), tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(6, patch)
        with pytest.raises(Killed):
            distill(student, tiny, tmp_path / "t", state, blocks, knobs, CPU)
    saved = json.loads((state / "step-4" / PROGRESS).read_text())["progress"]
    assert saved["steps"] == 16
    pace[0] = 100.0
    report = distill(student, tiny, tmp_path / "t", state, blocks, knobs, CPU)
    assert report["steps"] == 16
    # What the killed process did after its last state is lost.
    assert report["seconds"] == saved["seconds"] + 12 * 100.0
