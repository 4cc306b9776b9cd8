"""The knobs of distillation, and what can be refused of a run before a weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import check_applies, limit_of
from compress.model.folder import Shapes
from compress.quantize.scheme import Schemes

OPTIMIZERS = ("adamw", "adamw8bit")
TEACHERS = ("live", "cached")
BUDGETS = ("tokens", "steps", "minutes")
POSITIVE = (
    "temperature",
    "batch",
    "micro_batch",
    "rate",
    "clip",
    "top_k",
    "save_every",
    "log_every",
)
NOT_NEGATIVE = ("kl", "ce", "hidden", "weight_decay", "seed")
SHARES = ("warmup", "final_rate")
# What may change between a killed run and the one that goes on: it decides no weight, or, as minutes do, only
# the number of steps, which was settled at the start.
FREE = ("minutes", "save_every", "log_every")


@dataclass(frozen=True)
class Distill:
    """AdamW on all weights, or on all that a quantized model may change, against the original's logits.

    tokens, steps, minutes: the budget. Minutes count where the other two are not given, and are settled to a
        number of steps by the speed of the first few
    kl, ce, hidden: weights of the losses: KL of the logits, cross-entropy of the text, relative squared error
        of the states after the blocks
    temperature: of the KL
    length: tokens of a sequence, 2 or more
    batch: sequences an optimizer step, over all processes
    micro_batch: sequences that run at once in a process
    rate: the largest; it rises over the share ``warmup`` of the steps and falls as a cosine to the share
        ``final_rate`` of itself
    weight_decay: of matrices, not of norms and biases
    clip: largest norm of the gradient
    optimizer: adamw, or adamw8bit (bitsandbytes, CUDA alone), whose two moments take a quarter of the memory
    teacher: live runs the original beside the student; cached runs it once before, and keeps its ``top_k``
        most likely tokens and the mass of the others on disk, 8 * top_k bytes a token: for several epochs of
        a budget of tokens or steps
    checkpointing: compute activations of a block again in the backward pass instead of keeping them
    compile: blocks and losses through torch.compile
    save_every, log_every: steps
    seed: of the order of the sequences
    """

    tokens: int | None = None
    steps: int | None = None
    minutes: float | None = None
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    length: int = 512
    batch: int = 4
    micro_batch: int = 4
    rate: float = 2e-4
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    teacher: str = "live"
    top_k: int = 64
    checkpointing: bool = False
    compile: bool = False
    save_every: int = 50
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise UserError("distill.tokens and distill.steps are two budgets: choose one")
        if self.budget is None:
            raise UserError(f"distill needs a budget: choose one of {', '.join(BUDGETS)}")
        for name in (self.budget, *POSITIVE):
            self._refuse(name, getattr(self, name) > 0, "more than 0")
        self._refuse("length", self.length >= 2, "2 or more")
        for name in NOT_NEGATIVE:
            self._refuse(name, getattr(self, name) >= 0, "0 or more")
        for name in SHARES:
            self._refuse(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name, allowed in (("optimizer", OPTIMIZERS), ("teacher", TEACHERS)):
            self._refuse(name, getattr(self, name) in allowed, ", ".join(allowed))
        if not (self.kl or self.ce or self.hidden):
            raise UserError(
                "distill has no loss: set distill.kl, distill.ce or distill.hidden above 0"
            )
        if self.teacher == "cached":
            self._check_cached()

    def _check_cached(self) -> None:
        if self.hidden:
            raise UserError(
                "distill.hidden needs the original's states, which are not cached: set distill.teacher=live"
            )
        if self.budget == "minutes":
            raise UserError(
                "distill.teacher=cached must know beforehand which text will be seen: set distill.tokens or "
                "distill.steps"
            )

    @property
    def budget(self) -> str | None:
        """Which of tokens, steps, minutes counts."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def _refuse(self, name: str, allowed: bool, choices: str) -> None:
        if not allowed:
            raise UserError(
                f"distill.{name}={getattr(self, name)} is not allowed: choose {choices}"
            )

    def check(
        self, model: Shapes, device: torch.device, blocks: Tensor, processes: int = 1
    ) -> None:
        """Raises UserError for a family that it is not for, a model of float16, whose gradients would need
        loss scaling, fewer than 2 sequences, of which one is held out, sequences longer than the model takes,
        more kept tokens than its vocabulary has, an optimizer that the device lacks, and a batch that the
        processes cannot share.

        model: the source, or the original; blocks: int64 (sequences, length); processes: that train together
        """
        check_applies("distill", model.config)
        if model.dtype == torch.float16:
            raise UserError("distill trains in bfloat16 or float32: set the model's dtype to one")
        sequences, length = blocks.shape
        if sequences < 2:
            raise UserError(f"distill holds a sequence out of {sequences}: choose a longer text")
        limit = limit_of(model.config)
        if limit is not None and length > limit:
            raise UserError(f"distill.length={length} is not allowed: {model.path} takes {limit}")
        vocabulary = int(model.config["vocab_size"])
        if self.teacher == "cached" and self.top_k > vocabulary:
            raise UserError(
                f"distill.top_k={self.top_k} is not allowed: choose at most the {vocabulary} of the "
                "vocabulary"
            )
        if self.optimizer == "adamw8bit" and device.type != "cuda":
            raise UserError("distill.optimizer=adamw8bit needs a CUDA device: choose adamw")
        if self.batch % processes:
            raise UserError(
                f"distill.batch={self.batch} cannot be shared by {processes} processes: choose a multiple"
            )

    @property
    def decisive(self) -> dict[str, Any]:
        """The knobs that decide the weights a run ends with, once its number of steps is known."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def check_schemes(schemes: Schemes) -> None:
    """Raises UserError for a record whose linears cannot be trained: their numbers are not integers in
    groups or rows, or their inputs are rounded."""
    for scheme in (schemes.linears, *schemes.exceptions.values()):
        if not scheme.grouped_integers or scheme.inputs is not None:
            raise UserError(
                "distill works on integers in groups or rows with 16-bit inputs, not on "
                f"{scheme.name}: leave it out"
            )
