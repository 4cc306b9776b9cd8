"""Writing the safetensors files of an export as the tensors come, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.model.families import turned_over
from compress.model.folder import INDEX, SINGLE, ModelFolder, write_json
from compress.model.tensor_file import TensorFile
from compress.quantize import record
from compress.quantize.qtensor import QTensor

SHARD_BYTES = 4 * 2**30


class ShardWriter:
    """Puts tensors into files of at most ``shard_bytes`` (a larger tensor has its own file).

    turned: the ends of names of matrices that the files hold turned over
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES, turned: tuple[str, ...] = ()):
        self.path, self.turned = path, turned
        self.shard_bytes = shard_bytes
        self._total = 0
        self._shards: list[list[str]] = []
        self._file: TensorFile | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """The tensor is on disk when this returns."""
        if name.endswith(self.turned):
            tensor = tensor.T.contiguous()
        if self._file is not None and self._file.nbytes + tensor.nbytes > self.shard_bytes:
            self.flush()
        if self._file is None:
            self._file = TensorFile(self._part(len(self._shards)))
        self._file.add(name, tensor)

    def flush(self) -> None:
        """Write the file that was begun: the next tensor begins another."""
        if self._file is None:
            return
        self._file.close()
        self._shards.append(self._file.names)
        self._total += self._file.nbytes
        self._file = None

    def position(self) -> dict[str, Any]:
        """What a writer needs beside the files to go on from here, as JSON. Comes after ``flush``."""
        assert self._file is None
        return {"total": self._total, "shards": self._shards}

    def go_on(self, position: dict[str, Any]) -> None:
        """Go on from the position of another writer in the same folder."""
        self._total, self._shards = position["total"], position["shards"]

    def close(self, path: Path | None = None) -> None:
        """Give the files their final names, write the index if there are many.

        path: where the files are by now, if they were moved after ``flush``
        """
        self.flush()
        self.path = path or self.path
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.path / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self.path / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(
            self.path / INDEX,
            {"metadata": {"total_size": self._total}, "weight_map": weight_map},
        )

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:05d}.safetensors"


def write_tensors(
    source: ModelFolder,
    target: Path,
    stored: Callable[[str, QTensor], Iterable[tuple[str, Tensor]]],
) -> dict[str, Any]:
    """Write the tensors of a record, or plain folder, and what travels along, to the new folder ``target``.

    stored: the tensors of a linear, from its name without suffix, by local name. Returns the config.json of
    the original.
    """
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target, turned=turned_over(source.config))
    for name, value in record.contents(source):
        if isinstance(value, Tensor):
            shards.add(name, value)
            continue
        base = name.removesuffix(".weight")
        for local, tensor in stored(base, value):
            shards.add(f"{base}.{local}", tensor)
    shards.close()
    return {k: v for k, v in source.config.items() if k != record.KEY}
