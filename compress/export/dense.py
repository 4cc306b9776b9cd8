"""A plain folder of the weights that the codes of a record stand for, in the model's own type: what any
program loads that loads the original, as large as the original. Nothing says that it was quantized.

A plain folder is copied as it is.
"""

from __future__ import annotations

from pathlib import Path

from compress.errors import UserError
from compress.export.shards import write_tensors
from compress.kv_cache.folder import scheme_of
from compress.model.folder import ModelFolder, write_json
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
    config = write_tensors(source, target, lambda _, q: [("weight", q.dequantize(source.dtype))])
    write_json(target / "config.json", config)


def check(schemes: Schemes) -> None:
    """Raises UserError for rounded inputs: who loads the folder would not round them."""
    for scheme in (schemes.linears, *schemes.exceptions.values()):
        if scheme.inputs is not None:
            raise UserError(
                f"export={NAME} holds weights alone, and {scheme.name} rounds inputs too, which nobody who "
                "loads it would do: choose a scheme without scheme.inputs, or export=compressed-tensors"
            )
