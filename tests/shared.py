"""Stages on tiny models that several processes share, or one has alone.

The processes are forked: no imports, which would take longer than all that is compared. They have one thread.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from compress import processes
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.processes import ALONE, Team
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.inputs import InputScheme
from compress.quantize.repair import Kl
from compress.quantize.rounding import Gptaq, Gptq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale, Opt, Smooth

CPU = torch.device("cpu")
INT4 = Scheme(4, 32)
INT8 = Scheme(8, "channel", symmetric=True, inputs=InputScheme(outliers="static", threshold=2.0))
Stage = Callable[[ModelFolder, Path, Tensor, Team], dict[str, Any]]


def quantizing(transforms: list[Any], roundings: list[Any], scheme: Scheme = INT4) -> Stage:
    def run(source: ModelFolder, target: Path, tokens: Tensor, team: Team) -> dict[str, Any]:
        return quantize(
            source,
            target,
            tokens=tokens,
            schemes=Schemes(scheme),
            transforms=transforms,
            roundings=roundings,
            device=CPU,
            team=team,
        )

    return run


def caching(source: ModelFolder, target: Path, tokens: Tensor, team: Team) -> dict[str, Any]:
    state = StateScheme("float", 8, "head")
    return quantize_cache(
        source, target, CacheScheme(state, state), tokens=tokens, device=CPU, team=team
    )


def pruning(knobs: Prune) -> Stage:
    def run(source: ModelFolder, target: Path, tokens: Tensor, team: Team) -> dict[str, Any]:
        return prune(source, target, knobs, tokens=tokens, device=CPU, team=team)

    return run


def repairing(source: ModelFolder, target: Path, tokens: Tensor, team: Team) -> dict[str, Any]:
    """Of a record that the main process makes beside the target."""
    record = target.with_name(f"{target.name}-record")
    made = quantizing([], [Nearest()], Scheme(3, 32))
    team.from_main(lambda: made(source, record, tokens[:2], ALONE))
    knobs = Kl(epochs=2, batch=3, rate=1e-2)
    return knobs(ModelFolder(record), source, target, tokens[:11, :32], CPU, team=team)


CASES: dict[str, Stage] = {
    "awq": quantizing([AwqScale(), AwqClip()], [Nearest()]),
    "gptq": quantizing([Opt()], [Gptq()]),
    "gptaq": quantizing([], [Gptaq()]),
    "learned": quantizing([], [Learned(iters=6)]),
    "inputs": quantizing([Smooth()], [Nearest()], INT8),
    "cache": caching,
    # Of so few tokens that they are kept.
    "few": quantizing([AwqScale(), Opt()], [Gptq()]),
}


# What is fitted or trained, in floats.
FLOATS: dict[str, Stage] = {
    "cut": pruning(
        Prune(
            layers=2,
            mlp=192,
            kv_heads=1,
            hidden=96,
            kv="principal",
            depth="perplexity",
            refit="all",
        )
    ),
    "tried": pruning(Prune(share=0.3, axes=["layers", "mlp"], candidates=2, trial_sequences=8)),
    "activation": pruning(Prune(mlp=160, importance="activation")),
    "repair": repairing,
}


def forked(work: Callable[[Team], None], count: int = 2) -> list[int]:
    """Do the work in so many processes of one run; their exit codes, or signals as negative numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                place = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_WORLD_SIZE": count}
                place |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()})
                torch.set_num_threads(1)
                # What a test before this one set up in this process is not theirs.
                PartialState._reset_state()
                processes._group.cache_clear()
                processes.wait()
                work(processes.team())
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                # Nothing of the tests' own process is to be closed here.
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
