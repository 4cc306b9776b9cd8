"""The rotate stage: a model folder in, a plain model folder out that computes the same function, in
which no channel stands out. One decoder block in memory at a time; no data.

R1 turns the residual stream, R2 what attention takes from the values, one turn a head (SpinQuant, arXiv
2405.16406, section 3.1). Both are randomized Hadamard matrices (QuaRot, arXiv 2404.00456, section 4,
stages 1a and 1c) folded into the weights: nothing is left to do when the model runs. Between RMSNorms
without weights a turned stream passes unchanged, so the norms' weights go into their readers first.

Activations are rows, x -> x R, so a reader W becomes W R and a writer W becomes R^T W.
W (out, in); E (vocabulary, hidden); R1 (hidden, hidden); R2 (value heads, head size, head size)
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.shards import ShardWriter
from compress.hadamard import core_order, hadamard
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder, Shapes, write_json
from compress.model.skeleton import finite
from compress.model.walk import Walk
from compress.progress import track
from compress.quantize.record import KEY
from compress.saved import NOWHERE, Saved

log = logging.getLogger(__name__)

# Rows of an embedding that are turned at a time, and bytes that wait for their file: a float64 copy
# of a large vocabulary, or a shard of the usual size, would outgrow a block.
ROWS = 8192
SHARD_BYTES = 2**30


def rotate(
    source: ModelFolder, target: Path, *, seed: int = 0, saved: Saved = NOWHERE
) -> dict[str, Any]:
    """Fold R1 and R2 into the weights of ``source`` and write the result to ``target``.

    saved: where a killed one left the blocks that it had done

    All norms become ones. Head and embedding become two matrices, since only the head takes the
    final norm. Products are taken in float64 and rounded once to the model's dtype.

    Returns the seed, and the sizes of R1 and R2 as hidden_size and head_size. Raises UserError for
    an unknown family, a source that is quantized already or holds tensors its config does not
    account for, and a size that no rotation is known for.
    """
    family = family_of(source.config)
    hidden_size, head_size = rotated_sizes(source, family)
    walk = Walk(source, family, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    R1 = rotation(hidden_size, generator)

    position = saved.load()
    with saved.files(target) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        shards = ShardWriter(folder, SHARD_BYTES)
        if position is None:
            done = 0
            _write_rest(source, family, R1, shards, blocks=len(walk))
        else:
            done = position.facts["done"]
            shards.go_on(position.facts["shards"])
            generator.set_state(position.tensors["generator"])
            log.info("rotate goes on after block %d of %d", done, len(walk))
        del position
        for index in track(range(done, len(walk)), "rotate blocks"):
            with walk.open(index) as module, torch.no_grad():
                channels = source.shape(f"{walk.prefix(index)}.{family.values}.weight")[0]
                heads = range(channels // head_size)
                R2 = torch.stack([rotation(head_size, generator) for _ in heads])
                rotate_block(module, family, R1, R2)
                for name, parameter in module.named_parameters():
                    shards.add(f"{walk.prefix(index)}.{name}", parameter.data)
            # A file a block, as a position has them.
            shards.flush()
            saved.offer(
                {"done": index + 1, "shards": shards.position()},
                {"generator": generator.get_state()},
            )
    source.copy_companions(target)
    shards.close(target)
    # The config comes last: before that the folder does not open.
    write_json(target / "config.json", {**source.config, "tie_word_embeddings": False})
    log.info("rotated %d blocks: hidden size %d, head size %d", len(walk), hidden_size, head_size)
    return {"seed": seed, "hidden_size": hidden_size, "head_size": head_size}


def rotated_sizes(source: Shapes, family: Family) -> tuple[int, int]:
    """The sizes of R1 and R2, hidden size and head size, from file headers.

    Raises UserError if the model is quantized already, or no Hadamard matrix of a size is known.
    """
    if "quantization_config" in source.config or KEY in source.config:
        raise UserError(f"{source.path} is quantized already: rotate its 16-bit original")
    heads = source.config.get("num_attention_heads")
    if not isinstance(heads, int):
        raise UserError(f"{source.path}/config.json has no num_attention_heads")
    (reader,) = (shared.linears[0] for shared in family.inputs if shared.source == family.values)
    hidden_size = source.shape(f"{family.embedding}.weight")[1]
    head_size = source.shape(f"{family.blocks}.0.{reader}.weight")[1] // heads
    for what, size in (("hidden size", hidden_size), ("head size", head_size)):
        if core_order(size) is None:
            raise UserError(
                f"{source.path} has the {what} {size}, for which no Hadamard matrix is known here: "
                "leave rotate out of the stages"
            )
    return hidden_size, head_size


def rotate_block(module: nn.Module, family: Family, R1: Tensor, R2: Tensor) -> None:
    """Fold norms, R1 and R2 into the linears of one decoder block, in place."""
    for shared in family.inputs:
        norm: Any = None
        if shared.source is not None and shared.source not in family.linears:
            norm = module.get_submodule(shared.source)
        for name in shared.linears:
            linear: Any = module.get_submodule(name)
            W = linear.weight.double()
            if norm is not None:
                W = W * norm.weight.double() @ R1
            if shared.source == family.values:
                W = _turn_head_inputs(W, R2)
            linear.weight.data = _turn_outputs(W, name, family, R1, R2).to(linear.weight.dtype)
            if linear.bias is not None:
                b = _turn_outputs(linear.bias.double(), name, family, R1, R2)
                linear.bias.data = b.to(linear.bias.dtype)
        if norm is not None:
            norm.weight.data = torch.ones_like(norm.weight)


def _turn_head_inputs(W: Tensor, R2: Tensor) -> Tensor:
    """W of the linear that reads the heads: its columns are (value head, query head of it, channel)."""
    value_heads, head_size, _ = R2.shape
    per_head = W.unflatten(1, (value_heads, -1, head_size))
    return torch.einsum("okqi,kij->okqj", per_head, R2).flatten(1)


def _turn_outputs(P: Tensor, name: str, family: Family, R1: Tensor, R2: Tensor) -> Tensor:
    """A weight (out, in) or a bias (out) of a linear, turned by what its outputs go through."""
    if name == family.values:
        per_head = P.unflatten(0, R2.shape[:2])
        return torch.einsum("kij,ki...->kj...", R2, per_head).flatten(0, 1)
    return R1.T @ P if name in family.writers else P


def _write_rest(
    source: ModelFolder, family: Family, R1: Tensor, shards: ShardWriter, blocks: int
) -> None:
    """Everything outside the blocks: embedding and head turned, the final norm ones."""
    embedding, norm, head = (
        f"{name}.weight" for name in (family.embedding, family.final_norm, family.head)
    )

    def read(name: str) -> Tensor:
        return finite(source, name, source.tensor(name).to(source.dtype))

    gain = read(norm)
    shards.add(embedding, _turn_rows(read(embedding), R1))
    shards.add(norm, torch.ones_like(gain))
    original = read(embedding if source.tied_head else head)
    shards.add(head, _turn_rows(original, gain.double().unsqueeze(1) * R1))
    prefixes = tuple(f"{family.blocks}.{index}." for index in range(blocks))
    for name in source.names:
        if not name.startswith(prefixes) and name not in (embedding, norm, head):
            shards.add(name, read(name))


def _turn_rows(E: Tensor, R: Tensor) -> Tensor:
    return torch.cat([(rows.double() @ R).to(E.dtype) for rows in E.split(ROWS)])


def rotation(order: int, generator: torch.Generator) -> Tensor:
    """A randomized Hadamard matrix D H / sqrt(order), orthonormal, float64 (order, order).

    D: random signs. They stand on the side of the incoming rows: behind H they would only flip the
    signs of channels, and a vector that H maps onto one channel would stay an outlier. Raises
    UserError if no H is known.
    """
    signs = 2 * torch.randint(2, (order, 1), generator=generator).double() - 1
    return signs * hadamard(order) / math.sqrt(order)
