"""Pruning one decoder block: which of its parts stay, and what the others then do.

W (out, in); X (sequences, length, hidden)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.model.families import Family, Input
from compress.prune.importance import (
    Score,
    Sizes,
    activation_score,
    keep_heads,
    keep_structures,
    magnitude_score,
    random_score,
)
from compress.prune.knobs import Prune
from compress.prune.merge import merge_heads
from compress.prune.regression import Regression, Surgery
from compress.prune.shape import Anatomy, Shape, elements
from compress.prune.streams import Passage, token_weights

# Errors of a block are of its two halves' outputs.
ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Goal:
    """The original's stream on the same tokens, all channels of it: entering the block, behind attention, and
    behind the block (and those dropped after it)."""

    entering: Tensor
    middle: Tensor
    leaving: Tensor


@dataclass
class BlockCut:
    """One block of the pruned model in the making, and which parts of the old one stay.

    channels: of the residual stream that stay; the block has these alone already
    groups: query heads that share keys and values; one that goes is empty. sources: for each group the old
        head of keys and values that it reads
    """

    passage: Passage
    goal: Goal
    anatomy: Anatomy
    shape: Shape
    channels: Tensor
    knobs: Prune
    generator: torch.Generator
    groups: list[list[int]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    mlp: Tensor = field(default_factory=lambda: torch.empty(0))
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        old = self.anatomy.shape
        each = old.per_group
        self.groups = [list(range(g * each, (g + 1) * each)) for g in range(old.kv_heads)]
        self.sources = list(range(old.kv_heads))
        self.mlp = torch.arange(old.mlp)

    @property
    def family(self) -> Family:
        return self.anatomy.family

    @property
    def heads(self) -> list[int]:
        """The query heads that stay, in the order they will have."""
        return [head for heads in self.groups for head in heads]

    @property
    def kv_heads(self) -> list[int]:
        return [old for old, heads in zip(self.sources, self.groups, strict=True) if heads]

    def kept(self) -> dict[str, Tensor]:
        """Indices of the block's tensors that stay, by axis; channels are cut already."""
        head_dim = self.anatomy.head_dim
        return {
            "heads": elements(self.heads, head_dim),
            "kv_heads": elements(self.kv_heads, head_dim),
            "mlp": self.mlp,
        }

    def narrow(self, X: Tensor) -> Tensor:
        """The channels that stay."""
        if len(self.channels) == X.shape[-1]:
            return X
        return X.index_select(-1, self.channels)

    def adapt_readers(self, original: Any, shared: Input) -> None:
        """Let a norm and the linears behind it make of the pruned stream what the original's make of
        theirs.

        The norm divides by the size of fewer channels: on average that is put right. Then the linears are
        refitted.
        original: the original block; shared: linears whose input a norm makes
        """
        assert shared.source is not None
        attention = shared.linears[0] == self.family.queries
        theirs = self.goal.entering if attention else self.goal.middle
        ours = self.passage.X if attention else self.passage.middle()
        norms = original.get_submodule(shared.source), self.passage.part(shared.source)
        if len(self.channels) < theirs.shape[-1]:
            batches = self.passage.batches(ours, theirs)
            ratios = torch.cat([_rms(our) / _rms(their) for our, their in batches])
            ratio = self.passage.team.mean(ratios)
            norms[1].weight.data = (norms[1].weight.float() * ratio).to(norms[1].weight.dtype)
        if self.knobs.refit == "none":
            return
        linears = [self.passage.part(name) for name in shared.linears]
        W = torch.cat([linear.weight for linear in linears])
        goals = torch.cat([original.get_submodule(name).weight for name in shared.linears])
        found = Regression.zeros(ours.shape[-1], len(W), self.passage.device)
        for their, our in self.passage.batches(theirs, ours):
            made = torch.nn.functional.linear(norms[0](their), goals)
            found.add(norms[1](our), made, torch.ones_like(our[..., 0], dtype=torch.float32))
        every = torch.arange(ours.shape[-1], device=self.passage.device)
        fitted = found.mean(self.passage.team).fit(W, every, self.knobs.damping)
        for linear, part in zip(
            linears, fitted.split([len(linear.weight) for linear in linears]), strict=True
        ):
            _set(linear, part)

    def merge(self, method: str) -> None:
        """Make fewer heads of keys and values serve all query heads."""
        family, old = self.family, self.anatomy.shape
        names = {"queries": family.queries, "keys": family.keys, "values": family.values}
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self.passage.observe(*names.values()):
            for key, name in names.items():
                x = batch[name].flatten(0, -2).float()
                # Of the queries the size alone counts.
                found = x.square().sum(0) if key == "queries" else x.T @ x
                sums[key] = sums.get(key, 0) + found
            count += x.shape[0]
        count = sum(self.passage.team.exchange(count))
        for H in sums.values():
            self.passage.team.sum(H)
        linears = {key: self.passage.part(name) for key, name in names.items()}
        out = self.passage.part(family.attention_output)
        weights = {key: _with_bias(linear) for key, linear in linears.items()}
        merged = merge_heads(
            weights | {"output": out.weight},
            count=self.shape.kv_heads,
            kv_heads=old.kv_heads,
            moments={key: H.double() / count for key, H in sums.items()},
            method=method,
        )
        for key, linear in linears.items():
            W = getattr(merged, key)
            if linear.bias is not None:
                linear.bias.data = W[:, -1].to(linear.bias.dtype)
                W = W[:, :-1]
            _set(linear, W)
        _set(out, merged.output)
        # The first head of a group stands for all; query heads follow their groups.
        self.sources = [group[0] for group in merged.groups]
        self.groups = [[i for h in group for i in self.groups[h]] for group in merged.groups]

    def cut_attention(self) -> None:
        """Choose the heads that stay, and refit the linear that reads them."""
        family, old, new = self.family, self.anatomy.shape, self.shape
        out = self.passage.part(family.attention_output)
        ours, device = self.passage.attended(), self.passage.device
        found = Regression.zeros(ours.shape[-1], out.weight.shape[0], device)
        sizes = Sizes(old.heads, device)
        for x, entering, whole in self.passage.batches(ours, self.passage.X, self.goal.middle):
            goal = self.narrow(whole)
            found.add(x, _lacking(goal, entering, out), token_weights(goal))
            sizes.add(x)
        found = found.mean(self.passage.team)
        if new.heads < old.heads:
            score = self._score(
                found, sizes, out.weight, [self.passage.part(family.queries).weight]
            )
            self.groups = keep_heads(
                self.groups,
                self.anatomy.head_dim,
                left_groups=new.kv_heads,
                left_per_group=new.per_group,
                score=score,
            )
        columns = elements(self.heads, self.anatomy.head_dim).to(device)
        self.errors[ATTENTION] = self._refit(out, found, columns)

    def cut_mlp(self) -> None:
        """Choose the neurons that stay, and refit the linear that reads them."""
        family, old, new = self.family, self.anatomy.shape, self.shape
        out = self.passage.part(family.mlp_output)
        middle, device = self.passage.middle(), self.passage.device
        found = Regression.zeros(old.mlp, out.weight.shape[0], device)
        sizes = Sizes(old.mlp, device)
        batches = self.passage.batches(middle, self.goal.leaving)
        for x, (entering, whole) in zip(self.passage.neurons(), batches, strict=True):
            goal = self.narrow(whole)
            found.add(x, _lacking(goal, entering, out), token_weights(goal))
            sizes.add(x)
        found = found.mean(self.passage.team)
        if new.mlp < old.mlp:
            makers = [self.passage.part(name).weight for name in family.neurons]
            score = self._score(found, sizes, out.weight, makers)
            neurons = torch.arange(old.mlp, device=device).unsqueeze(1)
            self.mlp = keep_structures(neurons, new.mlp, score)
        self.errors[MLP] = self._refit(out, found, self.mlp.to(device))

    def _score(
        self, found: Regression, sizes: Sizes, W: Tensor, makers: list[Tensor]
    ) -> Score | Surgery:
        if self.knobs.importance == "error":
            return Surgery(found, self.knobs.damping)
        if self.knobs.importance == "activation":
            return activation_score(sizes.mean(self.passage.team), W.shape[1])
        if self.knobs.importance == "magnitude":
            return magnitude_score(makers, W)
        return random_score(self.generator)

    def _refit(self, linear: Any, found: Regression, kept: Tensor) -> float:
        """Let the linear read these inputs alone; returns its relative error."""
        W = linear.weight[:, kept]
        if self.knobs.refit != "none":
            W = found.fit(linear.weight, kept, self.knobs.damping)
        whole = torch.zeros_like(linear.weight)
        whole[:, kept] = W.to(whole.dtype)
        _set(linear, whole)
        return found.error(whole[:, kept], kept)


def _rms(X: Tensor) -> Tensor:
    return X.float().square().mean(-1).sqrt().clamp(min=1e-6)


def _lacking(goal: Tensor, entering: Tensor, linear: Any) -> Tensor:
    """What the linear must add to the pruned stream to reach the original's."""
    lacking = goal.float() - entering.float()
    return lacking if linear.bias is None else lacking - linear.bias.float()


def _with_bias(linear: Any) -> Tensor:
    if linear.bias is None:
        return linear.weight
    return torch.cat([linear.weight, linear.bias.unsqueeze(1)], 1)


def _set(linear: Any, W: Tensor) -> None:
    linear.weight.data = W.to(linear.weight.dtype)
