"""The room that a run certainly needs."""

from __future__ import annotations

import random

import pytest
import torch

from compress.plan import room


class Shaped:
    """Tensors of one row, in bytes."""

    dtype = torch.uint8

    def __init__(self, sizes: list[int]):
        self.names = [str(i) for i in range(len(sizes))]
        self._sizes = sizes

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._sizes[int(name)],)


def most(sizes: list[int], shard: int) -> int:
    """Bytes on the disk when it has most of them: files as ``ShardWriter`` fills them, twice at their end."""
    files = [0]
    for size in sizes:
        if files[-1] and files[-1] + size > shard:
            files.append(0)
        files[-1] += size
    return max(sum(files[: i + 1]) + file for i, file in enumerate(files))


def test_a_file_is_there_twice_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(0)
    monkeypatch.setattr(room, "SHARD_BYTES", 100)
    for _ in range(2000):
        sizes = [choose.randint(1, 60) for _ in range(choose.randint(1, 12))]
        total = sum(sizes)
        found = room._twice(total, Shaped(sizes))
        assert total + found <= most(sizes, 100)
        assert found == total if total <= 100 else 0 < found < 50
