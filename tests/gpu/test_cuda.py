"""The same stage, reader and decoder on a CUDA device."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration.moments import Moments
from compress.compose import compose_settings
from compress.config import parse
from compress.kernels import decode_attention, w8a8
from compress.kernels.decode_attention import attend, attend_reference
from compress.kv_cache.cache import PackedLayer, Scales
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.quantize.inputs import InputScheme
from compress.quantize.repair import Kl
from compress.quantize.rounding import Gptaq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes, make_grid, to_codes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale, Opt, Smooth
from compress.runtime.decoder import open_decoder
from compress.runtime.load import load_dense
from eval.bandwidth import CUDA_BYTES
from eval.engines.transformers_decode import open_transformers
from eval.speed import Load, Point, measure_speed

pytestmark = pytest.mark.gpu


def test_quantizing_agrees_with_the_cpu(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    errors = {}
    for name in ("cpu", "cuda"):
        report = quantize(
            tiny,
            tmp_path / name,
            tokens=tokens,
            schemes=Schemes(Scheme(3, 32)),
            transforms=[AwqScale(), AwqClip()],
            roundings=[Nearest()],
            device=torch.device(name),
        )
        errors[name] = [
            entry["relative_error"]
            for block in report["blocks"]
            for entry in block["linears"].values()
        ]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)


def test_refining_and_repair_agree_with_the_cpu(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Loosely: an integer that falls the other way moves those after it."""
    errors, kl = {}, {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        report = quantize(
            tiny,
            tmp_path / name,
            tokens=tokens,
            schemes=Schemes(Scheme(3, 32)),
            transforms=[Opt()],
            roundings=[Gptaq(), Learned(iters=10)],
            device=device,
        )
        errors[name] = [
            entry["relative_error"]
            for block in report["blocks"]
            for entry in block["linears"].values()
        ]
        source, target = ModelFolder(tmp_path / name), tmp_path / f"{name}-repaired"
        kl[name] = Kl(epochs=2)(source, tiny, target, tokens, device)["kl"]
    # One linear of 21 came out a third better on an H100: what must agree is all of them together.
    assert sum(errors["cuda"]) == pytest.approx(sum(errors["cpu"]), rel=0.1)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.5)
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.2)


def test_moments_lose_nothing_in_the_matrix_units() -> None:
    X = (torch.randn(500, 48, generator=torch.Generator().manual_seed(0)) * 30).bfloat16().cuda()
    moments = Moments.zeros(48, X.device)
    moments.add(X)
    exact = X.double()
    H = exact.T @ exact / len(exact)
    assert ((moments.mean().second - H).norm() / H.norm()) < 1e-6


def test_speed_and_memory_are_of_the_device(tiny: ModelFolder) -> None:
    point = Point(batch=2, input_length=8, output_length=4)
    load = Load((point,), warmup=1, repeats=2, seed=0, threads=None, device="cuda")
    openers = {
        "ours": functools.partial(open_decoder, tiny.path, "cuda"),
        "transformers": functools.partial(open_transformers, tiny.path, "cuda"),
    }
    weights = sum(tiny.nbytes(name) for name in tiny.names)
    for found in measure_speed(openers, load).values():
        assert found["loaded_cuda"] >= weights
        (found,) = found["points"]
        assert found["tokens_per_s"] > 0
        # The buffer that bandwidth is measured with is not of the decoding.
        assert weights < found["peak_cuda"] < CUDA_BYTES
        assert found["read_gb_s"] > 500


def test_decoding_on_the_device(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    decoder = open_decoder(tiny.path, "cuda")
    first = decoder.start(tokens[:2], 1)
    model = load_dense(tiny, torch.device("cuda"), torch.bfloat16)
    assert torch.equal(first, model(tokens[:2].cuda()).logits[:, -1].argmax(-1, keepdim=True))


@pytest.mark.parametrize("outliers", ["none", "dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_w8a8_agrees_with_its_reference(outliers: str, rows: int) -> None:
    device = torch.device("cuda")
    scheme = Scheme(8, "channel", True, inputs=InputScheme(outliers=outliers))
    W, columns = torch.randn(192, 576), torch.tensor([1, 500])
    q = replace(to_codes(W, make_grid(W, scheme, torch.bfloat16), scheme), inputs=scheme.inputs)
    x = torch.randn(rows, 576)
    if outliers != "none":
        x[:, columns] *= 100
    if outliers == "static":
        q = replace(q, columns=columns, kept=W[:, columns].bfloat16())
    assert w8a8.supports(q, device, torch.bfloat16)
    y = w8a8.W8A8Weight.pack(q, device).matmul(x.bfloat16().cuda())
    expected = w8a8.reference(x.bfloat16(), q)
    assert ((y.float().cpu() - expected).norm() / expected.norm()) < 6e-3


def test_outliers_and_rounded_inputs_agree_with_the_cpu(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    found = {}
    for name in ("cpu", "cuda"):
        report = quantize(
            tiny,
            tmp_path / name,
            tokens=tokens,
            schemes=Schemes(Scheme(8, "channel", True, inputs=InputScheme(outliers="static"))),
            transforms=[Smooth()],
            roundings=[Nearest()],
            device=torch.device(name),
        )
        layers = [entry["layers"] for entry in report["outliers"]["inputs"].values()]
        found[name] = [layer["largest"] for entry in layers for layer in entry]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.05)
    # In the first block both see the same inputs: the same columns are kept, with the same weights.
    cpu, cuda = (ModelFolder(tmp_path / name) for name in ("cpu", "cuda"))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        columns = [f.tensor(f"model.layers.0.{name}.columns") for f in (cpu, cuda)]
        kept = [f.tensor(f"model.layers.0.{name}.kept").float() for f in (cpu, cuda)]
        assert torch.equal(*columns)
        assert torch.allclose(*kept, rtol=0.02)


@pytest.mark.parametrize("name", ["fp8", "fp8-head", "int8", "int4-token", "int4", "int2"])
def test_decode_attention_on_shapes_of_an_8b_model(name: str) -> None:
    """The compiled kernel in bf16 against the reference, and once more as a captured graph."""
    scheme = parse(compose_settings(["recipe=kv-fp8", f"kv_cache={name}"])).cache
    assert scheme is not None
    device = torch.device("cuda")
    assert decode_attention.supported(scheme, 128, device)
    shape = (8, 1, 1) if name == "fp8-head" else (1,)
    scales = Scales(*(torch.full(shape, 0.02, device=device) for _ in range(2)))
    padding = torch.tensor([0, 300], device=device)
    layer = PackedLayer(scheme, scales=scales if scheme.static else None, padding=padding)
    layer.fused = True
    keys, values = (
        torch.randn(2, 8, 5000, 128, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    stored, _ = layer.update(keys[:, :, -1:], values[:, :, -1:])
    q = torch.randn(2, 32, 128, device=device, dtype=torch.bfloat16)
    expected = attend_reference(q, stored, 128**-0.5)
    found = attend(q, stored, 128**-0.5)
    assert (found.float() - expected).norm() / expected.norm() < 0.02
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = attend(q, stored, 128**-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, found)


def test_a_decoder_with_a_packed_cache(tiny: ModelFolder, tmp_path: Path) -> None:
    scheme = parse(compose_settings(["recipe=kv-int4", "kv_cache.window=64"])).cache
    assert scheme is not None
    quantize_cache(tiny, tmp_path / "int4", scheme, tokens=None, device=torch.device("cpu"))
    decoder = open_decoder(tmp_path / "int4", "cuda")
    decoder.start(torch.randint(256, (2, 150)), 1)
    for _ in range(40):
        decoder.step()
    assert decoder.kernels["static-attention"] == 3
