"""Quantization-aware training of a record: latent weights that are rounded onto grids which stay.

Every quantized linear of the blocks keeps a float32 weight, started at what its integers stand for. The
forward pass sees it rounded onto the record's scales and zero points; the gradient goes straight through
the rounding where the weight lies inside the range of its grid, and stops outside (arXiv 1308.3432; LSQ,
arXiv 1902.08153, equation 3). At the end the integers are picked by the same rounding. Norms
and biases are trained too; embedding and head stay. The other way round, integers that stay and scales that
are trained, is the stage ``repair``.

W (out, in); grid: scale and zero, each (out, groups)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.scheme import Grid, to_codes


def rounded(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """W as it comes back from its nearest codes, float32 (out, in), with the gradient passed straight
    through.

    scale, zero: float32 (out, groups)
    """
    return _Rounded.apply(W, scale, zero, 2**bits - 1)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        # As in compress.quantize.scheme.fake_quantize, so that the codes of the end are those of the
        # training.
        codes = (W.unflatten(1, (scale.shape[1], -1)) / scale).add_(zero).round_()
        ctx.inside = (codes >= 0) & (codes <= most)
        return codes.clamp_(0, most).sub_(zero).mul_(scale).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_weight: Tensor) -> tuple[Tensor | None, ...]:
        return by_weight * ctx.inside.flatten(1), None, None, None


class LatentLinear(nn.Module):
    """A linear whose weight is rounded onto a grid whenever it runs. x (..., in) -> (..., out)"""

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid, bits: int):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.bits = bits
        scale = grid.scale.float()
        zero = torch.full_like(scale, 2 ** (bits - 1)) if grid.zero is None else grid.zero.float()
        # They do not change, so no state needs them.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = rounded(self.weight, self.scale, self.zero, self.bits)
        return nn.functional.linear(x, weight, self.bias)


def latent_linears(source: ModelFolder) -> list[str]:
    """The quantized linears of a record's blocks: its embedding and head stay as they are."""
    family = family_of(source.config)
    return [n for n in record.linears(source) if n not in (family.head, family.embedding)]


def attach_latents(model: Any, source: ModelFolder) -> None:
    """Let the linears of a record's dense model run through latent weights; freeze embedding and head."""
    family = family_of(source.config)
    model.requires_grad_(True)
    for name in latent_linears(source):
        linear = model.get_submodule(name)
        q = record.read_linear(source, name)
        device = linear.weight.device
        zero = None if q.zero is None else q.zero.to(device)
        # Not the weight of the dense model: rounded to 16 bits it may be half a step off its 8-bit code.
        weight = q.dequantize(torch.float32).to(device)
        grid = Grid(q.scale.to(device), zero)
        bias = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(name, LatentLinear(weight, bias, grid, q.bits))
    for name in (family.embedding, family.head):
        model.get_submodule(name).requires_grad_(False)


def stored(source: ModelFolder, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was trained, by full name, as a record stores it: the codes of latent weights, on the grids they
    have; the rest in its type.

    trained: by the name in the model
    """
    latents, found = {f"{name}.weight" for name in latent_linears(source)}, {}
    for name, weight in trained.items():
        weight = weight.cpu()
        if name in latents:
            base = name.removesuffix(".weight")
            q, scheme = record.read_linear(source, base), record.scheme_of(source, base)
            codes = to_codes(weight, Grid(q.scale, q.zero), scheme).codes
            found[f"{base}.codes"] = codes
        else:
            found[name] = weight.to(source.tensor(name).dtype)
    return found
