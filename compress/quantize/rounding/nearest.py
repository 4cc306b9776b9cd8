"""Rounding to the nearest value of the grid (RTN)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress.quantize.block import Block
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import to_codes


@dataclass(frozen=True)
class Nearest:
    """No knobs, no data."""

    needs_data: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    grouped_integers: ClassVar[bool] = False
    refines: ClassVar[bool] = False

    def __call__(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]:
        return {
            name: to_codes(W, block.grid(name), block.schemes[name])
            for name, W in block.weights.items()
        }
