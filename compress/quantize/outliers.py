"""Outliers among the inputs of linears: what calibration saw of them, layer by layer.

An input column is an outlier feature by the rule of LLM.int8 (arXiv 2208.07339, section 4.1) if it reaches
the threshold in at least a quarter of the layers and, over all layers, at 6 % of the positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.quantize.block import Block
from compress.quantize.qtensor import QTensor

LAYERS, POSITIONS = 0.25, 0.06


@dataclass
class Outliers:
    """Gathers what the blocks report, in their order. threshold: least |x| of an outlier"""

    threshold: float
    _layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # Share of positions at which each column reaches the threshold, a row a layer.
    _shares: dict[str, list[Tensor]] = field(default_factory=dict)
    _readers: dict[str, list[str]] = field(default_factory=dict)

    def add(self, block: Block, quantized: Mapping[str, QTensor]) -> None:
        """Add a block that was rounded."""
        for shared in block.inputs:
            first = shared.linears[0]
            (largest, above), q = block.first_seen[first], quantized[first]
            self._readers.setdefault(first, list(shared.linears))
            self._shares.setdefault(first, []).append(above.cpu())
            layer = {
                "columns": int((above > 0).sum()),
                "values": float(above.mean()),
                "largest": float(largest.max()),
            }
            if q.columns is not None:
                layer["kept"] = len(q.columns)
            elif q.inputs is not None and q.inputs.outliers == "dynamic":
                layer["kept"] = int((block.moments_of(first).largest >= self.threshold).sum())
            self._layers.setdefault(first, []).append(layer)

    def position(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was added so far, as JSON and tensors."""
        facts = {"layers": self._layers, "readers": self._readers}
        return facts, {first: torch.stack(rows) for first, rows in self._shares.items()}

    def go_on(self, facts: dict[str, Any], shares: dict[str, Tensor]) -> None:
        """Go on from the position of another."""
        self._layers, self._readers = facts["layers"], facts["readers"]
        self._shares = {first: list(rows) for first, rows in shares.items()}

    def report(self) -> dict[str, Any]:
        """What metrics.json keeps. For each input, named by its first reader, in every layer: ``columns``
        that reached the threshold, the share of ``values`` that did, and the ``largest`` |x|, all before any
        transform; how many columns are ``kept`` in 16 bits, or would have been at some calibration token if
        that is found while it runs, after the transforms; and its outlier ``features``."""
        readers = self._readers
        above = {
            first: sum(layer["columns"] > 0 for layer in layers)
            for first, layers in self._layers.items()
        }
        return {
            "threshold": self.threshold,
            "rule": {"layers": LAYERS, "positions": POSITIONS},
            "linears": sum(len(readers[first]) * len(x) for first, x in self._layers.items()),
            "linears_above": sum(len(readers[first]) * count for first, count in above.items()),
            "inputs": {
                first: {
                    "readers": readers[first],
                    "width": len(self._shares[first][0]),
                    "layers": layers,
                    "features": features(torch.stack(self._shares[first])),
                }
                for first, layers in self._layers.items()
            },
        }


def features(shares: Tensor) -> list[dict[str, float]]:
    """The outlier features of an input: column, share of layers and share of positions it is hit in.

    shares: float32 (layers, in), share of the positions at which a column reaches the threshold
    """
    layers, positions = (shares > 0).float().mean(0), shares.mean(0)
    hit = (layers >= LAYERS) & (positions >= POSITIONS)
    return [
        {"column": column, "layers": float(layers[column]), "positions": float(positions[column])}
        for column in hit.nonzero().flatten().tolist()
    ]
