"""Stages with their hidden states in files end in the same bytes as with them in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import calibrate
from compress.model import walk
from compress.model.folder import ModelFolder
from compress.model.states import States
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.rounding import Gptaq, Gptq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.search import Search, choose
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale

CPU = torch.device("cpu")
INT4 = Schemes(Scheme(4, 32))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences at a time."""
    monkeypatch.setattr(walk.Walk.__init__, "__defaults__", (64, None))


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def without_seconds(report: Any) -> Any:
    if isinstance(report, dict):
        return {k: without_seconds(v) for k, v in report.items() if k != "seconds"}
    return [without_seconds(v) for v in report] if isinstance(report, list) else report


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("transforms", "roundings"),
    [
        ([AwqScale(grid=4), AwqClip(steps=2)], [Nearest()]),
        ([], [Gptq(), Learned(iters=4)]),
        ([], [Gptaq()]),
    ],
)
def test_quantize(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, transforms: Any, roundings: Any
) -> None:
    reports = []
    for name, spill in (("memory", None), ("files", tmp_path)):
        report = quantize(
            tiny,
            tmp_path / name,
            tokens=tokens,
            schemes=INT4,
            transforms=transforms,
            roundings=roundings,
            device=CPU,
            spill=spill,
        )
        reports.append(without_seconds(report))
    assert reports[0] == reports[1]
    assert weights(tmp_path / "memory") == weights(tmp_path / "files")
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "files"}


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    "knobs",
    [{"hidden": 96, "mlp": 160, "refit": "all"}, {"layers": 2, "kv_heads": 1, "kv": "principal"}],
)
def test_prune(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    reports = []
    for name, spill in (("memory", None), ("files", tmp_path)):
        report = prune(
            tiny, tmp_path / name, Prune(**knobs), tokens=tokens, device=CPU, spill=spill
        )
        reports.append(without_seconds(report))
    assert reports[0] == reports[1]
    assert weights(tmp_path / "memory") == weights(tmp_path / "files")


@pytest.mark.usefixtures("few_rows")
def test_search_and_cache(tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    search = Search(average_bits=3.5, choices=[3, 4])
    found = [choose(tiny, search, INT4, tokens, CPU, spill=spill)[1] for spill in (None, tmp_path)]
    assert without_seconds(found[0]) == without_seconds(found[1])
    fp8 = StateScheme(type="float", bits=8, per="tensor")
    scheme = CacheScheme(keys=fp8, values=fp8)
    scales = [calibrate(tiny, scheme, tokens, CPU, spill=spill) for spill in (None, tmp_path)]
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in scales[1])


@pytest.mark.usefixtures("few_rows")
def test_every_state_is_let_go_of(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a stage reads or writes of its states it also hands back: memory holds batches, no more."""
    parts, done = [], []
    read, let_go = States.read, States.done

    def noting(self: States, given: Any) -> Any:
        for part in read(self, given):
            parts.append(part.data_ptr())
            yield part

    def noting_done(self: States, part: torch.Tensor) -> None:
        done.append(part.data_ptr())
        let_go(self, part)

    monkeypatch.setattr(States, "read", noting)
    monkeypatch.setattr(States, "done", noting_done)
    quantize(
        make_model(),
        tmp_path / "out",
        tokens=tokens,
        schemes=INT4,
        transforms=[AwqScale(grid=2)],
        roundings=[Nearest()],
        device=CPU,
        spill=tmp_path,
    )
    # Three batches of two, in three blocks: observed, and run to the next.
    assert len(parts) == 3 * 3 * 2
    # And what was written: embeddings, outputs, what attention made when it was observed.
    assert len(done) >= len(parts) + 3 + 2 * 3 * 3
    assert set(parts) <= set(done)
