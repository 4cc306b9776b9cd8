"""The stages of a recipe, each from a model folder to a model folder; ``order`` says in which order."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.texts import load_mix
from calibration.tokens import TokenBlocks, training_blocks
from compress import pins, processes
from compress.config import Run
from compress.disk import writing
from compress.distill.plan import enough
from compress.distill.stage import distill
from compress.errors import UserError
from compress.kv_cache.stage import quantize_cache
from compress.model.check import check_tokens
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer
from compress.processes import ALONE, Team
from compress.prune.stage import prune
from compress.quantize.scheme import Schemes
from compress.quantize.search import choose
from compress.quantize.stage import quantize
from compress.rotate import rotate
from compress.saved import Saved


@dataclass(frozen=True)
class Work:
    """What a stage is given.

    model: the original; source: what the stage before left, or the original
    target: the folder to write, which does not exist yet
    state: a folder to go on from after being killed, which the stage makes if it wants one; it is there if
        an earlier start of the same stage left it, and is removed once the stage is whole
    fingerprint: what must be the same for the state to be gone on from
    tokens: int64 (sequences, length), or None if nothing looks at data
    shared: whether all processes of the run share the stage's sequences
    """

    run: Run
    model: ModelFolder
    source: ModelFolder
    target: Path
    state: Path
    fingerprint: dict[str, Any]
    tokens: Tensor | None
    shared: bool = False

    @property
    def team(self) -> Team:
        return processes.team() if self.shared else ALONE

    @property
    def saved(self) -> Saved:
        """Of the processes that share the stage: their number decides the order of sums."""
        known = self.fingerprint | {"processes": self.team.count}
        return Saved(self.state, known, team=self.team)

    @property
    def spill(self) -> Path | None:
        """The folder for hidden states, if the recipe keeps them on disk: beside the result, not in a /tmp
        that may be memory."""
        return self.target.parent if self.run.settings.spill else None


# Stages that train with all processes of a run, and those that share their calibration sequences among them;
# the others are the main one's alone.
DISTRIBUTED = frozenset({"distill"})
SHARED = frozenset({"prune", "quantize", "repair", "kv_cache"})


def run_stage(name: str, work: Work) -> dict[str, Any]:
    """Run a stage, in all processes if it is one that works with several. Returns its part of metrics.json.

    Called in the main process; the others are in ``join``.
    """
    together = processes.count() > 1
    if together and name in SHARED and work.tokens is not None:
        work = replace(work, shared=True)
    elif not (together and name in DISTRIBUTED):
        return _STAGES[name](work)
    processes.from_main((name, work))
    try:
        report = _STAGES[name](work)
        # Who fails at the end is heard here.
        work.team.exchange(None)
        processes.wait()
    except UserError as error:
        work.team.tell(error)
        processes.alone()
        raise
    except BaseException:
        # They may be anywhere in the stage: what is said now would not be heard.
        processes.alone()
        raise
    return report | ({"processes": work.team.count} if work.shared else {})


def join() -> int:
    """What a process beside the main one does: its part of the stages that work with several, called with
    the main one's work, until the main one says with which exit code to end."""
    # What is to be told the main one tells.
    logging.getLogger("compress").setLevel(logging.ERROR)
    task: Any = processes.from_main(None)
    while not isinstance(task, int):
        name, work = task
        try:
            with writing(work.target.parent):
                _STAGES[name](work)
            work.team.exchange(None)
        except UserError as error:
            work.team.tell(error)
            raise
        processes.wait()
        task = processes.from_main(None)
    return task


def training_text(run: Run, model: ModelFolder) -> TokenBlocks:
    """The recipe's text in blocks, as much as distillation may see. Raises UserError if it is too short."""
    assert run.distill is not None
    data = run.settings.data
    # In a process beside the main one too.
    pins.remember(run.pins)
    text = (data.source, data.field, data.split)
    pinned = frozenset(run.pins.items())
    return _packed(text, model.path, run.distill.length, data.seed, enough(run.distill), pinned)


@functools.lru_cache(maxsize=1)
def _packed(
    text: tuple[str, str, str],
    model: Path,
    length: int,
    seed: int,
    most: int | None,
    pinned: frozenset[tuple[str, str]],
) -> TokenBlocks:
    """Kept from the check to the run, and from run to run of a sweep. pinned: of another text at another time
    the name may be the same"""
    folder = ModelFolder(model)
    tokenizer = open_tokenizer(folder)
    blocks = training_blocks(load_mix(*text), tokenizer, length=length, seed=seed, most=most)
    check_tokens(blocks.tokens, folder)
    return blocks


def _prune(work: Work) -> dict[str, Any]:
    assert work.run.prune is not None
    assert work.tokens is not None
    return prune(
        work.source,
        work.target,
        work.run.prune,
        tokens=work.tokens,
        device=work.run.device,
        saved=work.saved,
        spill=work.spill,
        team=work.team,
    )


def _distill(work: Work) -> dict[str, Any]:
    run = work.run
    assert run.distill is not None
    blocks = training_text(run, work.model).tokens
    report = distill(
        work.source, work.model, work.target, work.state, blocks, run.distill, run.device
    )
    return {"distill": report}


def _rotate(work: Work) -> dict[str, Any]:
    seed = work.run.settings.data.seed
    return {"rotate": rotate(work.source, work.target, seed=seed, saved=work.saved)}


def _quantize(work: Work) -> dict[str, Any]:
    run, schemes, searched = work.run, work.run.schemes, dict[str, Any]()
    if run.search is not None:
        # On few tokens, with the whole model in memory: that is not shared.
        schemes, found = work.team.from_main(lambda: _searched(work))
        searched = {"search": found}
    return searched | quantize(
        work.source,
        work.target,
        tokens=work.tokens,
        schemes=schemes,
        transforms=run.transforms,
        roundings=run.roundings,
        device=run.device,
        saved=work.saved.part("blocks"),
        spill=work.spill,
        team=work.team,
        all_experts=run.settings.data.all_experts,
    )


def _searched(work: Work) -> tuple[Schemes, dict[str, Any]]:
    run = work.run
    assert run.search is not None
    assert work.tokens is not None
    saved = work.saved.alone().part("search")
    return choose(work.source, run.search, run.schemes, work.tokens, run.device, saved, work.spill)


def _repair(work: Work) -> dict[str, Any]:
    assert work.run.repair is not None
    assert work.tokens is not None
    repaired = work.run.repair(
        work.source,
        work.model,
        work.target,
        work.tokens,
        work.run.device,
        work.saved,
        work.spill,
        work.team,
    )
    return {"repair": repaired}


def _kv_cache(work: Work) -> dict[str, Any]:
    assert work.run.cache is not None
    return quantize_cache(
        work.source,
        work.target,
        work.run.cache,
        tokens=work.tokens,
        device=work.run.device,
        saved=work.saved,
        spill=work.spill,
        team=work.team,
    )


_STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "prune": _prune,
    "distill": _distill,
    "rotate": _rotate,
    "quantize": _quantize,
    "repair": _repair,
    "kv_cache": _kv_cache,
}
