"""The rows of a plan as JSON: sizes, points, which linears a scheme takes, what engines would be given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.config import Run
from compress.engines import DENSE
from compress.errors import UserError
from compress.export import gguf
from compress.export.formats import Weights
from compress.kv_cache.folder import scheme_of
from compress.kv_cache.scheme import CacheScheme
from compress.model.families import Family, family_of, heads_of
from compress.model.folder import ModelFolder, Shapes
from compress.model.shapes import ShapeFolder
from compress.plan.checkpoint import Checkpoint, linear_scheme
from compress.plan.hardware import Hardware
from compress.plan.loadable import Served, loadable
from compress.plan.roofline import decode, intensity, largest_batch, memory, prefill, prompt_bytes
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import linear_names, settle


def row(
    model: Checkpoint, hardware: Hardware, batches: Sequence[int], context: int, tp: int
) -> dict[str, Any]:
    """What one checkpoint would give; bytes of memory are those of each device."""
    return {
        "parameters": model.parameters,
        "bytes": round(model.files),
        "weights": round(model.weights),
        "read": round(model.read(1)),
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


def served(
    shapes: Shapes, schemes: Schemes | None, cache: CacheScheme | None, **rest: Any
) -> Served:
    """What engines would be given. shapes: of the 16-bit model; rest: export, tp, all_bits, capability of
    ``Served``"""
    family = family_of(shapes.config)
    heads, kv_heads = heads_of(shapes.config)[:2] if family.attention_output else (0, 0)
    size = _sizes(shapes, family)
    # Experts are all alike.
    inputs = [shared for shared in family.inputs_in(size) if shared.linears[0] in size]
    return Served(
        schemes=schemes,
        cache=cache,
        heads=heads,
        kv_heads=kv_heads,
        merged={shared.linears: size[shared.linears[0]][1] for shared in inputs},
        parts={name: outputs for name, (outputs, _) in size.items()},
        by_rows=tuple(writer.format(0) for writer in family.writers if writer.format(0) in size),
        by_heads=(family.keys, family.values),
        model_type=str(shapes.config["model_type"]),
        **rest,
    )


def _sizes(shapes: Shapes, family: Family) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of a block by their names there, of all that some block has; of experts the
    first."""
    found: dict[str, tuple[int, int]] = {}
    for name in linear_names(shapes, family):
        local = name.removeprefix(f"{family.blocks}.").partition(".")[2]
        if local not in found and not re.search(r"\.experts\.[1-9]", local):
            rows, columns = shapes.shape(f"{name}.weight")
            found[local] = (rows, columns)
    return found


def engines_of(
    run: Run, shapes: Shapes, capability: float | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """format -> ``loadable`` of what a run whose last stage has these shapes would write in it. Raises
    UserError if its schemes do not fit them."""
    settings = run.settings
    schemes = None
    if "quantize" in settings.stages:
        schemes = settle(shapes, family_of(shapes.config), run.schemes)
    return loadable_formats(
        settings.export,
        shapes,
        schemes,
        run.cache,
        tp=settings.serve.tp,
        capability=capability,
        all_bits=() if run.search is None else tuple(run.search.bits),
    )


def loadable_formats(
    formats: Iterable[str],
    shapes: Shapes,
    schemes: Schemes | None,
    cache: CacheScheme | None,
    **rest: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """format -> ``loadable`` of a model in it. Words as of ``served``."""
    return {form: loadable(served(shapes, schemes, cache, export=form, **rest)) for form in formats}


def loadable_folder(
    folder: Shapes, tp: int = 1, capability: float | None = None
) -> dict[str, dict[str, Any]]:
    """``loadable`` of a folder as it is."""
    return loadable(served_folder(folder, tp, capability))


def served_folder(folder: Shapes, tp: int = 1, capability: float | None = None) -> Served:
    """What engines would be given of a folder, from its headers: plain, record or exported; or of a config
    alone.

    tp: devices that share it; capability: of CUDA, 0: none, None: not known
    """
    form, schemes = DENSE, None
    if isinstance(folder, ModelFolder):
        weights = Weights(folder)
        form = gguf.NAME if gguf.holds(folder) else weights.format
        form = DENSE if form == "plain" else form
        schemes = schemes_on_disk(folder)
    sixteen = ShapeFolder(str(folder.path), folder.config)
    return served(sixteen, schemes, scheme_of(folder), export=form, tp=tp, capability=capability)


def schemes_on_disk(folder: ModelFolder) -> Schemes | None:
    """The schemes of a quantized folder: that of its first linear, those that differ, the embedding's."""
    weights, family = Weights(folder), family_of(folder.config)
    found = {name: linear_scheme(folder, weights.format, name) for name in weights.linears}
    head = found.pop(family.embedding, found.pop(family.head, None))
    if not found:
        return None
    first = next(iter(found.values()))
    return Schemes(first, {name: own for name, own in found.items() if own != first}, head)


def answers(engines: Mapping[str, Any]) -> list[str]:
    """A line an engine."""
    lines = []
    for name, found in engines.items():
        # What it would be like is of no use where it is not.
        told = found["notes"] if found["loads"] else found["reasons"]
        said = "; ".join(entry["text"] for entry in told)
        word = f"yes ({found['proved'] or 'by its source'})" if found["loads"] else "no, it"
        between = "" if not said else ", " if found["loads"] else " "
        lines.append(f"{name} {found['version']}: {word}{between}{said}")
    return lines
