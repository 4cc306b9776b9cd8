"""Which shapes a recipe asks for: sizes it names, and friendly ones that meet its target."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from compress.errors import UserError
from compress.prune.knobs import Prune
from compress.prune.shape import KEYS, Anatomy, Shape

# The axis that takes up what the others leave, in this order: the finest steps first.
SLACK = ("mlp", "hidden", "layers", "heads", "kv_heads")
# No axis of a search goes below this share of its size; a shape may miss the budget by this share.
LEAST, NEAR = 0.25, 0.05


def wanted(found: Anatomy, knobs: Prune) -> list[Shape]:
    """The shapes that a recipe asks for: one, or the candidates of a search.

    Raises UserError for sizes that do not fit the model, and a target that no shape meets.
    """
    base = found.shape
    fixed = _fixed(found, knobs)
    if not knobs.targets:
        if fixed == base:
            raise UserError(f"prune cuts nothing of {base}: choose a smaller size")
        return [fixed]
    cost, limit = _cost(found, knobs)
    chosen = _search(
        found,
        fixed,
        tuple(knobs.axes),
        limit=limit,
        cost=cost,
        count=knobs.candidates,
        multiple=knobs.multiple,
        merge=knobs.merges,
    )
    if base in chosen:
        raise UserError(
            f"prune.{knobs.targets[0]} asks for no less than {base}: choose a smaller target"
        )
    return chosen


def _cost(found: Anatomy, knobs: Prune) -> tuple[Callable[[Shape], int], float]:
    base = found.shape
    if knobs.share is not None:
        return found.block_parameters, (1 - knobs.share) * found.block_parameters(base)
    if knobs.cache is not None:
        return found.cached_heads, (1 - knobs.cache) * found.cached_heads(base)
    if knobs.parameters is not None:
        return found.parameters, float(knobs.parameters)
    if knobs.megabytes is not None:
        return found.nbytes, 1e6 * knobs.megabytes
    assert knobs.speedup is not None
    return found.step_bytes, found.step_bytes(base) / knobs.speedup


def _fixed(found: Anatomy, knobs: Prune) -> Shape:
    """The old shape with the sizes that are wanted as they are. Raises UserError for one that does not
    fit."""
    base, asked = found.shape, knobs.sizes
    for axis, size in asked.items():
        if size > getattr(base, axis):
            raise UserError(
                f"prune.{axis}={size} is more than the model's {getattr(base, axis)} ({KEYS[axis]})"
            )
        step = knobs.multiple or _multiple_of(axis, getattr(base, axis))
        if axis in ("mlp", "hidden") and size % step and size != getattr(base, axis):
            raise UserError(
                f"prune.{axis}={size} is no multiple of {step}: choose one, or set prune.multiple"
            )
    kv_heads = asked.get("kv_heads", base.kv_heads)
    groups = base.kv_heads if knobs.merges else kv_heads
    if knobs.merges and base.kv_heads % kv_heads:
        raise UserError(
            f"prune.kv_heads={kv_heads} does not divide the model's {base.kv_heads}, which merging needs: "
            f"choose one of {', '.join(map(str, _sizes(found, 'kv_heads', None, merge=True)))}"
        )
    heads = asked.get("heads", base.per_group * groups)
    if heads % groups or heads > base.per_group * groups:
        raise UserError(
            f"prune.heads={heads} is not allowed with {groups} groups: choose a multiple of {groups}, at "
            f"most {base.per_group * groups}"
        )
    rest = {axis: size for axis, size in asked.items() if axis != "heads"}
    return _with_sizes(base, base, rest | {"heads": heads // groups}, knobs.merges)


def _multiple_of(axis: str, size: int) -> int:
    """What a friendly size is a multiple of: kernels tile by 128 or 256, which small models have no room
    for."""
    if axis not in ("mlp", "hidden"):
        return 1
    return 256 if size >= 8192 else 128 if size >= 2048 else 32


def _sizes(anatomy: Anatomy, axis: str, multiple: int | None, merge: bool) -> list[int]:
    """The sizes of an axis that a search tries, the largest first: query heads are counted in a group."""
    base: int = getattr(anatomy.shape, axis) if axis != "heads" else anatomy.shape.per_group
    step = multiple if multiple and axis in ("mlp", "hidden") else _multiple_of(axis, base)
    found = [base, *(n for n in range(base - 1, 0, -1) if n % step == 0 and n >= LEAST * base)]
    if axis == "kv_heads" and merge:
        found = [n for n in found if base % n == 0]
    return found


def _search(
    anatomy: Anatomy,
    fixed: Shape,
    axes: tuple[str, ...],
    *,
    limit: float,
    cost: Callable[[Shape], float],
    count: int,
    multiple: int | None = None,
    merge: bool = False,
) -> list[Shape]:
    """At most ``count`` shapes whose cost is at most ``limit``, and near it: the one that cuts most evenly,
    then those least like the ones before. Neighbours would differ by a step and lose the same.

    fixed: sizes of the axes that are not searched. Raises UserError if even the smallest shape costs more.
    """
    slack = next(axis for axis in SLACK if axis in axes)
    others = [axis for axis in axes if axis != slack]
    choices = {axis: _sizes(anatomy, axis, multiple, merge) for axis in axes}
    found: list[Shape] = []
    for combination in itertools.product(*(choices[axis] for axis in others)):
        chosen = dict(zip(others, combination, strict=True))
        fitting = (
            shape
            for size in choices[slack]
            if cost(shape := _with_sizes(anatomy.shape, fixed, chosen | {slack: size}, merge))
            <= limit
        )
        if (best := next(fitting, None)) is not None:
            found.append(best)
    if not found:
        raise UserError(
            f"no shape on the axes {', '.join(axes)} is small enough: ask for less, or name more prune.axes"
        )
    near = [shape for shape in found if cost(shape) >= (1 - NEAR) * limit]
    near = near or [max(found, key=cost)]
    return _spread(anatomy.shape, near)[:count]


def _with_sizes(base: Shape, fixed: Shape, chosen: dict[str, int], merge: bool) -> Shape:
    """fixed: sizes of the axes that are not chosen; chosen: sizes by axis, query heads counted in one of the
    groups that base has. Merging heads of keys and values leaves as many query heads as there were, dropping
    them takes their query heads along."""
    rest = {axis: size for axis, size in chosen.items() if axis != "heads"}
    kv_heads = rest.get("kv_heads", fixed.kv_heads)
    groups = base.kv_heads if merge else kv_heads
    fixed_groups = base.kv_heads if merge else fixed.kv_heads
    per_group = chosen.get("heads", fixed.heads // fixed_groups)
    return replace(fixed, **rest, heads=per_group * groups)


def _spread(base: Shape, shapes: list[Shape]) -> list[Shape]:
    """The most even shape first, then always the one farthest from all before it, by the shares that the axes
    lose."""
    lost = {
        shape: [1 - getattr(shape, axis) / getattr(base, axis) for axis in SLACK]
        for shape in shapes
    }
    left = sorted(lost, key=lambda shape: max(lost[shape]))
    found = [left.pop(0)]
    while left:

        def apart(shape: Shape) -> float:
            return min(
                max(abs(a - b) for a, b in zip(lost[shape], lost[other], strict=True))
                for other in found
            )

        found.append(max(left, key=apart))
        left.remove(found[-1])
    return found
