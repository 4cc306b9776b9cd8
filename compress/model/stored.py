"""Checkpoints whose tensors are stored otherwise than the linears that they are: with other names, turned
over, or many in one. ``Stored`` reads such a file as if each linear were there, (out, in), by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.model.families import Experts, Family

# The parts of an expert in a tensor of all: which of its linears, whether that is every second row.
PACKED = {
    "gate_up_proj": ("weight", True),
    "gate_up_proj_bias": ("bias", True),
    "down_proj": ("weight", False),
    "down_proj_bias": ("bias", False),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor is: under another name, turned over, one of many, or every second row from ``start``."""

    name: str
    turned: bool = False
    number: int | None = None
    start: int | None = None

    def taken(self, part: Any) -> Tensor:
        """The tensor out of a slice of safetensors, which reads what it must."""
        tensor: Tensor = part[:] if self.number is None else part[self.number]
        if self.start is not None:
            tensor = tensor[..., self.start :: 2]
        return tensor.T.contiguous() if self.turned else tensor.contiguous()

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        shape = stored if self.number is None else stored[1:]
        if self.start is not None:
            shape = (*shape[:-1], shape[-1] // 2)
        return shape[::-1] if self.turned else shape


def is_plain(family: Family) -> bool:
    """Whether checkpoints of a family hold every tensor under its name, as it is."""
    packed = family.experts is not None and family.experts.packed
    return not (family.transposed or family.base or packed)


def places(family: Family, stored: str, experts: int) -> Iterator[tuple[str, Place]]:
    """The tensors that a stored one is, by name. experts: how many a block has"""
    name = (
        stored
        if stored.startswith(family.base) or _is_head(family, stored)
        else f"{family.base}{stored}"
    )
    packed = family.experts is not None and family.experts.packed
    found = re.fullmatch(r"(.*\.experts)\.(\w+)", name) if packed else None
    if found is not None and found[2] in PACKED:
        assert family.experts is not None
        yield from _of_experts(family.experts, stored, found[1], found[2], experts)
        return
    yield name, Place(stored, name.endswith(tuple(f".{n}.weight" for n in family.transposed)))


def _is_head(family: Family, name: str) -> bool:
    return name.startswith(f"{family.head}.")


def _of_experts(
    names: Experts, stored: str, path: str, part: str, experts: int
) -> Iterator[tuple[str, Place]]:
    kind, halves = PACKED[part]
    for number in range(experts):
        linears = (names.gate, names.up) if halves else (names.down,)
        for start, linear in enumerate(linears):
            place = Place(stored, kind == "weight", number, start if halves else None)
            yield f"{path}.{number}.{linear}.{kind}", place


class Stored:
    """A safetensors file with the methods of ``safe_open`` that ``ModelFolder`` calls, names as above."""

    def __init__(self, file: Any, family: Family, experts: int):
        self._file = file
        self._places = {
            name: place
            for stored in list(file.keys())
            for name, place in places(family, stored, experts)
        }

    def __enter__(self) -> Stored:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._places)

    def get_tensor(self, name: str) -> Tensor:
        place = self._places[name]
        return place.taken(self._file.get_slice(place.name))

    def get_slice(self, name: str) -> _Part:
        place = self._places[name]
        return _Part(place, self._file.get_slice(place.name))


@dataclass(frozen=True)
class _Part:
    place: Place
    part: Any

    def get_shape(self) -> list[int]:
        return list(self.place.shape(tuple(self.part.get_shape())))

    def get_dtype(self) -> str:
        return str(self.part.get_dtype())

    def __getitem__(self, rows: slice) -> Tensor:
        return self.place.taken(self.part)[rows]
