"""Measuring accuracy of folders: what is kept by token, noise of 16 bits, and whether damage is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.texts import load_texts
from calibration.tokens import TokenBlocks, evaluation_windows
from compress.config import EvalConfig
from compress.measure.accuracy import Accuracy, measure_accuracy
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer
from compress.quantize.scheme import Scheme
from compress.report.table import TOKENS
from compress.report.verdict import verdict
from eval.paired import Difference, difference
from tests.exported import exported

CPU = torch.device("cpu")
CONFIG = EvalConfig(tokens=2048, window=128, prompts=3, prompt_tokens=32, generated=70)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def windows(tiny: ModelFolder, text_file: Path) -> dict[str, TokenBlocks]:
    texts = load_texts(str(text_file), "text", "train")
    return {"prose": evaluation_windows(texts, open_tokenizer(tiny), tokens=2048, window=128)}


@pytest.fixture(scope="module")
def measure(
    tiny: ModelFolder, windows: dict[str, TokenBlocks]
) -> Callable[[ModelFolder], Accuracy]:
    return lambda folder: measure_accuracy(folder, tiny, windows, CONFIG, open_tokenizer(tiny), CPU)


@pytest.fixture(scope="module")
def candidate(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return exported(tiny, Scheme(8, group_size=64), tmp_path_factory.mktemp("int8"))


def _columns(found: Accuracy) -> dict[str, Any]:
    return {column: list(found.tokens[f"prose.{column}"]) for column in ("nll", "kl")}


def _compare(first: Accuracy, second: Accuracy) -> Difference:
    return difference(_columns(first), _columns(second))


def _damaged(folder: ModelFolder, path: Path) -> ModelFolder:
    """One linear of one layer with scales a tenth too large."""
    shutil.copytree(folder.path, path)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, file, metadata={"format": "pt"})
    return ModelFolder(path)


def test_two_runs_are_equal_and_a_damaged_layer_is_different(
    tiny: ModelFolder,
    candidate: ModelFolder,
    measure: Callable[[ModelFolder], Accuracy],
    tmp_path: Path,
) -> None:
    first, second = measure(candidate), measure(candidate)
    assert _compare(first, second).equal
    hurt = measure(_damaged(candidate, tmp_path / "hurt"))
    found = _compare(first, hurt)
    assert not found.equal
    assert found.kl.low > 0


def test_what_is_kept(
    tiny: ModelFolder,
    candidate: ModelFolder,
    measure: Callable[[ModelFolder], Accuracy],
    tmp_path: Path,
) -> None:
    found = measure(candidate)
    row, base = found.rows["candidate"], found.rows["base"]
    text = row["texts"]["prose"]
    # The figures by token are those that the row sums up.
    found.write(tmp_path)
    kept = load_file(tmp_path / TOKENS)
    assert set(kept) == {f"prose.{c}" for c in ("nll", "base_nll", "kl", "top1")}
    assert kept["prose.kl"].shape == (16, 127)
    assert text["kl"] == pytest.approx(float(kept["prose.kl"].mean()), rel=1e-5)
    assert text["paired"]["nll"]["mean"] == pytest.approx(
        float((kept["prose.nll"] - kept["prose.base_nll"]).mean()), abs=1e-7
    )
    assert text["top1"] == pytest.approx(float(kept["prose.top1"].mean()))
    assert text["paired"]["kl"]["low"] < text["kl"] < text["paired"]["kl"]["high"]
    assert text["kl_p99"] <= text["kl_p999"] <= float(kept["prose.kl"].max())
    noise = base["texts"]["prose"]["noise"]
    assert noise["dtype"] == "bfloat16"
    # Eight bits in groups cost hardly more than the rounding of 16-bit arithmetic, and that is not nothing.
    assert 0 < noise["kl"] < 10 * text["kl"]
    agreement = row["agreement"]
    assert (agreement["prompts"], agreement["prompt_tokens"], agreement["generated"]) == (3, 32, 70)
    assert len(agreement["lengths"]) == 3
    json.dumps(found.rows, allow_nan=False)
    assert verdict(row, base, {"kl": 10.0})["gate"]["passed"]


def test_noise_is_kept_in_the_cache(
    tiny: ModelFolder,
    candidate: ModelFolder,
    windows: dict[str, TokenBlocks],
    measure: Callable[[ModelFolder], Accuracy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first = measure(candidate).rows["base"]["texts"]["prose"]["noise"]
    assert len(list((tmp_path / "cache" / "compress" / "noise").iterdir())) == 1
    # Another pass would be different in nothing but time: only a pass that is not made may fail.
    with monkeypatch.context() as patch:
        patch.setattr("compress.measure.accuracy._Noise.reader", property(lambda _: 1 / 0))
        assert measure(candidate).rows["base"]["texts"]["prose"]["noise"] == first
    # The same tokens in windows of half the length have the same hash, and other figures.
    halves = replace(windows["prose"], tokens=windows["prose"].tokens.view(-1, 64))
    config = replace(CONFIG, window=64, generated=0)
    found = measure_accuracy(candidate, tiny, {"prose": halves}, config, open_tokenizer(tiny), CPU)
    assert found.rows["base"]["texts"]["prose"]["noise"]["kl"] != first["kl"]


def test_in_its_own_16_bits_there_is_no_noise_to_tell(
    tiny: ModelFolder, candidate: ModelFolder, windows: dict[str, TokenBlocks]
) -> None:
    config = EvalConfig(tokens=2048, window=128, dtype="bfloat16")
    found = measure_accuracy(candidate, tiny, windows, config, open_tokenizer(tiny), CPU)
    assert found.rows["base"]["texts"]["prose"]["noise"] is None
    assert "agreement" not in found.rows["candidate"]


def test_the_original_itself_has_no_loss(
    tiny: ModelFolder, measure: Callable[[ModelFolder], Accuracy]
) -> None:
    found = measure(tiny)
    judged = verdict(found.rows["candidate"], found.rows["base"], {})
    assert judged["text"].startswith(
        "no measurable loss (at most 0.0000 nats per token); KL 0.0000 on"
    )
    assert found.rows["candidate"]["agreement"]["whole"] == 1
