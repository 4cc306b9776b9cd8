"""Repair of a quantized model against its original: scales and norms are trained, the integers stay.

A short end-to-end pass over the calibration tokens with the forward KL divergence of the original's
distribution as the loss (the second phase of EfficientQAT, arXiv 2407.11062, with the original as
teacher instead of the text). The whole model is in memory, in 16 bits.

H (tokens, hidden) after the final norm; E (vocabulary, hidden) the head; levels (out, groups, columns)
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from calibration.tokens import held_out
from compress.errors import UserError
from compress.model.families import check_applies, family_of
from compress.model.folder import ModelFolder
from compress.model.states import States
from compress.processes import ALONE, Team
from compress.progress import track
from compress.quantize import record
from compress.runtime.load import load_dense
from compress.saved import NOWHERE, Position, Saved, named

log = logging.getLogger(__name__)

# Positions whose logits exist at the same time: few enough for a CPU's last cache.
ROWS = 128
# What a position of the training holds beside its tensors.
PROGRESS = ("history", "checks", "kept", "step", "total")


@dataclass(frozen=True)
class Kl:
    """Adam on a factor for every scale and every norm weight, all starting at 1.

    One sequence in 16 (``held_out``) is not trained on: after each pass the divergence on these decides
    which state is kept, the start included.

    epochs: passes over the tokens
    rate: the largest step of a factor; it rises over the first tenth of the steps and falls to 0
    batch: sequences a step
    seed: of the order of the sequences
    """

    epochs: int = 4
    rate: float = 2e-3
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "rate"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"repair.kl.{name}={getattr(self, name)} is not allowed: choose more than 0"
                )

    def check(self, source: ModelFolder, sequences: int) -> None:
        """Raises UserError for a family that it is not for, a float16 model, whose gradients would need loss
        scaling, and for too few sequences of calibration to hold one out."""
        check_applies("repair", source.config)
        if sequences < 2:
            raise UserError("repair=kl holds a sequence out: set data.sequences to 2 or more")
        if source.dtype == torch.float16:
            raise UserError("repair=kl trains in bfloat16 or float32: set the model's dtype to one")

    def __call__(
        self,
        source: ModelFolder,
        original: ModelFolder,
        target: Path,
        tokens: Tensor,
        device: torch.device,
        saved: Saved = NOWHERE,
        spill: Path | None = None,
        team: Team = ALONE,
    ) -> dict[str, Any]:
        """Train the record ``source`` and write it to ``target``.

        tokens: int64 (sequences, length); saved: where a killed one left its training; spill: a folder that
        the original's final states are kept in, if not in memory; team: the processes that share the
        sequences of every step, of which the main one writes
        Returns in nats per token the mean KL of every pass as it was while training (``kl``) and of
        the held-out sequences before and after every pass (``held_out_kl``), which of these states was
        kept (0 is the start), and how many tokens the training saw. Raises UserError as ``check`` does.
        """
        self.check(source, len(tokens))
        tokens = tokens.to(device)
        teacher = load_dense(original, device, source.dtype)
        states = States(device, spill, team)
        states.settle(tokens.numel() * _head_of(teacher)[0].nbytes)
        own = tokens[team.share(len(tokens), 1)]
        goal = Goal(tokens, _final_states(teacher, own, states), _head_of(teacher), states)
        del teacher
        student = Student(load_dense(source, device, source.dtype), source, goal)
        trained, held = held_out(len(tokens))
        report = self._train(student, trained, held, saved)
        if team.is_main:
            record.rewrite(source, target, student.tensors())
        return report | {"tokens": self.epochs * tokens[trained].numel()}

    def _train(
        self, student: Student, trained: Tensor, held: Tensor, saved: Saved
    ) -> dict[str, Any]:
        """Leaves the student in its best state. trained, held: numbers of sequences."""
        run = _Pass(student, torch.Generator().manual_seed(self.seed))
        run.go_on(saved.load())
        if not run.checks:
            run.checks.append(student.mean_loss(held, self.batch))
        per_pass = math.ceil(len(trained) / self.batch)
        steps = self.epochs * per_pass
        for epoch in range(len(run.history), self.epochs):
            order = run.shuffled(trained).split(self.batch)[run.step :]
            for rows in track(order, f"repair, pass {epoch + 1} of {self.epochs}"):
                run.total += student.learn(rows) * len(rows)
                run.update(self.rate * _share(epoch * per_pass + run.step, steps))
                saved.offer(*run.position())
            run.close(run.total / len(trained), student.mean_loss(held, self.batch))
            saved.offer(*run.position())
        if run.kept < self.epochs:
            log.warning("repair: the state after pass %d was better than the last: kept", run.kept)
        student.restore(run.best)
        return {"kl": run.history, "held_out_kl": run.checks, "kept": run.kept, "steps": steps}


class _Pass:
    """Where a training is.

    history: the mean loss of each pass that is done; checks: of the held-out sequences, at the start and
        after each
    best: the state that is kept, after ``kept`` passes
    step: of the running pass, and the ``total`` of its losses
    """

    def __init__(self, student: Student, generator: torch.Generator):
        self.student, self.best = student, student.state()
        self.history: list[float] = []
        self.checks: list[float] = []
        self.kept, self.step, self.total = 0, 0, 0.0
        self._optimizer = torch.optim.Adam(student.factors, betas=(0.9, 0.95))
        self._generator = generator
        # As it was when the running pass was shuffled.
        self._shuffle = generator.get_state()

    def shuffled(self, trained: Tensor) -> Tensor:
        self._shuffle = self._generator.get_state()
        return trained[torch.randperm(len(trained), generator=self._generator)]

    def update(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.step += 1

    def close(self, loss: float, check: float) -> None:
        """Note the losses of a pass that is done, and its state if it is the best."""
        self.history.append(loss)
        self.checks.append(check)
        log.info(
            "repair, pass %d: KL %.4f; held out %.4f, %.4f at the start",
            len(self.history),
            loss,
            check,
            self.checks[0],
        )
        if check < self.checks[self.kept]:
            self.kept, self.best = len(self.history), self.student.state()
        self.step, self.total = 0, 0.0
        self._shuffle = self._generator.get_state()
        sizes = [float(factor.detach().norm()) for factor in self.student.factors]
        self.student.goal.room.team.check_same("what repair has trained", sizes)

    def position(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        facts = {name: getattr(self, name) for name in PROGRESS}
        tensors = {"shuffle": self._shuffle}
        for i, factor in enumerate(self.student.factors):
            moments = self._optimizer.state[factor]
            tensors |= named(str(i), {"factor": factor.detach(), "best": self.best[i], **moments})
        return facts, tensors

    def go_on(self, position: Position | None) -> None:
        if position is None:
            return
        for name in PROGRESS:
            setattr(self, name, position.facts[name])
        self._generator.set_state(position.tensors["shuffle"])
        self._shuffle = position.tensors["shuffle"]
        for i, factor in enumerate(self.student.factors):
            found = position.under(str(i))
            factor.data = found.pop("factor").to(factor.device)
            self.best[i] = found.pop("best").to(factor.device)
            # Where the optimizer wants them: it counts its steps on the CPU.
            self._optimizer.state[factor] = {
                name: t if t.ndim == 0 else t.to(factor.device) for name, t in found.items()
            }
        log.info("repair goes on in pass %d, after step %d", len(self.history) + 1, self.step)


@dataclass(frozen=True)
class Goal:
    """What the original makes of the tokens (sequences, length). states: its final ones, (sequences,
    length, hidden), of several processes this one's; head: (vocabulary, hidden); room: where ``states`` are
    kept"""

    tokens: Tensor
    states: Tensor
    head: Tensor
    room: States = field(default_factory=States)


class Student:
    """The quantized model with the factors that are trained."""

    def __init__(self, model: Any, source: ModelFolder, goal: Goal):
        self.model, self.goal, self.head = model, goal, _head_of(model)
        self.parts = _parts(model, source)
        self.factors = [part.factor for part in self.parts]

    def learn(self, rows: Tensor) -> float:
        """The mean divergence of these sequences, whose gradient is left in the factors."""
        own, goal = self._own(rows)
        loss, share = 0.0, len(own) / len(rows)
        if share:
            H = self._states(own)
            loss, gradient = divergence(H.detach(), self.head, goal, self.goal.head)
            H.backward(gradient.mul_(share))
            for part in self.parts:
                part.collect()
        self._add_up_gradients(bool(share))
        return sum(self.goal.room.team.exchange(loss * share))

    @torch.no_grad()
    def mean_loss(self, rows: Tensor, batch: int) -> float:
        """The mean divergence of these sequences."""
        total = 0.0
        for part in rows.split(batch):
            own, goal = self._own(part)
            if len(own):
                H = self._states(own)
                total += divergence(H, self.head, goal, self.goal.head)[0] * len(own)
        return sum(self.goal.room.team.exchange(total)) / len(rows)

    def _states(self, rows: Tensor) -> Tensor:
        for part in self.parts:
            part.place()
        found = self.model.base_model(input_ids=self.goal.tokens[rows], use_cache=False)
        return cast(Tensor, found.last_hidden_state)

    def _own(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences that this process runs, and what the original makes of them."""
        room = self.goal.room
        mine = slice(room.team.rank, None, room.team.count)
        return rows[mine], room.pick(self.goal.states, rows)[mine]

    def _add_up_gradients(self, has_some: bool) -> None:
        """Make the factors' gradients those of all processes, the same in each."""
        team = self.goal.room.team
        if team.count == 1:
            return
        parts = [f.grad if has_some else torch.zeros_like(f) for f in self.factors]
        sums = team.sum(torch.cat([part.flatten() for part in parts if part is not None]))
        for factor, own in zip(
            self.factors, sums.split([f.numel() for f in self.factors]), strict=True
        ):
            factor.grad = own.view_as(factor)

    def state(self) -> list[Tensor]:
        return [factor.detach().clone() for factor in self.factors]

    def restore(self, state: list[Tensor]) -> None:
        for factor, value in zip(self.factors, state, strict=True):
            factor.data = value

    def tensors(self) -> dict[str, Tensor]:
        """What was trained, by full name, as it is stored."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors().items()}


def _head_of(model: Any) -> Tensor:
    return cast(Tensor, model.get_output_embeddings().weight.detach())


def _parts(student: Any, source: ModelFolder) -> list[ScaledWeight | ScaledNorm]:
    """What is trained: every quantized linear of the decoder blocks and every norm."""
    family = family_of(source.config)
    weights = [
        ScaledWeight(student.get_submodule(name), source, name)
        for name in record.linears(source)
        if name not in (family.head, family.embedding)
    ]
    norms = [
        ScaledNorm(module, name)
        for name, module in student.named_modules()
        if name.endswith("norm") and hasattr(module, "weight")
    ]
    return [*weights, *norms]


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


@torch.no_grad()
def _final_states(model: Any, tokens: Tensor, states: States) -> Tensor:
    parts = (
        model.base_model(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state
        for row in tokens
    )
    return states.joined(parts, len(tokens))


@torch.no_grad()
def divergence(H: Tensor, E: Tensor, goal: Tensor, goal_head: Tensor) -> tuple[float, Tensor]:
    """Mean KL(original || candidate) over all positions, and its gradient by H.

    goal: the original's final states, same shape as H; goal_head: its head. The gradient of KL by the
    candidate's logits is softmax(candidate) - softmax(original).
    """
    flat, flat_goal = H.flatten(0, -2), goal.flatten(0, -2)
    gradient, total = torch.empty_like(flat), 0.0
    for start in range(0, len(flat), ROWS):
        part = slice(start, start + ROWS)
        ours = (flat[part] @ E.T).float().log_softmax(-1)
        theirs = (flat_goal[part] @ goal_head.T).float().log_softmax(-1)
        p = theirs.exp()
        own = torch.linalg.vecdot(p, theirs)
        total += float((own - torch.linalg.vecdot(p, ours)).double().sum())
        difference = ours.exp_().sub_(p).div_(len(flat))
        gradient[part] = difference.to(E.dtype) @ E
    return total / len(flat), gradient.view_as(H)


class ScaledWeight:
    """A linear whose integers stay and whose scales are multiplied by a trained factor."""

    def __init__(self, module: Any, source: ModelFolder, name: str):
        self.module, self.name = module, name
        q = record.read_linear(source, name)
        device = module.weight.device
        zero = 2 ** (q.bits - 1) if q.zero is None else q.zero.to(torch.int16).unsqueeze(-1)
        levels = q.codes.unflatten(1, (q.scale.shape[1], -1)).to(torch.int16) - zero
        self.levels = levels.to(device=device, dtype=torch.int8 if q.bits < 8 else torch.int16)
        self.dtype = q.scale.dtype
        self.scale = q.scale.to(device=device, dtype=torch.float32).unsqueeze(-1)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def stored(self) -> Tensor:
        return (self.scale * self.factor.detach()).to(self.dtype)

    def place(self) -> None:
        weight = (self.levels.to(self.dtype) * self.stored()).flatten(1)
        self.module.weight = nn.Parameter(weight)

    def collect(self) -> None:
        """The gradient of the factor from the gradient of the weight."""
        gradient = self.module.weight.grad
        if gradient is None:
            # An expert that no token was sent to.
            self.factor.grad = torch.zeros_like(self.factor)
            return
        by_level = gradient.unflatten(1, self.levels.shape[1:]) * self.levels
        by_scale = by_level.sum(-1, keepdim=True, dtype=torch.float32)
        self.factor.grad = by_scale * self.scale
        self.module.weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.name}.scale": self.stored().squeeze(-1)}


class ScaledNorm:
    """A norm whose weight is multiplied by a trained factor."""

    def __init__(self, module: Any, name: str):
        self.module, self.name = module, name
        self.start = module.weight.detach().float()
        self.dtype = module.weight.dtype
        self.factor = nn.Parameter(torch.ones_like(self.start))

    def place(self) -> None:
        self.module.weight = nn.Parameter((self.start * self.factor.detach()).to(self.dtype))

    def collect(self) -> None:
        self.factor.grad = self.module.weight.grad.float() * self.start
        self.module.weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.name}.weight": (self.start * self.factor.detach()).to(self.dtype)}


REPAIRS = {"kl": Kl}
