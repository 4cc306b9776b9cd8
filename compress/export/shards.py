"""Writing the safetensors files of an export as the tensors come, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.model.folder import INDEX, SINGLE, ModelFolder, save_tensors, write_json
from compress.quantize import record
from compress.quantize.qtensor import QTensor

SHARD_BYTES = 4 * 2**30


class ShardWriter:
    """Collects tensors into files of at most ``shard_bytes`` (a larger tensor has its own file)."""

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES):
        self.path = path
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._bytes += tensor.nbytes

    def position(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a writer needs beside the files to go on from here, JSON and tensors."""
        return {"total": self._total, "shards": self._shards}, dict(self._pending)

    def go_on(self, facts: dict[str, Any], pending: dict[str, Tensor]) -> None:
        """Go on from the position of another writer in the same folder."""
        self._total, self._shards = facts["total"], facts["shards"]
        self._pending, self._bytes = pending, sum(t.nbytes for t in pending.values())

    def close(self, path: Path | None = None) -> None:
        """Write what is left, give the files their final names, write the index if there are many.

        path: where the files are by now, if they were moved
        """
        self.path = path or self.path
        self._flush()
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

    def _flush(self) -> None:
        save_tensors(self._part(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._total += self._bytes
        self._pending, self._bytes = {}, 0


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
    shards = ShardWriter(target)
    for name, value in record.contents(source):
        if isinstance(value, Tensor):
            shards.add(name, value)
            continue
        base = name.removesuffix(".weight")
        for local, tensor in stored(base, value):
            shards.add(f"{base}.{local}", tensor)
    shards.close()
    return {k: v for k, v in source.config.items() if k != record.KEY}
