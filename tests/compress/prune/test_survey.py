"""What a survey sees: against hooks on transformers' own model, and where blocks do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.prune.importance import Sizes
from compress.prune.shape import anatomy
from compress.prune.survey import Survey, survey

CPU = torch.device("cpu")


def surveyed(model: ModelFolder, tokens: Tensor, drop_one: bool = False) -> Survey:
    return survey(model, anatomy(model, family_of(model.config)), tokens, CPU, drop_one=drop_one)


def test_sizes_and_influence_are_those_of_the_model(
    make_model: Callable[..., ModelFolder], tokens: Tensor
) -> None:
    source = make_model("llama", dtype="float32")
    found = surveyed(source, tokens)
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]}) if args else None
        )
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
    channels = torch.zeros(128, dtype=torch.float64)
    for i, layer in enumerate(f"model.layers.{i}" for i in range(3)):
        last = states[i + 1] if i < 2 else seen["model.norm"]
        change = 1 - torch.cosine_similarity(states[i], last, dim=-1)
        assert found.influence[i] == pytest.approx(float(change.mean()), rel=1e-4)
        for part, name, count in (
            ("heads", "self_attn.o_proj", 4),
            ("neurons", "mlp.down_proj", 256),
        ):
            sizes = Sizes(count, CPU)
            sizes.add(seen[f"{layer}.{name}"])
            torch.testing.assert_close(getattr(found, part)[i], sizes.mean(), rtol=1e-4, atol=1e-6)
        for name in ("self_attn.q_proj", "mlp.gate_proj"):
            sizes = Sizes(128, CPU)
            sizes.add(seen[f"{layer}.{name}"])
            channels += sizes.mean()
    torch.testing.assert_close(found.channels, channels, rtol=1e-4, atol=1e-6)
    report = found.report()
    assert len(report["neurons"]) == 3
    assert report["neurons"][0][0] == pytest.approx(float(found.neurons[0].min()))


@pytest.fixture
def idle(make_model: Callable[..., ModelFolder], tmp_path: Path) -> ModelFolder:
    """Six blocks, of which 2 and 3 add almost nothing and 5 a little more."""
    source = make_model("llama", dtype="float32", num_hidden_layers=6)
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        for index, factor in ((2, 1e-4), (3, 1e-4), (5, 1e-3)):
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    model.save_pretrained(tmp_path / "idle")
    return ModelFolder(tmp_path / "idle")


def test_blocks_that_do_nothing_go_first(idle: ModelFolder, tokens: Tensor) -> None:
    found = surveyed(idle, tokens, drop_one=True)
    assert found.drop_one is not None
    assert found.layers(4, "influence") == found.layers(4, "contiguous") == [0, 1, 4, 5]
    assert found.layers(3, "influence") == [0, 1, 4]
    assert found.layers(6, "influence") == list(range(6))
    # The perplexity of a random model may fall without a block: the lowest go, whatever they are.
    lowest = sorted(range(6), key=found.drop_one.__getitem__)
    assert found.layers(4, "perplexity") == sorted(lowest[2:])
    model: Any = AutoModelForCausalLM.from_pretrained(idle.path, dtype=torch.float32)
    for gone in (0, 2):
        kept = [layer for i, layer in enumerate(model.model.layers) if i != gone]
        shorter: Any = AutoModelForCausalLM.from_pretrained(idle.path, dtype=torch.float32)
        shorter.model.layers = torch.nn.ModuleList(kept)
        with torch.inference_mode():
            logits = shorter(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        nll = -logits.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
        assert found.drop_one[gone] == pytest.approx(float(nll.exp()), rel=1e-3)


def test_channels_that_stay_are_the_largest(tiny: ModelFolder, tokens: Tensor) -> None:
    found = surveyed(tiny, tokens)
    kept = found.kept_channels(32)
    assert kept.tolist() == sorted(kept.tolist())
    gone = [i for i in range(128) if i not in kept.tolist()]
    assert found.channels[kept].min() >= found.channels[gone].max()
