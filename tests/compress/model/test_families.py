"""Models of every kind: walked as transformers runs them, scaled without a change, quantized, exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.commands.families import known
from compress.errors import UserError
from compress.export.audit import audit
from compress.export.formats import FORMATS, check_fits
from compress.export.outer import dress
from compress.model.check import check_model
from compress.model.families import FAMILIES, family_of, heads_of
from compress.model.folder import ModelFolder, open_tensors, save_tensors, write_json
from compress.model.language import outer_of, text_config, text_name
from compress.model.shapes import ShapeFolder
from compress.model.skeleton import model_of
from compress.model.walk import Walk
from compress.plan.checkpoint import as_planned
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding import Gptaq, Gptq, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import open_block, quantize
from compress.quantize.transforms import AwqClip, AwqScale
from compress.runtime.decoder import open_decoder
from compress.runtime.load import load_dense
from eval.engines.family_models import KINDS, SEEING, written_model, written_seeing_model

CPU = torch.device("cpu")
EIGHT, FOUR = Schemes(Scheme(8, 32)), Schemes(Scheme(4, 32))


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_blocks_compute_what_the_model_does(made: Any, tokens: Tensor) -> None:
    model, folder = made
    family = family_of(folder.config)
    check_model(folder, folder.names, plain=True)
    seen: list[Tensor] = []
    for block in model.get_submodule(family.blocks):
        block.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(tokens, use_cache=False)
    walk = Walk(folder, family, CPU, tokens_per_batch=4 * tokens.shape[1])
    walk.embed(tokens)
    for index, expected in enumerate(seen):
        with walk.open(index):
            walk.leave(index, walk.enter(index))
        torch.testing.assert_close(walk.hidden, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_moves_changes_nothing(made: Any, tokens: Tensor) -> None:
    _, folder = made
    family = family_of(folder.config)
    walk = Walk(folder, family, CPU)
    walk.embed(tokens)
    moved, named = set[str](), set[str]()
    for index in range(len(walk)):
        with walk.open(index) as module, torch.no_grad():
            block = open_block(module, walk.prefix(index), family, FOUR, folder.dtype)
            data = walk.enter(index)
            expected = data.forward(module, data.inputs)
            named |= {numbered(shared.source) for shared in block.inputs if shared.source}
            for inputs in block.foldable():
                columns = block.weights[inputs[0].linears[0]].shape[1]
                block.fold(inputs, torch.rand(columns) + 0.5)
                moved.add(numbered(inputs[0].source))
            for name, W in block.weights.items():
                block.place(name, W)
            torch.testing.assert_close(
                data.forward(module, data.inputs), expected, rtol=1e-4, atol=5e-5
            )
            walk.hidden = expected
    # Where heads share their values these are read more than once: there nothing moves.
    heads, shared, _ = heads_of(folder.config) if family.attention_output else (0, 0, 0)
    assert moved == named - ({"self_attn.v_proj"} if heads != shared else set())
    assert moved


def numbered(source: str | None) -> str:
    """The same for all experts."""
    return re.sub(r"experts\.\d+", "experts.{}", str(source))


def test_quantized_and_exported(made: Any, tokens: Tensor, tmp_path: Path) -> None:
    model, folder = made
    words = {"tokens": tokens, "device": CPU}
    first = quantize(
        folder, tmp_path / "awq", schemes=FOUR, transforms=[AwqScale(4), AwqClip(2)],
        roundings=[Nearest()], **words,
    )  # fmt: skip
    assert len(first["blocks"]) == len(model.get_submodule(family_of(folder.config).blocks))
    quantize(folder, tmp_path / "record", schemes=EIGHT, transforms=[], roundings=[Gptq()], **words)
    record = ModelFolder(tmp_path / "record")
    # A router that is nearly undecided sends a token elsewhere after the least change.
    routed = family_of(folder.config).experts is not None
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.log_softmax(-1)
        for name in ("compressed-tensors", "gptq", "dense"):
            if name in family_of(folder.config).refuses:
                with pytest.raises(UserError, match="does not apply"):
                    check_fits(name, folder, EIGHT, {})
                continue
            FORMATS[name].write(record, tmp_path / name)
            exported = ModelFolder(tmp_path / name)
            audit(record, exported, FORMATS[name].quantized)
            found = load_dense(exported, CPU, torch.float32)(tokens, use_cache=False).logits
            kl = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
            assert kl < (0.05 if routed else 1e-3), name


@pytest.mark.parametrize("kind", SEEING)
def test_the_language_part_of_a_model_that_sees(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model, folder = written_seeing_model(kind, tmp_path / "model")
    check_model(folder, folder.names, plain=True)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        found = load_dense(folder, CPU, torch.float32)(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    quantize(
        folder, tmp_path / "record", tokens=tokens, schemes=EIGHT, transforms=[AwqScale(4)],
        roundings=[Nearest()], device=CPU,
    )  # fmt: skip
    record = ModelFolder(tmp_path / "record")
    assert "text_config" not in record.config
    FORMATS["compressed-tensors"].write(record, tmp_path / "out")
    dress(tmp_path / "out", folder)
    exported = ModelFolder(tmp_path / "out")
    audit(record, exported)
    # Towers and projectors are there, to the bit, under their names.
    beside = [name for name in folder.stored if text_name(name, folder.outer) is None]
    assert beside
    for name in beside:
        assert torch.equal(raw(exported, name), raw(folder, name))
    assert exported.stated["model_type"] == kind
    with torch.no_grad():
        logits = load_dense(exported, CPU, torch.float32)(tokens, use_cache=False).logits
    log_p = expected.log_softmax(-1)
    assert (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean() < 1e-3


def raw(folder: ModelFolder, name: str) -> Tensor:
    with open_tensors(folder.stored[name]) as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "deepseek_v3", "gpt_neox"])
def test_a_dense_export_is_what_transformers_reads(
    kind: str, tokens: Tensor, tmp_path: Path
) -> None:
    """Names and layout of checkpoints: transformers finds all tensors, and computes the same."""
    _, folder = written_model(kind, tmp_path / "model")
    quantize(
        folder, tmp_path / "record", tokens=None, schemes=EIGHT, transforms=[], roundings=[Nearest()],
        device=CPU,
    )  # fmt: skip
    FORMATS["dense"].write(ModelFolder(tmp_path / "record"), tmp_path / "dense")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_dense(ModelFolder(tmp_path / "dense"), CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens, use_cache=False).logits,
            ours(tokens, use_cache=False).logits,
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    table = text.partition("<!-- compress families -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == known(list(FAMILIES))


# Of well-known models, as their files on the hub say it, without what shapes do not depend on; and how many
# parameters they are known to have, in billions.
ON_THE_HUB = json.loads((Path(__file__).parents[2] / "hub_configs.json").read_text())


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_models_of_the_hub_have_as_many_parameters_as_is_known(name: str) -> None:
    """With what their configs leave out (ties, heads, sizes), and without memory for a single weight."""
    known = ON_THE_HUB[name]
    config, outer = known["config"], outer_of(known["config"])
    # Of models that see images too those of the language part.
    shapes = ShapeFolder(name, config if outer is None else text_config(config, outer))
    found = as_planned(shapes, None)
    assert found.parameters / 1e9 == pytest.approx(known["billions"], rel=0.005)
    model = model_of(shapes.config, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert family_of(shapes.config).linears_in(
        n for n, part in model.get_submodule(family_of(shapes.config).blocks)[-1].named_modules()
        if isinstance(part, torch.nn.Linear)
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt", "smollm3", "falcon-7b"])
def test_ties_that_the_config_does_not_state(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    """As on the hub: the key is missing, and so is the head."""
    model, folder = written_model(kind, tmp_path / "model")
    config = {k: v for k, v in folder.config.items() if k != "tie_word_embeddings"}
    write_json(tmp_path / "model" / "config.json", config)
    bare = ModelFolder(tmp_path / "model")
    assert f"{family_of(config).head}.weight" not in bare
    check_model(bare, bare.names, plain=True)
    with torch.no_grad():
        torch.testing.assert_close(
            load_dense(bare, CPU, torch.float32)(tokens, use_cache=False).logits,
            model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_names_without_their_prefix(tokens: Tensor, tmp_path: Path) -> None:
    """GPT-2's files on the hub leave ``transformer.`` out, and hold masks that follow from the config."""
    model, folder = written_model("gpt2", tmp_path / "model")
    held = {raw_name: raw(folder, raw_name) for raw_name in folder.stored}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_tensors(tmp_path / "model" / "model.safetensors", bare)
    found = ModelFolder(tmp_path / "model")
    assert found.names == folder.names
    with torch.no_grad():
        logits = load_dense(found, CPU, torch.float32)(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)


def test_what_chooses_experts_keeps_its_bits(tmp_path: Path) -> None:
    """DeepSeek's correction of scores is in 32 bits in files of 16, where it is, and stays."""
    _, folder = written_model("deepseek_v3", tmp_path / "model", torch.bfloat16)
    held = {name: raw(folder, name) for name in folder.stored}
    (name,) = [n for n in held if n.endswith("e_score_correction_bias")]
    held[name] = torch.tensor([3.001, 3.002, 3.003, 3.004])
    save_tensors(tmp_path / "model" / "model.safetensors", held)
    source = ModelFolder(tmp_path / "model")
    quantize(
        source, tmp_path / "record", tokens=None, schemes=FOUR, transforms=[], roundings=[Nearest()],
        device=CPU,
    )  # fmt: skip
    FORMATS["compressed-tensors"].write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    for path in ("record", "out"):
        assert torch.equal(ModelFolder(tmp_path / path).tensor(name), held[name])
    model = load_dense(ModelFolder(tmp_path / "out"), CPU, torch.bfloat16)
    assert torch.equal(dict(model.named_buffers())[name], held[name])


def test_a_rounding_that_two_models_must_agree_for_is_refused(
    made: Any, tokens: Tensor, tmp_path: Path
) -> None:
    _, folder = made
    words = {
        "schemes": FOUR,
        "transforms": [],
        "roundings": [Gptaq()],
        "tokens": tokens,
        "device": CPU,
    }
    if family_of(folder.config).experts is not None:
        with pytest.raises(UserError, match="gptaq does not apply"):
            quantize(folder, tmp_path / "out", **words)
    else:
        assert quantize(folder, tmp_path / "out", **words)["blocks"]


def test_code_that_has_come_into_the_library_is_left_out(tmp_path: Path) -> None:
    _, folder = written_model("phi3", tmp_path / "model")
    named = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    write_json(tmp_path / "model" / "config.json", {**folder.config, "auto_map": named})
    assert "auto_map" not in ModelFolder(tmp_path / "model").config
    named["AutoModelForCausalLM"] = "modeling_phi3.Phi3SmallForCausalLM"
    write_json(tmp_path / "model" / "config.json", {**folder.config, "auto_map": named})
    with pytest.raises(UserError, match="asks for code of its own"):
        ModelFolder(tmp_path / "model")


SPLIT = Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))


def test_formats_of_models_in_16_bits(
    made_in_16_bits: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    """AWQ and bitsandbytes hold those alone."""
    for name, scheme in (("awq", Scheme(4, 32)), ("bitsandbytes", SPLIT)):
        if name in family_of(made_in_16_bits.config).refuses:
            with pytest.raises(UserError, match=f"{name} does not apply"):
                check_fits(name, made_in_16_bits, Schemes(scheme), {})
            continue
        quantize(
            made_in_16_bits, tmp_path / f"{name}-record", tokens=tokens, schemes=Schemes(scheme),
            transforms=[], roundings=[Nearest()], device=CPU,
        )  # fmt: skip
        record = ModelFolder(tmp_path / f"{name}-record")
        FORMATS[name].write(record, tmp_path / name)
        audit(record, ModelFolder(tmp_path / name))


@pytest.fixture(scope="module", params=KINDS)
def made_in_16_bits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ModelFolder:
    path = tmp_path_factory.mktemp(f"{request.param}-16") / "model"
    return written_model(request.param, path, torch.bfloat16)[1]


def test_the_decode_engine(made_in_16_bits: ModelFolder) -> None:
    """It runs a model, or says why not."""
    if "decoder" in family_of(made_in_16_bits.config).refuses:
        with pytest.raises(UserError, match="decoder does not apply"):
            open_decoder(made_in_16_bits.path, "cpu")
    else:
        rows = open_decoder(made_in_16_bits.path, "cpu").generate([[1, 2, 3]], tokens=4)
        assert [len(row) for row in rows] == [4]


def test_formats_name_the_matrices_that_keep_their_bits(tokens: Tensor, tmp_path: Path) -> None:
    """Routers and gates of shared experts, which readers would take for quantized linears."""
    _, folder = written_model("qwen2_moe", tmp_path / "model", torch.bfloat16)
    quantize(
        folder, tmp_path / "record", tokens=None, schemes=FOUR, transforms=[], roundings=[Nearest()],
        device=CPU,
    )  # fmt: skip
    kept = ["model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"]
    stated = {}
    for name in ("compressed-tensors", "awq", "gptq"):
        FORMATS[name].write(ModelFolder(tmp_path / "record"), tmp_path / name)
        stated[name] = ModelFolder(tmp_path / name).config["quantization_config"]
    assert sorted(stated["compressed-tensors"]["ignore"]) == ["lm_head", *kept]
    assert sorted(stated["awq"]["modules_to_not_convert"]) == ["lm_head", *kept]
    patterns = [key.removeprefix("-:") for key in stated["gptq"]["dynamic"]]
    assert [any(re.match(pattern, name) for pattern in patterns) for name in kept] == [True, True]
