"""Random weights in the shapes of a model, quantized by a scheme as they are made: one at a time, on the
device, never written to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kv_cache.scheme import CacheScheme
from compress.model.families import family_of
from compress.model.shapes import ShapeFolder
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes, make_grid, to_codes

# What calibration would fix; any number does for speed.
INPUT_SCALE = 0.05


@dataclass(frozen=True)
class RandomModel:
    """A model of a shape (``compress.model.shapes``). schemes, cache: the numbers of its weights and of its
    cache; None: 16 bits"""

    shape: str
    schemes: Schemes | None = None
    cache: CacheScheme | None = None


class RandomWeights:
    """A ``Source`` of the engine. schemes: None leaves everything in 16 bits"""

    def __init__(self, folder: ShapeFolder, schemes: Schemes | None, device: torch.device):
        self.folder, self._device = folder, device
        self._generator = torch.Generator(device).manual_seed(0)
        self._family = family_of(folder.config)
        self._linears = tuple(f".{name}.weight" for name in self._family.linears)
        shapes = {name: self._size(name) for name in folder.names if name.endswith(self._linears)}
        self._scheme = None if schemes is None else schemes.linears.resolve(shapes)
        head = None if schemes is None else schemes.head
        self._head = None if head is None else head.resolve(shapes)

    def get(self, name: str) -> Tensor | QTensor:
        """A norm of ones; a weight that keeps the size of what it reads, in the codes of its scheme."""
        shape = self.folder.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.folder.dtype, device=self._device)
        W = torch.randn(shape, generator=self._generator, device=self._device) * shape[1] ** -0.5
        scheme = self._scheme_of(name)
        if scheme is None:
            return W.to(self.folder.dtype)
        q = to_codes(W, make_grid(W, scheme, self.folder.dtype), scheme)
        if scheme.inputs is None:
            return q
        fixed = torch.tensor(INPUT_SCALE, device=self._device) if scheme.inputs.static else None
        return replace(q, inputs=scheme.inputs.running, input_scale=fixed)

    def _size(self, name: str) -> tuple[int, int]:
        rows, columns = self.folder.shape(name)
        return rows, columns

    def _scheme_of(self, name: str) -> Scheme | None:
        if name.endswith(self._linears):
            return self._scheme
        ends = (f"{self._family.embedding}.weight", f"{self._family.head}.weight")
        return self._head if name in ends else None
