"""The stages of a recipe, each from a model folder to a model folder; their order is in ``config.ORDER``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.config import Run
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.quantize.search import choose
from compress.quantize.stage import quantize
from compress.rotate import rotate


@dataclass(frozen=True)
class Work:
    """What a stage is given.

    model: the original; source: what the stage before left, or the original
    target: the folder to write, which does not exist yet
    state: a folder to go on from after being killed, which the stage makes if it wants one; it is there if
        an earlier start of the same stage left it, and is removed once the stage is whole
    tokens: int64 (sequences, length), or None if nothing looks at data
    """

    run: Run
    model: ModelFolder
    source: ModelFolder
    target: Path
    state: Path
    tokens: Tensor | None


def run_stage(name: str, work: Work) -> dict[str, Any]:
    """Run a stage. Returns its part of metrics.json."""
    return _STAGES[name](work)


def _rotate(work: Work) -> dict[str, Any]:
    return {"rotate": rotate(work.source, work.target, seed=work.run.settings.data.seed)}


def _quantize(work: Work) -> dict[str, Any]:
    run, schemes, searched = work.run, work.run.schemes, dict[str, Any]()
    if run.search is not None:
        assert work.tokens is not None
        schemes, found = choose(work.source, run.search, schemes, work.tokens, run.device)
        searched = {"search": found}
    return searched | quantize(
        work.source,
        work.target,
        tokens=work.tokens,
        schemes=schemes,
        transforms=run.transforms,
        roundings=run.roundings,
        device=run.device,
    )


def _repair(work: Work) -> dict[str, Any]:
    assert work.run.repair is not None
    assert work.tokens is not None
    repaired = work.run.repair(work.source, work.model, work.target, work.tokens, work.run.device)
    return {"repair": repaired}


def _kv_cache(work: Work) -> dict[str, Any]:
    assert work.run.cache is not None
    return quantize_cache(
        work.source, work.target, work.run.cache, tokens=work.tokens, device=work.run.device
    )


_STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "rotate": _rotate,
    "quantize": _quantize,
    "repair": _repair,
    "kv_cache": _kv_cache,
}
