"""The sizes of a model that pruning changes, which tensor has which of them, and what a size costs.

Knows names and sizes alone: no weight is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import Family, Twin, check_applies
from compress.model.folder import Shapes

# Keys of config.json.
KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "hidden": "hidden_size",
}
AXES = tuple(KEYS)
# Keys of config.json with an entry a layer.
PER_LAYER = ("layer_types", "no_rope_layers")
# Tokens in the cache of a step whose bytes predict decode speed.
CONTEXT = 1024


@dataclass(frozen=True)
class Shape:
    """layers, query heads, heads of keys and values, neurons of an MLP, channels of the residual stream."""

    layers: int
    heads: int
    kv_heads: int
    mlp: int
    hidden: int

    @property
    def per_group(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True)
class Anatomy:
    """Which of its dimensions every tensor of a model has.

    twin: the model type to write where heads x head size is not the hidden size, if this one's readers need
        that
    block: tensors of a decoder block by local name, rest: those outside the blocks; each with its
        dimensions, an axis of Shape or a number
    """

    family: Family
    shape: Shape
    head_dim: int
    bytes_per_weight: int
    twin: Twin | None
    block: Mapping[str, tuple[str | int, ...]]
    rest: Mapping[str, tuple[str | int, ...]]

    def size(self, axis: str | int, shape: Shape) -> int:
        if isinstance(axis, int):
            return axis
        count: int = getattr(shape, axis)
        return count * self.head_dim if axis in ("heads", "kv_heads") else count

    def block_parameters(self, shape: Shape) -> int:
        """Parameters of all decoder blocks: everything but embedding, head and final norm."""
        twin = self.twin_for(shape)
        zeros = 0 if twin is None else len(twin.zeros) * shape.hidden
        return shape.layers * (self._count(self.block, shape) + zeros)

    def twin_for(self, shape: Shape) -> Twin | None:
        """The model type that a model of this shape is written as, if not its own."""
        own = shape == self.shape or shape.heads * self.head_dim == shape.hidden
        return None if own else self.twin

    def parameters(self, shape: Shape) -> int:
        return self.block_parameters(shape) + self._count(self.rest, shape)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the weight files in the model's dtype."""
        return self.bytes_per_weight * self.parameters(shape)

    def cached_heads(self, shape: Shape) -> int:
        """Heads of keys and values in all layers: what a token of the cache takes goes with them."""
        return shape.layers * shape.kv_heads

    def step_bytes(self, shape: Shape) -> int:
        """Bytes that a decode step of one sequence reads: weights and a cache of CONTEXT tokens in 16 bits.

        Decoding is memory-bound, so its speed goes with the inverse. An embedding of its own is not read: a
        step looks up one row.
        """
        rest = dict(self.rest)
        if f"{self.family.head}.weight" in rest:
            del rest[f"{self.family.embedding}.weight"]
        weights = self.bytes_per_weight * (self.block_parameters(shape) + self._count(rest, shape))
        return weights + 4 * CONTEXT * shape.layers * shape.kv_heads * self.head_dim

    def _count(self, tensors: Mapping[str, tuple[str | int, ...]], shape: Shape) -> int:
        return sum(math.prod(self.size(axis, shape) for axis in t) for t in tensors.values())

    def cut(self, name: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """The part of a tensor that stays. name: local to a block, or that of a tensor outside.

        kept: indices by axis, in elements; an axis without stays whole
        """
        axes = self.block.get(name) or self.rest[name]
        for dim, axis in enumerate(axes):
            if isinstance(axis, str) and axis in kept:
                tensor = tensor.index_select(dim, kept[axis].to(tensor.device))
        return tensor


def anatomy(source: Shapes, family: Family) -> Anatomy:
    """The sizes of a folder, from its config and file headers.

    Raises UserError if the config lacks a size, or a tensor has dimensions that its config does not explain.
    """
    config = source.config
    check_applies("prune", config)
    for axis, key in KEYS.items():
        if not isinstance(config.get(key), int) and axis != "kv_heads":
            raise UserError(f"{source.path}/config.json has no {key}")
    heads = config[KEYS["heads"]]
    shape = Shape(
        **{axis: config[key] for axis, key in KEYS.items() if axis != "kv_heads"},
        kv_heads=config.get(KEYS["kv_heads"]) or heads,
    )
    prefix = f"{family.blocks}.0."
    queries = source.shape(f"{prefix}{family.queries}.weight")[0]
    block, rest = dict[str, tuple[str | int, ...]](), dict[str, tuple[str | int, ...]]()
    twin = family.twins.get(config["model_type"])
    found = Anatomy(family, shape, queries // heads, source.dtype.itemsize, twin, block, rest)
    for name in source.names:
        if name.startswith(prefix):
            local = name.removeprefix(prefix)
            block[local] = tuple(_block_axes(family, local, source.shape(name)))
            _agrees(source, name, found, block[local])
        elif not name.startswith(f"{family.blocks}.") and not _tied(source, family, name):
            rest[name] = (
                ("hidden",) if len(source.shape(name)) == 1 else (source.shape(name)[0], "hidden")
            )
            _agrees(source, name, found, rest[name])
    return found


def _tied(source: Shapes, family: Family, name: str) -> bool:
    """Some files of tied models hold the shared matrix twice."""
    return source.tied_head and name == f"{family.head}.weight"


def _block_axes(family: Family, local: str, shape: tuple[int, ...]) -> Iterator[str | int]:
    """The axes of a block's tensor: what its linear makes, then, of a matrix, what it reads."""
    made = {family.queries: "heads", family.keys: "kv_heads", family.values: "kv_heads"}
    made |= dict.fromkeys(family.neurons, "mlp")
    read = {family.attention_output: "heads", family.mlp_output: "mlp"}
    module = local.rpartition(".")[0]
    # Norms of single heads, one for all.
    yield shape[0] if module in family.head_norms else made.get(module, "hidden")
    if len(shape) == 2:
        yield read.get(module, "hidden")


def _agrees(source: Shapes, name: str, found: Anatomy, axes: tuple[str | int, ...]) -> None:
    expected = tuple(found.size(axis, found.shape) for axis in axes)
    if source.shape(name) != expected:
        raise UserError(
            f"{name} of {source.path} has shape {source.shape(name)}, its config.json asks for {expected}"
        )


def config_of(
    config: Mapping[str, Any], anatomy: Anatomy, shape: Shape, layers: list[int]
) -> dict[str, Any]:
    """The config.json of the pruned model: sizes, head size, and lists with an entry a layer.

    layers: which stay. Raises UserError for sliding windows that the new model could not have.
    """
    check_windows(config, anatomy, shape)
    changed = dict(config)
    for axis, key in KEYS.items():
        changed[key] = getattr(shape, axis)
    changed["head_dim"] = anatomy.head_dim
    for key in PER_LAYER:
        if isinstance(value := config.get(key), list):
            changed[key] = [value[i] for i in layers]
    if (twin := anatomy.twin_for(shape)) is not None:
        changed |= {
            "model_type": twin.model_type,
            "architectures": [twin.architecture],
            **twin.settings,
        }
        # Lists of the other type's own, such as which layers have sliding windows.
        changed.pop("layer_types", None)
    return changed


def check_windows(config: Mapping[str, Any], anatomy: Anatomy, shape: Shape) -> None:
    """Raises UserError for a model with sliding windows whose layers would lose or exchange them."""
    if not config.get("use_sliding_window"):
        return
    if anatomy.twin_for(shape) is not None:
        raise UserError(
            f"{config['model_type']} with sliding windows must keep heads x {anatomy.head_dim} = hidden "
            f"size, not {shape.heads} x {anatomy.head_dim} = {shape.hidden}: choose prune.heads and hidden so"
        )
    if shape.layers < anatomy.shape.layers and "layer_types" not in config:
        raise UserError(
            "config.json does not say which layers have sliding windows (layer_types): leave all layers in"
        )


def elements(heads: list[int], head_dim: int) -> Tensor:
    """The channels of these heads, in order."""
    return (torch.tensor(heads).unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()
