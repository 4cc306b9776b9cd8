"""The shortest time that memory and arithmetic of a device allow (Williams et al., CACM 52(4), 2009).

    seconds = max(bytes that must move / bandwidth, operations / rate)

A step of decoding moves every weight once, as it is stored, but of a table that is looked up only the
tokens' rows, of experts those that its tokens are sent to, and the cache of every sequence. Reading a prompt
moves the weights once and writes the cache. Nothing is said of what a device does not reach, of launches, or
of the exchange between devices: real speed is a share of this, which ``compress bench`` measures
(``share_of_roofline``).

A product of a weight (out, in) with n tokens takes 2 n out in operations; attention of a query over a context
of c tokens 4 c head_dim a head (scores, and the sum of the values); in a prompt c is all before, and itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from compress.plan.checkpoint import Checkpoint, Part
from compress.plan.hardware import Hardware

# Bytes of a number between two linears.
HALF = 2


class Request(Protocol):
    """``eval.speed.Point``: sequences at a time, tokens in and tokens out of each."""

    @property
    def batch(self) -> int: ...
    @property
    def input_length(self) -> int: ...
    @property
    def output_length(self) -> int: ...


@dataclass(frozen=True)
class Time:
    """seconds: the shortest; limit: what sets it, ``weights``, ``cache`` or ``compute``"""

    seconds: float
    limit: str


def decode(
    model: Checkpoint,
    hardware: Hardware,
    batch: int,
    context: int,
    *,
    tp: int = 1,
    whole: bool = False,
) -> Time:
    """One step of ``batch`` sequences with ``context`` tokens in the cache. whole: as published calculators
    count, with every weight read, a table that rows are looked up in too."""
    unread = 0 if whole else (model.looked_up + model.unread(batch)) / tp
    weights = model.on_each(tp) - unread
    cache = batch * model.cache_share(tp) * model.cache_of(context)
    seconds = [
        _linear_seconds(model, hardware, batch, batch),
        attention_decode(model, batch, context)[0] / hardware.flops("bf16"),
    ]
    return _time(weights, cache, sum(seconds) / tp, hardware)


def prefill(model: Checkpoint, hardware: Hardware, batch: int, length: int, *, tp: int = 1) -> Time:
    """Reading the prompts, to the first token of all of them."""
    cache = batch * model.cache_share(tp) * model.cache_of(length)
    seconds = [
        _linear_seconds(model, hardware, batch * length, batch),
        attention_prefill(model, batch, length)[0] / hardware.flops("bf16"),
    ]
    weights = model.on_each(tp) - (model.looked_up + model.unread(batch * length)) / tp
    return _time(weights, cache, sum(seconds) / tp, hardware)


def memory(model: Checkpoint, batch: int, context: int, *, tp: int = 1) -> float:
    """Bytes of weights and cache on each device. What a program takes beside them comes on top."""
    return model.on_each(tp) + batch * model.cache_share(tp) * model.cache_of(context)


def prompt_bytes(model: Checkpoint, batch: int, length: int) -> float:
    """Bytes between the linears of a block while prompts are read: the residual stream and a copy, queries,
    keys and values also in float32 for their turn, gate and up with two products."""
    turned = model.heads + 2 * model.kv_heads
    a_token = 2 * model.hidden + 3 * turned * model.head_dim + 4 * model.intermediate
    return HALF * batch * length * a_token


def largest_batch(model: Checkpoint, hardware: Hardware, context: int, *, tp: int = 1) -> int:
    """Sequences of so many tokens whose cache fits beside the weights; 0 if not even one does."""
    left = hardware.bytes - model.on_each(tp)
    return max(0, int(left // (model.cache_share(tp) * model.cache_of(context))))


def intensity(model: Checkpoint, batch: int, context: int) -> dict[str, dict[str, float]]:
    """Operations a byte of the MLP's linears and of attention (without its linears), reading a prompt and
    decoding."""
    found = {}
    for phase, tokens, attention in (
        ("prefill", batch * context, attention_prefill(model, batch, context)),
        ("decode", batch, attention_decode(model, batch, context)),
    ):
        flops = 2.0 * tokens * model.mlp.parameters
        moved = model.mlp.stored + _mlp_activations(model, tokens)
        if model.experts is not None:
            flops += 2 * tokens * model.routed * model.experts.parameters
            moved += model.experts.stored - model.unread(tokens)
        found[phase] = {"mlp": flops / moved, "attention": attention[0] / attention[1]}
    return found


def _mlp_activations(model: Checkpoint, tokens: int) -> float:
    """Bytes between the linears: in and out of gate and up, in and out of down."""
    return HALF * tokens * len(model.windows) * (2 * model.hidden + 3 * model.intermediate)


def attention_decode(model: Checkpoint, batch: int, context: int) -> tuple[float, float]:
    """Operations and bytes of a step's attention: every layer over what it sees."""
    seen = sum(context if w is None else min(context, w) for w in model.windows)
    flops = 4 * batch * seen * model.heads * model.head_dim
    vectors = 2 * HALF * batch * len(model.windows) * model.heads * model.head_dim
    return flops, batch * model.cache_of(context) + vectors


def attention_prefill(model: Checkpoint, batch: int, length: int) -> tuple[float, float]:
    """The same of a prompt, queries over themselves and what is before them, without scores in memory."""
    pairs = 0.0
    for window in model.windows:
        w = length if window is None else min(length, window)
        pairs += w * length - w * (w - 1) / 2
    flops = 4 * batch * pairs * model.heads * model.head_dim
    vectors = 2 * HALF * batch * length * model.head_dim * (model.heads + model.kv_heads)
    return flops, vectors * len(model.windows)


def _linear_seconds(model: Checkpoint, hardware: Hardware, tokens: int, rows: int) -> float:
    """Of the blocks' linears on so many tokens, and of the head, which only the last ``rows`` go through."""

    def seconds(part: Part, count: int) -> float:
        return 2 * count * part.parameters / hardware.flops(part.rate)

    blocks = seconds(model.attention, tokens) + seconds(model.mlp, tokens)
    if model.experts is not None:
        blocks += model.routed * seconds(model.experts, tokens)
    return blocks + seconds(model.head, rows)


def _time(weights: float, cache: float, compute: float, hardware: Hardware) -> Time:
    moving = (weights + cache) / hardware.bandwidth
    if compute > moving:
        return Time(compute, "compute")
    return Time(moving, "weights" if weights >= cache else "cache")


def predicted(model: Checkpoint, hardware: Hardware, point: Request) -> dict[str, Any]:
    """What metrics.json keeps beside a measured point: decoding at its mean context, memory at full length.

    bytes: that a step moves; memory_bytes: weights and cache; limit: ``memory`` or ``compute``
    """
    mean = point.input_length + point.output_length // 2
    step = decode(model, hardware, point.batch, mean)
    full = point.input_length + point.output_length
    return {
        "hardware": hardware.name,
        "bytes": round(model.read(point.batch) + point.batch * model.cache_of(mean)),
        "memory_bytes": round(memory(model, point.batch, full)),
        "itl_ms": 1e3 * step.seconds,
        "ttft_ms": 1e3 * prefill(model, hardware, point.batch, point.input_length).seconds,
        "tokens_per_s": point.batch / step.seconds,
        "limit": "compute" if step.limit == "compute" else "memory",
    }
