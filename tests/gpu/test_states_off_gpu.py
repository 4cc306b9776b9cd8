"""Hidden states beside the GPU, in CPU memory or in files, and blocks read ahead: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.model import states
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.quantize.rounding import Gptaq
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqScale

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def test_where_states_are_changes_nothing(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("gpu", "memory", "files"):
        if name == "memory":
            monkeypatch.setattr(states, "home_of", lambda *_, **__: states.CPU)
        quantize(
            tiny,
            tmp_path / name,
            tokens=tokens,
            schemes=Schemes(Scheme(4, 32)),
            transforms=[AwqScale(grid=4)],
            roundings=[Gptaq()],
            device=CUDA,
            spill=tmp_path if name == "files" else None,
        )
        files = sorted((tmp_path / name).glob("*.safetensors"))
        found[name] = [file.read_bytes() for file in files]
    assert found["gpu"] == found["memory"] == found["files"]


def test_off_loaded_states_are_in_pinned_memory(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    walk = Walk(tiny, LLAMA, CUDA)
    walk.embed(tokens)
    assert walk.hidden is not None
    assert walk.hidden.is_cuda
    assert walk._ahead is not None, "on a GPU the next block is read ahead"
    walk.states._home = states.CPU
    with walk.open(0):
        walk.leave(0, walk.enter(0))
    assert walk.hidden.device == states.CPU
    assert walk.hidden.is_pinned()
    for index in (1, 2):
        with walk.open(index) as module:
            assert all(p.is_cuda for p in module.parameters())
            walk.leave(index, walk.enter(index))
    ahead = walk.hidden
    plain = Walk(tiny, LLAMA, CUDA, ahead=False)
    plain.embed(tokens)
    for index in range(len(plain)):
        with plain.open(index):
            plain.leave(index, plain.enter(index))
    assert plain.hidden is not None
    assert torch.equal(ahead, plain.hidden.cpu())
