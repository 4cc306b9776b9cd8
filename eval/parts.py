"""Measuring in parts: what takes long is asked for part by part, and whoever keeps parts that are finished
lets a killed measuring go on from there (``compress.measure.parts``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Once(Protocol):
    """``once(name, make)`` is what ``make`` returns, or returned under that name before.

    A part is JSON values and tensors in dicts and lists, keys strings; a tuple may come back as a list.
    """

    def __call__(self, name: str, make: Callable[[], T], /) -> T: ...


def always(_: str, make: Callable[[], T]) -> T:
    """Of a measuring that keeps nothing."""
    return make()


def within(once: Once, *names: object) -> Once:
    """The parts of a part."""
    path = "/".join(map(str, names))

    def inner(name: str, make: Callable[[], T]) -> T:
        return once(f"{path}/{name}", make)

    return inner
