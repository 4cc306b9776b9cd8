"""Placeholder"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    average_bits: float | None = None
