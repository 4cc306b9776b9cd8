"""Exports of 8-bit and floating-point schemes: the reference libraries read the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.export.audit import audit, verify, write_manifest
from compress.export.bitsandbytes import SIDECAR
from compress.export.formats import FORMATS, Weights
from compress.kernels import w8a8
from compress.measure.size import measure_size
from compress.model.families import family_of
from compress.model.folder import ModelFolder, read_json, write_json
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense, load_packed

CPU = torch.device("cpu")

TOKEN, STATIC = InputScheme(), InputScheme(per="tensor")
SCHEMES = [
    Scheme(8, "channel", True),
    Scheme(8, "channel", True, inputs=TOKEN),
    Scheme(8, "tensor", True, inputs=STATIC),
    Scheme(4, 32, True, inputs=TOKEN),
    Scheme(8, "channel", True, "float"),
    Scheme(8, "channel", True, "float", InputScheme("float")),
    Scheme(8, "tensor", True, "float", InputScheme("float", "tensor")),
    Scheme(8, "block", True, "float", InputScheme("float", "group")),
    Scheme(4, 16, True, "float"),
    Scheme(4, 32, True, "float"),
]


def exported(
    source: ModelFolder, scheme: Scheme, tokens: torch.Tensor, path: Path, name: str
) -> ModelFolder:
    """A folder in this format, audited against its record."""
    quantize(
        source,
        path / "record",
        tokens=tokens,
        schemes=Schemes(scheme),
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    record = ModelFolder(path / "record")
    FORMATS[name].write(record, path / "out")
    found = ModelFolder(path / "out")
    audit(record, found)
    return found


def of_whole_blocks(make_model: Callable[..., ModelFolder]) -> ModelFolder:
    """A model whose linears all have rows and columns in steps of 128."""
    return make_model(num_key_value_heads=4)


def differences(
    folder: ModelFolder, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """How far the linears of the library's model are from ours on the inputs they see, as a share of the
    output; by linear, block 1. In float32, where nothing but the format can differ. Not the logits: rounded
    inputs make a step of every last bit on the way, and a random model much of every step."""
    theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype)
    ours = load_dense(folder, CPU, dtype)
    block = ours.model.layers[1]
    names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    weights = Weights(folder)
    for name in names:
        linear = block.get_submodule(name)
        # Theirs is not rounded to the checkpoint's dtype in a float32 model.
        q = weights.get(f"model.layers.1.{name}.weight")
        assert isinstance(q, QTensor)
        if q.inputs is None:
            linear.weight.data = q.dequantize(dtype)
        # Before our own hook, which rounds.
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]}), prepend=True
        )
        linear.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out}))
    with torch.inference_mode():
        theirs(tokens)
        ours(tokens)
        found = {}
        for name in names:
            got = theirs.model.layers[1].get_submodule(name)(inputs[name])
            found[name] = float((got - outputs[name]).norm() / outputs[name].norm())
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_transformers_computes_the_same(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    tmp_path: Path,
    scheme: Scheme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported(of_whole_blocks(make_model), scheme, tokens, tmp_path, "compressed-tensors")
    if scheme.inputs == TOKEN:
        # compressed-tensors puts the largest int8 input on 127.5, vLLM's kernel as we do on 127.
        assert max(differences(folder, tokens).values()) < 0.02
        monkeypatch.setattr(InputScheme, "largest", 127.5)
        monkeypatch.setattr(InputScheme, "_levels", lambda _, x: x.round().clamp(-128, 127))
    # 4-bit floats come back in the dtype of the checkpoint whatever is asked for.
    narrow = scheme.type == "float" and scheme.bits == 4
    found = differences(folder, tokens, torch.bfloat16 if narrow else torch.float32)
    assert len(found) == 7
    assert max(found.values()) < 2e-5


@pytest.mark.parametrize("outliers", ["dynamic", "static"])
def test_bitsandbytes_computes_the_same(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, tmp_path: Path, outliers: str
) -> None:
    """Its layer works in float16. It does not look at fixed columns and finds them while it runs."""
    scheme = Scheme(8, "channel", True, inputs=InputScheme(outliers=outliers, threshold=2.0))
    folder = exported(make_model(), scheme, tokens, tmp_path, "bitsandbytes")
    found = differences(folder, tokens)
    assert max(found.values()) < (2e-3 if outliers == "dynamic" else 0.02)


def reference(
    W: torch.Tensor, readers: list[torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What compressed-tensors itself makes of a weight float32 (out, in) under a group of a config.

    readers: all weights that read the same input, which share what stands for a whole tensor
    """
    scheme = QuantizationScheme.model_validate(config)
    args = scheme.weights
    blocks = W
    divisor = None
    if args.strategy in ("group", "tensor_group"):
        blocks = W.unflatten(1, (-1, args.group_size))
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(W, (0, -W.shape[1] % columns, 0, -W.shape[0] % rows))
        blocks = (
            padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        )
    elif args.strategy == "tensor":
        blocks = torch.cat(readers).reshape(1, -1)
    low, high = blocks.aminmax(dim=-1)
    if args.strategy == "tensor_group":
        every = torch.cat(readers)
        divisor = generate_gparam(every.min(), every.max())
    if args.strategy == "channel":
        low, high = low.unsqueeze(1), high.unsqueeze(1)
    scale, _ = calculate_qparams(low, high, args, divisor)
    if divisor is None and args.type == "float" and args.num_bits == 4:
        scale = scale.float()
    elif divisor is None:
        scale = scale.to(torch.bfloat16).float()
    state = {"weight": W, "weight_scale": scale}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    if config["format"] == "pack-quantized":
        state["weight_shape"] = torch.tensor(W.shape)
    return BaseCompressor.get_value_from_registry(config["format"]).compress(state, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_every_tensor_is_what_the_librarys_compressor_makes(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, tmp_path: Path, scheme: Scheme
) -> None:
    source = of_whole_blocks(make_model)
    folder = exported(source, scheme, tokens, tmp_path, "compressed-tensors")
    config = folder.config["quantization_config"]["config_groups"]["group_0"]
    checked = 0
    for shared in family_of(source.config).inputs:
        names = [f"model.layers.1.{name}" for name in shared.linears]
        readers = [source.tensor(f"{name}.weight").float() for name in names]
        for name, W in zip(names, readers, strict=True):
            for key, wanted in reference(W, readers, config).items():
                written = folder.tensor(f"{name}.{key}")
                assert written.shape == wanted.shape, key
                if key in ("weight", "weight_packed"):
                    assert written.dtype == wanted.dtype, key
                    # One code in a thousand may be a tie that another order of operations breaks.
                    assert (
                        written.view(torch.uint8) == wanted.view(torch.uint8)
                    ).float().mean() > 0.999
                else:
                    assert torch.equal(written.float(), wanted.float()), key
                checked += 1
    assert checked >= 14


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("outliers", ["dynamic", "static"])
def test_verbs_read_a_bitsandbytes_folder(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    tmp_path: Path,
    model_type: str,
    outliers: str,
) -> None:
    """With biases and without: the size counts the columns beside, verify finds what was touched."""
    inputs = InputScheme(outliers=outliers, threshold=2.0)
    scheme = Scheme(8, "channel", True, inputs=inputs)
    folder = exported(make_model(model_type), scheme, tokens, tmp_path, "bitsandbytes")
    packed, kernels = load_packed(folder, CPU)
    assert kernels == {"w8a8" if w8a8.cpu_runs() else "dense": 21}
    dense = load_dense(folder, CPU, torch.float32)
    x = torch.randn(5, 128).bfloat16()
    name = "model.layers.0.self_attn.q_proj"
    with torch.inference_mode():
        got, wanted = packed.get_submodule(name)(x).float(), dense.get_submodule(name)(x.float())
    assert (got - wanted).norm() < 0.01 * wanted.norm()
    size, beside = measure_size(folder), folder.path / SIDECAR
    assert beside.exists() == (outliers == "static")
    if outliers == "static":
        assert size["bytes"] > sum(file.stat().st_size for file in folder.weight_files)
        kept = sum(t.nbytes for t in load_file(beside).values())
        assert 0.01 < 8 * kept / 491520 < size["bits_linears"] - 8
        write_manifest(folder.path, {})
        assert verify(folder.path) == []
        beside.write_bytes(beside.read_bytes()[:-1] + b"?")
        assert verify(folder.path) == [
            f"{SIDECAR} has changed: its SHA-256 differs from the manifest"
        ]


def test_what_others_wrote_is_read_as_it_is(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Row maxima that are no multiple of a bf16 number, a threshold of 0, and 4 bits."""
    scheme = Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))
    folder = exported(make_model(), scheme, tokens, tmp_path, "bitsandbytes")
    name = "model.layers.0.mlp.up_proj"
    file = folder.path / "model.safetensors"
    scb = torch.linspace(0.1, 0.3, 256)
    save_file(load_file(file) | {f"{name}.SCB": scb}, file)
    q = FORMATS["bitsandbytes"].read_linear(ModelFolder(folder.path), name)
    assert torch.equal(q.scale.squeeze(1), scb / 127)
    config = read_json(folder.path / "config.json")
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    write_json(folder.path / "config.json", config)
    q = FORMATS["bitsandbytes"].read_linear(ModelFolder(folder.path), name)
    assert q.inputs == InputScheme()
    config["quantization_config"] |= {"load_in_8bit": False, "load_in_4bit": True}
    write_json(folder.path / "config.json", config)
    with pytest.raises(UserError, match="only load_in_8bit is read here"):
        FORMATS["bitsandbytes"].read_linear(ModelFolder(folder.path), name)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(8, "block", True),
        Scheme(8, "channel", True, inputs=InputScheme(per="group")),
        Scheme(8, 32, True, inputs=TOKEN),
        Scheme(8, "channel", True, inputs=InputScheme("float")),
        Scheme(8, 32, True, "float", InputScheme("float")),
        Scheme(4, 16, True, "float", InputScheme("float")),
    ],
    ids=lambda scheme: scheme.name,
)
def test_what_no_engine_runs_is_refused(scheme: Scheme) -> None:
    with pytest.raises(UserError, match="no engine runs"):
        FORMATS["compressed-tensors"].check(Schemes(scheme))
