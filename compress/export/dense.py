"""A plain folder of the weights that the codes of a record stand for, in the model's own type: what any
program loads that loads the original, as large as the original. Nothing says that it was quantized.

A plain folder is copied as it is.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compress.errors import UserError
from compress.export.shards import ShardWriter
from compress.kv_cache.folder import scheme_of
from compress.model.families import family_of, turned_over
from compress.model.folder import ModelFolder, write_json
from compress.model.stored import packed
from compress.quantize import record
from compress.quantize.scheme import Schemes

NAME = "dense"


def write(source: ModelFolder, target: Path) -> None:
    """Write a record or plain folder as a plain one. Raises UserError for schemes that ``check`` refuses, and
    for a cache of fixed scales, which have no place."""
    if record.KEY in source.config:
        check(record.schemes_of(source))
    cache = scheme_of(source)
    if cache is not None and cache.static:
        raise UserError(f"export={NAME} has no place for the scales of the cache")
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target, turned=turned_over(source.config))
    tensors = (
        (name, value if isinstance(value, Tensor) else value.dequantize(source.dtype))
        for name, value in record.contents(source)
    )
    family, experts = family_of(source.config), source.config.get("num_local_experts", 0)
    for name, tensor in packed(tensors, family, experts):
        shards.add(name, tensor)
    shards.close()
    config = {key: value for key, value in source.config.items() if key != record.KEY}
    write_json(target / "config.json", config)


def check(schemes: Schemes) -> None:
    """Raises UserError for rounded inputs: who loads the folder would not round them."""
    for scheme in (schemes.linears, *schemes.exceptions.values()):
        if scheme.inputs is not None:
            raise UserError(
                f"export={NAME} holds weights alone, and {scheme.name} rounds inputs too, which nobody who "
                "loads it would do: choose a scheme without scheme.inputs, or export=compressed-tensors"
            )
