"""The GPTQ and AWQ formats: what is in the files, and that a reader written from their description alone gets
the same numbers. GPTQModel's own reader is asked by eval/engines/unpack_check.py."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.compose import compose_settings
from compress.config import check_exports, parse
from compress.errors import UserError
from compress.export.audit import AuditError, audit, verify, write_manifest
from compress.export.formats import FORMATS, Weights, check_fits
from compress.measure.size import measure_size
from compress.model.families import family_of
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.shapes import ShapeFolder
from compress.plan.checkpoint import as_planned, on_disk
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize, settle
from compress.runtime.load import load_dense, load_packed

CPU = torch.device("cpu")
FILE = "model.safetensors"
Export = Callable[..., tuple[ModelFolder, ModelFolder]]

GPTQ = [
    Scheme(bits, size, symmetric)
    for bits in (2, 3, 4, 8)
    for size in (32, "channel")
    for symmetric in (True, False)
]
AWQ = [Scheme(4, size, symmetric) for size in (32, 64, "channel") for symmetric in (True, False)]
CASES = [*(("gptq", scheme) for scheme in GPTQ), *(("awq", scheme) for scheme in AWQ)]


@pytest.fixture(scope="module")
def export(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., ModelFolder]
) -> Export:
    """export(format, schemes, **model) -> (record, exported), made once."""
    made: dict[str, tuple[ModelFolder, ModelFolder]] = {}

    def run(name: str, schemes: Scheme | Schemes, **changes: Any) -> Any:
        key = repr((name, schemes, changes))
        if key not in made:
            path = tmp_path_factory.mktemp(name)
            quantize(
                make_model(**changes),
                path / "record",
                tokens=None,
                schemes=Schemes(schemes) if isinstance(schemes, Scheme) else schemes,
                transforms=[],
                roundings=[Nearest()],
                device=CPU,
            )
            source = ModelFolder(path / "record")
            FORMATS[name].write(source, path / "out")
            made[key] = source, ModelFolder(path / "out")
        return made[key]

    return run


def field(words: list[int], bits: int, index: int) -> int:
    """A field of a little-endian stream of 32-bit words, the first in the lowest bits."""
    stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return stream >> index * bits & 2**bits - 1


def textbook(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The weight (out, in) that the stored tensors of a linear stand for, a number at a time."""
    bits, names = config["bits"], ("qweight", "qzeros", "scales")
    codes, zeros, scales = (tensors[name].tolist() for name in names)
    outputs, groups = len(scales[0]), len(scales)
    if config["quant_method"] == "awq":
        inputs = len(codes)
        place = {column: i for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}

        def code(n: int, k: int) -> int:
            return codes[k][n // 8] >> 4 * place[n % 8] & 15

        def zero(n: int, g: int) -> int:
            return zeros[g][n // 8] >> 4 * place[n % 8] & 15
    else:
        inputs = len(codes) * 32 // bits
        columns = list(zip(*codes, strict=True))
        first = int(config["checkpoint_format"] == "gptq")

        def code(n: int, k: int) -> int:
            return field(list(columns[n]), bits, k)

        def zero(n: int, g: int) -> int:
            return field(zeros[g], bits, n) + first

    W = torch.empty(outputs, inputs, dtype=torch.float64)
    for n in range(outputs):
        level = [zero(n, g) for g in range(groups)]
        for k in range(inputs):
            g = k * groups // inputs
            W[n, k] = scales[g][n] * (code(n, k) - level[g])
    return W


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_reader_from_the_description_gets_the_weights_of_the_record(
    export: Export, name: str, scheme: Scheme
) -> None:
    source, exported = export(name, scheme)
    assert audit(source, exported)["linears"] == 21
    linear = "model.layers.1.self_attn.k_proj"
    files = load_file(exported.path / FILE)
    parts = {
        key.removeprefix(f"{linear}."): t
        for key, t in files.items()
        if key.startswith(f"{linear}.")
    }
    found = textbook(parts, exported.config["quantization_config"])
    wanted = record.read_linear(source, linear)
    groups = 1 if scheme.group_size == "channel" else 128 // int(scheme.group_size)
    assert wanted.scale.shape == (64, groups)
    assert torch.equal(found.float(), wanted.dequantize(torch.float32))


def described(exported: ModelFolder) -> dict[str, tuple[str, list[int]]]:
    return {
        name.removeprefix("model.layers.1."): (str(t.dtype).removeprefix("torch."), list(t.shape))
        for name, t in load_file(exported.path / FILE).items()
        if name.startswith(("model.layers.1.mlp.down", "model.layers.1.self_attn.k"))
    }


def test_keys_shapes_dtypes_of_gptq(export: Export) -> None:
    _, exported = export("gptq", Scheme(3, 32))
    assert described(exported) == {
        "mlp.down_proj.g_idx": ("int32", [256]),
        "mlp.down_proj.qweight": ("int32", [24, 128]),
        "mlp.down_proj.qzeros": ("int32", [8, 12]),
        "mlp.down_proj.scales": ("float16", [8, 128]),
        "self_attn.k_proj.g_idx": ("int32", [128]),
        "self_attn.k_proj.qweight": ("int32", [12, 64]),
        "self_attn.k_proj.qzeros": ("int32", [4, 6]),
        "self_attn.k_proj.scales": ("float16", [4, 64]),
    }
    config = exported.config["quantization_config"]
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 3,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert read_json(exported.path / "quantize_config.json") == config
    assert exported.tensor("model.layers.1.self_attn.k_proj.g_idx")[[0, 31, 32, 127]].tolist() == [
        0, 0, 1, 3,
    ]  # fmt: skip
    _, symmetric = export("gptq", Scheme(4, 32, True))
    assert symmetric.config["quantization_config"]["checkpoint_format"] == "gptq"
    # Zero points of 8 are stored as 7.
    zeros = symmetric.tensor("model.layers.1.self_attn.k_proj.qzeros")
    assert bool((zeros == 0x77777777).all())
    _, row = export("gptq", Scheme(4, "channel"))
    assert row.config["quantization_config"]["group_size"] == -1


def test_keys_shapes_dtypes_of_awq(export: Export) -> None:
    _, exported = export("awq", Scheme(4, 32, True))
    assert described(exported) == {
        "mlp.down_proj.qweight": ("int32", [256, 16]),
        "mlp.down_proj.qzeros": ("int32", [8, 16]),
        "mlp.down_proj.scales": ("float16", [8, 128]),
        "self_attn.k_proj.qweight": ("int32", [128, 8]),
        "self_attn.k_proj.qzeros": ("int32", [4, 8]),
        "self_attn.k_proj.scales": ("float16", [4, 64]),
    }
    assert exported.config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    zeros = exported.tensor("model.layers.1.self_attn.k_proj.qzeros")
    assert bool((zeros == 0x88888888 - 2**32).all())


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_rest_of_the_project_reads_them(
    export: Export, name: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The same logits and kernels as from compressed-tensors, the planned bytes, a manifest that holds."""
    scheme = Scheme(4, 32)
    source, exported = export(name, scheme, model_type="qwen2")
    assert "model.layers.0.self_attn.q_proj.bias" in exported
    FORMATS["compressed-tensors"].write(source, tmp_path / "other")
    other = ModelFolder(tmp_path / "other")
    with torch.inference_mode():
        logits = [load_dense(f, CPU, torch.bfloat16)(tokens).logits for f in (exported, other)]
    assert torch.equal(*logits)
    assert load_packed(exported, CPU)[1] == load_packed(other, CPU)[1]
    # Planned from shapes alone; a model without biases, which shapes do not tell apart.
    source, exported = export(name, scheme)
    settled = settle(source_of(source), family_of(source.config), Schemes(scheme))
    planned, size = as_planned(source_of(source), settled, export=name), measure_size(exported)
    assert planned.files == pytest.approx(size["bytes"], rel=0.01)
    assert planned.bits_linears == pytest.approx(size["bits_linears"], rel=1e-9)
    assert on_disk(exported).mlp == planned.mlp
    shutil.copytree(exported.path, tmp_path / "out")
    write_manifest(tmp_path / "out", {})
    assert verify(tmp_path / "out") == []


def source_of(folder: ModelFolder) -> ShapeFolder:
    return ShapeFolder("x", {k: v for k, v in folder.config.items() if k != record.KEY})


def test_mixed_bits_are_in_dynamic(export: Export) -> None:
    four, name = Scheme(4, 32), "model.layers.1.mlp.down_proj"
    source, exported = export("gptq", Schemes(four, {name: replace(four, bits=3)}))
    assert exported.config["quantization_config"]["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 3, "group_size": 32, "sym": False}
    }
    assert audit(source, exported)["linears"] == 21
    bits = {n: q.bits for n, q in linears(exported).items()}
    assert bits.pop(name) == 3
    assert set(bits.values()) == {4}


def linears(folder: ModelFolder) -> dict[str, QTensor]:
    weights = Weights(folder)
    found = {name: weights.get(f"{name}.weight") for name in weights.linears}
    assert all(isinstance(q, QTensor) for q in found.values())
    return found  # type: ignore[return-value]


def changed(
    folder: ModelFolder, path: Path, tensors: dict[str, Any], config: dict[str, Any]
) -> ModelFolder:
    """A copy in which functions of tensors, by the end of their name, and keys of the config are others."""
    shutil.copytree(folder.path, path)
    files = load_file(path / FILE)
    for end, make in tensors.items():
        files |= {name: make(t).contiguous() for name, t in files.items() if name.endswith(end)}
    save_file(files, path / FILE, metadata={"format": "pt"})
    stated = {**folder.config["quantization_config"], **config}
    stated = {key: value for key, value in stated.items() if value is not None}
    write_json(path / "config.json", {**folder.config, "quantization_config": stated})
    return ModelFolder(path)


def test_files_of_others(export: Export, tmp_path: Path) -> None:
    """Zero points of the first version, keys of older writers, an order of columns that is none."""
    _, exported = export("gptq", Scheme(4, 32))
    ours = linears(exported)
    # Of zero points above 0 each field can be one less without borrowing from the next.
    floor = changed(exported, tmp_path / "floor", {"qzeros": lambda t: t | 0x11111111}, {})
    first = changed(
        floor,
        tmp_path / "first",
        {"qzeros": lambda t: t - 0x11111111},
        {"checkpoint_format": None, "pack_dtype": None, "lm_head": None},
    )
    for name, q in linears(first).items():
        assert q.zero is not None
        assert torch.equal(q.zero, ours[name].zero | 1)  # type: ignore[operator]
        assert torch.equal(q.codes, ours[name].codes)
    bare = {"version": None, "bits": None, "w_bit": 4, "group_size": None, "q_group_size": 32}
    _, awq = export("awq", Scheme(4, 32))
    named = linears(changed(awq, tmp_path / "awq", {}, bare))
    assert all(torch.equal(named[name].zero, q.zero) for name, q in ours.items())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tensors", "config", "sentence"),
    [
        ("gptq", {"g_idx": lambda t: t.flip(0)}, {}, r"in an order of their own \(desc_act\)"),
        ("gptq", {"qzeros": torch.zeros_like}, {"checkpoint_format": "gptq_p"}, "this is 'gptq_p'"),
        (
            "gptq",
            {"qzeros": lambda t: torch.full_like(t, -1)},
            {"checkpoint_format": "gptq"},
            "zero points of .* are stored as 15",
        ),
        ("gptq", {}, {"bits": 5}, "of 5 bits, group_size 32, is not read here"),
        ("gptq", {}, {"group_size": 64}, r"qzeros has shape .* asks for \(4, 16\)"),
        ("awq", {}, {"version": "gemv"}, "version gemm with 4 bits is read here, this is 'gemv'"),
        ("awq", {}, {"group_size": 64}, r"qzeros has shape .* asks for \(4, 16\)"),
    ],
)
def test_what_is_not_read(
    export: Export, tmp_path: Path, name: str, tensors: Any, config: Any, sentence: str
) -> None:
    _, exported = export(name, Scheme(4, 32))
    with pytest.raises(UserError, match=sentence):
        linears(changed(exported, tmp_path / "changed", tensors, config))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_an_export_that_is_not_the_record_fails_its_audit(
    export: Export, tmp_path: Path, name: str
) -> None:
    source, exported = export(name, Scheme(4, 32))
    for i, (end, make) in enumerate(
        {"qweight": lambda t: t ^ 1, "scales": lambda t: 2 * t}.items()
    ):
        broken = changed(exported, tmp_path / str(i), {f"1.mlp.up_proj.{end}": make}, {})
        with pytest.raises(AuditError, match=r"layers\.1\.mlp\.up_proj.* reads back different"):
            audit(source, broken)


def test_scales_too_small_for_float16_keep_their_type(
    export: Export, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """2^-17 times a number of 8 bits is one of float16, below its normal ones; 2^-18 times it is not."""
    source, _ = export("gptq", Scheme(4, 32))
    for power, kept in ((17, torch.float16), (18, torch.bfloat16)):
        key, path = "model.layers.2.mlp.up_proj.scale", tmp_path / str(power)
        least = torch.full((256, 4), 255 / 128 * 2.0**-power, dtype=torch.bfloat16)
        shutil.copytree(source.path, path)
        small = ModelFolder(path)
        file = small.file_of(key)
        save_file({**load_file(file), key: least}, file, metadata={"format": "pt"})
        caplog.clear()
        for name in ("gptq", "awq"):
            with caplog.at_level(logging.WARNING):
                FORMATS[name].write(small, tmp_path / f"{name}-{power}")
            exported = ModelFolder(tmp_path / f"{name}-{power}")
            assert audit(small, exported)["linears"] == 21
            scales = [exported.tensor(n) for n in exported.names if n.endswith(".scales")]
            assert {t.dtype for t in scales} == {kept}
        assert ("do not fit float16" in caplog.text) == (kept == torch.bfloat16)


CACHE = ["stages=[quantize,kv_cache]", "kv_cache=fp8"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["export=gptq", "scheme.bits=6"], "export=gptq holds integers of 2, 3, 4, 8 bits"),
        (["export=gptq", "scheme=fp8"], "export=gptq holds integers"),
        (["export=gptq", "scheme=w8a8-int8"], r"not int8-channel-sym\+int8-token"),
        (["export=gptq", "head=int8"], "export=gptq keeps the head in 16 bits"),
        (["export=gptq", "search=average"], "not int5-gauto-asym: choose another scheme or search"),
        (["export=gptq", "search=average", "search.choices=[3,4,8]"], None),
        (["export=gguf", "search=average"], "zero points up to 5 bits, not int6-gauto-asym"),
        (["export=gguf", "search=average", "search.choices=[3,4,5]"], None),
        (["export=gptq", "scheme.group_size=96"], "export=gptq has groups of 16, 32, 64, 128, 256"),
        (["export=awq", "scheme.group_size=256"], "export=awq has groups of 16, 32, 64, 128 col"),
        (["export=awq", *CACHE], "export=awq has no place for the scales of the cache"),
        (["export=gptq", *CACHE], "export=gptq has no place for the scales of the cache"),
        (["export=gguf", *CACHE], "export=gguf has no place for the scales of the cache"),
        (["export=awq", "scheme.bits=3"], "export=awq holds integers of 4 bits"),
        (["export=awq", "head=int4"], "export=awq keeps the head in 16 bits"),
        (["export=awq", "search=average"], "the same in all linears, not mixed-int4-gauto-asym"),
        (["export=[compressed-tensors,awq]", "scheme.bits=3"], "export=awq holds integers of 4"),
        (["export=[gptq,nope]"], "export=nope is not known: known are awq"),
        (["export=[]"], r"export=\[\] is not allowed: choose from compressed-tensors"),
        (["export=dense", "scheme=fp8"], "export=dense holds weights alone, and fp8-channel"),
    ],
)
def test_what_the_formats_do_not_hold(words: list[str], sentence: str | None) -> None:
    def ask() -> Any:
        return parse(compose_settings(["recipe=rtn-int4", *words]))

    if sentence is None:
        assert ask().search is not None
    else:
        with pytest.raises(UserError, match=sentence):
            ask()


def test_sizes_that_do_not_fit(tiny: ModelFolder, make_model: Callable[..., ModelFolder]) -> None:
    schemes = Schemes(Scheme(4, 16))
    with pytest.raises(
        UserError, match=r"outputs in steps of 32 and inputs in steps of 32, a is 48 x"
    ):
        check_fits("gptq", tiny, schemes, {"a": (48, 64)})
    with pytest.raises(
        UserError, match=r"outputs in steps of 8 and inputs in steps of 1, a is 12 x"
    ):
        check_fits("awq", tiny, schemes, {"a": (12, 64)})
    check_fits("awq", tiny, schemes, {"a": (48, 40)})
    wide = make_model(dtype="float32")
    with pytest.raises(UserError, match="export=awq holds models of bfloat16 or float16"):
        check_fits("awq", wide, schemes, {"a": (48, 40)})


def test_formats_have_no_knobs() -> None:
    settings = compose_settings(["recipe=rtn-int4"])
    settings.export = {"awq": {"version": "gemv"}}
    with pytest.raises(UserError, match=r"export\.awq\.version is not known: it has no knobs"):
        check_exports(settings)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_zero_points_that_are_all_in_the_middle(export: Export, tmp_path: Path, name: str) -> None:
    """Of a scheme with zero points; AWQ stores those of a symmetric one alike."""
    source, _ = export(name, Scheme(4, 32))
    key = "model.layers.1.self_attn.k_proj.zero"
    shutil.copytree(source.path, tmp_path / "record")
    middle = ModelFolder(tmp_path / "record")
    file = middle.file_of(key)
    zeros = torch.full_like(source.tensor(key), 8)
    save_file({**load_file(file), key: zeros}, file, metadata={"format": "pt"})
    FORMATS[name].write(middle, tmp_path / "out")
    written = ModelFolder(tmp_path / "out")
    assert audit(middle, written)["linears"] == 21
    with pytest.raises(AuditError, match=r"k_proj\.weight reads back different"):
        audit(source, written)


def test_several_formats_in_their_order() -> None:
    run = parse(compose_settings(["recipe=rtn-int4", "export=[gptq,awq,compressed-tensors]"]))
    assert run.first_format == "gptq"
    assert list(run.settings.export) == ["gptq", "awq", "compressed-tensors"]
    assert json.dumps(run.settings.export) == '{"gptq": {}, "awq": {}, "compressed-tensors": {}}'
