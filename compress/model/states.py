"""Where the hidden states between two blocks are kept: on the device, in the memory beside it, or in files.

X hidden states (sequences, length, hidden); a part is some of its rows
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from compress.errors import UserError
from compress.processes import ALONE, Team, as_bytes

# States that a block needs at one time: what enters and leaves it, of the original too, and what its
# attention makes.
AT_ONCE = 5
CPU = torch.device("cpu")


class States:
    """Room for hidden states, and their way to the device that blocks run on, some rows at a time.

    device: of the blocks. folder: where they are spilled to, in unnamed files that are mapped to memory: the
    system has their room back when the tensor, or the process, ends. None: they stay in memory, of a GPU if
    all that a block needs of them takes at most half of what is free there, else in that of the CPU.
    team: the processes that share the sequences: each keeps the states of its own.
    """

    def __init__(self, device: torch.device = CPU, folder: Path | None = None, team: Team = ALONE):
        self.device, self.folder, self.team = device, folder, team
        self._home = device if folder is None else CPU
        # By the address of the tensor's memory; an entry goes with its tensor.
        self._files: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def settle(self, nbytes: int) -> None:
        """Choose where states of so many bytes are kept from now on."""
        if self.folder is None and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            self._home = home_of(self.device, AT_ONCE * nbytes, free)

    def like(self, X: Tensor) -> Tensor:
        return self.empty(tuple(X.shape), X.dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor for states. Raises UserError if the folder's disk has no room for it."""
        if self.folder is None:
            # Pinned memory is copied to a GPU while that computes.
            pinned = self._home != self.device
            return torch.empty(shape, dtype=dtype, device=self._home, pin_memory=pinned)
        nbytes = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            _reserve(file.fileno(), nbytes, self.folder)
            mapped = mmap.mmap(file.fileno(), nbytes)
        X = torch.frombuffer(mapped, dtype=dtype).view(shape)
        self._files[X.untyped_storage().data_ptr()] = mapped
        return X

    def keep(self, X: Tensor) -> Tensor:
        """The same on the device, or a copy of it where states are kept."""
        if self.folder is None and self._home == X.device:
            return X
        kept = self.like(X).copy_(X)
        self.done(kept)
        return kept

    def joined(self, parts: Iterable[Tensor], rows: int) -> Tensor:
        """Parts that come one after the other as one tensor of so many rows."""
        whole, start = None, 0
        for part in parts:
            if whole is None:
                whole = self.empty((rows, *part.shape[1:]), part.dtype)
            self.done(whole[start : start + len(part)].copy_(part))
            start += len(part)
        assert whole is not None
        assert start == rows, (start, rows)
        return whole

    def read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Parts, on the device one after the other."""
        for part in parts:
            yield part.to(self.device, non_blocking=True)
            self.done(part)

    def pick(self, X: Tensor, rows: Tensor) -> Tensor:
        """Some rows of X, on the device. rows: their numbers among those of all processes"""
        if self.team.count == 1:
            found = X[rows.to(X.device)].to(self.device)
            self.done(X)
            return found
        start = sum(self.team.exchange(len(X))[: self.team.rank])
        mine = (rows >= start) & (rows < start + len(X))
        found = torch.zeros((len(rows), *X.shape[1:]), dtype=X.dtype, device=self.device)
        found[mine.to(self.device)] = X[(rows[mine] - start).to(X.device)].to(self.device)
        self.done(X)
        self.team.sum(as_bytes(found))
        return found

    def count(self, X: Tensor) -> int:
        """How many rows of X all processes have together."""
        return sum(self.team.exchange(len(X)))

    def done(self, part: Tensor) -> None:
        """A part was read or written and is not needed now: of a file it leaves the memory."""
        mapped = self._files.get(part.untyped_storage().data_ptr())
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = int(part.storage_offset()) * part.itemsize
        first = start - start % mmap.PAGESIZE
        # What was written is in the system's cache of the file, from where it goes to the disk.
        mapped.madvise(mmap.MADV_DONTNEED, first, start + part.nbytes - first)


def home_of(device: torch.device, needed: int, free: int) -> torch.device:
    """Where states are kept of which a block needs so many bytes, with so many free on its GPU."""
    return device if 2 * needed <= free else CPU


def _reserve(file: int, nbytes: int, folder: Path) -> None:
    """Have the room now: a page of the mapping that finds none later ends the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, nbytes)
        else:
            os.truncate(file, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{folder} has no room for {nbytes} bytes of hidden states: make room there, or set spill=false"
        ) from error
