"""Whether engines load a checkpoint: the rows of ``compress.engines`` compared with it, and what is no row.

K are the inputs of a linear, N its outputs; with tensor parallelism over ``tp`` devices N of queries, keys,
values, gate and up is shared out, and K of the attention's output and of down. A head of keys and values is
never split: of fewer heads than devices each holds one. Engines run q, k, v as one linear, and gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.engines import (
    BNB,
    CT,
    DENSE,
    ENGINES,
    GGUF,
    GPTQ,
    KINDS,
    LLAMA_CPP,
    PLAIN,
    ROWS,
    TRANSFORMERS,
    UNREAD,
    VLLM_CPU,
    WIDE,
    Engine,
    Row,
    proof_of,
    words,
)
from compress.kv_cache.folder import engines as cache_arguments
from compress.kv_cache.scheme import CacheScheme
from compress.quantize.scheme import BLOCK, NVFP4, Scheme, Schemes

# Model types whose GGUF files transformers reads whole: of others it has its own defaults for some of what
# they say (sizes of experts, rotary embeddings of a part), or loads some weights at random.
READ_WHOLE = ("llama", "mistral", "qwen2")
# Devices that advice is looked for among.
MOST_DEVICES = 64


@dataclass(frozen=True)
class Served:
    """What an engine would be given.

    schemes: settled, None: 16 bits; all_bits: those that a search will choose from
    export: the format's name
    merged: names of the linears that engines run as one (q, k, v; gate, up; others alone) -> their K
    parts: name -> N of every linear of the checkpoint
    by_rows: which linears share out K; by_heads: of which N goes by the heads of keys and values
    capability: of CUDA, 0: none, None: not known
    model_type: as config.json has it
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
    capability: float | None = None
    all_bits: tuple[int, ...] = ()
    model_type: str = READ_WHOLE[0]

    @property
    def format(self) -> str:
        """``export``, or dense where there are no quantized weights to write; gguf holds those too."""
        return DENSE if self.schemes is None and self.export != GGUF else self.export

    @property
    def quantized(self) -> list[Scheme | None]:
        """The different schemes of the linears; None: 16 bits."""
        if self.schemes is None or self.export == DENSE:
            return [None]
        every = [self.schemes.linears, *self.schemes.exceptions.values()]
        every += [replace(self.schemes.linears, bits=bits) for bits in self.all_bits]
        if self.all_bits:
            every = every[1:]
        return list(dict.fromkeys(every))

    @property
    def kinds(self) -> list[str]:
        """What it holds in the words of ``engines.Proof``."""
        cache = "" if self.cache is None else f"+kv-{self.cache.name}"
        head = "" if self.head is None else f"+head-{self.head.name}"
        names = [PLAIN if scheme is None else scheme.name for scheme in self.quantized]
        return [f"{name}{head}{cache}" for name in names]

    @property
    def head(self) -> Scheme | None:
        return None if self.schemes is None or self.export == DENSE else self.schemes.head

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


@dataclass(frozen=True)
class Facts:
    """A scheme in the words of the rows."""

    format: str
    numbers: str
    inputs: str
    bits: int
    group: int | str
    zeros: bool

    @property
    def name(self) -> str:
        return f"{self.format} {KINDS[self.numbers]}"


def facts(scheme: Scheme | None, form: str) -> Facts:
    if scheme is None:
        return Facts(form, "16 bits", WIDE, 16, "", zeros=False)
    numbers = "int"
    if scheme.type == "float":
        fours = "nvfp4" if scheme.group_size == NVFP4 else "mxfp4"
        numbers = "fp8" if scheme.bits == 8 else fours
    inputs = WIDE if scheme.inputs is None else scheme.inputs.name
    return Facts(form, numbers, inputs, scheme.bits, scheme.group_size, not scheme.symmetric)


@dataclass(frozen=True)
class Field:
    """A field that rows and a checkpoint are compared in.

    fits(row, facts); told(rows, facts): what rows take that fit so far, and what to change
    """

    fits: Callable[[Row, Facts], bool]
    told: Callable[[Sequence[Row], Facts], str]


def _of(rows: Iterable[Row], name: str) -> list[Any]:
    """All that rows allow in a field."""
    return [value for row in rows for value in getattr(row, name)]


def _format(rows: Sequence[Row], f: Facts) -> str:
    known = words(row.format for row in rows)
    # Another format helps where all else fits.
    others = [row for row in rows if row.format != DENSE and _fits_as(row, f)]
    advice = f": export={words(row.format for row in others)}" if others else ""
    return f"reads {known}, not {f.format}{advice}"


def _numbers(rows: Sequence[Row], f: Facts) -> str:
    known = words(KINDS[row.numbers] for row in rows)
    return f"loads {known} in {f.format}, not {KINDS[f.numbers]}"


def _inputs(rows: Sequence[Row], f: Facts) -> str:
    return f"loads {f.name} with inputs {words(_of(rows, 'inputs'))}, this has {f.inputs}"


def _bits(rows: Sequence[Row], f: Facts) -> str:
    known = words(_of(rows, "bits"))
    rounded = "" if f.inputs == WIDE else f" with inputs {f.inputs}"
    return f"loads {f.name} of {known} bits{rounded}, this has {f.bits}: scheme.bits={known}"


def _groups(rows: Sequence[Row], f: Facts) -> str:
    known = words(_of(rows, "groups"))
    return f"loads {f.name} with scales for {known}, this has {f.group}: scheme.group_size={known}"


def _zeros(rows: Sequence[Row], f: Facts) -> str:
    known = words(_of(rows, "zeros"))
    where = f"with zero points at {known} bits alone" if known else "without zero points"
    return f"loads {f.name} {where}, this has them at {f.bits}: scheme.symmetric=true"


def _group_fits(row: Row, f: Facts) -> bool:
    whole = [group for group in row.groups if not isinstance(group, range)]
    steps = [group for group in row.groups if isinstance(group, range)]
    return not row.groups or f.group in whole or any(f.group in step for step in steps)


def _zeros_fit(row: Row, f: Facts) -> bool:
    # Of bits that a row does not take at all its zero points say nothing.
    other = bool(row.bits) and f.bits not in row.bits
    return not f.zeros or row.refused is not None or f.bits in row.zeros or other


FIELDS = (
    Field(lambda row, f: row.format == f.format, _format),
    Field(lambda row, f: row.numbers in ("", f.numbers), _numbers),
    Field(lambda row, f: not row.inputs or f.inputs in row.inputs, _inputs),
    Field(lambda row, f: not row.bits or f.bits in row.bits, _bits),
    Field(_group_fits, _groups),
    Field(_zeros_fit, _zeros),
)


def _fits_as(row: Row, f: Facts) -> bool:
    """Whether it would load in the row's format."""
    return all(field.fits(row, replace(f, format=row.format)) for field in FIELDS)


@dataclass(frozen=True)
class Found:
    """The row that fits, None if none does; what is in the way; notes; (text, source) each."""

    row: Row | None
    reasons: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


def compare(engine: str, scheme: Scheme | None, served: Served) -> Found:
    """Which row of the engine a scheme fits. Fields are compared one by one, with the rows that fitted those
    before; where none fits all are kept, so that every field that is in the way is told."""
    f = facts(scheme, served.format)
    rows = [row for row in ROWS if row.engine == engine]
    for row in rows:
        if row.refused is not None and all(field.fits(row, f) for field in FIELDS):
            return Found(None, ((row.refused, row.source),))
    left = [row for row in rows if row.refused is None]
    reasons = []
    for number, field in enumerate(FIELDS):
        fitting = [row for row in left if field.fits(row, f)]
        if not fitting:
            reasons.append((field.told(left, f), words((row.source for row in left), "and")))
            # In another format, or of other numbers, the rest means nothing.
            if number < 2:
                return Found(None, tuple(reasons))
        left = fitting or left
    every = [_on_devices(row, served) for row in left]
    whole = [one for one in every if one.row is not None]
    if whole and not reasons:
        return whole[0]
    # Of rows that do not fit the first is what most people mean.
    return Found(None, (*reasons, *([] if whole else every[0].reasons)))


def _on_devices(row: Row, served: Served) -> Found:
    """Whether a row's shapes and hardware fit."""
    notes = [] if row.note is None else [row.note]
    reasons, misfit = [], _shapes(row, served)
    if misfit is not None and row.pads:
        notes.append(f"slower: it {misfit}, so the rest is filled with zeros")
    elif misfit is not None:
        reasons.append(misfit)
    has = served.capability
    if row.cuda and has is not None and has < row.cuda:
        reasons.append(
            f"needs CUDA of compute capability {row.cuda} or more, this hardware has {has or 'none'}"
        )
    if row.native and has is not None and has < row.native:
        notes.append(
            "this hardware has no 8-bit floats: weights are widened, inputs are not rounded"
        )
    told = [tuple((text, row.source) for text in texts) for texts in (reasons, notes)]
    return Found(None, told[0]) if reasons else Found(row, notes=told[1])


def _shapes(row: Row, served: Served) -> str | None:
    """The linears whose sizes on a device do not fit."""
    sizes = {names: served.shared(names) for names in served.merged}
    misfits = [
        f"{'+'.join(names)} is {n} x {k}"
        for names, (n, k) in sizes.items()
        if row.shapes and not any(n % rows == 0 and k % cols == 0 for rows, cols in row.shapes)
    ]
    if not misfits:
        return None
    known = words(f"{rows} x {cols}" for rows, cols in row.shapes)
    return f"needs N x K in multiples of {known}, and on a device {words(misfits, 'and')}"


# A sentence without its subject that says what is in the way, or None.
Check = Callable[[Engine, Served], str | None]


@dataclass(frozen=True)
class Rule:
    """What is no row. source: where it was read; check: what is in the way; of a note, to know"""

    source: str
    check: Check


def _heads(engine: Engine, s: Served) -> str | None:
    if not engine.shares or (s.heads % s.tp == 0 and _kv_shared(s, s.tp)):
        return None
    fitting = words(
        tp for tp in range(1, MOST_DEVICES + 1) if s.heads % tp == 0 and _kv_shared(s, tp)
    )
    if s.heads % s.tp:
        return f"cannot share the {s.heads} query heads out over {s.tp} devices: serve.tp={fitting}"
    return (
        f"cannot share the {s.kv_heads} heads of keys and values out over {s.tp} devices, which neither "
        f"divide them nor are a multiple: serve.tp={fitting}"
    )


def _kv_shared(s: Served, tp: int) -> bool:
    return s.kv_heads % tp == 0 or tp % s.kv_heads == 0


def _shares(engine: Engine, s: Served) -> str | None:
    for names, k in s.merged.items():
        for name in names:
            size, what = (k, "inputs") if name in s.by_rows else (s.parts[name], "outputs")
            if engine.shares and size % s.tp and name not in s.by_heads:
                return f"cannot share the {size} {what} of {name} out over {s.tp} devices"
    return None


def _whole_groups(engine: Engine, s: Served) -> str | None:
    for scheme in s.quantized if engine.shares else []:
        size = scheme.group_size if scheme is not None else None
        size = BLOCK[1] if size == "block" else size
        for name in s.by_rows if isinstance(size, int) else ():
            n, k = s.shared((name,))
            if k % int(size or 1):
                return (
                    f"needs whole groups on every device: groups of {size} do not divide the {k} inputs of "
                    f"{name} ({n} x {k}) on one of {s.tp}: a smaller scheme.group_size or serve.tp"
                )
    return None


def _blocks(engine: Engine, s: Served) -> str | None:
    if not engine.shares or all(x is None or x.group_size != "block" for x in s.quantized):
        return None
    for name in s.parts:
        if name not in s.by_rows and (n := s.outputs(name)) % BLOCK[0]:
            return (
                f"needs whole blocks: blocks of {BLOCK[0]} do not divide the {n} outputs of {name} on one of "
                f"{s.tp} devices: recipe=fp8, or another serve.tp"
            )
    return None


def _quantized_head(engine: Engine, s: Served) -> str | None:
    rows = [row for row in ROWS if row.engine == engine.name and row.format == s.format]
    if s.head is None or not rows or any(row.head for row in rows):
        return None
    return "does not run a quantized embedding and head: leave head out"


def _mixed_zeros(engine: Engine, s: Served) -> str | None:
    mixed = len(s.quantized) > 1 and any(x is not None and not x.symmetric for x in s.quantized)
    if engine.name == TRANSFORMERS and s.format == CT and mixed:
        return "does not load mixed bits with zero points: scheme.symmetric=true"
    return None


def _mixed_gptq(engine: Engine, s: Served) -> str | None:
    if engine.name != LLAMA_CPP and s.format == GPTQ and len(s.quantized) > 1:
        return "does not load mixed bits in gptq: export=compressed-tensors"
    return None


def _cache(engine: Engine, s: Served) -> str | None:
    if s.cache is None or not s.cache.static or s.cache.keys.name in engine.caches:
        return None
    if not engine.caches:
        return "reads no scales of the cache: leave kv_cache out"
    known = words(engine.caches)
    return f"reads scales of the cache as {known}, not {s.cache.keys.name}: kv_cache=fp8 has one a layer"


def _gguf_of_others(engine: Engine, s: Served) -> str | None:
    if engine.name == TRANSFORMERS and s.format == GGUF and s.model_type not in READ_WHOLE:
        return (
            f"reads GGUF files of {words(READ_WHOLE)} whole, not of {s.model_type}: "
            "export=compressed-tensors"
        )
    return None


def _unread(engine: Engine, s: Served) -> str | None:
    zeros = any(x is not None and not x.symmetric for x in s.quantized)
    for row in UNREAD:
        named = row.engine == engine.name and s.model_type in row.model_types
        if named and s.format in row.formats and (zeros or not row.zeros):
            return row.reason
    return None


RULES = (
    Rule("sharding of attention", _heads),
    Rule("column and row parallel linears", _shares),
    Rule("K after sharding in whole groups, never padded", _whole_groups),
    Rule("FP8 blocks of merged shards", _blocks),
    Rule("run on vLLM 0.32; none found in the others", _quantized_head),
    Rule("the first scheme unpacks all", _mixed_zeros),
    Rule("dynamic names linears that engines fuse; tried with transformers 5.23", _mixed_gptq),
    Rule("compressed-tensors, kv_cache_scheme", _cache),
    Rule("tried with a random model of the type", _unread),
    Rule("integrations/ggml.py, GGUF_CONFIG_MAPPING; tried", _gguf_of_others),
)


def _sidecar(engine: Engine, s: Served) -> str | None:
    fixed = any(x and x.inputs and x.inputs.outliers == "static" for x in s.quantized)
    if fixed and s.format == BNB:
        return "does not look at the fixed outlier columns, and finds its own"
    return None


def _one_device(engine: Engine, s: Served) -> str | None:
    if engine.shares or s.tp == 1:
        return None
    return "by itself on one device: its tensor parallelism was not looked at"


def _cache_argument(engine: Engine, s: Served) -> str | None:
    """How the engine is told to keep its cache so; ``kv_cache.folder`` has the arguments."""
    if s.cache is None:
        return None
    if engine.name == TRANSFORMERS:
        return _cache_of_transformers(s, s.cache)
    # The CPU build has the attention for 8-bit floats alone.
    name = "vllm" if engine.name == VLLM_CPU and s.cache.static else engine.name
    argued = cache_arguments(s.cache).get(name)
    if argued is not None:
        return f"serve with {' '.join(argued['arguments'])} ({argued['note']})"
    if s.cache.static:
        return "reads the scales of the cache as FP8"
    return "has nothing alike: its cache stays in 16 bits"


def _cache_of_transformers(s: Served, cache: CacheScheme) -> str:
    if not cache.static:
        return "keeps this cache through compress.load alone"
    if any(scheme is not None and not scheme.symmetric for scheme in s.quantized):
        return "keeps its cache in 16 bits beside weights with zero points: scheme.symmetric=true"
    return "reads the scales of the cache as FP8"


def _gguf_not_looked_at(engine: Engine, s: Served) -> str | None:
    other = s.model_type not in READ_WHOLE and s.format == GGUF
    if other and engine.name not in (TRANSFORMERS, LLAMA_CPP):
        return f"its reader of GGUF was not looked at for models of type {s.model_type}"
    return None


NOTES = (
    Rule("bitsandbytes 0.50", _sidecar),
    Rule("-", _one_device),
    Rule("kv_cache_scheme and the engine's arguments", _cache_argument),
    Rule("-", _gguf_not_looked_at),
)


def loadable(served: Served) -> dict[str, dict[str, Any]]:
    """engine -> {version, loads, proved (what was run, or None), reasons (why not), notes}; reasons and notes
    as {text, source}. A reason is a sentence without its subject, the engine."""
    return {engine.name: _loadable(engine, served) for engine in ENGINES.values()}


def _loadable(engine: Engine, served: Served) -> dict[str, Any]:
    found = [compare(engine.name, scheme, served) for scheme in served.quantized]
    reasons = [reason for one in found for reason in one.reasons]
    known = any(row.format == served.format for row in ROWS if row.engine == engine.name)
    if known:
        reasons += _applied(RULES, engine, served)
    notes = [note for one in found for note in one.notes] + _applied(NOTES, engine, served)
    proof = proof_of(engine.name, served.format, served.kinds, served.model_type)
    return {
        "version": engine.version,
        "loads": not reasons,
        "proved": None if reasons or proof is None or served.tp > 1 else str(proof),
        "reasons": [_told(*reason, engine) for reason in dict.fromkeys(reasons)],
        "notes": [_told(*note, engine) for note in dict.fromkeys(notes)],
    }


def _applied(rules: Sequence[Rule], engine: Engine, served: Served) -> list[tuple[str, str]]:
    checked = [(rule.check(engine, served), rule.source) for rule in rules]
    return [(text, source) for text, source in checked if text is not None]


def _told(text: str, source: str, engine: Engine) -> dict[str, str]:
    return {"text": text, "source": f"{engine.name} {engine.version}: {source}"}


def refusals(
    given: Mapping[str, Mapping[str, Mapping[str, Any]]], engines: Iterable[str]
) -> list[str]:
    """A sentence for every broken rule of an engine that loads no format. given: format -> ``loadable``"""
    found = []
    for name in engines:
        answers = [engines_of[name] for engines_of in given.values()]
        if not any(answer["loads"] for answer in answers):
            found += [
                f"{name} {answer['version']} {reason['text']}"
                for answer in answers
                for reason in answer["reasons"]
            ]
    return list(dict.fromkeys(found))


def warnings(given: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A line for every engine that people serve with and that loads no format: the first broken rule. Of
    llama.cpp, which reads GGUF alone, where there is one. given: format -> ``loadable``"""
    asked = [
        e.name for e in ENGINES.values() if e.serves and (e.name != LLAMA_CPP or GGUF in given)
    ]
    lines = []
    for name in asked:
        broken = refusals(given, [name])
        more = f" (rules broken: {len(broken)})" if len(broken) > 1 else ""
        lines += [f"{line}{more}" for line in broken[:1]]
    return lines
