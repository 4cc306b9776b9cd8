"""Hidden states in files: the same numbers, and no more in memory than what is worked on."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import psutil
import pytest
import torch

from compress.errors import UserError
from compress.model.states import CPU, States, home_of

MB = 2**20


def mapped_bytes() -> int:
    """Resident bytes of files, mapped ones among them."""
    return int(psutil.Process().memory_info().shared)


def test_states_in_files_are_those_in_memory(tmp_path: Path) -> None:
    X = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    for states in (States(), States(CPU, tmp_path)):
        kept = states.joined(iter(X.split(4)), 6)
        assert torch.equal(kept, X)
        # Letting go changes nothing: what is looked at again is read again.
        states.done(kept)
        assert [len(part) for part in states.read(kept.split(4))] == [4, 2]
        assert torch.equal(torch.cat(list(states.read(kept.split(4)))), X)
        rows = torch.tensor([5, 0, 5])
        assert torch.equal(states.pick(kept, rows), X[rows])
        assert torch.equal(states.keep(X), X)
        assert states.like(X).dtype == X.dtype
    assert not list(tmp_path.iterdir()), "their files have no names"


def test_what_was_worked_on_leaves_the_memory(tmp_path: Path) -> None:
    """64 MB written and read in parts of 1 MB."""
    states = States(CPU, tmp_path)
    before, most = mapped_bytes(), 0
    X = states.empty((64, 4, MB // 16), torch.float32)
    for part in X.split(1):
        states.done(part.fill_(1.0))
        most = max(most, mapped_bytes() - before)
    total = 0.0
    for part in states.read(X.split(1)):
        total += float(part.sum())
        most = max(most, mapped_bytes() - before)
    assert total == X.numel()
    assert most < 16 * MB, most


def test_room_comes_back_with_the_tensor(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    states = States(CPU, tmp_path)
    X = states.empty((8, MB), torch.uint8)
    assert len(states._files) == 1
    del X
    gc.collect()
    assert not states._files
    assert os.statvfs(tmp_path).f_blocks == free.f_blocks


def test_a_full_disk_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 40 bytes of hidden states.*spill=false"):
        States(CPU, tmp_path).empty((2, 5), torch.float32)


def test_states_stay_on_a_gpu_only_where_they_leave_room() -> None:
    gpu = torch.device("cuda", 0)
    assert home_of(gpu, needed=10, free=20) == gpu
    assert home_of(gpu, needed=11, free=20) == CPU
