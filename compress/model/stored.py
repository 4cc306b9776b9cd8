"""Checkpoints whose tensors are stored otherwise than the linears that they are: with other names, turned
over, or many in one. ``Stored`` reads such a file as if each linear were there, (out, in), by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.model.families import Experts, Family
from compress.model.language import Outer, text_name

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


@dataclass(frozen=True)
class Spelling:
    """How a folder's files name and hold the tensors of its model.

    family: None: as they are; experts: how many a block has; outer: what the language model is the part of
    """

    family: Family | None
    experts: int
    outer: Outer | None

    @property
    def plain(self) -> bool:
        """Whether every tensor is held under its name, as it is."""
        family = self.family
        return self.outer is None and not (
            family is not None and (family.transposed or family.base or self._packed)
        )

    @property
    def _packed(self) -> bool:
        family = self.family
        return family is not None and family.experts is not None and family.experts.packed

    def places(self, stored: str) -> Iterator[tuple[str, Place]]:
        """The tensors that a stored one is, by name: none for one that is not of the language model."""
        found = stored if self.outer is None else text_name(stored, self.outer)
        if found is not None:
            yield from self._of_family(found, stored)

    def places_in(self, held: Iterable[str]) -> dict[str, Place]:
        """The tensors in a file that holds these."""
        return {name: place for stored in held for name, place in self.places(stored)}

    def _of_family(self, name: str, stored: str) -> Iterator[tuple[str, Place]]:
        family = self.family
        if family is None:
            yield name, Place(stored)
            return
        if not name.startswith((family.base, f"{family.head}.")):
            name = f"{family.base}{name}"
        part = re.fullmatch(r"(.*\.experts)\.(\w+)", name) if self._packed else None
        if part is not None and part[2] in PACKED:
            assert family.experts is not None
            yield from _of_experts(family.experts, stored, part[1], part[2], self.experts)
            return
        yield name, Place(stored, name.endswith(tuple(f".{n}.weight" for n in family.transposed)))


def _of_experts(
    names: Experts, stored: str, path: str, part: str, experts: int
) -> Iterator[tuple[str, Place]]:
    kind, halves = PACKED[part]
    for number in range(experts):
        linears = (names.gate, names.up) if halves else (names.down,)
        for start, linear in enumerate(linears):
            place = Place(stored, kind == "weight", number, start if halves else None)
            yield f"{path}.{number}.{linear}.{kind}", place


def packed(
    tensors: Iterable[tuple[str, Tensor]], family: Family, experts: int
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain folder as its files hold them: where that is all experts in one, those of a
    block come together. experts: how many a block has"""
    if family.experts is None or not family.experts.packed:
        yield from tensors
        return
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        path, found, local = name.rpartition(".experts.")
        if not found:
            yield name, tensor
            continue
        held = waiting.setdefault(f"{path}.experts", {})
        held[local] = tensor
        for part in PACKED:
            wanted = [local for local, _ in _of_experts(family.experts, "", "", part, experts)]
            wanted = [local.removeprefix(".") for local in wanted]
            if all(local in held for local in wanted):
                yield f"{path}.experts.{part}", _together([held.pop(n) for n in wanted], part)
    assert not any(waiting.values()), list(waiting)


def _together(parts: list[Tensor], part: str) -> Tensor:
    """What ``Place.taken`` takes apart."""
    kind, halves = PACKED[part]
    each = [tensor.T if kind == "weight" else tensor for tensor in parts]
    if halves:
        # The rows of gate and up in turn.
        pairs = zip(each[::2], each[1::2], strict=True)
        each = [torch.stack(pair, -1).flatten(-2) for pair in pairs]
    return torch.stack(each)


class Stored:
    """A safetensors file with the methods of ``safe_open`` that ``ModelFolder`` calls.

    places: where its tensors are
    """

    def __init__(self, file: Any, places: Mapping[str, Place]):
        self._file, self._places = file, places

    def __enter__(self) -> Stored:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._places)

    def get_tensor(self, name: str) -> Tensor:
        place = self._places[name]
        if place == Place(place.name):
            found: Tensor = self._file.get_tensor(place.name)
            return found
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
