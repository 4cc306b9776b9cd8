"""Whether serving engines load a checkpoint, as rules: read from the engines' source, not run, where no run
is named.

vLLM 0.33, SGLang 0.5.23, TensorRT-LLM (main, 2026), transformers 5.23. K are the inputs of a linear, N its
outputs; with tensor parallelism over ``tp`` devices N of queries, keys, values, gate and up is shared out,
and K of the attention's output and of down. A head of keys and values is never split: of fewer heads than
devices each holds one. Engines run q, k, v as one linear, and gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.export import bitsandbytes
from compress.kv_cache.folder import engines as cache_arguments
from compress.kv_cache.scheme import CacheScheme
from compress.quantize.scheme import MXFP4, Scheme, Schemes

VLLM, SGLANG, TENSORRT, TRANSFORMERS = "vLLM", "SGLang", "TensorRT-LLM", "transformers"
VERSIONS = {VLLM: "0.33", SGLANG: "0.5.23", TENSORRT: "main 2026", TRANSFORMERS: "5.23"}
SERVERS = (VLLM, SGLANG, TENSORRT)
# Groups and tiles of the Marlin kernels: N and K are multiples of one of the pairs.
MARLIN_GROUPS = (32, 64, 128)
MARLIN_TILES = ((64, 128), (128, 64))


@dataclass(frozen=True)
class Served:
    """What an engine would be given.

    schemes: settled, None: 16 bits; all_bits: those that a search will choose from
    merged: names of the linears that engines run as one (q, k, v; gate, up; others alone) -> their K
    parts: name -> N of every linear of the checkpoint
    by_rows: which linears share out K; by_heads: of which N goes by the heads of keys and values
    eight_bit_floats: whether the hardware multiplies them
    """

    schemes: Schemes | None
    export: str
    cache: CacheScheme | None
    heads: int
    kv_heads: int
    merged: Mapping[tuple[str, ...], int]
    parts: Mapping[str, int]
    by_rows: tuple[str, ...]
    by_heads: tuple[str, ...]
    tp: int = 1
    eight_bit_floats: bool = True
    all_bits: tuple[int, ...] = ()

    @property
    def linears(self) -> Scheme | None:
        return None if self.schemes is None else self.schemes.linears

    @property
    def bits(self) -> tuple[int, ...]:
        if self.all_bits or self.schemes is None:
            return self.all_bits
        every = (self.schemes.linears, *self.schemes.exceptions.values())
        return tuple(sorted({scheme.bits for scheme in every}))

    @property
    def mixed(self) -> bool:
        """Whether bits differ from linear to linear."""
        return len(self.bits) > 1

    @property
    def weights_alone(self) -> bool:
        """Integers with 16-bit inputs, in compressed-tensors."""
        s = self.linears
        return s is not None and s.type == "int" and s.inputs is None

    def outputs(self, name: str) -> int:
        """N of a linear of the checkpoint that one device holds."""
        n = self.parts[name]
        if name in self.by_rows:
            return n
        if name in self.by_heads:
            return n // self.kv_heads * -(-self.kv_heads // self.tp)
        return n // self.tp

    def shared(self, names: tuple[str, ...]) -> tuple[int, int]:
        """(N, K) that one device holds of linears that run as one."""
        k = self.merged[names]
        by_rows = names[0] in self.by_rows
        return sum(map(self.outputs, names)), k // self.tp if by_rows else k


# A sentence that says what is in the way, or None.
Check = Callable[[Served], str | None]


@dataclass(frozen=True)
class Rule:
    """engines: whose rule it is; source: where it was read; check: what is in the way; of a note, to know"""

    engines: tuple[str, ...]
    source: str
    check: Check


def _heads(s: Served) -> str | None:
    if s.heads % s.tp:
        return f"tp={s.tp} does not divide the {s.heads} query heads"
    if s.kv_heads % s.tp and s.tp % s.kv_heads:
        return (
            f"tp={s.tp} neither divides the {s.kv_heads} heads of keys and values nor is a multiple"
        )
    return None


def _shares(s: Served) -> str | None:
    for names, k in s.merged.items():
        for name in names:
            size, what = (k, "inputs") if name in s.by_rows else (s.parts[name], "outputs")
            if size % s.tp and name not in s.by_heads:
                return f"tp={s.tp} does not divide the {size} {what} of {name}"
    return None


def _groups(s: Served) -> str | None:
    scheme = s.linears
    if scheme is None:
        return None
    size = scheme.group_size if isinstance(scheme.group_size, int) else None
    size = 128 if scheme.group_size == "block" else size
    for name in s.by_rows:
        k = s.shared((name,))[1]
        if size is not None and k % size:
            return (
                f"groups of {size} do not divide the {k} inputs of {name} on one of {s.tp} devices"
            )
    return None


def _blocks(s: Served) -> str | None:
    if s.linears is None or s.linears.group_size != "block":
        return None
    for name in s.parts:
        if name not in s.by_rows and (n := s.outputs(name)) % 128:
            return f"blocks of 128 do not divide the {n} outputs of {name} on one of {s.tp} devices"
    return None


def _bitsandbytes(s: Served) -> str | None:
    return (
        "it no longer reads bitsandbytes by itself: install vllm-bnb-plugin" if _is_bnb(s) else None
    )


def _is_bnb(s: Served) -> bool:
    return s.schemes is not None and s.export == bitsandbytes.NAME


def _no_bitsandbytes(s: Served) -> str | None:
    return "it does not read bitsandbytes" if _is_bnb(s) else None


def _four_or_eight(s: Served) -> str | None:
    odd = [bits for bits in s.bits if bits not in (4, 8)]
    if s.weights_alone and odd:
        return f"it has kernels for integers of 4 and 8 bits, not of {odd[0]}"
    return None


def _rounded_inputs(s: Served) -> str | None:
    scheme = s.linears
    if scheme is not None and scheme.inputs is not None and scheme.bits < 8:
        return f"it has no kernel for {scheme.bits}-bit weights with 8-bit inputs of a dense model"
    return None


def _marlin_groups(s: Served) -> str | None:
    scheme = s.linears
    if scheme is None or not s.weights_alone or not isinstance(scheme.group_size, int):
        return None
    if scheme.group_size not in MARLIN_GROUPS:
        return f"its kernel takes groups of 32, 64, 128 or whole rows, not of {scheme.group_size}"
    return None


def _tiles(s: Served) -> str | None:
    if not s.weights_alone:
        return None
    for names in s.merged:
        n, k = s.shared(names)
        if not any(n % rows == 0 and k % columns == 0 for rows, columns in MARLIN_TILES):
            return (
                f"{'+'.join(names)} is {n} x {k} on a device, and its kernel needs multiples of 64 x 128 "
                "or 128 x 64"
            )
    return None


def _eight_bit_zeros(s: Served) -> str | None:
    scheme = s.linears
    if s.weights_alone and scheme is not None and scheme.bits == 8 and not scheme.symmetric:
        return "its kernel has zero points at 4 bits alone: set scheme.symmetric=true"
    return None


def _tensorrt_integers(s: Served) -> str | None:
    scheme = s.linears
    if scheme is None or scheme.type == "float" or _is_bnb(s):
        return None
    if scheme.inputs is not None and scheme.bits == 8:
        return "it takes 8 bits by row and token for FP8 whatever their type, and would compute nonsense"
    return "of compressed-tensors it reads 8 bits (FP8) and 4 bits (NVFP4), no integers"


def _tensorrt_floats(s: Served) -> str | None:
    scheme = s.linears
    if scheme is None or (scheme.type, scheme.bits) != ("float", 8):
        return None
    if not s.eight_bit_floats:
        return "it has FP8 on hardware that multiplies it alone"
    if scheme.inputs is None:
        return "it takes FP8 with rounded inputs alone: recipe=fp8"
    if "tensor" in (scheme.group_size, scheme.inputs.per):
        return "it takes FP8 by row and token or in blocks, not one scale a tensor: recipe=fp8"
    return None


def _quantized_head(s: Served) -> str | None:
    if s.schemes is not None and s.schemes.head is not None:
        return "it does not run a quantized embedding and head: leave head out"
    return None


def _mixed_zeros(s: Served) -> str | None:
    if s.mixed and s.linears is not None and not s.linears.symmetric:
        return "mixed bits with zero points do not load: set scheme.symmetric=true"
    return None


def _head_scales(s: Served) -> str | None:
    if s.cache is not None and s.cache.static and s.cache.keys.per == "head":
        return "scales of the cache by head are not read: kv_cache=fp8 has one a layer"
    return None


RULES = (
    Rule(SERVERS, "sharding of attention: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM main", _heads),
    Rule(SERVERS, "column and row parallel linears, the same versions", _shares),
    Rule(
        SERVERS,
        "K after sharding in whole groups: vLLM 0.33 (never padded), SGLang 0.5.23",
        _groups,
    ),
    Rule(
        SERVERS, "FP8 blocks of merged shards: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM main", _blocks
    ),
    Rule((VLLM,), "vLLM 0.33, RFC #39583", _bitsandbytes),
    Rule(SERVERS, "run on vLLM 0.32; none found in the others", _quantized_head),
    Rule((SGLANG,), "SGLang 0.5.23, compressed_tensors: num_bits in {4, 8}", _four_or_eight),
    Rule((SGLANG,), "SGLang 0.5.23: W4A8 for experts alone", _rounded_inputs),
    Rule((SGLANG,), "SGLang 0.5.23, Marlin", _marlin_groups),
    Rule((SGLANG,), "SGLang 0.5.23, Marlin: dense tiles are not padded", _tiles),
    Rule((SGLANG,), "SGLang 0.5.23, Marlin", _eight_bit_zeros),
    Rule(
        (SGLANG, TENSORRT), "SGLang 0.5.23 warns and ignores them; TensorRT-LLM main", _head_scales
    ),
    Rule((TENSORRT,), "TensorRT-LLM main", _no_bitsandbytes),
    Rule((TENSORRT,), "TensorRT-LLM main, compressed-tensors parser", _tensorrt_integers),
    Rule((TENSORRT,), "TensorRT-LLM main, compressed-tensors parser", _tensorrt_floats),
    Rule((TRANSFORMERS,), "transformers 5.23: the first scheme unpacks all", _mixed_zeros),
)


def _jit(s: Served) -> str | None:
    odd = [bits for bits in s.bits if bits not in (4, 8)]
    if s.weights_alone and odd:
        return "CUDA alone, through humming-kernels, which compile with nvcc (SM75 or newer)"
    if _rounded_inputs(s):
        return "through humming-kernels, on CUDA alone"
    return None


def _padded(s: Served) -> str | None:
    # Other widths do not go through Marlin.
    found = None if _four_or_eight(s) else _tiles(s)
    return found and f"slower: {found}, so the rest is filled with zeros"


def _widened(s: Served) -> str | None:
    scheme = s.linears
    if (
        scheme is not None
        and scheme.type == "float"
        and scheme.bits == 8
        and not s.eight_bit_floats
    ):
        return "this hardware has no 8-bit floats: weights are widened, inputs are not rounded"
    return None


def _dense(s: Served) -> str | None:
    if s.schemes is None or _is_bnb(s):
        return None
    return "unpacked to 16 bits when it runs: the memory and speed of 16 bits"


def _sidecar(s: Served) -> str | None:
    inputs = None if s.linears is None else s.linears.inputs
    if inputs is not None and inputs.outliers == "static":
        return "does not look at the fixed outlier columns, and finds its own"
    return None


def _one_device(s: Served) -> str | None:
    return (
        None if s.tp == 1 else "by itself on one device: its tensor parallelism was not looked at"
    )


def _partial(s: Served) -> str | None:
    scheme = s.linears
    if scheme is not None and scheme.type == "float" and scheme.group_size == MXFP4:
        return "MXFP4 is supported in parts"
    return None


NOTES = (
    Rule((VLLM,), "vLLM 0.33 (#46389)", _jit),
    Rule((VLLM,), "vLLM 0.33, Marlin", _padded),
    Rule((VLLM, SGLANG), "vLLM 0.33: W8A16 through Marlin below SM89", _widened),
    Rule((SGLANG,), "SGLang 0.5.23", _partial),
    Rule((SGLANG, TRANSFORMERS), "bitsandbytes 0.50", _sidecar),
    Rule((TRANSFORMERS,), "transformers 5.23 decompresses in the first forward", _dense),
    Rule((TRANSFORMERS,), "-", _one_device),
)


def loadable(served: Served) -> dict[str, dict[str, Any]]:
    """engine -> {version, loads, reasons (why not), notes}; reasons and notes as {text, source}."""
    found = {}
    for engine, version in VERSIONS.items():
        reasons = _applied(RULES, engine, served)
        found[engine] = {
            "version": version,
            "loads": not reasons,
            "reasons": reasons,
            "notes": _applied(NOTES, engine, served) + _cache_notes(engine, served.cache),
        }
    return found


def _applied(rules: tuple[Rule, ...], engine: str, served: Served) -> list[dict[str, str]]:
    checked = [(rule, rule.check(served)) for rule in rules if engine in rule.engines]
    return [{"text": text, "source": rule.source} for rule, text in checked if text is not None]


def _cache_notes(engine: str, cache: CacheScheme | None) -> list[dict[str, str]]:
    """How the engine is told to keep its cache so; ``kv_cache.folder`` has the arguments."""
    if cache is None:
        return []
    if engine == TRANSFORMERS:
        return [
            {"text": "keeps this cache through compress.load alone", "source": "transformers 5.23"}
        ]
    known = {name.lower(): value for name, value in cache_arguments(cache).items()}
    argued = known.get(engine.lower())
    if argued is not None:
        text = f"serve with {' '.join(argued['arguments'])} ({argued['note']})"
    elif cache.static:
        text = "reads the scales of the cache as FP8"
    else:
        text = "has nothing alike: its cache stays in 16 bits"
    return [{"text": text, "source": f"{engine} {VERSIONS[engine]}"}]
