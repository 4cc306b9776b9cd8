"""What distillation minimises, a chunk of positions at a time: logits of all positions never exist.

Forward KL of the original's distribution and the student's, both at temperature T and times T^2 (Hinton,
arXiv 1503.02531, section 2; Minitron, arXiv 2407.14679, section 3: T = 1), and cross-entropy of the text,
in one pass that writes its own gradients.

n positions, V vocabulary, k tokens kept; H (n, hidden) the student's final states; E (V, hidden) its head
x (rows, V) the student's logits; q its distribution, p the original's, at temperature T
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Positions whose logits exist at the same time: enough for the matmuls, few enough for a CPU's caches.
ROWS = {"cpu": 256, "cuda": 2048}
# Rows of a head's gradient that are added to at a time on a CPU.
SLICE = 2048
# Label of a position that has no next token.
NONE = -100


@dataclass(frozen=True)
class Weights:
    """How much the losses count, the temperature of the KL, and whether what is no matmul is compiled."""

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    compile: bool = False


@dataclass
class Room:
    """Buffers (rows, V) that all chunks share: fresh ones of this size would cost a page fault each 4 KiB."""

    x: Tensor
    y: Tensor
    p: Tensor

    def first(self, rows: int) -> Room:
        return Room(self.x[:rows], self.y[:rows], self.p[:rows])


class Goal(Protocol):
    """What the original says at n positions."""

    def part(self, rows: slice) -> Goal:
        """The same of some of the positions."""
        ...

    def prepare(self, y: Tensor) -> None:
        """Do the matmuls. y: (n, V), for logits if they are needed"""
        ...

    def diverge(self, room: Room, temperature: float) -> Tensor:
        """KL of each position, (n,).

        room: x holds the student's log-probabilities, which become the gradient of KL by the student's logits
        over the temperature; y as ``prepare`` left it; p is free
        """
        ...

    def exact(self) -> Goal:
        """The same from logits in float32, which a CPU's matmul would round to the type of the states."""
        ...

    def nll(self, labels: Tensor) -> Tensor:
        """The original's own cross-entropy of the labelled positions at temperature 1, ()."""
        ...


@dataclass(frozen=True)
class States:
    """The original's final states (n, hidden of the original) and its head (V, hidden of the original)."""

    states: Tensor
    head: Tensor

    def part(self, rows: slice) -> States:
        return States(self.states[rows], self.head)

    def prepare(self, y: Tensor) -> None:
        product(self.states, self.head.T, y)

    def diverge(self, room: Room, temperature: float) -> Tensor:
        log_q, log_p, p = room.x, room.y, room.p
        torch.log_softmax(_scaled(log_p, temperature), -1, out=log_p)
        probabilities(log_p, p)
        kl = dot(p, log_p.sub_(log_q))
        probabilities(log_q, log_q)
        log_q.sub_(p)
        return kl

    def exact(self) -> States:
        return self if self.states.is_cuda else States(self.states.float(), self.head.float())

    @torch.no_grad()
    def nll(self, labels: Tensor) -> Tensor:
        nlls = torch.cat([text_nll(*chunk) for chunk in self.logits(labels)])
        return nlls[labels != NONE].mean()

    def logits(self, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (rows, V), float32 or wider, and labels (rows,) of the positions, a chunk at a time."""
        states, head = self.states, self.head
        wide, rows = torch.promote_types(states.dtype, torch.float32), ROWS[states.device.type]
        for part, following in zip(states.split(rows), labels.split(rows), strict=True):
            y = torch.empty(len(part), len(head), dtype=wide, device=part.device)
            product(part, head.T, y)
            yield y, following


@dataclass(frozen=True)
class Top:
    """The original's k most likely tokens at temperature T and the mass of all others.

    tokens: int (n, k); log_p: float32 (n, k); log_tail: float32 (n,), -inf where nothing is left; text_nll:
        float32 (n,), -log of the next token's probability at temperature 1, 0 where there is none
    Its KL is that of the distributions with all other tokens as one: by the log-sum inequality a lower bound
    of the exact one, which it equals at k = V.
    """

    tokens: Tensor
    log_p: Tensor
    log_tail: Tensor
    text_nll: Tensor

    def part(self, rows: slice) -> Top:
        return Top(self.tokens[rows], self.log_p[rows], self.log_tail[rows], self.text_nll[rows])

    def prepare(self, y: Tensor) -> None:
        pass

    def diverge(self, room: Room, temperature: float) -> Tensor:
        tokens, q = self.tokens.long(), room.x
        p, p_tail = self.log_p.exp(), self.log_tail.exp()
        log_q_kept = q.gather(1, tokens)
        probabilities(q, q)
        q_kept = q.gather(1, tokens)
        q.scatter_(1, tokens, 0.0)
        # Summed, not 1 - the others: the tail may be tiny.
        q_tail = q.sum(-1).clamp_(min=torch.finfo(q.dtype).tiny)
        own = torch.where(p_tail > 0, p_tail * (self.log_tail - q_tail.log()), 0.0)
        kl = (p * (self.log_p - log_q_kept)).sum(-1) + own
        # By the logits: q - p for the kept; what the tail has too much or too little, spread as q is there.
        q.mul_((1 - p_tail / q_tail).unsqueeze(-1))
        q.scatter_(1, tokens, q_kept - p)
        return kl

    def exact(self) -> Top:
        return self

    def nll(self, labels: Tensor) -> Tensor:
        return self.text_nll[labels != NONE].mean()


@torch.no_grad()
def top_of(goal: States, labels: Tensor, k: int, temperature: float) -> Top:
    """The k most likely tokens of the original at each position. labels: int64 (n,), as for ``losses``"""
    parts: list[tuple[Tensor, ...]] = []
    for y, following in goal.logits(labels):
        nll = text_nll(y, following)
        torch.log_softmax(_scaled(y, temperature), -1, out=y)
        log_p, tokens = y.topk(k)
        probabilities(y, y)
        tail = y.scatter_(1, tokens, 0.0).sum(-1).log()
        parts.append((tokens.int(), log_p, tail, nll))
    return Top(*(torch.cat(column) for column in zip(*parts, strict=True)))


def text_nll(x: Tensor, labels: Tensor) -> Tensor:
    """-log of the label's probability by the logits x (rows, V), (rows,); 0 where there is no label."""
    return nn.functional.cross_entropy(x, labels, ignore_index=NONE, reduction="none")


def losses(
    H: Tensor, E: Tensor, labels: Tensor, goal: Goal, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mean KL over the positions, mean cross-entropy over those that have a label; float32 ().

    labels: int64 (n,), the next token or NONE
    Only the loss, ``weights.kl * KL + weights.ce * CE``, has gradients, by H and E. Under autocast products
    are taken in its type, all else in float32.
    """
    device = H.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else H.dtype
    learn = torch.is_grad_enabled() and (H.requires_grad or E.requires_grad)
    with torch.autocast(device, enabled=False):
        found = _Losses.apply(H, E, labels, goal, weights, low, learn)
    return cast(tuple[Tensor, Tensor, Tensor], found)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        H: Tensor,
        E: Tensor,
        labels: Tensor,
        goal: Goal,
        weights: Weights,
        low: torch.dtype,
        learn: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(low, torch.float32)
        H_low, E_low = H.to(low), E.to(low)
        rows = min(ROWS[H.device.type], len(H))
        room = Room(*(torch.empty(rows, len(E), dtype=exact, device=H.device) for _ in range(3)))
        dH = torch.empty_like(H, dtype=exact) if learn else None
        dE = torch.zeros_like(E, dtype=exact) if learn and ctx.needs_input_grad[1] else None
        kl, ce = torch.zeros(2, dtype=exact, device=H.device)
        # How much a position counts among the n in the mean over those with a label; counted on the device,
        # so that the host does not wait.
        counts = (labels != NONE).to(exact)
        counts *= len(H) / counts.sum().clamp(min=1)
        chunk = _compiled_chunk() if weights.compile else _chunk
        for start in range(0, len(H), rows):
            part = slice(start, min(start + rows, len(H)))
            own, said = room.first(part.stop - start), goal.part(part)
            product(H_low[part], E_low.T, own.x)
            said.prepare(own.y)
            kl_rows, ce_rows = chunk(own, labels[part], counts[part], said, weights)
            kl += kl_rows.sum()
            ce += ce_rows.sum()
            if dH is not None:
                g = own.x.to(low)
                product(g, E_low, dH[part])
                if dE is not None:
                    accumulate(dE, g.T, H_low[part])
        kl, ce = kl / len(H), ce / len(H)
        ctx.n = len(H)
        ctx.gradients = (
            None if dH is None else dH.to(H.dtype),
            None if dE is None else dE.to(E.dtype),
        )
        ctx.mark_non_differentiable(kl, ce)
        return weights.kl * kl + weights.ce * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * (by_loss / ctx.n) for g in ctx.gradients]
        return (*scaled, None, None, None, None, None)


def _chunk(
    room: Room, labels: Tensor, counts: Tensor, goal: Goal, weights: Weights
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy of each position, (rows,), the latter times ``counts`` (rows,), which is 0 without
    a label; the logits in ``room.x`` become the gradient of the weighted sum of both over all positions."""
    x, T = room.x, weights.temperature
    at = labels.clamp(min=0).unsqueeze(-1)
    log_q_text = x if T == 1 else x.log_softmax(-1)
    torch.log_softmax(_scaled(x, T), -1, out=x)
    nll = -log_q_text.gather(1, at).squeeze(-1)
    q_text = log_q_text.softmax(-1) if weights.ce else None
    kl = goal.diverge(room, T)
    # T^2 of the loss, 1 / T of the logits' scale.
    if (factor := weights.kl * T) != 1:
        x.mul_(factor)
    if q_text is not None:
        by_row = (weights.ce * counts).unsqueeze(-1)
        x.addcmul_(q_text, by_row)
        x.scatter_add_(1, at, -by_row)
    return kl * T**2, nll * counts


@functools.cache
def _compiled_chunk() -> Any:
    return torch.compile(_chunk, dynamic=False)


def _scaled(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x.div_(temperature)


def probabilities(log_q: Tensor, out: Tensor) -> None:
    """exp(log_q) for log-probabilities: the softmax kernel is three times as fast as exp on a CPU."""
    torch.softmax(log_q, -1, out=out)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The product of each row with its like, (rows,), without a product in memory."""
    if torch.compiler.is_compiling():
        return (a * b).sum(-1)
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def product(A: Tensor, B: Tensor, out: Tensor) -> None:
    """A @ B into ``out``, whose type may be wider; CUDA's matmul then does not round to A's type."""
    if A.dtype == out.dtype:
        torch.mm(A, B, out=out)
    elif A.is_cuda:
        torch.mm(A, B, out_dtype=out.dtype, out=out)
    else:
        out.copy_(A @ B)


def accumulate(total: Tensor, A: Tensor, B: Tensor) -> None:
    """total += A @ B, ``total`` of a wider type."""
    if A.dtype == total.dtype:
        total.addmm_(A, B)
    elif A.is_cuda:
        torch.addmm(total, A, B, out_dtype=total.dtype, out=total)
    else:
        # A slice at a time stays in the cache: the whole product, widened, takes as long as the matmul.
        for rows, part in zip(total.split(SLICE), A.split(SLICE), strict=True):
            rows.add_((part @ B).to(total.dtype))


def next_tokens(tokens: Tensor) -> Tensor:
    """Labels (sequences x length,) of tokens (sequences, length): the next one, NONE at the end."""
    return nn.functional.pad(tokens[:, 1:], (0, 1), value=NONE).flatten()


def relative_error(S: Tensor, T: Tensor) -> Tensor:
    """Mean over the tokens of ||s - t||^2 / ||t||^2, (). S, T: (..., hidden)

    Relative for every token: a few have states a hundred times as large as the others'.
    """
    S, T = S.float(), T.float()
    tiny = torch.finfo(T.dtype).tiny
    return ((S - T).square().sum(-1) / T.square().sum(-1).clamp(min=tiny)).mean()
