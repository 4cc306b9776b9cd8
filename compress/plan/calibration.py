"""What a run takes while it compresses: bytes of the process beside its start, and a rough time, by stage.

Counted from the sizes that live at one time in ``quantize.stage``, ``quantize.block``,
``calibration.moments`` and the methods. On a GPU the arrays are in its memory; only runs on a CPU were held
against this (eval/benchmarks/plan_check.py).

T tokens of calibration, B tokens that run at once, h hidden size, m neurons, P weights of a block's linears,
K the inputs of its linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from calibration.moments import are_few
from compress.config import Run
from compress.model.families import Family, family_of, size_of
from compress.model.folder import Shapes
from compress.plan.checkpoint import Checkpoint
from compress.plan.hardware import Hardware
from compress.quantize.rounding.gptq import Gptaq, Gptq
from compress.quantize.rounding.learned import Learned
from compress.quantize.stage import linear_names
from compress.quantize.transforms.awq_clip import AwqClip
from compress.quantize.transforms.awq_scale import AwqScale
from compress.quantize.transforms.opt import Opt

# Bytes of libraries' code and buffers that a first use brings, without calibration data and with, by runs of
# rtn-int4 and awq-int4 on a model of next to no size (torch 2.13, a CPU); and of a block without weights.
CODE, CODE_WITH_DATA, EMPTY_BLOCK = 22e6, 40e6, 5e5
# What glibc keeps of freed memory: twice the largest block that it takes from its heap (mallopt(3),
# M_MMAP_THRESHOLD: at most 32 MiB). Smaller things that come later do not fit into all of it.
KEPT = 2 * 2**25
# Tokens that run at once, as ``model.walk.Walk`` has it.
AT_ONCE = 4096
HALF, SINGLE, DOUBLE = 2, 4, 8
# float64 squares of K that factoring and inverting one holds at a time: two, and where inputs are dead a copy
# of H in float32. With the original's inputs three, and copies of their moments.
SQUARES, SQUARES_WITH_ORIGINAL = 2.5, 4
# Bytes a second that the export is taken to read, and to write: a disk's, not measured.
DISK = 1e9
# Of a matrix outside the blocks in 16 bits that is quantized: itself, and its codes in parts and as a whole.
# One that is copied passes some rows at a time.
WITH_CODES = 2
# Of a linear that is packed, for each code: itself, as an integer of 32 bits in two orders, and its words.
PACKING = 10
# Numbers of a matrix that a search works on at a time: 2048 rows of 14,336 columns and less.
PART = 2**25


@dataclass(frozen=True)
class Stage:
    """bytes: of the process beside its start, at the peak; what: holds them; seconds: rough"""

    name: str
    bytes: float
    what: str
    seconds: float


@dataclass(frozen=True)
class _Sizes:
    """The letters above, with the input squares: sum and largest of K^2 over the shared inputs; moments:
    what is kept of them, K^2 numbers or the tokens; across: the most columns an error is multiplied by."""

    T: int
    length: int
    B: int
    h: int
    m: int
    P: int
    layers: int
    squares: int
    largest: int
    moments: float
    across: int
    stacked: int
    linear: int
    attended: int


def stages(run: Run, shapes: Shapes, planned: Checkpoint, hardware: Hardware) -> list[Stage]:
    """The stages of a recipe that are counted, quantize and the export; ``uncounted`` names the others."""
    sizes = _sizes(run, shapes)
    found = []
    if "quantize" in run.settings.stages:
        found.append(_quantize(run, shapes, sizes, hardware))
    holders = {"its largest matrix": float(max(_rest(shapes).values(), default=0))}
    if "quantize" in run.settings.stages:
        holders["packing its largest linear"] = PACKING * sizes.linear
    what, most = max(holders.items(), key=lambda item: item[1])
    # Every byte is written twice: tensors go to a file of their own before the header is known.
    found.append(Stage("export", _code(sizes) + most, what, 3 * planned.files / DISK))
    return found


def uncounted(run: Run) -> list[str]:
    """What a run does beside: stages, and the search for bits, whose memory and time are not counted."""
    others = [stage for stage in run.settings.stages if stage != "quantize"]
    return others if run.search is None else [*others, "search"]


def _sizes(run: Run, shapes: Shapes) -> _Sizes:
    family, data = family_of(shapes.config), run.settings.data
    size = _heaviest(shapes, family)
    inputs = family.inputs_in(size)
    generated = data.generated
    T = (data.sequences + generated) * data.length if run.needs_data else 0
    rows = max(1, AT_ONCE // data.length) * data.length
    # Columns of every input, and whether its tokens are kept: how many an expert sees is not known before.
    read = [
        (size[i.linears[0]][1], not i.routed and are_few(T, size[i.linears[0]][1])) for i in inputs
    ]
    columns = [k for k, _ in read]
    within = size.get(family.attention_output, (0, 0))[1]
    neurons = [k for name, (_, k) in size.items() if name != family.attention_output]
    return _Sizes(
        T=T,
        length=data.length,
        B=min(T, rows),
        h=size_of("hidden_size", shapes.config),
        m=max(neurons, default=0),
        P=sum(math.prod(s) for s in size.values()),
        layers=size_of("num_hidden_layers", shapes.config),
        squares=sum(k * k for k in columns),
        largest=max(columns) ** 2,
        # Tokens are in 16 bits.
        moments=sum(T * k * HALF / SINGLE if few else k * k for k, few in read),
        across=max(T if few else k for k, few in read),
        stacked=max(sum(math.prod(size[n]) for n in i.linears) for i in inputs),
        linear=max(math.prod(s) for s in size.values()),
        attended=within,
    )


def _heaviest(shapes: Shapes, family: Family) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of the block with most weights, by their names there: not all are alike."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for name in linear_names(shapes, family):
        number, _, local = name.removeprefix(f"{family.blocks}.").partition(".")
        rows, columns = shapes.shape(f"{name}.weight")
        blocks.setdefault(number, {})[local] = (rows, columns)
    return max(blocks.values(), key=lambda size: sum(math.prod(s) for s in size.values()))


def _rest(shapes: Shapes) -> dict[str, int]:
    """Bytes of the matrices outside the blocks."""
    family: Family = family_of(shapes.config)
    outside = (n for n in shapes.names if not n.startswith(f"{family.blocks}."))
    return {n: math.prod(shapes.shape(n)) * shapes.dtype.itemsize for n in outside}


def _quantize(run: Run, shapes: Shapes, s: _Sizes, hardware: Hardware) -> Stage:
    moments = dict(_moments(run, s))
    name, peak = max(moments.items(), key=lambda item: item[1])
    if run.schemes.head is not None:
        # The walk still holds what left the last block.
        others = _code(s) + HALF * s.T * s.h + WITH_CODES * max(_rest(shapes).values())
        if others > peak:
            name, peak = "embedding or head and its codes", others
    return Stage("quantize", peak, name, _seconds(run, s, hardware))


def _code(s: _Sizes) -> float:
    return (CODE_WITH_DATA if s.T else CODE) + s.layers * EMPTY_BLOCK


def _moments(run: Run, s: _Sizes) -> Iterator[tuple[str, float]]:
    """Bytes at the moments that may be the peak of a block."""
    # The block in the model's type, and in float32.
    block = (HALF + SINGLE) * s.P
    rounded = (HALF + 1) * s.P
    work = 4 * SINGLE * s.stacked
    if not s.T:
        yield (
            "a block, its copy in float32 and what it is rounded to",
            CODE + block + rounded + work,
        )
        return
    code = CODE_WITH_DATA
    twins = 2 if any(method.needs_original for method in run.roundings) else 1
    states = twins * HALF * s.T * s.h + HALF * s.T * s.attended
    seconds = SINGLE * s.moments * twins
    # Gate, up, their product and its parts; the inputs in float32 and their sizes; the residual stream.
    batch = s.B * (4 * HALF * s.m + (SINGLE + HALF) * s.m + 3 * HALF * s.h)
    yield "moments of a block's inputs", code + states + block + seconds + batch
    held = code + states + block + rounded + seconds
    yield "outputs of a block", held + HALF * s.T * s.h + batch
    code += min(batch, KEPT)
    # The products of all errors, and what they are made of a part at a time.
    work = SINGLE * (s.stacked + 4 * min(s.stacked, PART))
    yield "a search over a block's weights", code + states + block + seconds + work + rounded
    for method in run.roundings:
        if isinstance(method, Learned):
            # Offsets, their gradients, the codes and the weight they give; what the steps keep to go back.
            learned = 5 * SINGLE * s.P + method.batch * s.length * SINGLE * (6 * s.m + 8 * s.h)
            yield "learning how to round", code + states + block + seconds + learned
    if any(isinstance(method, Gptq | Gptaq) for method in run.roundings):
        squares = SQUARES if twins == 1 else SQUARES_WITH_ORIGINAL
        factor = squares * DOUBLE * s.largest + 6 * SINGLE * s.stacked
        if are_few(s.T, math.isqrt(s.largest)):
            # The square that is made of the tokens.
            factor += SINGLE * s.largest
        yield "factoring second moments", code + states + block + rounded + seconds + factor


def _seconds(run: Run, s: _Sizes, hardware: Hardware) -> float:
    """Products at the hardware's rates, and every search's passes over the weights at its bandwidth."""
    bf16, single = hardware.flops("bf16"), hardware.flops("float32")
    # Through the block to collect moments and once more behind its rounding; moments, a triangle of each.
    # Attention, norms and what is copied between are taken to last as long again.
    products = 2 * s.T * s.layers * (2 * 2 * s.P + s.squares) / bf16
    passes, flops = 12.0, 0.0
    for method in (*run.transforms, *run.roundings):
        cost = next((c for kind, c in _COSTS.items() if isinstance(method, kind)), None)
        if cost is not None:
            more, own = cost(method, s)
            passes, flops = passes + more, flops + own
    moving = s.layers * passes * SINGLE * s.P / hardware.bandwidth
    return products + moving + s.layers * flops / single


# Of a method on one block: passes over float32 weights, and operations in float32. A rounding to a grid is
# some eight passes; D H D^T is two products.
def _awq_scale(method: AwqScale, s: _Sizes) -> tuple[float, float]:
    return 10 * method.grid, method.grid * 2 * s.P * s.across


def _awq_clip(method: AwqClip, s: _Sizes) -> tuple[float, float]:
    return 12 * method.steps, method.steps * 2 * s.P * 128


def _opt(method: Opt, s: _Sizes) -> tuple[float, float]:
    trials = 3 * method.steps + 2 * method.rounds
    return 10 * trials, trials * 2 * s.P * 128


def _gptq(method: Any, s: _Sizes) -> tuple[float, float]:
    # Each column: a pass over its block of 128, and its share of the product with the rest. Factoring in
    # float64 is four times k^3, at half the rate.
    return 64 + 12, s.P * math.sqrt(s.largest) + 8 * s.squares * math.sqrt(s.largest)


def _learned(method: Learned, s: _Sizes) -> tuple[float, float]:
    return 20 * method.iters, method.iters * 6 * s.P * method.batch * s.length


_COSTS: dict[type, Callable[[Any, _Sizes], tuple[float, float]]] = {
    AwqScale: _awq_scale,
    AwqClip: _awq_clip,
    Opt: _opt,
    Gptq: _gptq,
    Gptaq: _gptq,
    Learned: _learned,
}
