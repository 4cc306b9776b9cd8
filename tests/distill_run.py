"""One training in a process of its own, or in several that ``accelerate launch`` starts.

    python -m tests.distill_run SOURCE ORIGINAL FOLDER BLOCKS.pt '{"steps": 8}'
        [--kill-at STEP] [--stop-at STEP] [--fsdp]

FOLDER gets target/, state/ and report-RANK.json, the latter with the norms of the gradients. --kill-at: the
process kills itself in that step; --stop-at: the training ends there with an exception, and another one
follows; --fsdp: parameters are sharded by FSDP2, which accelerate itself offers on GPUs alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState

from compress.distill import stage
from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.distill.training import Training
from compress.model.folder import ModelFolder


class Stopped(Exception):
    pass


def end_at(step: int, end: Callable[[], None]) -> None:
    """Call this in a step, once."""
    update = Training.update

    def deadly(self: Training, rate: float) -> None:
        if self.progress.step == step:
            Training.update = update  # type: ignore[method-assign]
            end()
        update(self, rate)

    Training.update = deadly  # type: ignore[method-assign]


def note_norms() -> list[float]:
    """The norm of every step's gradient from now on, before it is clipped."""
    update, norms = Training.update, list[float]()

    def noting(self: Training, rate: float) -> None:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1e9)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        update(self, rate)

    Training.update = noting  # type: ignore[method-assign]
    return norms


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Stopped


def shard() -> None:
    """Let accelerate do on CPUs what its FSDP2 does on GPUs."""
    make = stage.open_accelerator

    def sharded(device: torch.device) -> Any:
        accelerator = make(device)
        # Read by the plugin of accelerate where it saves and loads.
        os.environ["FSDP_VERSION"] = "2"
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for kind in (PartialState, AcceleratorState):
            kind._shared_state["distributed_type"] = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    stage.open_accelerator = sharded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "original", "folder", "blocks"):
        parser.add_argument(name, type=Path)
    parser.add_argument("knobs", type=json.loads)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--fsdp", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    norms = note_norms()
    if asked.kill_at is not None:
        end_at(asked.kill_at, kill)
    if asked.stop_at is not None:
        end_at(asked.stop_at, stop)
    if asked.fsdp:
        shard()
    run = functools.partial(
        distill,
        ModelFolder(asked.source),
        ModelFolder(asked.original),
        asked.folder / "target",
        asked.folder / "state",
        torch.load(asked.blocks),
        Distill(**asked.knobs),
        torch.device("cpu"),
    )
    try:
        report: dict[str, Any] = run()
    except Stopped:
        report = run()
    file = asked.folder / f"report-{PartialState().process_index}.json"
    file.write_text(json.dumps(report | {"norms": norms}))


if __name__ == "__main__":
    main()
