"""Every YAML under recipes/ composes into settings, whatever folder it is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.compose import RECIPES, compose_settings, expand_shorthand, options
from compress.config import parse
from compress.errors import UserError

FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_every_file_composes(file: Path) -> None:
    group = file.parent.relative_to(RECIPES).as_posix()
    overrides = ["recipe=rtn-int4"]
    if group == "recipe":
        overrides = [f"recipe={file.stem}"]
    elif group in ("transforms",):
        overrides.append(f"{group}=[{file.stem}]")
    elif group != ".":
        overrides.append(f"{group}={file.stem}")
    missing = {"model/folder.yaml": "model.source=x/y", "data/text.yaml": "data.source=x.txt"}
    if needed := missing.get(file.relative_to(RECIPES).as_posix()):
        overrides.append(needed)
    parse(compose_settings(overrides))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_no_file_can_name_code(file: Path) -> None:
    assert "_target_" not in file.read_text()
    yaml.safe_load(file.read_text())


def test_named_recipes_are_what_their_names_say() -> None:
    assert options("recipe") == ["awq-int3", "awq-int4", "rtn-int3", "rtn-int4"]
    for name in options("recipe"):
        run = parse(compose_settings([f"recipe={name}"]))
        assert run.scheme.bits == int(name[-1])
        assert not run.scheme.symmetric
        assert [type(t).__name__ for t in run.transforms] == (
            ["AwqScale", "AwqClip"] if name.startswith("awq") else []
        )
        assert run.needs_data == name.startswith("awq")


def test_overrides_reach_the_methods() -> None:
    run = parse(
        compose_settings(
            ["recipe=awq-int4", "scheme.group_size=32", "transforms.awq_scale.grid=5", "eval=none"]
        )
    )
    assert run.scheme.group_size == 32
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
