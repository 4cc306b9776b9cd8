"""The parts of a run's measuring that are finished, kept in its folder for a start after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from compress.saved import Saved
from eval.parts import Once, within

T = TypeVar("T")

log = logging.getLogger(__name__)

# Between the keys of a tensor's name: in no name of a file or a part.
BETWEEN = "\x1f"


class Parts:
    """Finished parts by name, each JSON values and tensors; those of an earlier start are there already.

    They are kept by the rule of ``compress.saved``, so some of the last may be measured again.
    """

    def __init__(self, saved: Saved):
        self._saved = saved
        found = saved.load()
        self._known: dict[str, Any] = {}
        if found is not None:
            parts = found.facts["parts"].items()
            self._known = {name: _joined(part, found.tensors, name) for name, part in parts}
            log.info("measuring goes on: %d parts are there", len(self._known))
        # Of an earlier start.
        self.taken = len(self._known)

    def of(self, section: str, asked: Any) -> Once:
        """The parts of a section of metrics.json. asked: what they depend on beside the folders, JSON: of one
        that is asked otherwise now no part is known."""
        text = json.dumps(asked, sort_keys=True)
        return within(self._once, section, hashlib.sha256(text.encode()).hexdigest())

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._known:
            self._known[name] = make()
            tensors: dict[str, Tensor] = {}
            parts = {key: _apart(part, tensors, key) for key, part in self._known.items()}
            self._saved.offer({"parts": parts}, tensors)
        return self._known[name]


def _apart(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The value as JSON, its tensors put into ``tensors`` under names that tell their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return None
    if isinstance(value, dict):
        return {k: _apart(v, tensors, f"{name}{BETWEEN}{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_apart(v, tensors, f"{name}{BETWEEN}{i}") for i, v in enumerate(value)]
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor], name: str) -> Any:
    """What ``_apart`` was given, but for tuples, which come back as lists."""
    if isinstance(value, dict):
        return {k: _joined(v, tensors, f"{name}{BETWEEN}{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_joined(v, tensors, f"{name}{BETWEEN}{i}") for i, v in enumerate(value)]
    return tensors.get(name) if value is None else value
