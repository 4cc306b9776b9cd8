"""Mixed bits: how many bits each linear gets, from what fewer bits there do to the model's output.

Linears that read one tensor (q, k, v; gate, up) are one fused group and get the same bits, because
engines run them as one. For every group the divergence from the original is measured with this group
alone quantized; an integer program then picks the bits with the least sum within the budget. The sum
stands for the whole: it takes the groups' damages as independent, as HAWQ-V3 (arXiv 2011.10680) does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.packing import packed_width
from compress.model.families import Family, Input, check_applies, family_of
from compress.model.folder import ModelFolder, Shapes
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.sensitivity import ANCHOR, sensitivities
from compress.quantize.stage import linear_names, settle
from compress.saved import NOWHERE, Saved

log = logging.getLogger(__name__)

# Tokens of a sequence that sensitivity is measured on, at least: less would be mostly without context.
WINDOW = 128


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
            raise UserError(
                "search needs one budget: set search.average_bits or search.megabytes, the other to null"
            )
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


def budget(source: Shapes, search: Search, schemes: Schemes) -> Budget:
    """The groups of a model and what each choice costs there, from file headers alone.

    Raises UserError if the model or a scheme does not fit, or no choice of bits fits the budget or
    fills it.
    """
    family = check_applies("search", source.config)
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


def fused_groups(source: Shapes, family: Family, schemes: Schemes) -> list[Group]:
    """The fused groups of every block in the order in which they run. ``schemes`` are settled."""
    blocks: dict[int, list[str]] = {}
    for name in linear_names(source, family):
        number, _, local = name.removeprefix(f"{family.blocks}.").partition(".")
        blocks.setdefault(int(number), []).append(local)
    found = []
    for index, held in sorted(blocks.items()):
        for shared in family.inputs_in(held):
            names = [f"{family.blocks}.{index}.{name}" for name in shared.linears]
            shapes = {n: source.shape(f"{n}.weight") for n in names}
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
    saved: Saved = NOWHERE,
    spill: Path | None = None,
) -> tuple[Schemes, dict[str, Any]]:
    """The schemes with the bits that the search picks, and what metrics.json keeps of it.

    tokens: calibration tokens (sequences, length), of which the first ``search.tokens`` are used
    spill: a folder that hidden states are kept in, if not in memory
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
    used = spread_tokens(tokens, search.tokens)
    costs, floors = sensitivities(source, schemes, search.bits, used, device, saved, spill)
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


def spread_tokens(tokens: Tensor, count: int) -> Tensor:
    """About ``count`` tokens from the starts of as many sequences as give ``WINDOW`` each: neighbouring
    sequences are of different parts of the calibration mix. (sequences, length)"""
    length = min(count, tokens.shape[1], max(WINDOW, count // len(tokens)))
    return tokens[: max(1, count // length), :length]


def solve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: float
) -> list[int]:
    """The choice of each group with the least summed cost within the limit, proven by HiGHS.

    costs, sizes: (groups, choices), sizes whole numbers; their sum over the picks is at most
    ``limit``. The smallest sizes must fit.
    """
    # Here, not above: every run without a search would carry it in memory.
    from scipy.optimize import Bounds, LinearConstraint, milp

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
