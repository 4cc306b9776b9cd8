"""Every YAML under recipes/ composes into settings, whatever folder it is in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from compress.compose import RECIPES, compose_settings, expand_shorthand, options
from compress.config import parse
from compress.distill.knobs import Distill
from compress.errors import UserError
from compress.prune.knobs import Prune

FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_every_file_composes(file: Path) -> None:
    group = file.parent.relative_to(RECIPES).as_posix()
    overrides = ["recipe=rtn-int4"]
    if group == "repair":
        overrides.append("stages=[quantize,repair]")
    if group == "prune":
        overrides += ["stages=[prune]", "export=compressed-tensors"]
    if group == "distill":
        overrides.append("stages=[quantize,distill]")
    if group == "kv_cache":
        overrides.append("stages=[quantize,kv_cache]")
    if group == "recipe":
        overrides = [f"recipe={file.stem}"]
    elif group in ("transforms",):
        overrides.append(f"{group}=[{file.stem}]")
    elif group != ".":
        overrides.append(f"{group}={file.stem}")
    missing = {
        "model/folder.yaml": "model.source=x/y",
        "data/text.yaml": "data.source=x.txt",
        "head/int8.yaml": "scheme.symmetric=true",
        "scheme/llm-int8.yaml": "export=bitsandbytes",
        "prune/sizes.yaml": "prune.mlp=64",
        "export/bitsandbytes.yaml": "scheme=llm-int8",
    }
    if needed := missing.get(file.relative_to(RECIPES).as_posix()):
        overrides.append(needed)
    parse(compose_settings(overrides))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_no_file_can_name_code(file: Path) -> None:
    assert "_target_" not in file.read_text()
    yaml.safe_load(file.read_text())


# What a recipe's name stands for: stages, transforms and roundings; the number at its end are its bits.
NAMES = {
    **dict.fromkeys(["rtn-int4", "rtn-int3"], (["quantize"], [], ["Nearest"])),
    **dict.fromkeys(["awq-int4", "awq-int3"], (["quantize"], ["AwqScale", "AwqClip"], ["Nearest"])),
    **dict.fromkeys(["gptq-int4", "gptq-int3"], (["quantize"], ["Opt"], ["Gptq"])),
    "gptaq-int4": (["quantize"], ["AwqScale", "Opt"], ["Gptaq"]),
    **dict.fromkeys(["learned-int4", "learned-int3"], (["quantize"], ["Opt"], ["Learned"])),
    **dict.fromkeys(
        ["best-int4", "best-int3"], (["quantize", "repair"], ["AwqScale", "Opt"], ["Learned"])
    ),
    "best-int2": (["quantize", "repair"], ["Opt"], ["Learned"]),
}
OTHERS = ["mixed-3.5", "rotate-int4-channel"]


@pytest.mark.parametrize("name", NAMES)
def test_named_recipes_are_what_their_names_say(name: str) -> None:
    stages, transforms, roundings = NAMES[name]
    run = parse(compose_settings([f"recipe={name}"]))
    assert run.schemes.linears.bits == int(name[-1])
    assert not run.schemes.linears.symmetric
    assert run.schemes.exceptions == {}
    assert run.schemes.head is None
    assert run.settings.stages == stages
    assert run.search is None
    assert (run.repair is not None) == ("repair" in stages)
    assert [type(t).__name__ for t in run.transforms] == transforms
    assert [type(r).__name__ for r in run.roundings] == roundings
    assert run.needs_data == (not name.startswith("rtn"))


# What the 8-bit and floating-point recipes stand for: their scheme, transforms, format, and whether they
# look at data.
EIGHT = {
    "w8a16-int8": ("int8-channel-sym", [], "compressed-tensors", False),
    "w8a8-int8": ("int8-channel-sym+int8-token", ["Smooth"], "compressed-tensors", True),
    "llm-int8": ("int8-channel-sym+int8-token-dynamic-outliers", ["Smooth"], "bitsandbytes", True),
    "llm-int8-static": ("int8-channel-sym+int8-token-static-outliers", [], "bitsandbytes", True),
    "fp8": ("fp8-channel+fp8-token", [], "compressed-tensors", False),
    "fp8-static": ("fp8-tensor+fp8-tensor", [], "compressed-tensors", True),
    "fp8-block": ("fp8-block+fp8-group", [], "compressed-tensors", False),
    "nvfp4": ("nvfp4", ["AwqScale"], "compressed-tensors", True),
    "mxfp4": ("mxfp4", ["AwqScale"], "compressed-tensors", True),
}


@pytest.mark.parametrize("name", EIGHT)
def test_recipes_of_eight_bits_and_floats(name: str) -> None:
    scheme, transforms, export, needs_data = EIGHT[name]
    run = parse(compose_settings([f"recipe={name}"]))
    assert run.schemes.name == scheme
    assert [type(t).__name__ for t in run.transforms] == transforms
    assert [type(r).__name__ for r in run.roundings] == ["Nearest"]
    assert run.first_format == export
    assert run.needs_data == needs_data
    inputs = run.schemes.linears.inputs
    if inputs is not None:
        assert (inputs.threshold, inputs.ratio) == (6.0, 3.0)


# The recipes of the cache: stages, and what keys and values are kept in.
CACHES = {
    "kv-fp8": (["kv_cache"], "fp8-tensor", True),
    "kv-int8": (["kv_cache"], "int8-token", False),
    "kv-int4": (["kv_cache"], "int4-channel64-rotated+int4-token-rotated", False),
    "kv-int2": (["kv_cache"], "int2-channel32-rotated+int2-token-rotated", False),
    "awq-int4-kv-fp8": (["quantize", "kv_cache"], "fp8-tensor", True),
    "awq-int4-kv-int4": (
        ["quantize", "kv_cache"],
        "int4-channel64-rotated+int4-token-rotated",
        True,
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_recipes_of_the_cache(name: str) -> None:
    stages, cache, needs_data = CACHES[name]
    run = parse(compose_settings([f"recipe={name}"]))
    assert run.settings.stages == stages
    assert run.cache is not None
    assert run.cache.name == cache
    assert run.needs_data == needs_data
    assert run.settings.context is not None
    assert run.settings.eval is not None
    if "quantize" in stages:
        awq = parse(compose_settings(["recipe=awq-int4"]))
        assert (run.schemes, run.transforms, run.roundings) == (
            awq.schemes,
            awq.transforms,
            awq.roundings,
        )


def test_mixed_and_rotated_recipes() -> None:
    mixed = parse(compose_settings(["recipe=mixed-3.5"]))
    assert mixed.search is not None
    assert mixed.search.average_bits == 3.5
    rotated = parse(compose_settings(["recipe=rotate-int4-channel"]))
    assert rotated.settings.stages == ["rotate", "quantize"]
    assert rotated.schemes.linears.name == "int4-channel-asym"


# What pruning recipes cut, and what comes after it.
PRUNING = {
    "prune-depth": (["prune"], {"share": 0.2, "axes": ["layers"], "depth": "contiguous"}),
    "prune-width": (["prune"], {"share": 0.2, "axes": ["heads", "mlp"]}),
    "prune-heads": (["prune"], {"share": 0.05, "axes": ["heads"]}),
    "prune-kv-heads": (["prune"], {"cache": 0.5, "axes": ["kv_heads"], "kv": "principal"}),
    "prune-width-distill": (["prune", "distill"], {"share": 0.2, "axes": ["heads", "mlp"]}),
    "prune-depth-distill": (["prune", "distill"], {"share": 0.2, "axes": ["layers"]}),
    "minitron-awq": (["prune", "distill", "quantize"], {"share": 0.2, "axes": ["heads", "mlp"]}),
}


@pytest.mark.parametrize("name", PRUNING)
def test_recipes_of_pruning(name: str) -> None:
    stages, knobs = PRUNING[name]
    run = parse(compose_settings([f"recipe={name}"]))
    assert run.settings.stages == stages
    assert run.prune is not None
    assert {key: getattr(run.prune, key) for key in knobs} == knobs
    assert run.settings.data.sequences == 1024
    assert run.needs_data
    assert (run.distill is not None) == ("distill" in stages)
    if run.distill is not None:
        assert (run.distill.kl, run.distill.ce, run.distill.temperature) == (1.0, 0.0, 1.0)
        assert run.distill.minutes == 20
    if "quantize" in stages:
        awq = parse(compose_settings(["recipe=awq-int4"]))
        assert (run.schemes, run.transforms, run.roundings) == (
            awq.schemes,
            awq.transforms,
            awq.roundings,
        )


def test_the_keys_of_pruning_and_distillation_are_all_in_their_files() -> None:
    """So that each can be set, and is shown by --cfg job; with the values of the dataclasses."""
    for file, schema in (("prune/sizes", Prune(mlp=1)), ("distill/kl", Distill(minutes=20))):
        listed = yaml.safe_load((RECIPES / f"{file}.yaml").read_text())
        assert listed == {**asdict(schema), **({"mlp": None} if "prune" in file else {})}


def test_tokens_and_steps_come_before_minutes() -> None:
    words = ["recipe=prune-width-distill", "distill.tokens=1000"]
    assert parse(compose_settings(words)).distill.budget == "tokens"  # type: ignore[union-attr]


def test_no_recipe_is_left_out() -> None:
    known = set(NAMES) | set(EIGHT) | set(CACHES) | set(PRUNING)
    assert set(options("recipe")) == known | set(OTHERS)


BASE = ["recipe=rtn-int4", "eval=none", "speed=none"]


def test_roundings_follow_each_other_in_order() -> None:
    run = parse(compose_settings([*BASE, "rounding=[gptq,learned]", "rounding.learned.iters=5"]))
    assert [type(r).__name__ for r in run.roundings] == ["Gptq", "Learned"]
    assert run.roundings[1].iters == 5  # type: ignore[attr-defined]
    assert run.needs_data
    alone = parse(compose_settings([*BASE, "rounding=learned"]))
    assert [type(r).__name__ for r in alone.roundings] == ["Learned"]


def test_repair_is_a_stage_of_its_own() -> None:
    run = parse(compose_settings([*BASE, "stages=[quantize,repair]", "repair=kl"]))
    assert type(run.repair).__name__ == "Kl"
    assert [type(r).__name__ for r in run.roundings] == ["Nearest"]
    assert run.needs_data, "nearest looks at no data, repair does"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rounding=[learned,gptq]"], r"rounding.gptq starts anew.*only learned may follow"),
        (["rounding=[gptq,nearest]"], r"rounding.nearest starts anew"),
        (["rounding=[gptq,gptaq]"], r"rounding.gptaq starts anew"),
        (["rounding=[]"], r"rounding must name a method of: nearest, gptq, gptaq, learned"),
        (["rounding=gptq", "rounding.gptq.damping=2"], r"rounding.gptq.damping=2.0 is not allowed"),
        (["stages=[]"], r"stages=\[\] is not allowed: choose from prune"),
        (["stages=[repair]", "repair=kl"], r"stages=\['repair'\] is not allowed"),
        (
            ["stages=[repair,quantize]", "repair=kl"],
            r"is not allowed: choose from prune",
        ),
        (["stages=[quantize,rotate]"], r"is not allowed: choose from prune"),
        (["stages=[quantize,quantize]"], r"is not allowed: choose from prune"),
        (["repair=kl"], r"repair=kl needs repair among the stages"),
        (
            ["stages=[quantize,repair]"],
            r"the stage repair needs one method of: kl, as in repair=kl",
        ),
        (["stages=[quantize,repair]", "repair=kl", "repair.kl.epochs=0"], r"repair.kl.epochs=0"),
        (["prune=width"], r"the stage prune and its settings go together"),
        (["stages=[prune]"], r"the stage prune and its settings go together"),
        (["distill=kl"], r"the stage distill and its settings go together"),
        (["stages=[distill]", "distill=kl"], r"is not allowed: choose from prune"),
        (
            ["stages=[quantize,distill]", "distill=kl", "distill.tokens=1", "distill.steps=1"],
            r"distill.tokens and distill.steps are two budgets: choose one",
        ),
        (
            ["stages=[quantize,distill]", "distill=kl", "distill.minutes=0"],
            r"distill.minutes=0.0 is not allowed: choose more than 0",
        ),
        (["scheme.bits=1"], r"scheme.bits=1 is not allowed"),
        (["stages=[repair,kv_cache]", "repair=kl", "kv_cache=int4"], r"is not allowed: choose"),
        (
            ["context=standard", "context.buckets=3"],
            r"context.buckets=3 is not allowed: choose a div",
        ),
        (
            ["context=standard", "context.facts=1"],
            r"context.facts=1 is not allowed: choose 2 to 17",
        ),
        (["context=standard", "context.lengths=[64]"], r"context.lengths=\[64\] is not allowed"),
        (["context=standard", "context.dtype=int8"], r"context.dtype=int8 is not known"),
        (["context=standard", "context.windows=0"], r"context.windows=0 is not allowed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_does_not_fit_together_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(compose_settings([*BASE, *words]))


def test_overrides_reach_the_methods() -> None:
    run = parse(
        compose_settings(
            ["recipe=awq-int4", "scheme.group_size=32", "transforms.awq_scale.grid=5", "eval=none"]
        )
    )
    assert run.schemes.linears.group_size == 32
    assert run.transforms[0].grid == 5  # type: ignore[attr-defined]
    assert run.settings.eval is None


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["model=smollm2"], ["model=smollm2"]),
        (["model=owner/name"], ["model=folder", "model.source=owner/name"]),
        (["model=./a,./b"], ["model=folder", "model.source=./a,./b"]),
        (["data=a.jsonl"], ["data=text", "data.source=a.jsonl"]),
        (["model=mispelt"], ["model=mispelt"]),
        (["recipe=a/b"], ["recipe=a/b"]),
    ],
)
def test_paths_in_place_of_names(words: list[str], expanded: list[str]) -> None:
    assert expand_shorthand(words) == expanded


def test_a_sweep_over_names_and_paths_is_refused() -> None:
    with pytest.raises(UserError, match="mixes names and paths"):
        expand_shorthand(["model=smollm2,./a"])
