"""Sizes of a model and what they cost, against transformers' own counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.prune.shape import CONTEXT, Shape, anatomy, config_of, elements

MODELS = {
    "gqa-tied": ("llama", {}),
    "mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "own-head-size": ("mistral", {"head_dim": 16}),
}


def counted(config: dict[str, object]) -> tuple[int, int]:
    """Parameters of all, and of the decoder blocks, as transformers makes them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("case", MODELS)
def test_parameters_are_those_of_transformers(
    make_model: Callable[..., ModelFolder], case: str
) -> None:
    model_type, changes = MODELS[case]
    model = make_model(model_type, **changes)
    found = anatomy(model, family_of(model.config))
    smaller = [
        found.shape,
        replace(found.shape, layers=2),
        replace(found.shape, heads=2, kv_heads=1 if found.shape.kv_heads == 2 else 2),
        replace(found.shape, mlp=96),
        replace(found.shape, hidden=96),
        Shape(1, 2, 1, 64, 64),
    ]
    for shape in smaller:
        # As it will be written: Qwen2 with fewer heads is a Llama with zero biases then.
        expected = counted(config_of(model.config, found, shape, [0] * shape.layers))
        assert (found.parameters(shape), found.block_parameters(shape)) == expected, shape
        assert found.nbytes(shape) == 2 * expected[0]


def test_the_bytes_of_a_step(make_model: Callable[..., ModelFolder]) -> None:
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    steps = []
    for model in (tied, untied):
        found = anatomy(model, family_of(model.config))
        cache = 2 * 2 * CONTEXT * 3 * 2 * 32
        read = found.parameters(found.shape) - (0 if model.tied_head else 320 * 128)
        steps.append(found.step_bytes(found.shape))
        assert steps[-1] == 2 * read + cache
    assert steps[0] == steps[1]


def test_the_config_of_a_cut_model(make_model: Callable[..., ModelFolder]) -> None:
    model = make_model("qwen2", layer_types=["full_attention"] * 3)
    found = anatomy(model, family_of(model.config))
    kept = config_of(model.config, found, replace(found.shape, layers=2, mlp=64), [0, 2])
    assert kept["model_type"] == "qwen2"
    assert kept["head_dim"] == 32
    assert kept["layer_types"] == ["full_attention"] * 2
    fewer = config_of(model.config, found, replace(found.shape, heads=2, kv_heads=2), [0, 1, 2])
    assert (fewer["model_type"], fewer["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert fewer["attention_bias"] is True
    # A list that happens to be as long as there are layers is none of theirs.
    other = config_of({**model.config, "eos_token_id": [1, 2, 3]}, found, found.shape, [0, 2])
    assert other["eos_token_id"] == [1, 2, 3]
    sliding = {**model.config, "use_sliding_window": True}
    with pytest.raises(UserError, match="with sliding windows must keep heads x 32 = hidden size"):
        config_of(sliding, found, replace(found.shape, heads=2), [0, 1, 2])
    del sliding["layer_types"]
    with pytest.raises(UserError, match="does not say which layers have sliding windows"):
        config_of(sliding, found, replace(found.shape, layers=2), [0, 2])


def test_a_config_without_head_size_and_groups(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    """As old Llama folders have it: then every query head has keys and values of its own."""
    model = make_model("llama", num_key_value_heads=4)
    shutil.copytree(model.path, tmp_path / "old")
    left_out = ("head_dim", "num_key_value_heads")
    config = {key: value for key, value in model.config.items() if key not in left_out}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    found = anatomy(ModelFolder(tmp_path / "old"), family_of(config))
    assert (found.shape.kv_heads, found.head_dim) == (4, 32)
    assert config_of(config, found, found.shape, [0, 1, 2])["num_key_value_heads"] == 4


def test_a_config_that_contradicts_its_tensors_is_refused(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny.path, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**tiny.config, "intermediate_size": 99})
    )
    with pytest.raises(UserError, match=r"mlp.*its config.json asks for"):
        anatomy(ModelFolder(tmp_path / "m"), family_of(tiny.config))


def test_elements_of_heads() -> None:
    assert elements([2, 0], 3).tolist() == [6, 7, 8, 0, 1, 2]
