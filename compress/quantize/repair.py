"""Repair of a quantized model against its original: scales and norms are trained, the integers stay.

A short end-to-end pass over the calibration tokens with the forward KL divergence of the original's
distribution as the loss (the second phase of EfficientQAT, arXiv 2407.11062, with the original as
teacher instead of the text). The whole model is in memory, in 16 bits.

H (tokens, hidden) after the final norm; E (vocabulary, hidden) the head; levels (out, groups, columns)
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.generated import generated_tokens
from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.progress import track
from compress.quantize import record
from compress.runtime.load import load_dense

log = logging.getLogger(__name__)

# Positions whose logits exist at the same time.
ROWS = 256


@dataclass(frozen=True)
class Kl:
    """Adam on a factor for every scale and every norm weight, all starting at 1.

    epochs: passes over the tokens
    generated: sequences that the original writes itself and that are added to the calibration tokens;
        they keep what is trained from fitting the calibration's domain alone
    rate: the largest step of a factor; it rises over the first tenth of the steps and falls to 0
    batch: sequences a step
    """

    epochs: int = 4
    generated: int = 0
    rate: float = 2e-3
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "rate"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"repair.kl.{name}={getattr(self, name)} is not allowed: choose more than 0"
                )

    def check(self, source: ModelFolder) -> None:
        """Raises UserError for a float16 model, whose gradients would need loss scaling."""
        if source.dtype == torch.float16:
            raise UserError("repair=kl trains in bfloat16 or float32: set the model's dtype to one")

    def __call__(
        self,
        source: ModelFolder,
        original: ModelFolder,
        target: Path,
        tokens: Tensor,
        device: torch.device,
    ) -> dict[str, Any]:
        """Train the record ``source`` and write it to ``target``.

        Returns the mean KL of every epoch as it was while training, in nats per token, and how many
        tokens the training saw. Raises UserError as ``check`` does.
        """
        self.check(source)
        tokens = tokens.to(device)
        teacher = load_dense(original, device, source.dtype)
        if self.generated:
            own = generated_tokens(
                teacher,
                sequences=self.generated,
                length=tokens.shape[1],
                prefix=_common_start(tokens),
                seed=0,
            )
            tokens = torch.cat([tokens, own])
        goal = _final_states(teacher, tokens)
        head = teacher.get_output_embeddings().weight.detach()
        del teacher
        student = load_dense(source, device, source.dtype)
        weights = [
            ScaledWeight(student.get_submodule(name), source, name)
            for name in record.linears(source)
            if name != family_of(source.config).head and name != family_of(source.config).embedding
        ]
        norms = [
            ScaledNorm(module, name)
            for name, module in student.named_modules()
            if name.endswith("norm") and hasattr(module, "weight")
        ]
        parts: list[ScaledWeight | ScaledNorm] = [*weights, *norms]
        steps = self.epochs * math.ceil(len(tokens) / self.batch)
        optimizer = torch.optim.Adam(
            [part.factor for part in parts], lr=self.rate, betas=(0.9, 0.95)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _share(i, steps))
        generator = torch.Generator().manual_seed(0)
        history = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(tokens), generator=generator).split(self.batch)
            total = 0.0
            for rows in track(order, f"repair, pass {epoch + 1} of {self.epochs}"):
                for part in parts:
                    part.place()
                H = student.model(input_ids=tokens[rows], use_cache=False).last_hidden_state
                loss, gradient = divergence(
                    H.detach(), student.get_output_embeddings().weight.detach(), goal[rows], head
                )
                H.backward(gradient)
                for part in parts:
                    part.collect()
                optimizer.step()
                schedule.step()
                total += loss * len(rows)
            history.append(total / len(tokens))
            log.info("repair, pass %d: KL %.4f", epoch + 1, history[-1])
        _write(source, target, {k: v for part in parts for k, v in part.tensors().items()})
        return {
            "kl": history,
            "tokens": self.epochs * tokens.numel(),
            "generated_tokens": self.generated * tokens.shape[1],
            "steps": steps,
        }


def _common_start(tokens: Tensor) -> list[int]:
    """[BOS] if every sequence starts with the same token, else []."""
    first = tokens[:, 0]
    return [int(first[0])] if len(first) > 1 and bool((first == first[0]).all()) else []


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


@torch.no_grad()
def _final_states(model: Any, tokens: Tensor) -> Tensor:
    return torch.cat(
        [
            model.model(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state
            for row in tokens
        ]
    )


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
        total += float((p * theirs.sub_(ours)).sum())
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
        by_scale = (gradient.unflatten(1, self.levels.shape[1:]) * self.levels).sum(
            -1, keepdim=True
        )
        self.factor.grad = by_scale.float() * self.scale
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


def _write(source: ModelFolder, target: Path, changed: dict[str, Tensor]) -> None:
    """The record with these tensors changed, file by file."""
    writer = record.RecordWriter(target, source, record.schemes_of(source))
    unused = set(changed) - set(source.names)
    assert not unused, unused
    for file in source.weight_files:
        names = [name for name in source.names if source.file_of(name) == file]
        writer.add(file.name, {n: changed.get(n, source.tensor(n)) for n in names})
    writer.close()


REPAIRS = {"kl": Kl}
