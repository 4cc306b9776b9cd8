"""The kernels for packed weights against their reference, on the interpreter where there is no GPU."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.kernels import packed_linear, tuning
from compress.kernels.fusion import PLAIN, Fusion, around, rms_norm
from compress.kernels.packed_linear import TritonWeight, pack_plane, reference, unpack_plane
from compress.kernels.tuning import Config, Key, Table
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, make_grid, to_codes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP16, BF16 = torch.float16, torch.bfloat16
FP8_TOKEN, FP8_TENSOR = InputScheme("float"), InputScheme("float", "tensor")
FP8_GROUP, INT8_TOKEN = InputScheme("float", "group"), InputScheme()
# Scheme and number of inputs: several groups, and none of 576 inputs fills its last tile.
FORMATS = {
    "w4-g64": (Scheme(4, 64), 576),
    "w4-g128-sym": (Scheme(4, 128, True), 384),
    "w4-g32": (Scheme(4, 32), 288),
    "w4-g192": (Scheme(4, 192), 576),
    "w4-g256-sym": (Scheme(4, 256, True), 768),
    "w4-channel": (Scheme(4, "channel"), 400),
    "w3-g64": (Scheme(3, 64), 576),
    "w3-g128-sym": (Scheme(3, 128, True), 384),
    "w2-g64": (Scheme(2, 64), 576),
    "w2-channel-sym": (Scheme(2, "channel", True), 272),
    "w8-channel-sym": (Scheme(8, "channel", True), 576),
    "w8-g128": (Scheme(8, 128), 384),
    "w8-tensor": (Scheme(8, "tensor", True), 272),
    "w6-g64": (Scheme(6, 64), 576),
    "fp8-channel": (Scheme(8, "channel", True, "float"), 576),
    "fp8-tensor": (Scheme(8, "tensor", True, "float"), 272),
    "fp8-block": (Scheme(8, "block", True, "float"), 576),
    "fp8-channel+fp8-token": (Scheme(8, "channel", True, "float", FP8_TOKEN), 576),
    "fp8-tensor+fp8-tensor": (Scheme(8, "tensor", True, "float", FP8_TENSOR), 272),
    "fp8-block+fp8-group": (Scheme(8, "block", True, "float", FP8_GROUP), 384),
    "w8-channel+int8-token": (Scheme(8, "channel", True, inputs=INT8_TOKEN), 576),
    "w4-g128+fp8-token": (Scheme(4, 128, True, inputs=FP8_TOKEN), 384),
}
THIN = Config("thin", rows=32, slices=2, stages=2)
PRECISE = {FP16: 5e-4, BF16: 4e-3}


def quantized(name: str, rows: int, dtype: torch.dtype = FP16) -> QTensor:
    scheme, columns = FORMATS[name]
    # Columns of different size, as real ones; scales in the dtype of the model.
    W = torch.randn(rows, columns) * torch.randn(columns).exp() * columns**-0.5
    q = to_codes(W, make_grid(W, scheme, dtype), scheme)
    fixed = torch.tensor(4.0 / 448) if scheme.inputs is not None and scheme.inputs.static else None
    return replace(q, inputs=scheme.inputs, input_scale=fixed)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


def check(
    q: QTensor,
    tokens: int,
    config: Config,
    *,
    dtype: torch.dtype = FP16,
    fusion: Fusion = PLAIN,
    with_residual: bool = False,
) -> Tensor:
    x = torch.randn(tokens, q.shape[1]).to(dtype)
    width = q.shape[0] // 2 if fusion.gated else q.shape[0]
    residual = torch.randn(tokens, width).to(dtype) if with_residual else None
    there = replace(
        fusion,
        norm=None if fusion.norm is None else fusion.norm.to(DEVICE),
        bias=None if fusion.bias is None else fusion.bias.to(DEVICE),
    )
    weight = TritonWeight.pack(q, DEVICE)
    y = weight.fused(x.to(DEVICE), there, None if residual is None else residual.to(DEVICE), config)
    assert y.dtype == dtype
    assert y.shape == (tokens, width)
    if q.inputs is not None and fusion.norm is not None:
        # A last bit of the norm moves some inputs by a whole level: take those the kernel rounds.
        wide = DEVICE.type == "cpu" and dtype == BF16
        x, norm = (t.to(torch.float32 if wide else dtype) for t in (x, fusion.norm))
        x, fusion = rms_norm(x, norm, fusion.eps), replace(fusion, norm=None)
    expected = reference(x, q, fusion, residual)
    # The product of x and the gain is rounded, and a gate makes more of it.
    assert difference(y, expected) < (1 if fusion.norm is None else 4) * PRECISE[dtype]
    return y


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "dtype"), [(1, 40, FP16), (3, 24, BF16), (16, 44, FP16)]
)
def test_every_format(name: str, tokens: int, rows: int, dtype: torch.dtype) -> None:
    """Rows that fill neither a program nor, with 44, a chunk."""
    torch.manual_seed(tokens)
    check(quantized(name, rows, dtype), tokens, THIN, dtype=dtype)


@pytest.mark.parametrize("name", ["w4-g64", "fp8-block+fp8-group"])
def test_more_tokens_than_a_program_takes(name: str) -> None:
    torch.manual_seed(0)
    fusion = Fusion(torch.rand(quantized(name, 64).shape[1]) + 0.5, 1e-5, gated=True)
    config = Config("wide", rows=32, stages=2, split=2)
    check(quantized(name, 64), 150, config, fusion=fusion, with_residual=True)


@pytest.mark.parametrize("name", ["w4-g64", "w3-g128-sym", "w8-g128", "fp8-block+fp8-group"])
def test_wide_products(name: str) -> None:
    torch.manual_seed(0)
    for tokens, dtype in ((5, FP16), (33, BF16)):
        check(quantized(name, 40), tokens, Config("wide", rows=32, stages=2), dtype=dtype)


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [16, 64])
def test_programs_of_any_size(slices: int, rows: int) -> None:
    torch.manual_seed(slices)
    config = Config("thin", rows, slices, 3)
    check(quantized("w4-g64", 72), 1, config)


@pytest.mark.parametrize("path", ["thin", "wide"])
def test_programs_that_share_columns(path: str) -> None:
    """Up to the order of the sums, and the same twice."""
    torch.manual_seed(0)
    q = quantized("w4-g256-sym", 40)
    # Only the interpreter takes float32, which shows more.
    dtype, close = (torch.float32, 1e-5) if DEVICE.type == "cpu" else (FP16, 2e-3)
    weight, x = TritonWeight.pack(q, DEVICE), torch.randn(3, q.shape[1], device=DEVICE, dtype=dtype)
    whole, parts, again, most = (
        weight.fused(x, PLAIN, config=Config(path, 32, 1, 2, split)) for split in (1, 2, 2, 64)
    )
    for other in (parts, most):
        assert torch.allclose(other, whole, rtol=close, atol=close * float(whole.abs().max()))
    assert torch.equal(parts, again)


def test_many_rows() -> None:
    torch.manual_seed(0)
    check(quantized("w4-g128-sym", 960), 1, Config("thin", rows=64, slices=1, stages=2))


@pytest.mark.parametrize("name", ["w4-g64", "w8-channel-sym", "fp8-channel+fp8-token"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("split", [1, 2])
def test_what_surrounds_the_product(name: str, tokens: int, split: int) -> None:
    """All of it at once, of a norm in the kernel (1, 2) and before it (4), and each part alone."""
    torch.manual_seed(tokens)
    rows, config = 48, replace(THIN, split=split)
    q = quantized(name, rows)
    norm, bias = torch.randn(q.shape[1]).exp().half(), torch.randn(rows).half()
    for fusion, with_residual in (
        (Fusion(norm, 1e-5, bias, gated=True), True),
        (Fusion(norm, 1e-5), False),
        (Fusion(gated=True), False),
        (Fusion(bias=bias), True),
    ):
        dtype = FP16 if with_residual else BF16
        check(q, tokens, config, dtype=dtype, fusion=fusion, with_residual=with_residual)


def test_gate_and_up_in_one_chunk_are_not_mixed_up() -> None:
    """Half the rows are no whole chunks: steps one by one."""
    torch.manual_seed(0)
    check(quantized("w4-g64", 24), 2, THIN, fusion=Fusion(gated=True), with_residual=True)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_weights_in_16_bits(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    W = torch.randn(44, 336).to(dtype).to(DEVICE)
    x = torch.randn(2, tokens, 336).to(dtype).to(DEVICE)
    norm, bias = torch.randn(336).exp().to(dtype), torch.randn(44).to(dtype)
    fusion = Fusion(norm.to(DEVICE), 1e-6, bias.to(DEVICE))
    weight = TritonWeight.dense(W)
    assert weight.words.data_ptr() == W.data_ptr()
    expected = around(
        lambda x: x @ W.float().T,
        x.float(),
        replace(fusion, norm=norm.float().to(DEVICE), bias=bias.float().to(DEVICE)),
    ).cpu()
    for config in (THIN, Config("wide", rows=16, stages=2), Config("dense")):
        y = weight.fused(x, fusion, config=config)
        assert y.shape == (2, tokens, 44)
        # torch's own steps round after each.
        tolerance = 2 * PRECISE[dtype] if config.path == "dense" else PRECISE[dtype]
        assert difference(y, expected) < tolerance


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_bit_by_bit(name: str) -> None:
    torch.manual_seed(0)
    q = quantized(name, 44)
    weight = TritonWeight.pack(q, DEVICE)
    for dtype in (torch.float32, FP16):
        assert torch.equal(weight.dequantize(dtype).cpu(), q.dequantize(dtype))


@pytest.mark.parametrize("inputs", [INT8_TOKEN, InputScheme(per="tensor")], ids=lambda i: i.name)
def test_many_tokens_with_8_bit_inputs(inputs: InputScheme) -> None:
    """The product of integers, and the same at few tokens."""
    torch.manual_seed(0)
    W, x = torch.randn(48, 256), torch.randn(24, 256)
    scheme = Scheme(8, "channel", True, inputs=inputs)
    q = to_codes(W, make_grid(W, scheme, BF16), scheme)
    q = replace(q, inputs=inputs, input_scale=torch.tensor(3.0 / 127) if inputs.static else None)
    weight = TritonWeight.pack(q, DEVICE)
    many = weight.fused(x.half().to(DEVICE), PLAIN, config=Config("dense"))
    few = weight.fused(x[:3].half().to(DEVICE), PLAIN, config=Config("dense"))
    assert difference(many, reference(x.half(), q)) < PRECISE[FP16]
    assert difference(few, reference(x[:3].half(), q)) < 2 * PRECISE[FP16]


@pytest.mark.parametrize("name", ["fp8-channel+fp8-token", "fp8-block+fp8-group"])
def test_inputs_are_rounded_to_the_same_levels(name: str) -> None:
    """Bit by bit, subnormal levels and the largest ones included."""
    q = quantized(name, 16)
    assert q.inputs is not None
    x = torch.randn(5, q.shape[1]) * torch.randn(5, q.shape[1]).mul(4).exp()
    levels, scale = TritonWeight.pack(q, DEVICE)._rounded(x.to(DEVICE), torch.float32)
    groups = levels.unflatten(1, (-1, 128 if q.inputs.per == "group" else q.shape[1]))
    found = groups * scale.view(groups.shape[1], 5).T.unsqueeze(-1)
    assert torch.equal(found.flatten(1).cpu(), q.inputs.round(x))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 128), (44, 400), (3, 16)])
def test_planes_round_trip(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    words = pack_plane(codes, bits)
    assert words.shape == (-(-shape[0] // 8), -(-shape[1] // 128), 32 * bits)
    assert torch.equal(unpack_plane(words, bits, codes.shape), codes)


def test_packing_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(16, (44, 400), dtype=torch.uint8)
    whole = pack_plane(codes, 4)
    monkeypatch.setattr(packed_linear, "CODES_AT_ONCE", 1)
    assert torch.equal(pack_plane(codes, 4), whole)


def test_bytes_of_a_weight() -> None:
    """3 bits are 3, and a scale is counted."""
    weight = TritonWeight.pack(quantized("w3-g128-sym", 64), DEVICE)
    assert weight.nbytes == 64 * 384 * 3 // 8 + 2 * 64 * 3


def test_what_the_kernels_take() -> None:
    q = quantized("w4-g64", 16)
    assert not packed_linear.supports(q, torch.device("cpu"), BF16)
    assert packed_linear.layout_of(q) is not None
    assert packed_linear.name(q) == "w4a16"
    assert packed_linear.name(quantized("fp8-channel+fp8-token", 16)) == "fp8-w8a8"
    assert packed_linear.layout_of(quantized_in("nvfp4")) is None
    assert packed_linear.layout_of(replace(q, columns=torch.tensor([0]))) is None
    W = torch.randn(16, 48)
    odd = to_codes(W, make_grid(W, Scheme(4, 24), FP16), Scheme(4, 24))
    assert packed_linear.layout_of(odd) is None


def quantized_in(name: str) -> QTensor:
    scheme = {"nvfp4": Scheme(4, 16, True, "float")}[name]
    W = torch.randn(16, 64)
    return to_codes(W, make_grid(W, scheme, BF16), scheme)


def test_the_norm_of_one_token_is_as_precise_as_the_reference_in_bfloat16() -> None:
    """Large activations in two channels: what is rounded once loses no more than what is rounded twice."""
    torch.manual_seed(0)
    q = quantized("w4-g64", 64, BF16)
    x = torch.randn(1, q.shape[1])
    x[:, [3, 500]] *= 300
    x, norm = x.to(BF16), torch.randn(q.shape[1]).exp().to(BF16)
    exact = reference(x, q, Fusion(norm, 1e-5))
    W = q.dequantize(torch.float32)
    steps = rms_norm(x, norm, 1e-5).float() @ W.T
    y = TritonWeight.pack(q, DEVICE).fused(x.to(DEVICE), Fusion(norm.to(DEVICE), 1e-5), None, THIN)
    assert difference(y, exact) < 1.5 * difference(steps, exact) + 2e-3


def key(tokens: int = 1, N: int = 4096, K: int = 4096, name: str = "w4a16") -> Key:
    return Key("gpu", "bfloat16", name, False, 128, N, K, tokens)


def test_configurations_without_a_measurement() -> None:
    for name in ("w4a16", "fp8-w8a8", "w16a16"):
        for tokens in (1, 8, 16, 32, 64):
            for N, K in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (512, 2048)):
                one = key(tokens, N, K, name)
                config = tuning.default(one, 132)
                held = config.stages - (config.path == "thin")
                assert held * tuning.stage_bytes(one, config) <= tuning.SHARED
                assert config.path == ("wide" if tokens > 32 else "thin")
                if N >= 4096:
                    assert math.ceil(N / config.rows) * config.split >= 128
        assert tuning.default(key(512, name=name), 132).path == "dense"
    assert tuning.default(key(256), 132).path == "wide"
    zeros = replace(key(256), zeros=True, group=64)
    assert tuning.default(zeros, 132).path == "dense"
    assert tuning.default(key(128, name="w16a16"), 132).path == "dense"
    assert [tuning.bucket(n) for n in (1, 2, 8, 9, 33, 64, 65, 9999)] == [
        1, 8, 8, 16, 64, 64, 128, 512
    ]  # fmt: skip
    paths = {n: [c.path for c in tuning.starts(key(n), 132)] for n in (1, 16, 256)}
    assert paths == {1: ["thin"], 16: ["thin", "wide", "dense"], 256: ["wide", "dense"]}


def test_tuning_finds_the_fastest_axis_by_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device of known times: where one configuration fails, and another is the best of all."""
    best = Config("thin", 16, 8, 1, 2)

    def microseconds(calls: list[Config]) -> float:
        (config,) = calls
        if config.stages == 3:
            raise ValueError("out of resources")
        axes = ("rows", "slices", "stages", "split")
        return 1.0 + sum(getattr(config, axis) != getattr(best, axis) for axis in axes)

    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    table = Table(tmp_path / "configs.json")
    times = tuning.tune(key(), lambda config: [config], table, 132)  # type: ignore[arg-type, list-item, return-value]
    assert Table.load(tmp_path / "configs.json").config(key(), 132) == best
    assert len(times) < 14
    assert all(config.stages != 3 for config in times)
    monkeypatch.setattr(tuning, "AXES", {})
    monkeypatch.setattr(tuning, "starts", lambda key, processors: [Config(stages=3)])
    with pytest.raises(RuntimeError, match="no configuration runs"):
        tuning.tune(key(), lambda config: [config], table, 132)  # type: ignore[arg-type, list-item, return-value]


def test_the_table_is_kept_and_found_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "configs.json")
    table.found[key().text] = Config("thin", 64, 8, 5, 2)
    table.save()
    again = Table.load(tmp_path / "configs.json")
    assert again == table
    assert again.config(key(), 132) == Config("thin", 64, 8, 5, 2)
    assert again.config(key(8), 132) == tuning.default(key(8), 132)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 0, "configs": {}}',
        '{"version": 1, "configs": {"a": {"path": "other"}}}',
        '{"version": 1, "configs": {"a": {"rows": "many"}}}',
        '{"version": 1}',
    ],
)
def test_a_foreign_table_is_not_used(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "configs.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert Table.load(tmp_path / "configs.json").found == {}
    assert "is not used" in caplog.text


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, "channel"])
def test_rows_are_those_of_the_dequantized_weight(bits: int, group: int | str) -> None:
    scheme = Scheme(bits, group, True)
    W = torch.randn(50, 192, generator=torch.Generator().manual_seed(bits))
    weight = TritonWeight.pack(
        to_codes(W, make_grid(W, scheme, torch.float16), scheme), torch.device("cpu")
    )
    index = torch.tensor([49, 0, 8, 8, 31])
    found = weight.rows(index, torch.float16)
    assert torch.equal(found, weight.dequantize(torch.float16)[index])
