"""A tiny model that lost some of its neurons, to be repaired against what it was."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.model.folder import SINGLE, ModelFolder, save_tensors, write_json
from compress.runtime.load import load_dense

CPU = torch.device("cpu")


def narrowed(original: ModelFolder, path: Path, neurons: int = 192) -> ModelFolder:
    """The model with the first ``neurons`` of every MLP alone."""
    path.mkdir(parents=True)
    original.copy_companions(path)
    tensors = {name: original.tensor(name) for name in original.names}
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:neurons].clone()
        if "down_proj" in name:
            tensors[name] = tensor[:, :neurons].clone()
    save_tensors(path / SINGLE, tensors)
    write_json(path / "config.json", {**original.config, "intermediate_size": neurons})
    return ModelFolder(path)


@torch.no_grad()
def measured(candidate: ModelFolder, original: ModelFolder, tokens: Tensor) -> tuple[float, float]:
    """KL(original || candidate) over all positions and the candidate's next-token loss, in float32."""
    ours, theirs = (
        load_dense(folder, CPU, torch.float32)(tokens).logits.log_softmax(-1)
        for folder in (candidate, original)
    )
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    nll = -ours[:, :-1].gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
    return float(kl), float(nll)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    first, second = ModelFolder(a), ModelFolder(b)
    return first.names == second.names and all(
        torch.equal(first.tensor(name), second.tensor(name)) for name in first.names
    )
