"""Published facts about well-known models, and cases worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.model.shapes import ShapeFolder, shape_config
from compress.plan.checkpoint import Checkpoint, as_planned
from compress.plan.hardware import Hardware, hardware_named
from compress.plan.roofline import (
    decode,
    intensity,
    largest_batch,
    memory,
    prefill,
)
from compress.quantize.inputs import InputScheme
from compress.quantize.scheme import Scheme, Schemes

H100 = hardware_named("h100")


@pytest.fixture(scope="module")
def llama13b() -> Checkpoint:
    return as_planned(ShapeFolder("llama-2-13b"), None)


def test_llama_2_13b_has_its_published_size_and_speed(llama13b: Checkpoint) -> None:
    assert llama13b.parameters == 13_015_864_320
    # Keys and values, 40 layers, 40 heads of 128, 2 bytes.
    assert llama13b.cache_of(1) == 2 * 40 * 40 * 128 * 2
    published = decode(llama13b, H100, 1, 1024, whole=True)
    assert published.seconds == pytest.approx((26_031_728_640 + 838_860_800) / 3.35e12)
    assert 1e3 * published.seconds == pytest.approx(8.0, abs=0.05)
    assert int(1 / published.seconds) == 124
    # Of the embedding a step reads one row: 32000 x 5120 numbers less.
    ours = decode(llama13b, H100, 1, 1024)
    left = 2 * 32000 * 5120 / 3.35e12
    assert ours.seconds == pytest.approx(published.seconds - left)
    assert ours.limit == "weights"


@pytest.mark.parametrize(("batch", "fits"), [(1, True), (64, True), (256, False)])
def test_batches_of_llama_2_13b_by_the_formula(
    llama13b: Checkpoint, batch: int, fits: bool
) -> None:
    needed = 26_031_728_640 + batch * 1024 * 819_200
    assert memory(llama13b, batch, 1024) == needed
    assert (needed <= H100.bytes) == fits
    step = decode(llama13b, H100, batch, 1024, whole=True)
    assert step.seconds == pytest.approx(needed / 3.35e12)
    assert step.limit == ("weights" if batch == 1 else "cache")


def test_eight_heads_of_keys_and_values_let_256_sequences_in(tmp_path: Path) -> None:
    config = shape_config("llama-2-13b") | {"num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = as_planned(ShapeFolder(str(tmp_path / "config.json")), None)
    assert model.cache_of(1) == 819_200 / 5
    assert memory(model, 256, 1024) < H100.bytes
    assert largest_batch(model, H100, 1024) > 256


def test_llama_3_8b_takes_16_gb() -> None:
    model = as_planned(ShapeFolder("llama-3.1-8b"), None)
    assert model.parameters == 8_030_261_248
    assert model.weights == pytest.approx(16.06e9, rel=1e-3)


def test_the_largest_batch_is_the_last_that_fits(llama13b: Checkpoint) -> None:
    most = largest_batch(llama13b, H100, 1024)
    assert memory(llama13b, most, 1024) <= H100.bytes < memory(llama13b, most + 1, 1024)
    small = Hardware("small", 20, 1000, {"bf16": 100})
    assert largest_batch(llama13b, small, 1024) == 0


def test_intensity_by_hand(llama13b: Checkpoint) -> None:
    found = intensity(llama13b, 1, 1024)
    # One token: two operations a weight of two bytes. Every head has keys of its own: likewise.
    assert found["decode"]["mlp"] == pytest.approx(1, rel=0.01)
    assert found["decode"]["attention"] == pytest.approx(1, rel=0.01)
    # 1024 tokens: 1024 times the operations, and what flows between the linears.
    weights = 3 * 40 * 5120 * 13824
    flows = 2 * 1024 * 40 * (2 * 5120 + 3 * 13824)
    wanted = 2 * 1024 * weights / (2 * weights + flows)
    assert found["prefill"]["mlp"] == pytest.approx(wanted)
    # Half of 1024 keys for each query: 4 x 128 x 512.5 operations over 4 vectors of 256 bytes.
    assert found["prefill"]["attention"] == pytest.approx(512.5 / 2)


def test_shared_heads_raise_the_intensity_of_attention() -> None:
    model = as_planned(ShapeFolder("llama-3.1-8b"), None)
    assert intensity(model, 8, 4096)["decode"]["attention"] == pytest.approx(4, rel=0.01)


def test_prompts_are_bound_by_arithmetic(llama13b: Checkpoint) -> None:
    time = prefill(llama13b, H100, 1, 1024)
    blocks = 13_015_864_320 - 2 * 32000 * 5120 - 81 * 5120
    flops = 2 * 1024 * blocks + 2 * 32000 * 5120 + 4 * 40 * 5120 * 1024 * 1025 / 2
    assert time.limit == "compute"
    assert time.seconds == pytest.approx(flops / 989e12)


def test_rounded_inputs_run_at_the_rate_of_their_type() -> None:
    shapes = ShapeFolder("llama-3.2-1b")
    fp8 = Scheme(8, "channel", True, "float", InputScheme("float"))
    model = as_planned(shapes, Schemes(fp8))
    slow = as_planned(shapes, None)
    assert model.mlp.rate == "fp8"
    # Where the device has no such units, as a weight of 8 bits alone would.
    a100 = hardware_named("a100")
    assert prefill(model, a100, 8, 1024).seconds == prefill(slow, a100, 8, 1024).seconds
    assert prefill(model, H100, 8, 1024).seconds < 0.65 * prefill(slow, H100, 8, 1024).seconds
    # A batch in which the products take longer than the weights.
    assert decode(slow, H100, 2048, 1).limit == "compute"


def test_devices_share_weights_and_heads(llama13b: Checkpoint) -> None:
    # Norms are on each.
    norms = 81 * 5120 * 2
    assert memory(llama13b, 8, 1024, tp=4) == (memory(llama13b, 8, 1024) + 3 * norms) / 4
    assert decode(llama13b, H100, 8, 1024, tp=4).seconds == pytest.approx(
        decode(llama13b, H100, 8, 1024).seconds / 4, rel=1e-4
    )
    # Eight heads of keys and values on sixteen devices: each holds a whole one, and what makes it.
    eight = as_planned(ShapeFolder("llama-3.1-8b"), None)
    assert eight.cache_share(16) == 1 / 8
    of_heads, norms = 32 * 2 * 4096 * 1024 * 2, 65 * 4096 * 2
    shared = eight.weights - of_heads - norms
    assert eight.on_each(16) == pytest.approx(shared / 16 + of_heads / 8 + norms)
