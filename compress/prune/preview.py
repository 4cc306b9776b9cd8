"""What a folder will hold once it is pruned, so that later stages can be checked before anything is cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress.model.families import family_of
from compress.model.folder import Shapes
from compress.prune.budget import wanted
from compress.prune.knobs import Prune
from compress.prune.shape import Anatomy, Shape, anatomy, config_of


class Preview:
    """Config, names and shapes of a pruned model, as ``model.folder.Shapes``, under its source's path."""

    def __init__(self, source: Shapes, found: Anatomy, shape: Shape):
        self.path: Path = source.path
        self.dtype: torch.dtype = source.dtype
        self.tied_head: bool = source.tied_head
        self.config: dict[str, Any] = config_of(
            source.config, found, shape, list(range(shape.layers))
        )
        self._found, self._shape = found, shape

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found, shape = self._found, self._shape
        prefix = found.family.blocks
        twin = found.twin_for(shape)
        zeros = {} if twin is None else {f"{name}.bias": ("hidden",) for name in twin.zeros}
        tensors = {
            f"{prefix}.{index}.{name}": axes
            for index in range(shape.layers)
            for name, axes in {**found.block, **zeros}.items()
        }
        return {
            name: tuple(found.size(axis, shape) for axis in axes)
            for name, axes in {**tensors, **found.rest}.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def previews(source: Shapes, knobs: Prune) -> Iterator[Preview]:
    """Every model that the recipe may leave. Raises UserError as ``budget.wanted`` does."""
    found = anatomy(source, family_of(source.config))
    for shape in wanted(found, knobs):
        yield Preview(source, found, shape)
