"""A measuring that is killed goes on from its finished parts, and finds the same to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.texts import load_texts
from calibration.tokens import TokenBlocks, evaluation_windows
from compress import saved
from compress.config import ContextConfig, EvalConfig
from compress.measure.accuracy import measure_accuracy, measure_blocks
from compress.measure.context import measure_context
from compress.measure.parts import Parts
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer
from compress.quantize.scheme import Scheme
from compress.saved import Saved
from eval.parts import Once
from eval.speed import Load, Point, measure_speed
from tests.exported import exported

CPU = torch.device("cpu")
EVAL = EvalConfig(
    tokens=512,
    window=128,
    block_tokens=256,
    prompts=2,
    prompt_tokens=32,
    generated=8,
    tasks=["packaged_openbookqa"],
    limit=6,
    batch_size=2,
)


class Killed(Exception):
    pass


class Fragile:
    """Parts that are killed after so many new ones."""

    def __init__(self, once: Once, after: int):
        self.once, self.left, self.made = once, after, list[str]()

    def __call__(self, name: str, make: Callable[[], Any], /) -> Any:
        def counted() -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.made.append(name)
            return make()

        return self.once(name, counted)


@pytest.fixture(autouse=True)
def every_part_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(saved, "TIMES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def parts(folder: Path, asked: Any = None, **fingerprint: Any) -> Once:
    return Parts(Saved(folder, fingerprint)).of("accuracy", asked)


def in_pieces(folder: Path, measure: Callable[[Once], Any], piece: int) -> tuple[Any, list[str]]:
    """What a measuring finds that is killed after every ``piece`` parts, and all parts in the order they were
    made."""
    made: list[str] = []
    while True:
        once = Fragile(parts(folder), piece)
        try:
            return measure(once), made + once.made
        except Killed:
            made += once.made


@pytest.fixture(scope="module")
def candidate(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return exported(tiny, Scheme(4, group_size=64), tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def windows(tiny: ModelFolder, text_file: Path) -> dict[str, TokenBlocks]:
    texts = load_texts(str(text_file), "text", "train")
    return {"prose": evaluation_windows(texts, open_tokenizer(tiny), tokens=512, window=128)}


def test_accuracy(
    tiny: ModelFolder,
    candidate: ModelFolder,
    windows: dict[str, TokenBlocks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(once: Once) -> Any:
        return measure_accuracy(candidate, tiny, windows, EVAL, open_tokenizer(tiny), CPU, once)

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    whole = Fragile(parts(tmp_path / "whole"), -1)
    expected = measure(whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, made = in_pieces(tmp_path / "killed", measure, 3)
    # No part was made twice; noise, four windows, agreement; batches of both models' answers. Parts that
    # enclose those of a model begin again with each start.
    outer = ("candidate", "base")
    assert [n for n in made if n not in outer] == [n for n in whole.made if n not in outer]
    assert len([n for n in made if "window" in n]) == 4
    assert len([n for n in made if "likelihoods" in n]) >= 2 * 3
    assert json.dumps(found.rows) == json.dumps(expected.rows)
    assert found.samples == expected.samples
    assert found.tokens.keys() == expected.tokens.keys()
    assert all(torch.equal(t, expected.tokens[name]) for name, t in found.tokens.items())


def test_blocks_and_length(
    tiny: ModelFolder,
    candidate: ModelFolder,
    windows: dict[str, TokenBlocks],
    text_file: Path,
    tmp_path: Path,
) -> None:
    def blocks(once: Once) -> Any:
        return measure_blocks(candidate, tiny, windows, EVAL, CPU, once)

    config = ContextConfig(
        text=str(text_file), tokens=128, windows=2, prompts=2, prompt_tokens=32, generated=8
    )

    def length(once: Once) -> Any:
        return measure_context(candidate, tiny, config, open_tokenizer(tiny), CPU, once)

    for name, measure, least in (("blocks", blocks, 6), ("length", length, 3)):
        whole = Fragile(parts(tmp_path / f"{name} whole"), -1)
        expected = measure(whole)
        # The part of a text encloses those of its blocks: it begins again with each start.
        found, made = in_pieces(tmp_path / name, measure, 2)
        assert json.dumps(found) == json.dumps(expected)
        inner = [part for part in made if "window" in part]
        assert inner == [part for part in whole.made if "window" in part]
        assert len(inner) >= least - 1
    # The same question of another text.
    changed = text_file.with_name("changed.txt")
    changed.write_text(text_file.read_text() + "More of it.")
    for known in (False, True):
        config = replace(config, text=str(changed))
        once = Fragile(parts(tmp_path / "length"), -1)
        length(once)
        assert (once.made == []) == known


def test_a_point_of_speed_that_is_known_opens_nothing() -> None:
    asked = []

    def once(name: str, make: Callable[[], Any], /) -> Any:
        asked.append(name)
        return {"a": {"load": {"load_s": len(asked)}, "point": {"tokens_per_s": 7.0}}}

    points = (Point(1, 4, 2), Point(2, 4, 2))
    load = Load(points, warmup=0, repeats=1, seed=0, threads=None)
    found = measure_speed({"a": lambda: pytest.fail("opened")}, load, once)
    # What is told of loading is of the first point's process.
    assert found == {"a": {"load_s": 1, "points": [{"tokens_per_s": 7.0}] * 2}}
    assert asked == ["a/batch 1, 4/2", "a/batch 2, 4/2"]


def test_parts_of_other_work_are_not_known(tmp_path: Path) -> None:
    value = {"a": [1.5, None, {"t": torch.arange(3)}], "n": float("nan")}
    first = parts(tmp_path, {"tokens": 1}, model="a")("x", lambda: value)
    assert first is value

    def kept(asked: Any, **fingerprint: Any) -> bool:
        made = []
        found = parts(tmp_path, asked, **fingerprint)("x", lambda: made.append(1) or value)
        assert str(found) == str(value)
        return not made

    assert kept({"tokens": 1}, model="a")
    assert not kept({"tokens": 2}, model="a")
    # The other question did not push out the first one's parts.
    assert kept({"tokens": 1}, model="a")
    assert not kept({"tokens": 1}, model="b")
    assert not kept({"tokens": 1}, model="a")
