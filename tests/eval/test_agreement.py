"""What counts as an engine computing what was exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.engines.agreement import CLIP, Ours, apart, clip, compare

ORIGINAL = torch.full((2, 50), -3.0)


def off(distance: float) -> torch.Tensor:
    """As far from the original as said, in both directions."""
    signs = torch.ones_like(ORIGINAL)
    signs[:, ::2] = -1
    return ORIGINAL + distance * signs


def ours(
    loss: float,
    *,
    alone: float | None = None,
    wide: float | None = None,
    quantized: bool = True,
) -> Ours:
    found = off(loss)
    return Ours(
        found,
        ORIGINAL,
        found if alone is None else off(alone),
        found if wide is None else off(wide),
        quantized=quantized,
        rounded=alone is not None,
        cached=wide is not None,
    )


@pytest.mark.parametrize(
    ("theirs", "agrees"),
    [
        (0.43, True),
        (0.48, True),
        # The original itself: the quantization was dropped.
        (0.0, False),
        # Beyond the tolerance, if much nearer to ours.
        (0.56, False),
    ],
)
def test_weights_alone(theirs: float, agrees: bool) -> None:
    found = compare(ours(0.43), off(theirs))
    assert found["agrees"] is agrees
    assert found["distance"] == pytest.approx(abs(theirs - 0.43), abs=1e-5)
    assert found["to_original"] == pytest.approx(theirs, abs=1e-5)
    assert found["ours_to_original"] == pytest.approx(0.43, abs=1e-5)


def test_a_small_loss_asks_for_more_than_the_tolerance() -> None:
    assert not compare(ours(0.06), off(0.0))["agrees"]
    assert compare(ours(0.06), off(0.045))["agrees"]


def test_the_original_has_the_tolerance_alone() -> None:
    assert compare(ours(0.0, quantized=False), off(0.04))["agrees"]
    assert not compare(ours(0.0, quantized=False), off(0.11))["agrees"]


@pytest.mark.parametrize(
    ("theirs", "agrees"), [(0.13, True), (0.17, True), (0.18, False), (0.10, False), (0.06, False)]
)
def test_rounded_inputs(theirs: float, agrees: bool) -> None:
    """As far from the original as ours, not as a model whose inputs are left alone."""
    assert compare(ours(0.14, alone=0.05), off(theirs))["agrees"] is agrees


def test_inputs_that_tell_nothing_do_not_decide() -> None:
    assert compare(ours(0.14, alone=0.13), off(0.125))["agrees"]
    assert not compare(ours(0.14, alone=0.13), off(0.1))["agrees"]


@pytest.mark.parametrize(
    ("theirs", "agrees"), [(0.108, True), (0.08, True), (0.07, False), (0.13, False), (0.0, False)]
)
def test_an_engine_that_rounds_inputs_by_itself(theirs: float, agrees: bool) -> None:
    """Weights that cost little: another engine's answer is as near to the original's as to ours."""
    mine = ours(0.097)
    assert compare(mine, off(theirs), rounds=True)["agrees"] is agrees
    # In the other direction it is as far from the original, and too far from ours.
    assert not compare(mine, off(-0.097), rounds=True)["agrees"]
    # Of 16-bit weights no inputs are rounded.
    plain = ours(0.097, quantized=False)
    assert compare(plain, off(0.08), rounds=True) == compare(plain, off(0.08))


def test_a_cache_has_to_move_with_its_scales() -> None:
    mine = ours(0.12, wide=0.0, quantized=False)
    theirs = off(0.15)
    assert compare(mine, theirs, lambda: off(5.0))["agrees"]
    # An engine that does not read them.
    assert not compare(mine, theirs, lambda: theirs)["agrees"]
    # One that keeps 16 bits.
    assert not compare(mine, off(0.01), lambda: off(5.0))["agrees"]
    assert not compare(mine, off(0.3), lambda: off(5.0))["agrees"]


def test_a_cache_beside_quantized_weights() -> None:
    mine = ours(0.5, wide=0.4)
    assert compare(mine, off(0.52), lambda: off(5.0))["agrees"]
    # As far from our 16-bit cache as we are, but the weights are the original's.
    assert not compare(mine, off(0.25), lambda: off(5.0))["agrees"]


def test_an_engine_with_a_16_bit_cache_is_compared_with_one() -> None:
    mine = ours(0.5, wide=0.4)
    found = compare(mine, off(0.41), None)
    assert found["agrees"]
    assert found["distance"] == pytest.approx(0.01, abs=1e-5)


def test_clipped_scales(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    scale, weight = torch.tensor([0.5]), torch.ones(2, 2)
    names = ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")
    save_file({names[0]: scale, names[1]: scale + 1, "w": weight}, folder / "model.safetensors")
    found = load_file(clip(folder, tmp_path / "copy") / "model.safetensors")
    assert found[names[0]].item() == 0.5 / CLIP
    assert found[names[1]].item() == 1.5 / CLIP
    assert torch.equal(found["w"], weight)
    assert load_file(folder / "model.safetensors")[names[0]].item() == 0.5


def test_apart_is_the_mean_of_absolute_differences() -> None:
    assert apart(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])) == 1.5
