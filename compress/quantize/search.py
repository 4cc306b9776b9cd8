"""Mixed bits: how many bits each linear gets, from what fewer bits there do to the model's output.

Linears that read one tensor (q, k, v; gate, up) are one fused group and get the same bits, because
engines run them as one. For every group the divergence from the original is measured with this group
alone quantized; an integer program then picks the bits with the least sum within the budget. The sum
stands for the whole: it takes the groups' damages as independent, as HAWQ-V3 (arXiv 2011.10680) does.

W, D (out, in); H (in, in); X (sequences, length, hidden); F (tokens, hidden); E (vocabulary, hidden)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.packing import packed_width
from compress.model.families import Family, Input, family_of
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign
from compress.model.walk import Walk
from compress.progress import track
from compress.quantize.block import Block, output_error
from compress.quantize.scheme import Scheme, Schemes, to_codes
from compress.quantize.stage import linear_names, open_block, settle
from compress.quantize.transforms.opt import Opt

log = logging.getLogger(__name__)

# The divergence of more bits follows from the one measured at so many: see ``sensitivities``.
ANCHOR = 3
# Bits at which a group's own divergence is far below the noise of 16-bit arithmetic.
QUIET = 8
# A coarser search of grids than a recipe's: here they only have to rank the groups.
GRIDS = Opt(steps=4, rounds=1)
# Positions whose logits exist at the same time.
ROWS = 256


@dataclass(frozen=True)
class Search:
    """Pick the bits of every fused group under one budget; give exactly one of the two.

    average_bits: mean bits of a code over all weights of the decoder blocks' linears; scales and
        zero points are not counted
    megabytes: size of the same linears in the exported files, codes (rows padded to 32-bit words),
        scales and zero points, in 1e6 bytes; embedding and head are not counted
    choices: bits that a group may get, 2 to 8
    tokens: calibration tokens that the divergence is measured on
    """

    average_bits: float | None = None
    megabytes: float | None = None
    choices: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    tokens: int = 1024

    def __post_init__(self) -> None:
        if (self.average_bits is None) == (self.megabytes is None):
            raise UserError("search needs a budget: set one of search.average_bits and megabytes")
        if not self.choices or not all(2 <= bits <= 8 for bits in self.choices):
            raise UserError(f"search.choices={list(self.choices)} is not allowed: choose 2 to 8")
        if self.tokens < 1:
            raise UserError(f"search.tokens={self.tokens} is not allowed: choose 1 or more")
        low, high = self.bits[0], self.bits[-1]
        if self.average_bits is not None and not low <= self.average_bits <= high:
            raise UserError(
                f"search.average_bits={self.average_bits} is not allowed: choose {low} to {high}, "
                "the range of search.choices"
            )

    @property
    def bits(self) -> list[int]:
        """The choices in rising order."""
        return sorted(set(self.choices))


@dataclass(frozen=True)
class Group:
    """Linears of one block that share their bits.

    schemes: full name of each linear -> its scheme, bits aside
    shapes: full name -> (out, in)
    """

    block: int
    shared: Input
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """As the linears' names, with those after the first cut to their last part."""
        first, *others = self.schemes
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())

    def nbytes(self, bits: int, dtype: torch.dtype) -> int:
        """Exported bytes of its codes, scales and zero points; scales are stored in ``dtype``."""
        return sum(
            linear_bytes(self.shapes[name], replace(scheme, bits=bits), dtype)
            for name, scheme in self.schemes.items()
        )


def linear_bytes(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of a linear (out, in) in an exported file: rows of codes fill whole 32-bit words."""
    rows, columns = shape
    groups = columns // scheme.columns_per_group(columns)
    zeros = 0 if scheme.symmetric else 4 * packed_width(rows, scheme.bits) * groups
    return 4 * rows * packed_width(columns, scheme.bits) + rows * groups * dtype.itemsize + zeros


@dataclass(frozen=True)
class Budget:
    """What the groups may cost together. sizes: (groups, choices); both in the unit of the budget's key."""

    groups: list[Group]
    sizes: list[list[int]]
    limit: float


def budget(source: ModelFolder, search: Search, schemes: Schemes) -> Budget:
    """The groups of a model and what each choice costs there, from file headers alone.

    Raises UserError if the model or a scheme does not fit, or no choice of bits fits the budget or
    fills it.
    """
    family = family_of(source.config)
    groups = fused_groups(source, family, settle(source, family, schemes))
    if search.megabytes is None:
        assert search.average_bits is not None
        sizes = [[bits * group.weights for bits in search.bits] for group in groups]
        return Budget(groups, sizes, search.average_bits * sum(group.weights for group in groups))
    sizes = [[group.nbytes(bits, source.dtype) for bits in search.bits] for group in groups]
    low, high = (sum(row[i] for row in sizes) / 1e6 for i in (0, -1))
    if not low <= search.megabytes <= high:
        raise UserError(
            f"search.megabytes={search.megabytes} is not allowed: choose {math.ceil(low * 100) / 100} "
            f"to {math.floor(high * 100) / 100}, what the linears take with the search.choices"
        )
    return Budget(groups, sizes, search.megabytes * 1e6)


def fused_groups(source: ModelFolder, family: Family, schemes: Schemes) -> list[Group]:
    """The fused groups of every block in the order in which they run. ``schemes`` are settled."""
    present, found = set(linear_names(source, family)), []
    for index in range(int(source.config["num_hidden_layers"])):
        for shared in family.inputs:
            names = [f"{family.blocks}.{index}.{name}" for name in shared.linears]
            shapes = {n: source.shape(f"{n}.weight") for n in names if n in present}
            found.append(
                Group(
                    index,
                    shared,
                    {name: schemes.of(name) for name in shapes},
                    {name: (shape[0], shape[1]) for name, shape in shapes.items()},
                )
            )
    return found


def choose(
    source: ModelFolder,
    search: Search,
    schemes: Schemes,
    tokens: Tensor,
    device: torch.device,
) -> tuple[Schemes, dict[str, Any]]:
    """The schemes with the bits that the search picks, and what metrics.json keeps of it.

    tokens: calibration tokens (sequences, length), of which the first ``search.tokens`` are used
    Linears whose bits differ from ``schemes.linears`` become exceptions; group sizes and symmetry
    stay as they are, and so does ``schemes.head``. The whole model is in memory, in 16 bits, beside
    a float32 copy of its head and of one block.

    The report holds for each group its bits and its divergence at every choice in nats per token
    (``kl``; ``measured_bits`` says which were measured, the others follow from those), the noise that
    was subtracted in each block, the sum over the groups (``predicted_kl``), and the average bits and
    megabytes that were reached.
    Raises UserError as ``budget`` and ``quantize`` do.
    """
    start = time.perf_counter()
    family = family_of(source.config)
    schemes = settle(source, family, schemes)
    allowed = budget(source, search, schemes)
    groups = allowed.groups
    used = first_tokens(tokens, search.tokens)
    costs, floors = sensitivities(source, schemes, search.bits, used, device)
    picks = solve(costs, allowed.sizes, allowed.limit)
    bits = [search.bits[pick] for pick in picks]
    exceptions = dict(schemes.exceptions)
    for group, chosen in zip(groups, bits, strict=True):
        exceptions |= {name: replace(s, bits=chosen) for name, s in group.schemes.items()}
    weights = sum(group.weights for group in groups)
    chosen_groups = list(zip(groups, bits, strict=True))
    report = {
        "seconds": time.perf_counter() - start,
        "tokens": used.numel(),
        "noise": floors,
        "measured_bits": [b for b in search.bits if b <= ANCHOR],
        "average_bits": sum(b * group.weights for group, b in chosen_groups) / weights,
        "megabytes": sum(group.nbytes(b, source.dtype) for group, b in chosen_groups) / 1e6,
        "predicted_kl": sum(row[pick] for row, pick in zip(costs, picks, strict=True)),
        "groups": {
            group.name: {
                "block": group.block,
                "linears": list(group.shared.linears),
                "bits": chosen,
                "kl": {str(b): cost for b, cost in zip(search.bits, row, strict=True)},
            }
            for group, chosen, row in zip(groups, bits, costs, strict=True)
        },
    }
    log.info(
        "searched bits in %.1f s: %.3f on average, %.2f MB, predicted KL %.4f",
        *(report[key] for key in ("seconds", "average_bits", "megabytes", "predicted_kl")),
    )
    different = {name: own for name, own in exceptions.items() if own != schemes.linears}
    return Schemes(schemes.linears, different, schemes.head), report


def first_tokens(tokens: Tensor, count: int) -> Tensor:
    """About the first ``count`` tokens: whole sequences, or the start of one. (sequences, length)"""
    length = min(count, tokens.shape[1])
    return tokens[: count // length, :length]


def solve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: float
) -> list[int]:
    """The choice of each group with the least summed cost within the limit, proven by HiGHS.

    costs, sizes: (groups, choices), sizes whole numbers; their sum over the picks is at most
    ``limit``. The smallest sizes must fit.
    """
    c, a = np.array(costs, dtype=float), np.array(sizes, dtype=np.int64)
    # HiGHS's tolerances are absolute: small whole sizes and costs far above 1e-6 keep it exact.
    unit = int(np.gcd.reduce(a, axis=None))
    a, room = a // unit, math.floor(limit / unit + 1e-9)
    each = np.kron(np.eye(len(c)), np.ones(c.shape[1]))
    found = milp(
        c.ravel() * (1e4 / (np.abs(c).max() or 1.0)),
        integrality=np.ones(c.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(a.reshape(1, -1), -np.inf, room),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.success, found.message
    picks = [int(pick) for pick in found.x.reshape(c.shape).argmax(1)]
    used = sum(int(row[pick]) for row, pick in zip(a, picks, strict=True))
    assert used <= room, (used, room)
    return picks


def sensitivities(
    source: ModelFolder,
    schemes: Schemes,
    choices: Sequence[int],
    tokens: Tensor,
    device: torch.device,
) -> tuple[list[list[float]], list[float]]:
    """KL(original || one group at so many bits) in nats per token, (groups, choices).

    The group's weights are rounded to the nearest value of searched grids, all others are the
    original's. Up to 3 bits it is measured. With more bits the divergence drowns in the noise of
    16-bit arithmetic, but there the change is small enough for it to be quadratic in the change: it
    is the one at 3 bits times the ratio of the group's output errors tr(D H D^T) at the two widths.

    Any change early in the model makes what follows round differently, which adds about 3e-4 to a
    measured divergence. The second result is this floor for each block, and it is subtracted: the
    first group at 8 bits has next to no divergence of its own.
    """
    family = family_of(source.config)
    walk = Walk(source, family, device)
    walk.embed(tokens)
    found, floors = [], []
    with torch.no_grad(), _whole(walk) as original:
        goal = original.finish(0)
        for index in track(range(len(walk)), "search bits"):
            start = time.perf_counter()
            layer = walk.layers[index]
            block = open_block(layer, walk.prefix(index), family, schemes, source.dtype)
            block.activations = walk.enter(index)
            block.observe(*family.inputs)
            rows, floor = _block(original, index, block, choices, goal)
            found += rows
            floors.append(floor)
            walk.leave(index, block.activations)
            log.info(
                "%s: %.1f s, KL at %s bits %s, noise %.1e",
                walk.prefix(index),
                time.perf_counter() - start,
                choices[0],
                ", ".join(f"{row[0]:.1e}" for row in rows),
                floor,
            )
    return found, floors


def _block(
    original: _Original, index: int, block: Block, choices: Sequence[int], goal: Tensor
) -> tuple[list[list[float]], float]:
    """The divergences of a block's groups, (groups, choices), and the floor under the measured ones."""
    inputs, widths = block.family.inputs, sorted({*choices, ANCHOR})
    tried = [{bits: _rounded(block, shared, bits) for bits in widths} for shared in inputs]
    quiet = _rounded(block, inputs[0], QUIET)
    keys = [(group, bits) for group in range(len(tried)) for bits in widths if bits <= ANCHOR]
    finals = [
        _final(original, index, block, candidate)
        for candidate in (quiet, *(tried[group][bits] for group, bits in keys))
    ]
    noise, *values = divergences(finals, goal, original.head)
    kl = dict(zip(keys, values, strict=True))
    # Two equations for the first group: kl = floor + signal, and at 8 bits floor + share * signal.
    share = _ratio(quiet, tried[0][ANCHOR])
    floor = max(0.0, (noise - share * kl[0, ANCHOR]) / (1 - share))
    above = {key: max(0.0, value - floor) for key, value in kl.items()}
    rows = [
        [
            above[group, bits]
            if bits <= ANCHOR
            else above[group, ANCHOR] * _ratio(own[bits], own[ANCHOR])
            for bits in choices
        ]
        for group, own in enumerate(tried)
    ]
    return rows, floor


@dataclass(frozen=True)
class _Candidate:
    """A group at some bits: its output error, and by local name its weights in the model's dtype."""

    error: float
    weights: dict[str, Tensor]


def _rounded(block: Block, shared: Input, bits: int) -> _Candidate:
    """The readers of an input at so many bits; without weights where none are going to run."""
    weights, error = {}, 0.0
    for name in shared.linears:
        W, H = block.weights[name], block.moments[name].second
        scheme = replace(block.schemes[name], bits=bits)
        weights[name] = to_codes(W, GRIDS.search(W, H, scheme, block.dtype), scheme).dequantize(
            block.dtype
        )
        error += output_error(weights[name].float() - W, H)
    return _Candidate(error, weights if bits <= ANCHOR or bits == QUIET else {})


def _ratio(candidate: _Candidate, anchor: _Candidate) -> float:
    return candidate.error / anchor.error if anchor.error else 0.0


def _final(original: _Original, index: int, block: Block, candidate: _Candidate) -> Tensor:
    """The final states with these weights in the block, whose own are put back."""
    for name, W in candidate.weights.items():
        block.place(name, W)
    F = original.finish(index)
    for name in candidate.weights:
        block.place(name, block.weights[name])
    return F


@dataclass(frozen=True)
class _Original:
    """The model with all its blocks in memory. norm: the final one; head: float32 (vocabulary, hidden)"""

    walk: Walk
    norm: nn.Module
    head: Tensor

    def finish(self, index: int) -> Tensor:
        """The final states, (tokens, hidden) in the model's dtype, from what enters this block on."""
        X = self.walk.hidden
        assert X is not None
        for i in range(index, len(self.walk)):
            X = self.walk.enter(i).forward(self.walk.layers[i], X)
        return self.norm(X).flatten(0, -2).to(self.walk.folder.dtype)


@contextmanager
def _whole(walk: Walk) -> Iterator[_Original]:
    """All blocks of an embedded walk in memory, with hidden states in float32 between them.

    In 16 bits they would round differently after every small change, and that noise (about 0.001
    nats) is as large as what is measured. The linears compute in the model's dtype.
    """
    family, folder, model = walk.family, walk.folder, walk.model
    head = folder.tensor(f"{family.embedding if folder.tied_head else family.head}.weight")
    name = f"{family.final_norm}.weight"
    assign(model, name, folder.tensor(name).to(device=walk.device, dtype=folder.dtype))
    assert walk.hidden is not None
    walk.hidden = walk.hidden.float()
    with ExitStack() as stack:
        for index in range(len(walk)):
            layer = stack.enter_context(walk.open(index))
            for linear in family.linears:
                module = layer.get_submodule(linear)
                narrow = partial(_narrow, folder.dtype)
                stack.callback(module.register_forward_pre_hook(narrow).remove)
        head = head.to(folder.dtype).to(device=walk.device, dtype=torch.float32)
        yield _Original(walk, model.get_submodule(family.final_norm), head)


def _narrow(dtype: torch.dtype, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].to(dtype),)


@torch.no_grad()
def divergences(finals: Sequence[Tensor], goal: Tensor, E: Tensor) -> list[float]:
    """Mean KL(original || candidate) over tokens, in nats, of each candidate's final states.

    finals: F of each candidate; goal: F of the original; E: float32 head. Logits are float32.
    """
    sums = [0.0] * len(finals)
    for start in range(0, len(goal), ROWS):
        rows = slice(start, start + ROWS)
        theirs = _logits(goal[rows], E).log_softmax(-1)
        p = theirs.exp()
        own = torch.linalg.vecdot(p, theirs)
        for i, F in enumerate(finals):
            ours = _logits(F[rows], E).log_softmax(-1)
            sums[i] += float((own - torch.linalg.vecdot(p, ours)).double().sum())
    return [total / len(goal) for total in sums]


def _logits(F: Tensor, E: Tensor) -> Tensor:
    """F E^T in float32: through the 16-bit units where F is bf16, which loses nothing then."""
    if F.dtype != torch.bfloat16:
        return F.float() @ E.T
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    cuda = torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        return F.float() @ E.T
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
