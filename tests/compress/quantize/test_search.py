"""Picking bits: the integer program, the budgets, the measurement, and files of mixed bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export import compressed_tensors
from compress.export.audit import audit
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.rounding.nearest import Nearest
from compress.quantize.scheme import Scheme, Schemes, to_codes
from compress.quantize.search import Search, budget, choose, solve, spread_tokens
from compress.quantize.sensitivity import ANCHOR, GRIDS, divergences, sensitivities
from compress.quantize.stage import quantize
from compress.report.bits import draw_bits
from compress.runtime.load import load_dense
from eval.text import token_kl

CPU = torch.device("cpu")
INT4 = Schemes(Scheme(4, 32))


def test_solve_by_hand() -> None:
    """Sizes 1 and 2, room for one of three to be large: the one that gains most, not the worst one."""
    costs = [[9.0, 8.0], [5.0, 1.0], [4.0, 1.0]]
    assert solve(costs, [[1, 2]] * 3, 4) == [0, 1, 0]
    assert solve(costs, [[1, 2]] * 3, 5) == [0, 1, 1]
    assert solve(costs, [[1, 2]] * 3, 3) == [0, 0, 0]
    assert solve(costs, [[1, 2]] * 3, 6) == [1, 1, 1]
    # Group 1 gains most but is too large beside anything else; the other two together gain more.
    assert solve([[3.0, 0.0], [4.0, 0.0], [3.0, 0.0]], [[0, 2], [0, 4], [0, 2]], 4) == [1, 0, 1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_solve_is_as_good_as_trying_all(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = (scale * torch.rand(6, 4, generator=generator, dtype=torch.float64)).tolist()
    sizes = torch.randint(1, 2_000_000, (6, 4), generator=generator).sort(-1).values.tolist()
    low, high = (sum(row[i] for row in sizes) for i in (0, -1))
    limit = low + (high - low) * 0.4

    def total(table: list[list[Any]], picks: tuple[int, ...] | list[int]) -> Any:
        return sum(row[pick] for row, pick in zip(table, picks, strict=True))

    allowed = [p for p in itertools.product(range(4), repeat=6) if total(sizes, p) <= limit]
    picks = solve(costs, sizes, limit)
    assert total(sizes, picks) <= limit
    assert total(costs, picks) == pytest.approx(min(total(costs, p) for p in allowed), rel=1e-9)


def test_divergences_match_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    goal, first, second = (torch.randn(300, 16, generator=generator) for _ in range(3))
    E = torch.randn(50, 16, generator=generator)

    def log_probs(F: Tensor) -> Tensor:
        return (F.double() @ E.double().T).log_softmax(-1)

    found = divergences([first, goal, second], goal, E)
    expected = [
        float(token_kl(log_probs(goal), log_probs(F)).mean()) for F in (first, goal, second)
    ]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_spread_tokens() -> None:
    """Many short windows, so that every kind of text of a mix is among them."""
    tokens = torch.arange(8 * 512).reshape(8, 512)
    assert torch.equal(spread_tokens(tokens, 1024), tokens[:, :128])
    assert torch.equal(spread_tokens(tokens, 800), tokens[:6, :128])
    assert torch.equal(spread_tokens(tokens, 2048), tokens[:, :256])
    assert torch.equal(spread_tokens(tokens, 3), tokens[:1, :3])
    assert torch.equal(spread_tokens(tokens, 10_000), tokens)
    assert torch.equal(spread_tokens(tokens[:, :4], 9), tokens[:2, :4])


def textbook(model: ModelFolder, tokens: Tensor, block: int, group: int, bits: int) -> float:
    """KL with one group quantized in a whole float32 model, inputs gathered by a hook on each linear."""
    base = load_dense(model, CPU, torch.float32)
    candidate = load_dense(model, CPU, torch.float32)
    scheme = Scheme(bits, 32)
    for name in LLAMA.inputs[group].linears:
        seen: list[Tensor] = []
        path = f"model.layers.{block}.{name}"
        hook = base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
        with torch.inference_mode():
            base(tokens)
        hook.remove()
        X = torch.cat(seen)
        weight = candidate.get_submodule(path).weight
        grid = GRIDS.search(weight.data, X.T @ X / len(X), scheme, model.dtype)
        weight.data = to_codes(weight.data, grid, scheme).dequantize(model.dtype).float()
    with torch.inference_mode():
        ours, theirs = (m(tokens).logits.log_softmax(-1) for m in (candidate, base))
    return float(token_kl(theirs, ours).mean())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_sensitivity_is_the_divergence_of_that_group_alone(
    make_model: Callable[..., ModelFolder], tokens: Tensor, model_type: str
) -> None:
    model = make_model(model_type, dtype="float32")
    found, noise = sensitivities(model, INT4, [2, 3], tokens, CPU)
    assert len(found) == 3 * len(LLAMA.inputs)
    for block, group in ((0, 0), (1, 2), (1, 3), (2, 1)):
        expected = [textbook(model, tokens, block, group, bits) for bits in (2, 3)]
        measured = [kl + noise[block] for kl in found[block * 4 + group]]
        assert measured == pytest.approx(expected, rel=1e-3)


def test_sixteen_bits_measure_nearly_the_same(tiny: ModelFolder, tokens: Tensor) -> None:
    """The noise of 16-bit linears changes a sensitivity by a share, not its size."""
    found, noise = sensitivities(tiny, INT4, [2, 3], tokens, CPU)
    for block, group in ((0, 0), (1, 2), (1, 3), (2, 1)):
        expected = [textbook(tiny, tokens, block, group, bits) for bits in (2, 3)]
        measured = [kl + noise[block] for kl in found[block * 4 + group]]
        assert measured == pytest.approx(expected, rel=0.3)


def test_more_bits_follow_from_the_anchor(
    make_model: Callable[..., ModelFolder], tokens: Tensor
) -> None:
    """They are near a direct measurement, as near as so small a model allows."""
    model = make_model(dtype="float32")
    rows, _ = sensitivities(model, INT4, [3, 4, 5], tokens, CPU)
    alone, _ = sensitivities(model, INT4, [4], tokens, CPU)
    for index in (5, 6, 9):
        assert alone[index][0] == pytest.approx(rows[index][1])
        for bits, kl in ((4, rows[index][1]), (5, rows[index][2])):
            direct = textbook(model, tokens, index // 4, index % 4, bits)
            assert direct / 2.5 < kl < direct * 2.5


def chosen(schemes: Schemes) -> dict[str, int]:
    return {
        f"model.layers.{block}.{name}": schemes.of(f"model.layers.{block}.{name}").bits
        for block in range(3)
        for name in LLAMA.linears
    }


@pytest.mark.parametrize("average", [2, 2.7, 3.5, 6])
def test_average_bits_are_met_and_groups_stay_together(
    tiny: ModelFolder, tokens: Tensor, average: float
) -> None:
    base = Schemes(Scheme(4, "auto", symmetric=True))
    schemes, report = choose(tiny, Search(average_bits=average), base, tokens, CPU)
    bits = chosen(schemes)
    sizes = {name: tiny.tensor(f"{name}.weight").numel() for name in bits}
    mean = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
    assert average - 0.15 < mean <= average
    assert report["average_bits"] == pytest.approx(mean)
    assert len(report["groups"]) == 3 * len(LLAMA.inputs)
    for group in report["groups"].values():
        names = [f"model.layers.{group['block']}.{name}" for name in group["linears"]]
        assert {bits[name] for name in names} == {group["bits"]}
        assert set(group["kl"]) == {"2", "3", "4", "5", "6"}
    assert report["predicted_kl"] == pytest.approx(
        sum(group["kl"][str(group["bits"])] for group in report["groups"].values())
    )
    assert report["measured_bits"] == [2, ANCHOR]
    assert all((s.group_size, s.symmetric) == (128, True) for s in schemes.exceptions.values())
    assert all(s.bits != 4 for s in schemes.exceptions.values())


Exported = tuple[ModelFolder, ModelFolder, Mapping[str, int]]


@pytest.fixture(params=[False, True], ids=["asym", "sym"])
def mixed(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: ModelFolder, tokens: Tensor
) -> tuple[Exported, dict[str, Any]]:
    """(record, exported, bits), report of a model of mixed bits under 0.2 MB."""
    search, base = Search(megabytes=0.2), Schemes(Scheme(4, 32, request.param))
    schemes, report = choose(tiny, search, base, tokens, CPU)
    quantize(
        tiny,
        tmp_path / "record",
        tokens=None,
        schemes=schemes,
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    written = ModelFolder(tmp_path / "record")
    compressed_tensors.write(written, tmp_path / "out")
    return (written, ModelFolder(tmp_path / "out"), chosen(schemes)), report


def test_megabytes_are_those_of_the_exported_files(mixed: tuple[Exported, dict[str, Any]]) -> None:
    (_, exported, _), report = mixed
    stored = sum(
        exported.nbytes(name)
        for name in exported.names
        if name.endswith(("_packed", "_scale", "_zero_point"))
    )
    assert stored == round(report["megabytes"] * 1e6)
    assert 0.19e6 < stored <= 0.2e6


def test_mixed_bits_travel_to_the_files_and_other_readers(
    mixed: tuple[Exported, dict[str, Any]], tokens: Tensor
) -> None:
    (written, exported, bits), _ = mixed
    assert len(set(bits.values())) > 2
    assert audit(written, exported)["linears"] == len(bits)
    for name, count in bits.items():
        ours, decided = (
            compressed_tensors.read_linear(exported, name),
            record.read_linear(written, name),
        )
        assert ours.bits == decided.bits == count
        assert torch.equal(ours.codes, decided.codes)
    if not record.schemes_of(written).linears.symmetric:
        # transformers 5.23 allocates packed zero points in their unpacked shape: it must not load
        # other numbers instead.
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.bfloat16)
        return
    theirs = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.bfloat16)
    dense = load_dense(exported, CPU, torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(dense(tokens).logits, theirs(tokens).logits)


def test_compressed_tensors_unpacks_the_same_weights(
    mixed: tuple[Exported, dict[str, Any]],
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    (_, exported, bits), _ = mixed
    config = QuantizationConfig.model_validate(exported.config["quantization_config"])
    group_of: dict[str, QuantizationScheme] = {
        target: scheme for scheme in config.config_groups.values() for target in scheme.targets
    }
    assert set(group_of) == set(bits)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in bits:
        state = {
            part: exported.tensor(f"{name}.{part}")
            for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            if f"{name}.{part}" in exported
        }
        theirs = compressor.decompress(state, group_of[name])["weight"]
        ours = compressed_tensors.read_linear(exported, name).dequantize(torch.bfloat16)
        assert torch.equal(theirs, ours)


def test_the_picture(tmp_path: Path) -> None:
    kl = {"2": 1.0, "4": 0.1, "8": 0.0}
    groups = {
        f"{block}.{linears}": {"block": block, "linears": linears, "bits": bits, "kl": kl}
        for block, bits in enumerate((2, 4, 8))
        for linears in (["attn.q_proj", "attn.k_proj"], ["mlp.down_proj"])
    }
    draw_bits({"groups": groups, "average_bits": 4.5, "megabytes": 1.0}, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({}, "search needs one budget"),
        ({"average_bits": 3.0, "megabytes": 4.0}, "search needs one budget"),
        ({"average_bits": 1.9}, "average_bits=1.9 is not allowed: choose 2 to 6"),
        ({"average_bits": 6.1}, "average_bits=6.1 is not allowed: choose 2 to 6"),
        ({"average_bits": 3.0, "choices": [4, 8]}, "choose 4 to 8"),
        ({"average_bits": 3.0, "choices": []}, "search.choices"),
        ({"average_bits": 3.0, "choices": [1, 4]}, "search.choices"),
        ({"average_bits": 3.0, "choices": [4, 9]}, "search.choices"),
        ({"average_bits": 3.0, "tokens": 0}, "search.tokens=0"),
    ],
)
def test_impossible_knobs(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Search(**knobs)


@pytest.mark.parametrize("megabytes", [0.01, 9.0])
def test_impossible_sizes(tiny: ModelFolder, megabytes: float) -> None:
    with pytest.raises(UserError, match=rf"megabytes={megabytes} is not allowed: choose 0\.\d+ to"):
        budget(tiny, Search(megabytes=megabytes), INT4)


def test_the_command_line_sets_the_budget() -> None:
    run = parse(compose_settings(["recipe=mixed-3.5", "search.average_bits=3.25"]))
    assert run.search == Search(average_bits=3.25)
    assert run.needs_data
    words = ["recipe=mixed-3.5", "search.megabytes=40", "search.average_bits=null"]
    assert parse(compose_settings(words)).search == Search(megabytes=40.0)
    assert parse(compose_settings(["recipe=awq-int4"])).search is None
