"""The table of formats, and one way to read the weights of a folder whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.errors import UserError
from compress.export import bitsandbytes, compressed_tensors, gguf
from compress.kv_cache.folder import is_scale
from compress.model.families import family_of
from compress.model.folder import ModelFolder, Shapes
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes


@dataclass(frozen=True)
class Format:
    """write(record, target); linears(folder) and read_linear(folder, name) read it back.

    check(schemes, mixed) raises UserError for schemes that no engine could load from it. sidecar: a file of
    weights beside the others; half: its scales fit models of 16 bits alone; plain: it holds models of which
    nothing is quantized. fits(model, schemes) raises UserError for a model that it has no place for (schemes
    None: a plain one). nbytes(q, scheme): what a linear takes, where its bits and scales do not tell
    """

    name: str
    write: Callable[[ModelFolder, Path], None]
    linears: Callable[[ModelFolder], list[str]]
    read_linear: Callable[[ModelFolder, str], QTensor]
    check: Callable[[Schemes, bool], None]
    sidecar: str | None = None
    half: bool = False
    plain: bool = False
    fits: Callable[[Shapes, Schemes | None], None] | None = None
    nbytes: Callable[[QTensor, Scheme], int] | None = None


FORMATS = {
    compressed_tensors.NAME: Format(
        compressed_tensors.NAME,
        compressed_tensors.write,
        compressed_tensors.linears,
        compressed_tensors.read_linear,
        compressed_tensors.check,
        plain=True,
    ),
    bitsandbytes.NAME: Format(
        bitsandbytes.NAME,
        bitsandbytes.write,
        bitsandbytes.linears,
        bitsandbytes.read_linear,
        bitsandbytes.check,
        bitsandbytes.SIDECAR,
        half=True,
    ),
    gguf.NAME: Format(
        gguf.NAME,
        gguf.write,
        gguf.linears,
        gguf.read_linear,
        gguf.check,
        half=True,
        plain=True,
        fits=gguf.fits,
        nbytes=gguf.nbytes,
    ),
}


class Weights:
    """The weights of a plain, record, or exported folder under their original names.

    Raises UserError if the folder is quantized in a way that is not read here.
    """

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        quantization = folder.config.get("quantization_config")
        self._read_linear: Callable[[ModelFolder, str], QTensor] = record.read_linear
        self.format = "plain"
        linears: list[str] = []
        if record.KEY in folder.config:
            self.format = "record"
            linears = record.linears(folder)
        elif quantization is not None:
            method = quantization.get("quant_method")
            if method not in FORMATS:
                raise UserError(
                    f"{folder.path}: quant_method {method!r} is not read here, only "
                    f"{', '.join(FORMATS)}"
                )
            self.format = method
            linears = FORMATS[method].linears(folder)
            self._read_linear = FORMATS[method].read_linear
        elif gguf.linears(folder):
            # A file of others, beside a config that says nothing of it.
            self.format, linears = gguf.NAME, gguf.linears(folder)
            self._read_linear = gguf.read_linear
        self.linears = dict.fromkeys(linears)

    @property
    def names(self) -> list[str]:
        """Original names: ``NAME.weight`` for every quantized linear, the rest as stored, scales of the cache
        left out."""
        plain = [n for n in self.folder.names if n.rpartition(".")[0] not in self.linears]
        plain = [n for n in plain if not is_scale(n)]
        if self.linears and self.folder.tied_head:
            # A tied head has no tensors of its own: a format may repeat the embedding's scales.
            repeated = f"{family_of(self.folder.config).head}.weight_scale"
            plain = [n for n in plain if n != repeated]
        # A bias lives beside the quantized parts of its linear.
        biases = [
            n
            for n in self.folder.names
            if n.endswith(".bias") and n.removesuffix(".bias") in self.linears
        ]
        return [*plain, *biases, *(f"{name}.weight" for name in self.linears)]

    def get(self, name: str) -> Tensor | QTensor:
        base, _, part = name.rpartition(".")
        if part == "weight" and base in self.linears:
            return self._read_linear(self.folder, base)
        return self.folder.tensor(name)
