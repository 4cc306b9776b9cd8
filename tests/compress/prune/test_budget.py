"""Which shapes a recipe asks for, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.prune.budget import wanted
from compress.prune.knobs import Prune
from compress.prune.shape import Anatomy, Shape, anatomy
from compress.prune.stage import check

# SmolLM2-135M, and an 8B Llama.
SMALL = Shape(layers=30, heads=9, kv_heads=3, mlp=1536, hidden=576)
LARGE = Shape(layers=32, heads=32, kv_heads=8, mlp=14336, hidden=4096)


def like(tiny: ModelFolder, shape: Shape, head_dim: int) -> Anatomy:
    found = anatomy(tiny, family_of(tiny.config))
    return replace(found, shape=shape, head_dim=head_dim)


@pytest.fixture
def small(tiny: ModelFolder) -> Anatomy:
    return like(tiny, SMALL, 64)


@pytest.fixture
def large(tiny: ModelFolder) -> Anatomy:
    return like(tiny, LARGE, 128)


def test_a_fifth_of_the_blocks_of_the_demo_model(small: Anatomy) -> None:
    found = wanted(small, Prune(share=0.2, axes=["heads", "mlp"]))
    # Two, three or one query heads a group; as many neurons as then fit, in steps of 32.
    assert {(s.heads, s.mlp) for s in found} == {(9, 1120), (6, 1248), (3, 1376)}
    base = small.block_parameters(SMALL)
    for shape in found:
        assert replace(shape, heads=9, mlp=1536) == SMALL
        assert 0.2 <= 1 - small.block_parameters(shape) / base < 0.24
        wider = replace(shape, mlp=shape.mlp + 32)
        assert 1 - small.block_parameters(wider) / base < 0.2


def test_large_models_get_sizes_that_kernels_tile(large: Anatomy) -> None:
    for shape in wanted(large, Prune(share=0.3, axes=["heads", "mlp", "hidden"], candidates=20)):
        assert shape.mlp % 256 == 0
        assert shape.hidden % 128 == 0
        assert shape.heads % shape.kv_heads == 0


def test_the_most_even_shape_comes_first_then_those_unlike_it(large: Anatomy) -> None:
    knobs = Prune(share=0.3, axes=["heads", "mlp", "hidden"], candidates=3)
    first = wanted(large, knobs)
    every = wanted(large, replace(knobs, candidates=1000))
    assert len(first) == 3
    assert first == every[:3]

    def largest(shape: Shape) -> float:
        return max(
            1 - a / b for a, b in zip(vars(shape).values(), vars(LARGE).values(), strict=True)
        )

    assert largest(first[0]) == min(map(largest, every))
    assert len(set(every)) == len(every)
    # Not its neighbours, which are a step of 128 or 256 away.
    for shape, other in itertools.combinations(first, 2):
        apart = [
            abs(getattr(shape, axis) - getattr(other, axis)) / getattr(LARGE, axis)
            for axis in ("heads", "mlp", "hidden")
        ]
        assert max(apart) > 0.2


@pytest.mark.parametrize(
    ("target", "measure", "limit"),
    [
        ({"parameters": 6_000_000_000}, "parameters", 6e9),
        ({"megabytes": 12_000}, "nbytes", 12e9),
        ({"speedup": 1.5}, "step_bytes", None),
    ],
)
def test_other_targets(
    large: Anatomy, target: dict[str, Any], measure: str, limit: float | None
) -> None:
    cost: Callable[[Shape], int] = getattr(large, measure)
    limit = cost(LARGE) / 1.5 if limit is None else limit
    for shape in wanted(large, Prune(**target, axes=["layers", "mlp"])):
        assert 0.95 * limit <= cost(shape) <= limit


def test_a_smaller_cache(small: Anatomy, large: Anatomy) -> None:
    knobs = Prune(cache=0.5, axes=["kv_heads"], kv="principal")
    assert wanted(large, knobs) == [replace(LARGE, kv_heads=4)]
    assert wanted(small, knobs) == [replace(SMALL, kv_heads=1)]
    dropped = replace(knobs, kv="drop")
    assert wanted(large, dropped) == [replace(LARGE, kv_heads=4, heads=16)]


def test_sizes_by_name_and_a_search_on_the_rest(large: Anatomy) -> None:
    assert wanted(large, Prune(layers=24, heads=16)) == [replace(LARGE, layers=24, heads=16)]
    assert wanted(large, Prune(kv_heads=4)) == [replace(LARGE, kv_heads=4, heads=16)]
    assert wanted(large, Prune(kv_heads=4, kv="mean")) == [replace(LARGE, kv_heads=4)]
    # Merged heads of keys and values by name leave the search all query heads.
    for axes in (["heads", "mlp"], ["mlp"]):
        knobs = Prune(share=0.2, kv="principal", kv_heads=4, axes=axes, candidates=50)
        shapes = wanted(large, knobs)
        assert {shape.kv_heads for shape in shapes} == {4}
        assert max(shape.heads for shape in shapes) == 32
    for shape in wanted(large, Prune(share=0.4, layers=24, axes=["mlp"])):
        assert shape.layers == 24
        assert shape.mlp < 14336


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({}, "prune cuts nothing: set a target and prune.axes, or one of layers"),
        ({"share": 0.2}, "a search needs prune.axes and a target"),
        ({"axes": ["mlp"]}, "a search needs prune.axes and a target"),
        ({"share": 0.2, "speedup": 2.0, "axes": ["mlp"]}, "two targets: choose one"),
        ({"share": 0.2, "axes": ["width"]}, "prune.axes=width is not known: known are layers"),
        ({"share": 0.2, "axes": ["mlp"], "mlp": 64}, "prune.mlp is set and among prune.axes too"),
        ({"share": 1.2, "axes": ["mlp"]}, "prune.share=1.2 is not allowed"),
        ({"speedup": 0.9, "axes": ["mlp"]}, "prune.speedup=0.9 is not allowed"),
        ({"mlp": 0}, "prune.mlp=0 is not allowed: choose more than 0"),
        ({"mlp": 64, "damping": 0.0}, "prune.damping=0.0 is not allowed"),
        ({"mlp": 64, "importance": "luck"}, "prune.importance=luck is not known: known are error"),
        ({"mlp": 64, "depth": "luck"}, "prune.depth=luck is not known"),
        ({"mlp": 64, "kv": "luck"}, "prune.kv=luck is not known"),
        ({"mlp": 64, "refit": "luck"}, "prune.refit=luck is not known"),
    ],
)
def test_knobs_that_do_not_fit_together(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Prune(**knobs)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"mlp": 256}, "prune cuts nothing of layers 3, heads 4"),
        ({"mlp": 512}, r"prune.mlp=512 is more than the model's 256 \(intermediate_size\)"),
        ({"mlp": 100}, "prune.mlp=100 is no multiple of 32: choose one, or set prune.multiple"),
        (
            {"heads": 3},
            "prune.heads=3 is not allowed with 2 groups: choose a multiple of 2, at most 4",
        ),
        ({"kv_heads": 3}, "prune.kv_heads=3 is more than the model's 2"),
        ({"parameters": 1000, "axes": ["mlp"]}, "no shape on the axes mlp is small enough"),
        ({"parameters": 10**9, "axes": ["mlp"]}, "prune.parameters asks for no less than layers 3"),
        (
            {"share": 0.3, "axes": ["heads", "mlp"], "multiple": 8},
            "raise data.sequences from 6, or set prune.cand",
        ),
    ],
)
def test_what_does_not_fit_the_model(
    tiny: ModelFolder, knobs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check(tiny, Prune(**knobs), sequences=6)


def test_quantized_models_and_three_heads_are_refused(
    make_model: Callable[..., ModelFolder], tmp_path: Any
) -> None:
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(
        UserError, match="does not divide the model's 4, which merging needs: choose one of"
    ):
        check(model, Prune(kv_heads=3, kv="mean"), sequences=6)
    model.config["quantization_config"] = {}
    try:
        with pytest.raises(UserError, match="is quantized already: prune its 16-bit original"):
            check(model, Prune(mlp=64), sequences=6)
    finally:
        del model.config["quantization_config"]


def test_a_multiple_of_ones_own(tiny: ModelFolder) -> None:
    found = anatomy(tiny, family_of(tiny.config))
    assert wanted(found, Prune(mlp=100, multiple=4)) == [replace(found.shape, mlp=100)]
    assert (
        torch.tensor([s.mlp for s in wanted(found, Prune(share=0.2, axes=["mlp"], multiple=8))])
        .remainder(8)
        .eq(0)
        .all()
    )
