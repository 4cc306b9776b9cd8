"""Decoding over exported folders: the packed model computes what the dense one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.export.formats import Weights
from compress.model.folder import ModelFolder
from compress.quantize.scheme import Scheme
from compress.runtime.build import build
from compress.runtime.decoder import Decoder, open_decoder
from compress.runtime.load import load_dense, load_packed
from tests.exported import exported

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_packed_equals_dense(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, tmp_path: Path, model_type: str
) -> None:
    folder = exported(make_model(model_type), Scheme(4, 32), tmp_path)
    packed, kernels = load_packed(folder, CPU)
    assert sum(kernels.values()) == 21
    assert "dense" not in kernels
    dense = load_dense(folder, CPU, torch.bfloat16)
    exact = load_dense(folder, CPU, torch.float32)
    with torch.inference_mode():
        expected = exact(tokens).logits
        noise = (dense(tokens).logits.float() - expected).norm()
        error = (packed(tokens).logits.float() - expected).norm()
    # bf16 alone moves the logits of this model by some per cent; the kernel may add little to that.
    assert error < 1.3 * noise


def test_weights_are_rounded_to_the_checkpoints_type_first(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    """What is judged in float32 are the 16-bit weights that engines compute with."""
    folder = exported(tiny, Scheme(4, 32), tmp_path)
    served, judged = (load_dense(folder, CPU, t) for t in (torch.bfloat16, torch.float32))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(judged.get_parameter(name), served.get_parameter(name).float())


def test_what_no_kernel_fits_is_counted_as_dense(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = exported(make_model(dtype="float32"), Scheme(8, 32), tmp_path)
    _, kernels = load_packed(folder, CPU)
    assert kernels == {"dense": 21}
    _, kernels = build(Weights(folder), CPU)
    assert kernels == {"dense": 21, "16-bit": 1}


def test_greedy_decoding_equals_generate(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor
) -> None:
    """In float32: in 16 bits near ties fall as the machine adds up."""
    folder = make_model(dtype="float32")
    decoder = open_decoder(folder.path, "cpu")
    prompt = tokens[:2]
    ours = [decoder.start(prompt, 8)] + [decoder.step() for _ in range(7)]
    model = load_dense(folder, CPU, torch.float32)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        suppress_tokens=[],
    )
    picked = torch.cat(ours, dim=1)
    # generate forbids the end token before min_new_tokens; ours picks it if it is the likeliest.
    assert (picked != model.config.eos_token_id).all()
    assert torch.equal(picked, theirs[:, prompt.shape[1] :])


def test_a_new_request_forgets_the_last(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    decoder: Decoder = open_decoder(tiny.path, "cpu")
    first = decoder.start(tokens[:1], 2)
    decoder.step()
    assert torch.equal(decoder.start(tokens[:1], 2), first)


def test_missing_tensors_are_named(tiny: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny.path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"lacks 1 tensors, the first is model.norm.weight"):
        load_dense(ModelFolder(tmp_path), CPU, torch.bfloat16)


def test_other_formats_are_refused(tiny: ModelFolder, tmp_path: Path) -> None:
    import json

    config = {**tiny.config, "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny.path / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="'hqq' is not read here, only compressed-tensors"):
        load_dense(ModelFolder(tmp_path), CPU, torch.bfloat16)
