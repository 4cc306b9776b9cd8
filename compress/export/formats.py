"""The table of formats, and one way to read the weights of a folder whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.errors import UserError
from compress.export import awq, bitsandbytes, by_columns, compressed_tensors, dense, gguf, gptq
from compress.kv_cache.folder import is_scale
from compress.model.families import family_of
from compress.model.folder import ModelFolder, Shapes, reading
from compress.model.skeleton import finite
from compress.quantize import record
from compress.quantize.numbers import decode_scale
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes


@dataclass(frozen=True)
class Format:
    """write(record, target) makes a folder; linears(folder), read_linear(folder, name) and scheme_of(folder,
    name) read it back, None: a plain folder, in which nothing is quantized.

    check(schemes) raises UserError for schemes that no engine could load from it
    stored(q, scheme, apart): the tensors of a linear, by local name, also without data
    sidecar: a file of weights beside the others
    half: its scales are those of models in 16 bits, so it has no quantized weights of others
    steps: what rows and columns of each linear must be multiples of
    plain: holds a model without quantized weights too; cache_scales: and the fixed scales of a cache
    fits(model, schemes) raises UserError for a model that it has no place for (schemes None: a plain one)
    nbytes(q, scheme): what a linear takes, where its bits and scales do not tell
    """

    name: str
    write: Callable[[ModelFolder, Path], None]
    check: Callable[[Schemes], None]
    stored: Callable[[QTensor, Scheme, bool], Iterator[tuple[str, Tensor]]] | None = None
    linears: Callable[[ModelFolder], list[str]] | None = None
    read_linear: Callable[[ModelFolder, str], QTensor] | None = None
    scheme_of: Callable[[ModelFolder, str], Scheme] | None = None
    sidecar: str | None = None
    half: bool = False
    steps: tuple[int, int] = (1, 1)
    plain: bool = False
    cache_scales: bool = False
    fits: Callable[[Shapes, Schemes | None], None] | None = None
    nbytes: Callable[[QTensor, Scheme], int] | None = None

    @property
    def quantized(self) -> bool:
        """Whether weights stay as codes in it."""
        return self.stored is not None


FORMATS = {
    compressed_tensors.NAME: Format(
        name=compressed_tensors.NAME,
        write=compressed_tensors.write,
        check=compressed_tensors.check,
        stored=compressed_tensors.compress_linear,
        linears=compressed_tensors.linears,
        read_linear=compressed_tensors.read_linear,
        scheme_of=lambda folder, name: compressed_tensors.described(folder, name)[0],
        plain=True,
        cache_scales=True,
    ),
    bitsandbytes.NAME: Format(
        name=bitsandbytes.NAME,
        write=bitsandbytes.write,
        check=bitsandbytes.check,
        stored=lambda q, scheme, apart: bitsandbytes.compress_linear(q),
        linears=bitsandbytes.linears,
        read_linear=bitsandbytes.read_linear,
        scheme_of=bitsandbytes.scheme_of,
        sidecar=bitsandbytes.SIDECAR,
        half=True,
    ),
    gptq.NAME: Format(
        name=gptq.NAME,
        write=gptq.write,
        check=gptq.check,
        stored=lambda q, scheme, apart: gptq.compress_linear(q),
        linears=by_columns.linears,
        read_linear=gptq.read_linear,
        scheme_of=gptq.scheme_of,
        half=True,
        steps=(gptq.STEP, gptq.STEP),
    ),
    awq.NAME: Format(
        name=awq.NAME,
        write=awq.write,
        check=awq.check,
        stored=lambda q, scheme, apart: awq.compress_linear(q),
        linears=by_columns.linears,
        read_linear=awq.read_linear,
        scheme_of=awq.scheme_of,
        half=True,
        steps=(awq.IN_WORD, 1),
    ),
    gguf.NAME: Format(
        name=gguf.NAME,
        write=gguf.write,
        check=gguf.check,
        stored=lambda q, scheme, apart: gguf.compress_linear(q, scheme),
        linears=gguf.linears,
        read_linear=gguf.read_linear,
        scheme_of=gguf.scheme_of,
        half=True,
        plain=True,
        fits=gguf.fits,
        nbytes=gguf.nbytes,
    ),
    dense.NAME: Format(name=dense.NAME, write=dense.write, check=dense.check, plain=True),
}


def check_fits(
    export: str, model: Shapes, schemes: Schemes | None, linears: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError for a model that the format ``export`` has no place for.

    schemes: settled on the model; linears: (out, in) of those that are quantized; none for a plain model
    """
    form = FORMATS[export]
    if form.half and linears and model.dtype.itemsize != 2:
        raise UserError(
            f"export={export} holds models of bfloat16 or float16 exactly, {model.path} is "
            f"{str(model.dtype).removeprefix('torch.')}: choose export=compressed-tensors"
        )
    for name, (rows, columns) in linears.items():
        if rows % form.steps[0] or columns % form.steps[1]:
            raise UserError(
                f"export={export} packs outputs in steps of {form.steps[0]} and inputs in steps of "
                f"{form.steps[1]}, {name} is {rows} x {columns}: choose export=compressed-tensors"
            )
    if form.fits is not None:
        form.fits(model, schemes)


class Weights:
    """The weights of a plain, record, or exported folder under their original names.

    Raises UserError if the folder is quantized in a way that is not read here, or its tensors and its config
    contradict each other.
    """

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        with reading(folder.path):
            self._find()

    def _find(self) -> None:
        folder = self.folder
        quantization = folder.config.get("quantization_config")
        self._read_linear: Callable[[ModelFolder, str], QTensor] = record.read_linear
        self.format = "plain"
        linears: list[str] = []
        if record.KEY in folder.config:
            self.format = "record"
            linears = record.linears(folder)
        elif quantization is not None:
            method = quantization.get("quant_method")
            found = FORMATS.get(method)
            if found is None or found.linears is None or found.read_linear is None:
                known = ", ".join(name for name, f in FORMATS.items() if f.read_linear is not None)
                raise UserError(
                    f"{folder.path}: quant_method {method!r} is not read here, only {known}"
                )
            self.format = found.name
            linears = found.linears(folder)
            self._read_linear = found.read_linear
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
        """Raises UserError for one that cannot be read, or holds NaN or Inf."""
        base, _, part = name.rpartition(".")
        if part == "weight" and base in self.linears:
            with reading(f"{self.folder.path}: {base}"):
                q = self._read_linear(self.folder, base)
            finite(self.folder, name, decode_scale(q.scale))
            return q
        return finite(self.folder, name, self.folder.tensor(name))
