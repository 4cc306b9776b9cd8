"""What a recipe says of pruning."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress.errors import UserError
from compress.prune.importance import IMPORTANCES
from compress.prune.shape import AXES
from compress.prune.survey import DEPTHS

TARGETS = ("share", "cache", "parameters", "megabytes", "speedup")
REFITS = ("none", "outputs", "all")
MERGES = ("drop", "principal", "mean")


@dataclass(frozen=True)
class Prune:
    """What a recipe says of pruning: a target that is searched for, explicit sizes, or both.

    share: of the parameters of the decoder blocks that goes; cache: share of the bytes of keys and values
        that goes; parameters: of the whole model that stay; megabytes: of its weight files; speedup: of
        decoding, predicted from the bytes of a step. At most one.
    axes: what the search may cut, of layers, heads (query heads in every group), kv_heads, mlp, hidden
    layers, heads, kv_heads, mlp, hidden: sizes that are wanted as they are
    multiple: of mlp and hidden (null = 32; 128 from 2048 on, 256 from 8192 on)
    importance: of heads, groups, and neurons, see importance.py; ``error`` counts on the refit
    depth: how layers are chosen: influence, contiguous, or perplexity (of the model without each)
    kv: what becomes of heads of keys and values: drop (with their query heads), or merge as principal
        components or by their mean, see merge.py
    refit: which linears of the blocks: none, outputs (the last of attention and MLP), or all; with fewer
        channels their readers are refitted too, unless it is none
    damping: of the least squares, as a share of the mean second moment
    candidates: shapes of the search that are cut on trial_sequences and judged by their divergence; 1 tries
        none
    """

    share: float | None = None
    cache: float | None = None
    parameters: int | None = None
    megabytes: float | None = None
    speedup: float | None = None
    axes: list[str] = field(default_factory=list)
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None
    hidden: int | None = None
    multiple: int | None = None
    importance: str = "error"
    depth: str = "contiguous"
    kv: str = "drop"
    refit: str = "outputs"
    damping: float = 0.01
    candidates: int = 4
    trial_sequences: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        named = {"importance": IMPORTANCES, "depth": DEPTHS, "kv": MERGES, "refit": REFITS}
        for key, allowed in named.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"prune.{key}={getattr(self, key)} is not known: known are {', '.join(allowed)}"
                )
        if unknown := [axis for axis in self.axes if axis not in AXES]:
            raise UserError(f"prune.axes={unknown[0]} is not known: known are {', '.join(AXES)}")
        if len(targets := self.targets) > 1:
            raise UserError(
                f"prune.{targets[0]} and prune.{targets[1]} are two targets: choose one"
            )
        if bool(self.targets) != bool(self.axes):
            raise UserError(
                f"a search needs prune.axes and a target, one of {', '.join(TARGETS)}: set both or neither"
            )
        if both := [axis for axis in self.axes if getattr(self, axis) is not None]:
            raise UserError(f"prune.{both[0]} is set and among prune.axes too: choose one")
        if not self.targets and not self.sizes:
            raise UserError(
                f"prune cuts nothing: set a target and prune.axes, or one of {', '.join(AXES)}"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        for key in ("share", "cache"):
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                raise UserError(
                    f"prune.{key}={value} is not allowed: choose more than 0, less than 1"
                )
        if self.speedup is not None and self.speedup <= 1:
            raise UserError(f"prune.speedup={self.speedup} is not allowed: choose more than 1")
        for key in (
            "parameters",
            "megabytes",
            *AXES,
            "multiple",
            "candidates",
            "trial_sequences",
            "damping",
        ):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"prune.{key}={value} is not allowed: choose more than 0")

    @property
    def targets(self) -> list[str]:
        return [name for name in TARGETS if getattr(self, name) is not None]

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) is not None}

    @property
    def merges(self) -> bool:
        return self.kv != "drop"
