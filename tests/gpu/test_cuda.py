"""The same stage, reader and decoder on a CUDA device."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from calibration.moments import Moments
from compress.model.folder import ModelFolder
from compress.quantize.repair import Kl
from compress.quantize.rounding import Gptaq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale, Opt
from compress.runtime.decoder import open_decoder
from compress.runtime.load import load_dense
from eval.speed import Load, measure_speed

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
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.2)
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.2)


def test_moments_lose_nothing_in_the_matrix_units() -> None:
    X = (torch.randn(500, 48, generator=torch.Generator().manual_seed(0)) * 30).bfloat16().cuda()
    moments = Moments.zeros(48, X.device)
    moments.add(X)
    exact = X.double()
    H = exact.T @ exact / len(exact)
    assert ((moments.mean().second - H).norm() / H.norm()) < 1e-6


def test_speed_and_memory_are_of_the_device(tiny: ModelFolder) -> None:
    load = Load(input_length=8, output_length=4, batch=2, warmup=1, repeats=2, seed=0, threads=None)
    opener = functools.partial(open_decoder, tiny.path, "cuda")
    found = measure_speed({"tiny": opener}, load)["tiny"]
    assert found["tokens_per_s"] > 0
    assert found["peak_cuda"] > sum(tiny.nbytes(name) for name in tiny.names)


def test_decoding_on_the_device(tiny: ModelFolder, tokens: torch.Tensor) -> None:
    decoder = open_decoder(tiny.path, "cuda")
    first = decoder.start(tokens[:2])
    model = load_dense(tiny, torch.device("cuda"), torch.bfloat16)
    assert torch.equal(first, model(tokens[:2].cuda()).logits[:, -1].argmax(-1, keepdim=True))
