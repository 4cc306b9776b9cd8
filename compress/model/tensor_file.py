"""A safetensors file written tensor by tensor: it may be larger than the memory.

Its header says where every tensor lies and comes first: tensors go into an unnamed file on the same disk as
they come, and are copied behind the header at the end. The bytes are those of safetensors' ``save_file``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.model.folder import READABLE

# Types in the order in which the library lays tensors out, so that each lies at a multiple of its size.
TYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(TYPES)}
# Bytes that are in memory at a time.
CHUNK = 2**24


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> tuple[int, str]:
        return _RANK[self.dtype], self.name


class TensorFile:
    """Nothing is under ``path`` before ``close``; what was added is gone if it does not come to that."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # until close()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Of all tensors so far."""
        return sum(entry.nbytes for entry in self._entries.values())

    def add(self, name: str, tensor: Tensor) -> None:
        self.add_rows(name, tuple(tensor.shape), tensor.dtype, [tensor])

    def add_rows(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterable[Tensor]
    ) -> None:
        """Add a tensor whose rows come in parts."""
        assert name not in self._entries, name
        entry = _Entry(name, dtype, shape, self._data.tell())
        for part in parts:
            assert part.dtype == dtype, (name, part.dtype, dtype)
            for rows in chunks(part):
                self._data.write(_bytes(rows))
        assert self._data.tell() - entry.start == entry.nbytes, name
        self._entries[name] = entry

    def close(self) -> None:
        """Write the file."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.place)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in entries:
            start, end = end, end + entry.nbytes
            place = {"shape": list(entry.shape), "data_offsets": [start, end]}
            header[entry.name] = {"dtype": TYPES[entry.dtype], **place}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file, self._data:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                self._data.seek(entry.start)
                left = entry.nbytes
                while left:
                    part = self._data.read(min(left, CHUNK))
                    left -= file.write(part)
        self.path.chmod(READABLE)


def chunks(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor in rows of about CHUNK bytes."""
    if tensor.dim() == 0 or tensor.nbytes <= CHUNK:
        return [tensor]
    return tensor.split(rows_of(tuple(tensor.shape), tensor.dtype.itemsize))


def rows_of(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of a tensor take about CHUNK bytes, one at least."""
    return max(1, CHUNK // max(1, math.prod(shape[1:]) * itemsize))


def _bytes(tensor: Tensor) -> Any:
    """What a file takes: an array that shares the tensor's memory where that is in one piece."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
