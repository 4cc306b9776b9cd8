"""The loop: batches, gradients, optimizer, what is noted on the way. The same in every process.

Losses of a batch are means over all its tokens, whichever process ran them, in pieces of whatever size.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.distill.knobs import Distill
from compress.distill.losses import next_tokens
from compress.distill.plan import Costs, affordable, batch_rows, rate_at, share_of
from compress.distill.state import Progress, State
from compress.distill.student import Student, Wanted
from compress.distill.teacher import Teacher
from compress.errors import UserError

log = logging.getLogger(__name__)
now = time.perf_counter

# Steps whose speed settles how many there will be in the minutes.
TIMED = 3
# How often the held-out sequences are looked at after the start, the end included.
CHECKS = 4
NAMES = ("loss", "kl", "ce", "hidden")


@dataclass(frozen=True)
class Text:
    """blocks: int64 (n, length), on the CPU; trained, held: numbers of sequences"""

    blocks: Tensor
    trained: Tensor
    held: Tensor


class Training:
    """A student with its teacher, optimizer and text, and where it is."""

    def __init__(
        self, student: Student, teacher: Teacher, text: Text, knobs: Distill, accelerator: Any
    ):
        self.teacher, self.text, self.knobs, self.accelerator = teacher, text, knobs, accelerator
        self.model, self.optimizer = accelerator.prepare(student, _optimizer(student, knobs))
        # Where FSDP put what was opened on the CPU.
        self.device = next(self.model.parameters()).device
        self.progress = Progress()
        self.began = now()
        self.sums = torch.zeros(4, device=self.device)
        self.look_seconds = 0.0
        self._held: list[tuple[Tensor, Wanted]] = []

    def run(self, state: State, began: float, steps: int | None) -> Progress:
        """Go on from the newest state, or from the start, to the end of the budget.

        began: when this process began with the stage, by ``now()``; steps: in all, None for minutes
        """
        progress = self.progress = state.resume()
        progress.steps = progress.steps or steps
        self.began = began - progress.seconds
        self._share_sums()
        progress.aside += now() - began
        if not progress.held_out:
            self._look()
        if progress.steps is None:
            with self._aside():
                self._warm_up()
        while progress.steps is None or progress.step < progress.steps:
            rate = self._step()
            if progress.steps is None:
                self._settle(state)
            self._note(rate, state)
        progress.seconds = self.elapsed()
        return progress

    def _step(self) -> float:
        """One step. Returns its rate."""
        progress, knobs = self.progress, self.knobs
        self.sums += self.gradients(batch_rows(progress.step, knobs, self.text.trained))
        steps = progress.steps
        if steps is None:
            # Not known yet: the rate follows what it looks like.
            steps = progress.step + 1 + self._affordable(progress.step + 1, 0.0)
        rate = rate_at(progress.step, steps, knobs)
        self.update(rate)
        progress.step += 1
        return rate

    def _note(self, rate: float, state: State) -> None:
        """What is due after a step."""
        step, steps = self.progress.step, self.progress.steps
        if step % self.knobs.log_every == 0 or step == steps:
            self._point(rate)
        if steps is None:
            return
        if step == steps or step % math.ceil(steps / CHECKS) == 0:
            self._look()
        if step % self.knobs.save_every == 0 and step < steps:
            self._save(state)

    def gradients(self, rows: Tensor) -> Tensor:
        """Leave the gradient of the batch in the parameters. rows: numbers of its sequences, (batch,)

        Returns this process's part of the losses, float32 (4,): their sum over the processes is the mean over
        the batch.
        """
        accelerator = self.accelerator
        pieces = share_of(
            rows, accelerator.process_index, accelerator.num_processes, self.knobs.micro_batch
        )
        total = torch.zeros(4, device=self.device)
        for piece in pieces:
            last = piece is pieces[-1]
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                tokens = self._tokens(piece)
                found = self.model(tokens, self.teacher(piece, tokens))
                part = len(piece) / len(rows)
                # The gradients of the processes are averaged, their losses are parts of a sum.
                accelerator.backward(found.loss * (part * accelerator.num_processes))
            total += part * torch.stack(found).detach()
        return total

    def update(self, rate: float) -> None:
        """One step of the optimizer, which takes the gradients away."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.knobs.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _tokens(self, rows: Tensor) -> Tensor:
        tokens = self.text.blocks[rows]
        if self.device.type != "cuda":
            return tokens
        # From pinned memory the copy waits for nothing.
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def _point(self, rate: float) -> None:
        """Note the means since the last point, and tell them."""
        progress = self.progress
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        trained = self._trained()
        step, seconds = progress.step - progress.since[0], trained - progress.since[1]
        tokens = self.knobs.batch * self.text.blocks.shape[1]
        point: dict[str, float] = {"step": progress.step, "tokens": progress.step * tokens}
        point |= {name: value / step for name, value in zip(NAMES, sums, strict=True)}
        point |= {"rate": rate, "tokens_per_s": step * tokens / seconds}
        if not math.isfinite(point["loss"]):
            raise UserError(
                f"the loss of distill is not finite at step {progress.step}: lower distill.rate"
            )
        progress.curve.append(point)
        progress.since = [progress.step, trained]
        self.sums.zero_()
        left = ""
        if progress.steps is not None:
            minutes = (progress.steps - progress.step) * trained / progress.step / 60
            left = f" of {progress.steps}, {minutes:.1f} minutes left"
        log.info(
            "distill, step %d%s: loss %.4f, %.0f tokens/s",
            progress.step,
            left,
            point["loss"],
            point["tokens_per_s"],
        )

    def _look(self) -> None:
        """Note divergence and next-token loss of the held-out sequences."""
        progress = self.progress
        with self._aside():
            kl, nll = self._held_out()
        progress.held_out.append({"step": progress.step, "kl": kl, "nll": nll})
        log.info("distill, step %d, held out: KL %.4f, nll %.4f", progress.step, kl, nll)

    @torch.no_grad()
    def _held_out(self) -> tuple[float, float]:
        """KL at temperature 1 and next-token loss, from logits in float32. Every process looks at all
        sequences: they are few, and none waits for another."""
        if not self._held:
            for rows in self.text.held.split(self.knobs.micro_batch):
                tokens = self._tokens(rows)
                # What the original makes of them is kept: it stays the same.
                self._held.append((tokens, Wanted(self.teacher(rows, tokens).goal, [])))
        count = len(self.text.held)
        if self.progress.original_nll is None:
            nlls = [len(t) * wanted.goal.exact().nll(next_tokens(t)) for t, wanted in self._held]
            self.progress.original_nll = float(sum(nlls)) / count
        total = torch.zeros(4, device=self.device)
        for tokens, wanted in self._held:
            # Not kept like that: every piece would hold a wide head of its own.
            exact = Wanted(wanted.goal.exact(), [])
            total += len(tokens) * torch.stack(self.model(tokens, exact, look=True))
        _, kl, nll, _ = (total / count).tolist()
        return kl, nll

    def _warm_up(self) -> None:
        """Let what happens at a first time happen, and throw its gradient away; time a look that is not the
        first."""
        once = self.knobs.micro_batch * self.accelerator.num_processes
        self.gradients(batch_rows(0, self.knobs, self.text.trained)[:once])
        self.optimizer.zero_grad()
        self._synchronize()
        start = now()
        self._held_out()
        self._synchronize()
        self.look_seconds = now() - start

    def _save(self, state: State) -> None:
        with self._aside():
            progress = self.progress
            progress.sums = self.accelerator.reduce(self.sums, "sum").tolist()
            self._share_sums()
            progress.seconds = self.elapsed()
            state.save(progress)

    def _share_sums(self) -> None:
        """Let every process carry its part of the sums that were saved."""
        whole = torch.tensor(self.progress.sums, device=self.device)
        self.sums = whole / self.accelerator.num_processes

    def _settle(self, state: State) -> None:
        """After the first steps fix how many there will be, by what a step, a look and a save take."""
        progress = self.progress
        left = self._affordable(progress.step, 0.0)
        if left and progress.step < TIMED:
            return
        if left:
            start = now()
            self._save(state)
            left = max(1, self._affordable(progress.step, now() - start))
        progress.steps = progress.step + left
        if left:
            state.note(progress)
        log.info("distill settles to %d steps", progress.steps)

    def _affordable(self, done: int, saving: float) -> int:
        """Steps that fit into the minutes that are left, the same in every process."""
        assert self.knobs.minutes is not None
        self._synchronize()
        seconds = [self.elapsed(), self._trained() / done, self.look_seconds, saving]
        found = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        elapsed, step, look, saving = self.accelerator.reduce(found, "max").tolist()
        costs = Costs(step, look, saving)
        return affordable(60 * self.knobs.minutes - elapsed, costs, self.knobs.save_every, CHECKS)

    def _trained(self) -> float:
        """Seconds in steps."""
        return self.elapsed() - self.progress.aside

    def elapsed(self) -> float:
        """Seconds since the stage began, those of processes that were killed included."""
        return now() - self.began

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens here does not count as training."""
        self._synchronize()
        start = now()
        yield
        self._synchronize()
        self.progress.aside += now() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _optimizer(student: Student, knobs: Distill) -> torch.optim.Optimizer:
    """AdamW over what is trained; matrices alone decay."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": knobs.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {"lr": knobs.rate, "betas": (0.9, 0.95)}
    if knobs.optimizer == "adamw8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)
