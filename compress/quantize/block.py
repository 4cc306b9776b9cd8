"""One decoder block while it is being quantized: what transforms change and rounding reads.

W (out, in); H (in, in), or the tokens that it is the mean of; s (in,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from calibration.moments import Collector, Moments, Tokens
from compress.errors import UserError
from compress.model.experts import every_token
from compress.model.families import Family, Input
from compress.model.walk import Activations
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Grid, Scheme, make_grid

# Numbers of a matrix that are worked on at a time, where each row is by itself.
PART = 2**23
# Of these, the numbers that go through elementwise work at a time: they and what is made of them stay in a
# core's cache.
PIECE = 2**17


@dataclass
class Block:
    """A block handed from transform to transform, then to rounding.

    module: the decoder layer in the model's dtype; its norms and biases change in place
    schemes: local name -> scheme of each linear that gets quantized
    weights: local name -> float32 (out, in) working copy of each linear that gets quantized
    activations: what enters the block; None if no method looks at data
    original: a copy of the transformed block that stays unquantized, while a method needs it
    moments: local name -> moments of that linear's input, as last observed
    grids: local name -> grid that was chosen
    search: chooses the grids that nobody has chosen when they are asked for, (W, H, scheme, dtype) -> grid;
        min-max if there is none
    notes: what a method has to tell, for metrics.json
    all_experts: every token is observed in every expert
    first_seen: first reader of an input -> ``largest`` and ``above`` of its moments before any transform;
        only if the schemes round inputs
    """

    module: nn.Module
    family: Family
    schemes: dict[str, Scheme]
    dtype: torch.dtype
    weights: dict[str, Tensor]
    activations: Activations | None = None
    original: nn.Module | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    search: Callable[[Tensor, Tensor | Tokens, Scheme, torch.dtype], Grid] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    first_seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    all_experts: bool = False
    # What attention's output projection reads, batch by batch, as long as nothing before it changes.
    _attended: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Of the linears that this block has: those of a family are not all alike.
        self.inputs = self.family.inputs_in(self.weights)
        self.linears = tuple(name for shared in self.inputs for name in shared.linears)

    def part(self, name: str) -> Any:
        """The norm or linear of this local name."""
        return self.module.get_submodule(name)

    def moments_of(self, name: str) -> Moments:
        """The moments of this linear's input; the whole block is observed if they were not taken yet."""
        if name not in self.moments:
            self.observe(*self.inputs)
        return self.moments[name]

    def grid(self, name: str) -> Grid:
        """The grid of this linear. A search sees the moments as they are when it is first asked for."""
        if name not in self.grids:
            W, scheme = self.weights[name], self.schemes[name]
            if self.search is None:
                return make_grid(W, scheme, self.dtype, largest=self._largest(name))
            self.grids[name] = self.search(W, self.moments_of(name).H, scheme, self.dtype)
        return self.grids[name]

    def _largest(self, name: str) -> Tensor:
        """Largest |w| of all linears that read this one's input: engines fuse them, and have one scale for a
        whole tensor only once."""
        readers = next(i.linears for i in self.inputs if name in i.linears)
        return torch.stack([self.weights[reader].abs().max() for reader in readers]).max()

    def scheme(self, shared: Input) -> Scheme:
        """The one scheme of the readers of an input: engines fuse them, so they never differ."""
        schemes = {self.schemes[name] for name in shared.linears}
        assert len(schemes) == 1, (shared.linears, schemes)
        return schemes.pop()

    @torch.no_grad()
    def observe(self, *inputs: Input) -> None:
        """Take the moments of these inputs with the module's weights as they are now.

        With an ``original`` copy the cross moments too. Inputs are given in the order in which they
        run; the block runs no further than the last one.
        """
        assert self.activations is not None, "the methods asked for no data"
        data, names = self.activations, [shared.linears for shared in inputs]
        team = data.states.team
        firsts = [linears[0] for linears in names]
        twin: Any = self.original
        collector = Collector(
            {name: self.part(name) for name in firsts},
            names,
            None if twin is None else {name: twin.get_submodule(name) for name in firsts},
            self.threshold,
            sum(team.exchange(data.inputs.shape[:-1].numel())),
            [shared.linears[0] for shared in inputs if shared.routed],
            team,
        )
        everywhere = every_token(self.module, self.all_experts)
        with self.attention_once(), collector.hooks(), everywhere:
            originals = None if twin is None else data.batches(_given(data.original))
            for X in data.batches(data.inputs):
                if originals is not None:
                    collector.run(_given(twin), next(originals), data.arguments)
                collector.run(self.module, X, data.arguments)
        self.moments |= collector.means()
        self._borrow(inputs)
        for first in firsts:
            moments = self.moments[first]
            if moments.above is not None:
                self.first_seen.setdefault(first, (moments.largest.clone(), moments.above))

    def _borrow(self, inputs: Sequence[Input]) -> None:
        """Give experts that no token was sent to the largest inputs of the others: a scale that is fixed by
        them must hold when tokens come."""
        routed = [shared for shared in inputs if shared.routed]
        for shared in routed:
            own = self.moments[shared.linears[0]]
            if not own.tokens:
                others = (self.moments[s.linears[0]] for s in routed if s.pattern == shared.pattern)
                own.largest = torch.stack([moments.largest for moments in others]).amax(0)

    @contextmanager
    def attention_once(self) -> Iterator[None]:
        """Within it the module runs on all batches of its inputs, in order.

        Attention itself is computed in the first such pass and not again until a weight that it depends
        on changes: later passes start from what its output projection read.
        """
        name = self.family.attention_output
        if name not in self.linears:
            yield
            return
        out, attention = self.part(name), self.part(name.rpartition(".")[0])
        states = _given(self.activations).states
        if self._attended:
            batches = states.read(self._attended)
            attention.forward = lambda *_, **__: (out(next(batches)), None)
            try:
                yield
            finally:
                del attention.forward
            return
        seen: list[Tensor] = []
        handle = out.register_forward_pre_hook(lambda _, args: seen.append(states.keep(args[0])))
        try:
            yield
            self._attended = seen
        finally:
            handle.remove()

    @property
    def threshold(self) -> float | None:
        """What the schemes call an outlier among the inputs, if they round those."""
        found = {s.inputs.threshold for s in self.schemes.values() if s.inputs is not None}
        assert len(found) <= 1, found
        return next(iter(found), None)

    def place_inputs(self, name: str, q: QTensor) -> None:
        """Let the module round this linear's inputs from now on, if its scheme does."""
        if q.inputs is not None:
            self._attended = []
            q.inputs.attach(self.part(name), q.input_scale, q.columns)

    def place(self, name: str, W: Tensor) -> None:
        """Let the module compute with this weight, rounded to the model's dtype."""
        part, W, before = self.part(name), W.to(self.dtype), self.linears.index
        if (
            self._attended
            and not torch.equal(part.weight, W)
            and before(name) < before(self.family.attention_output)
        ):
            self._attended = []
        part.weight.data = W

    def foldable(self) -> list[tuple[Input, ...]]:
        """The inputs that a scale can be moved into the source of, those of one source together: several
        experts read one norm."""
        by_source: dict[str, list[Input]] = {}
        for shared in self.inputs:
            if shared.source is not None and self._can_fold(shared.source, shared.linears[0]):
                by_source.setdefault(shared.source, []).append(shared)
        return [tuple(found) for found in by_source.values()]

    def _can_fold(self, source: str, reader: str) -> bool:
        """Whether the source's (last) outputs are the readers' inputs one to one.

        They are not where heads share their values (grouped-query attention): there o_proj reads
        more columns than v_proj has rows.
        """
        rows, columns = len(self.part(source).weight), self.weights[reader].shape[1]
        return rows >= columns if source in self.weights else rows == columns

    def fold(self, inputs: Sequence[Input], s: Tensor) -> None:
        """Multiply the readers' input columns by s > 0 and divide their source's output by it.

        The function of the block stays the same. A norm's weight is rounded to the model's dtype
        when it is stored, so the readers take the ratio that was really stored rather than s.
        Raises UserError if one of them has a grid already.
        """
        (name,) = {shared.source for shared in inputs}
        assert name is not None
        linears = [linear for shared in inputs for linear in shared.linears]
        names = (name, *linears)
        if chosen := [name for name in names if name in self.grids or self.search is not None]:
            raise UserError(
                f"a transform chose the grid of {chosen[0]} and a later one scales it: "
                "list transforms that scale (awq_scale) before those that choose grids "
                "(awq_clip, opt)"
            )
        self._attended = []
        source = self.part(name)
        bias = getattr(source, "bias", None)
        if name in self.weights:
            self.weights[name][-len(s) :] /= s.unsqueeze(1)
        else:
            shift = self.family.norm_shift
            before = source.weight.detach().float() + shift
            # As it is when the norm adds to it what is stored.
            stored = (before / s - shift).to(self.dtype)
            held = stored.float() + shift
            s = torch.where(held == 0, torch.ones_like(s), before / held)
            source.weight.data = stored
        if bias is not None:
            # A new tensor: what holds the old one is not ours.
            divided = bias.data.float()
            divided[-len(s) :] /= s
            bias.data = divided.to(self.dtype)
        for linear in linears:
            self.weights[linear] *= s
        for linear in self._others(inputs):
            part = self.part(linear)
            part.weight.data = (part.weight.data.float() * s).to(self.dtype)
        for moments in {id(m): m for m in map(self.moments.get, linears) if m}.values():
            moments.scale(1 / s)

    def _others(self, inputs: Sequence[Input]) -> list[str]:
        """The readers of these inputs that keep 16 bits, of those that the block has."""
        held = {name for name, _ in self.module.named_modules()}
        return list(dict.fromkeys(n for shared in inputs for n in shared.others if n in held))


def _given(value: Any) -> Any:
    assert value is not None
    return value


def output_error(D: Tensor, H: Tensor | Tokens) -> float:
    """Mean squared output error of a weight change D (out, in) on inputs with second moment H."""
    return summed_error(row_parts(D), H, len(D))


def summed_error(parts: Iterable[Tensor], H: Tensor | Tokens, rows: int) -> float:
    """The same of a change whose ``rows`` come in parts, which need not be in memory together. They are added
    up in one piece, so that the sum does not depend on the parts."""
    other = H.root().T if isinstance(H, Tokens) else H
    products, done = other.new_empty(rows, other.shape[1]), 0
    for D in parts:
        outputs = products[done : done + len(D)]
        if isinstance(H, Tokens):
            torch.matmul(D, other, out=outputs).square_()
        else:
            torch.mul(D @ other, D, out=outputs)
        done += len(D)
    assert done == rows, (done, rows)
    return float(products.sum())


def row_parts(W: Tensor, numbers: int = PART) -> tuple[Tensor, ...]:
    """The rows of W in parts of so many numbers: what is computed of one part takes little memory."""
    return W.split(max(1, numbers // W.shape[1]))


def group_moments(H: Tensor | Tokens, columns: int) -> Tensor:
    """The diagonal blocks of H (in, in), one a group: (groups, columns, columns)."""
    if isinstance(H, Tokens):
        groups = H.root().unflatten(1, (-1, columns)).transpose(0, 1)
        return groups.mT @ groups
    blocks = H.unflatten(0, (-1, columns)).unflatten(2, (-1, columns))
    return torch.stack([blocks[g, :, g] for g in range(blocks.shape[0])])


class Transform(Protocol):
    """Changes a block without changing its function, or chooses its grids. Needs the moments.

    grouped_integers: fits schemes of integers in groups or channels alone
    """

    grouped_integers: ClassVar[bool]

    def __call__(self, block: Block) -> None: ...


class Rounding(Protocol):
    """Picks the integers of every linear of a block.

    needs_data: looks at activations; needs_original: also at those of the original model;
    observes: takes the moments itself, of one input after the other; grouped_integers: as in
    ``Transform``; refines: starts from the integers
    of the method before it. A method that does not is given {}.
    """

    needs_data: ClassVar[bool]
    observes: ClassVar[bool]
    needs_original: ClassVar[bool]
    grouped_integers: ClassVar[bool]
    refines: ClassVar[bool]

    def __call__(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]: ...
