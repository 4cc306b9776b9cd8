"""Quantization-aware distillation: straight through onto the record's grids, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.distill.knobs import Distill
from compress.distill.latent import LatentLinear, rounded
from compress.distill.stage import distill
from compress.distill.student import open_student
from compress.errors import UserError
from compress.export import compressed_tensors
from compress.export.audit import audit
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Grid, Scheme, Schemes, fake_quantize, make_grid, to_codes
from compress.quantize.stage import quantize
from compress.runtime.load import load_dense
from tests.distill import CPU, measured

KNOBS = Distill(steps=40, batch=4, micro_batch=4, rate=1e-2, log_every=10)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(256, (17, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def decided(
    make_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[ModelFolder, ModelFolder]]:
    """decided(model_type, scheme, head) -> (original, record), by rounding to nearest"""

    def make(
        model_type: str, scheme: Scheme, head: Scheme | None = None
    ) -> tuple[ModelFolder, ModelFolder]:
        original, target = make_model(model_type), tmp_path_factory.mktemp("latent") / "record"
        quantize(
            original,
            target,
            tokens=None,
            schemes=Schemes(scheme, head=head),
            transforms=[],
            roundings=[Nearest()],
            device=CPU,
        )
        return original, ModelFolder(target)

    return make


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_and_its_gradient(symmetric: bool) -> None:
    """As the scheme rounds; the gradient passes where the nearest code is one of the grid's."""
    W = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(3, 8, symmetric)
    grid = make_grid(0.6 * W, scheme, torch.bfloat16)
    W.requires_grad_()
    scale = grid.scale.float()
    zero = torch.full_like(scale, 4.0) if grid.zero is None else grid.zero.float()
    found = rounded(W, scale, zero, 3)
    assert torch.equal(found, fake_quantize(W.detach(), grid, scheme))
    G = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    (found * G).sum().backward()
    level = W.detach().unflatten(1, (3, 8)) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    inside = ((level > -0.5) & (level < 7.5)).flatten(1)
    assert 0.1 < (~inside).float().mean() < 0.9
    assert W.grad is not None
    assert torch.equal(W.grad, G * inside)


@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(8, "channel", True)])
def test_the_student_starts_as_the_record(
    decided: Callable[..., tuple[ModelFolder, ModelFolder]], scheme: Scheme
) -> None:
    """Every latent weight lies on its code, exactly."""
    _, source = decided("qwen2", scheme)
    student = open_student(source, KNOBS, CPU)
    latents = {n: m for n, m in student.model.named_modules() if isinstance(m, LatentLinear)}
    assert sorted(latents) == sorted(record.linears(source))
    for name, module in latents.items():
        q = record.read_linear(source, name)
        weight = module.weight.detach()
        assert torch.equal(to_codes(weight, Grid(q.scale, q.zero), scheme).codes, q.codes)
        exact = q.dequantize(torch.float32)
        assert torch.equal(weight, exact)
        assert torch.equal(rounded(weight, module.scale, module.zero, q.bits), exact)
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    assert {n for n in trained if n.endswith("bias")} >= {"model.layers.0.self_attn.q_proj.bias"}


@pytest.mark.parametrize(
    ("model_type", "scheme", "head"),
    [
        ("llama", Scheme(3, 32), None),
        ("qwen2", Scheme(4, "channel", True), Scheme(8, "channel", True)),
    ],
)
def test_integers_are_picked_anew(
    decided: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    model_type: str,
    scheme: Scheme,
    head: Scheme | None,
) -> None:
    original, source = decided(model_type, scheme, head)
    report = distill(source, original, tmp_path / "t", tmp_path / "s", blocks, KNOBS, CPU)
    written = ModelFolder(tmp_path / "t")
    assert written.config == source.config
    assert written.names == source.names
    changed = set()
    for name in source.names:
        old, new = source.tensor(name), written.tensor(name)
        assert (old.dtype, old.shape) == (new.dtype, new.shape), name
        if not torch.equal(old, new):
            changed.add(name)
            if name.endswith(".codes"):
                assert new.max() < 2**scheme.bits
    linears = {n for n in record.linears(source) if "layers" in n}
    expected = {f"{name}.codes" for name in linears}
    expected |= {n for n in source.names if n.endswith(("norm.weight", "bias"))}
    assert changed == expected
    parameters = sum(source.tensor(name).numel() for name in expected)
    assert report["parameters"] == parameters

    held = blocks[[15]]
    start, end = measured(source, original, held), measured(written, original, held)
    assert end[0] < 0.9 * start[0]
    assert report["held_out"][-1]["kl"] == pytest.approx(end[0], rel=0.05)

    compressed_tensors.write(written, tmp_path / "out")
    exported = ModelFolder(tmp_path / "out")
    assert audit(written, exported)["linears"] == len(record.linears(source))
    with torch.inference_mode():
        logits = [load_dense(f, CPU, torch.bfloat16)(held).logits for f in (written, exported)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(8, "channel", True, type="float"),
        Scheme(8, "channel", True, inputs=InputScheme()),
    ],
)
def test_other_numbers_are_refused(
    decided: Callable[..., tuple[ModelFolder, ModelFolder]],
    blocks: Tensor,
    tmp_path: Path,
    scheme: Scheme,
) -> None:
    original, source = decided("llama", scheme)
    with pytest.raises(UserError, match="integers in groups or rows with 16-bit inputs, not on"):
        distill(source, original, tmp_path / "t", tmp_path / "s", blocks, KNOBS, CPU)
    assert not list(tmp_path.iterdir())
