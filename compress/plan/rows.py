"""The rows of a plan as JSON: sizes, points, which linears a scheme takes, what engines would be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import Shapes
from compress.plan.checkpoint import Checkpoint
from compress.plan.hardware import Hardware
from compress.plan.loadable import Served
from compress.plan.roofline import decode, intensity, largest_batch, memory, prefill, prompt_bytes
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import linear_names


def row(
    model: Checkpoint, hardware: Hardware, batches: Sequence[int], context: int, tp: int
) -> dict[str, Any]:
    """What one checkpoint would give; bytes of memory are those of each device."""
    return {
        "parameters": model.parameters,
        "bytes": round(model.files),
        "weights": round(model.weights),
        "read": round(model.read),
        "bits_linears": model.bits_linears,
        "bits_file": model.bits_file,
        "cache_bytes_per_token": model.cache_of(context) / context,
        "largest_batch": largest_batch(model, hardware, context, tp=tp),
        "points": [_point(model, hardware, batch, context, tp) for batch in batches],
    }


def _point(
    model: Checkpoint, hardware: Hardware, batch: int, context: int, tp: int
) -> dict[str, Any]:
    step = decode(model, hardware, batch, context, tp=tp)
    whole = decode(model, hardware, batch, context, tp=tp, whole=True)
    prompt = prefill(model, hardware, batch, context, tp=tp)
    needed = memory(model, batch, context, tp=tp)
    return {
        "batch": batch,
        "context": context,
        "memory_bytes": round(needed),
        "prompt_bytes": round(prompt_bytes(model, batch, context)),
        "fits": needed <= hardware.bytes,
        "ttft_ms": 1e3 * prompt.seconds,
        "ttft_limit": prompt.limit,
        "itl_ms": 1e3 * step.seconds,
        "tokens_per_s": batch / step.seconds,
        "limit": step.limit,
        "all_weights": {"itl_ms": 1e3 * whole.seconds, "tokens_per_s": batch / whole.seconds},
        "intensity": intensity(model, batch, context),
    }


def matches(shapes: Shapes, schemes: Schemes) -> list[dict[str, Any]]:
    """Every kind of matrix, alike ones of all blocks together: {name, shape, count, scheme, reason}; scheme
    None where it stays in 16 bits, and then the reason."""
    family = family_of(shapes.config)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in linear_names(shapes, family):
        local = ".".join(name.removeprefix(f"{family.blocks}.").split(".")[1:])
        entry = _match(name, shapes.shape(f"{name}.weight"), schemes.of(name)) | {"name": local}
        key = (local, *entry["shape"], entry["scheme"])
        found.setdefault(key, entry | {"count": 0})["count"] += 1
    return [*found.values(), *_ends(shapes, schemes)]


def _match(name: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Any]:
    """Whether a scheme fits one matrix: {shape, scheme, reason}."""
    try:
        fitting = scheme.resolve({name: (shape[0], shape[1])})
    except UserError as error:
        return {"shape": list(shape), "scheme": None, "reason": str(error)}
    return {"shape": list(shape), "scheme": fitting.name, "reason": None}


def _ends(shapes: Shapes, schemes: Schemes) -> list[dict[str, Any]]:
    """Embedding and head."""
    family, head = family_of(shapes.config), schemes.head
    entries = []
    for name in (family.embedding, family.head):
        tied = name == family.head and shapes.tied_head
        shape = shapes.shape(f"{family.embedding if tied else name}.weight")
        if tied or head is None:
            why = "embedding and head stay in 16 bits: head=int8 or head=int4 quantizes them"
            reason = f"it is {family.embedding}" if tied else why
            entry = {"shape": list(shape), "scheme": None, "reason": reason}
        else:
            entry = _match(name, shape, head)
        entries.append({"name": name, "count": int(not tied), **entry})
    return entries


def served(shapes: Shapes, model: Checkpoint, schemes: Schemes | None, **rest: Any) -> Served:
    """What engines would be given. rest: export, tp, all_bits, eight_bit_floats of ``Served``"""
    family = family_of(shapes.config)
    size = {name: shapes.shape(f"{family.blocks}.0.{name}.weight") for name in family.linears}
    return Served(
        schemes=schemes,
        cache=model.cache,
        heads=model.heads,
        kv_heads=model.kv_heads,
        merged={shared.linears: size[shared.linears[0]][1] for shared in family.inputs},
        parts={name: outputs for name, (outputs, _) in size.items()},
        by_rows=family.writers,
        by_heads=(family.keys, family.values),
        **rest,
    )


def answers(engines: Mapping[str, Any]) -> list[str]:
    """A line an engine."""
    lines = []
    for name, found in engines.items():
        # What it would be like is of no use where it is not.
        told = found["notes"] if found["loads"] else found["reasons"]
        said = "; ".join(entry["text"] for entry in told)
        word = "yes" if found["loads"] else "no"
        lines.append(f"{name} {found['version']}: {word}{', ' if said else ''}{said}")
    return lines
