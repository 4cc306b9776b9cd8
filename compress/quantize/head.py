"""Embedding and language-model head as integers: rows of the vocabulary, groups along hidden.

No calibration input reaches the embedding, so a grid is judged by the error of the weights alone.
W (vocabulary, hidden); H (hidden, hidden)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, to_codes
from compress.quantize.transforms.opt import Opt

# Rows handled at a time: a vocabulary of 150,000 by 8,192 in float32 is 5 GB.
ROWS = 4096


def quantize_rows(
    W: Tensor, scheme: Scheme, device: torch.device
) -> tuple[QTensor, dict[str, Any]]:
    """Round W to the nearest values of the grids with the least squared error of the weights.

    W: (vocabulary, hidden) in the dtype of the checkpoint, which is also that of the scales.
    Returns the QTensor on the CPU, and its bits per weight and relative error |Wq - W|^2 / |W|^2.
    """
    parts, lost, energy = [], 0.0, 0.0
    # Inputs that are independent and of one size: every weight counts the same.
    H = torch.eye(W.shape[1], device=device)
    for rows in W.split(ROWS):
        X = rows.to(device=device, dtype=torch.float32)
        q = to_codes(X, Opt().search(X, H, scheme, W.dtype), scheme)
        lost += float((q.dequantize(W.dtype).float() - X).square().sum())
        energy += float(X.square().sum())
        zero = None if q.zero is None else q.zero.cpu()
        parts.append(QTensor(q.codes.cpu(), q.scale.cpu(), zero, q.bits))
    zeros = [q.zero for q in parts if q.zero is not None]
    whole = QTensor(
        torch.cat([q.codes for q in parts]),
        torch.cat([q.scale for q in parts]),
        torch.cat(zeros) if zeros else None,
        scheme.bits,
    )
    relative = lost / energy if energy else 0.0
    return whole, {"bits_per_weight": whole.bits_per_weight, "relative_error": relative}
