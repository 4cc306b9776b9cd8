"""Bytes that are predicted from shapes are those of the files that are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.compose import compose_settings
from compress.config import schemes_of
from compress.export import bitsandbytes
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.measure.size import measure_size
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder
from compress.plan.checkpoint import as_planned, on_disk
from compress.plan.hardware import Hardware
from compress.plan.predict import predict
from compress.quantize.rounding import Nearest
from compress.quantize.stage import quantize, settle
from compress.runtime.decoder import open_decoder
from eval.speed import Point
from tests.exported import exported

CPU = torch.device("cpu")
SCHEMES = [
    "int4",
    "int3",
    "int8",
    "int4-channel",
    "int8-channel",
    "w8a8-int8",
    "fp8",
    "fp8-block",
    "nvfp4",
    "mxfp4",
]


@pytest.mark.parametrize("name", SCHEMES)
def test_files_are_as_large_as_planned(
    name: str, make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    model = make_model(num_key_value_heads=4)
    schemes = schemes_of(compose_settings(["recipe=rtn-int4", f"scheme={name}"]))
    folder = exported(model, schemes, tmp_path)
    settled = settle(model, family_of(model.config), schemes)
    planned = as_planned(model, settled)
    size = measure_size(folder)
    assert planned.files == pytest.approx(size["bytes"], rel=0.01)
    assert planned.bits_linears == pytest.approx(size["bits_linears"], rel=1e-9)
    assert planned.parameters == size["parameters"]
    found = on_disk(folder)
    assert found.files == size["bytes"]
    for part in ("attention", "mlp", "head", "embedding", "rest"):
        assert getattr(found, part) == getattr(planned, part), part


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_too(
    tied: bool, make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=tied)
    words = ["recipe=rtn-int4", "scheme.symmetric=true", "head=int8"]
    schemes = schemes_of(compose_settings(words))
    folder = exported(model, schemes, tmp_path)
    planned = as_planned(model, settle(model, family_of(model.config), schemes))
    assert planned.files == pytest.approx(measure_size(folder)["bytes"], rel=0.01)
    found = on_disk(folder)
    assert (found.head, found.embedding) == (planned.head, planned.embedding)


def test_bitsandbytes(tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    schemes = schemes_of(compose_settings(["recipe=llm-int8"]))
    quantize(
        tiny,
        tmp_path / "record",
        tokens=tokens,
        schemes=schemes,
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    bitsandbytes.write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    planned, found = (
        as_planned(tiny, schemes, export=bitsandbytes.NAME),
        on_disk(ModelFolder(tmp_path / "out")),
    )
    assert planned.files == pytest.approx(found.files, rel=0.01)
    assert planned.mlp == found.mlp
    assert planned.mlp.rate == "int8"


def test_the_original_and_its_shape_alone(tiny: ModelFolder) -> None:
    disk, shapes = on_disk(tiny), as_planned(ShapeFolder("x", tiny.config), None)
    assert shapes.files == pytest.approx(disk.files, rel=0.01)
    assert (shapes.mlp, shapes.head, shapes.embedding) == (disk.mlp, disk.head, None)
    assert disk.bits_linears == 16


def test_bytes_of_a_step_are_those_that_the_runtime_counts(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    schemes = schemes_of(compose_settings(["recipe=w8a16-int8"]))
    point = Point(3, 40, 9)
    hardware = Hardware("cpu", 10, 20, {"bf16": 0.1})
    for folder in (tiny, exported(tiny, schemes, tmp_path)):
        found = predict(folder, hardware, point)
        counted = open_decoder(folder.path, "cpu").bytes_per_step(3, 40 + 9 // 2)
        # Norms are not among the runtime's linears.
        assert found["bytes"] == pytest.approx(counted, rel=0.03)
        assert found["itl_ms"] >= 1e3 * found["bytes"] / 20e9
        assert found["tokens_per_s"] == pytest.approx(3e3 / found["itl_ms"])


def test_without_a_kernel_here_a_weight_is_held_in_16_bits(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    folder = exported(tiny, schemes_of(compose_settings(["recipe=nvfp4"])), tmp_path)
    # Groups of 16 columns: none of the CPU's kernels takes them.
    assert on_disk(folder, CPU).mlp.stored == on_disk(tiny).mlp.stored
    assert on_disk(folder).mlp.stored < 0.3 * on_disk(tiny).mlp.stored


def test_a_quantized_cache_counts(tiny: ModelFolder, tmp_path: Path) -> None:
    by_token = StateScheme(bits=8, symmetric=True)
    scheme = CacheScheme(by_token, by_token)
    quantize_cache(tiny, tmp_path / "kv", scheme, tokens=None, device=CPU)
    found = on_disk(ModelFolder(tmp_path / "kv"))
    # 8 bits and a scale of 16 for the 32 channels of a head.
    assert found.cache_of(100) == pytest.approx(on_disk(tiny).cache_of(100) * (8 + 16 / 32) / 16)
