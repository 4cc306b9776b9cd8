"""Models of every kind: walked as transformers runs them, scaled without a change, quantized, exported."""

from __future__ import annotations

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
from compress.model.families import FAMILIES, family_of
from compress.model.folder import ModelFolder, open_tensors
from compress.model.language import text_name
from compress.model.walk import Walk
from compress.quantize.rounding import Gptq, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import open_block, quantize
from compress.quantize.transforms import AwqClip, AwqScale
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
    moved = 0
    for index in range(len(walk)):
        with walk.open(index) as module, torch.no_grad():
            block = open_block(module, walk.prefix(index), family, FOUR, folder.dtype)
            data = walk.enter(index)
            expected = data.forward(module, data.inputs)
            for inputs in block.foldable():
                columns = block.weights[inputs[0].linears[0]].shape[1]
                block.fold(inputs, torch.rand(columns) + 0.5)
                moved += 1
            for name, W in block.weights.items():
                block.place(name, W)
            torch.testing.assert_close(
                data.forward(module, data.inputs), expected, rtol=1e-4, atol=5e-5
            )
            walk.hidden = expected
    assert moved


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
