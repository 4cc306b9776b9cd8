"""The memory of a compressing run, term by term."""

from __future__ import annotations

from compress.compose import compose_settings
from compress.config import parse
from compress.model.families import family_of
from compress.model.shapes import ShapeFolder, shape_config
from compress.plan.calibration import CODE, EMPTY_BLOCK, Stage, stages
from compress.plan.checkpoint import as_planned
from compress.plan.hardware import Hardware
from compress.quantize.stage import settle

HERE = Hardware("here", 20, 20, {"bf16": 0.2, "float32": 0.1})


def planned(shape: str, *words: str) -> list[Stage]:
    run, shapes = parse(compose_settings([*words])), ShapeFolder(shape)
    schemes = settle(shapes, family_of(shapes.config), run.schemes)
    return stages(run, shapes, as_planned(shapes, schemes), HERE)


def test_a_large_vocabulary_passes_in_rows_unless_it_is_quantized() -> None:
    quantize, export = planned("smollm2-135m", "recipe=rtn-int4")
    table = 49152 * 576 * 2
    code = CODE + 30 * EMPTY_BLOCK
    weights = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    # A block in 16 and 32 bits, its codes and what they stand for, and work on gate and up.
    assert quantize.bytes == CODE + (2 + 4 + 1 + 2) * weights + 4 * 4 * 2 * 1536 * 576
    assert export.bytes == code + table
    assert export.what == "its largest matrix"
    rounded, _ = planned("smollm2-135m", "recipe=rtn-int4", "scheme.symmetric=true", "head=int8")
    assert rounded.bytes == code + 2 * table
    assert rounded.what == "embedding or head and its codes"


def test_an_export_holds_a_tensor_and_not_a_file() -> None:
    _, export = planned("llama-2-13b", "recipe=rtn-int4")
    assert export.bytes == CODE + 40 * EMPTY_BLOCK + 10 * 5120 * 13824
    assert export.what == "packing its largest linear"


def test_depth_costs_next_to_nothing() -> None:
    """32 blocks more are so many modules without weights."""
    found = []
    for layers in (8, 40):
        run = parse(compose_settings(["recipe=awq-int4"]))
        shapes = ShapeFolder(
            "llama-3.1-8b", {**shape_config("llama-3.1-8b"), "num_hidden_layers": layers}
        )
        schemes = settle(shapes, family_of(shapes.config), run.schemes)
        found.append(stages(run, shapes, as_planned(shapes, schemes), HERE))
    assert found[1][0].bytes - found[0][0].bytes <= 32 * EMPTY_BLOCK
    assert found[1][1].bytes - found[0][1].bytes == 32 * EMPTY_BLOCK


def test_factoring_in_float64_grows_with_the_widest_input() -> None:
    gptq, _ = planned("llama-2-13b", "recipe=gptq-int4")
    awq, _ = planned("llama-2-13b", "recipe=awq-int4")
    assert gptq.what == "factoring second moments"
    assert gptq.bytes > 2.5 * 8 * 13824**2
    assert awq.bytes < gptq.bytes
    # More text is more states between two blocks, and more work, but no more of anything else.
    more, _ = planned("llama-2-13b", "recipe=gptq-int4", "data.sequences=128")
    assert more.bytes - gptq.bytes == 64 * 512 * 2 * (5120 + 5120)
    assert more.seconds > gptq.seconds


def test_states_of_the_original_beside_them() -> None:
    once, _ = planned("llama-3.2-1b", "recipe=gptq-int4")
    twice, _ = planned("llama-3.2-1b", "recipe=gptaq-int4")
    # Its states, and cross moments beside the second ones, of 64 x 512 tokens; these in float64, and copied.
    states, moments = 64 * 512 * 2 * 2048, 4 * (3 * 2048**2 + 8192**2)
    assert twice.bytes - once.bytes == states + moments + 1.5 * 8 * 8192**2


def test_few_tokens_are_kept_in_16_bits_instead_of_squares() -> None:
    """1,024 tokens are fewer than half of 4,096 inputs, and of 14,336; 2,048 only of the latter."""
    few, more = (
        planned("llama-3.1-8b", "recipe=awq-int4", f"data.sequences={n}", "data.length=128")[0]
        for n in (8, 16)
    )
    states = 2 * 1024 * (4096 + 4096)
    kept = 2 * 1024 * 14336 + 3 * (4 * 4096**2 - 2 * 1024 * 4096)
    assert few.what == more.what == "a search over a block's weights"
    assert more.bytes - few.bytes == states + kept
    assert few.seconds < more.seconds
