"""What every serving engine loads, as data: a row for each kind of checkpoint.

``plan.loadable`` compares rows with a checkpoint; ``python -m compress.engines`` prints docs/engines.md. N
are the outputs of a linear, K its inputs, both on one device after tensor parallelism, with q, k and v, and
gate and up, taken together, as engines run them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

VLLM, VLLM_CPU, SGLANG = "vllm", "vllm-cpu", "sglang"
TENSORRT, TRANSFORMERS, LLAMA_CPP = "tensorrt-llm", "transformers", "llama.cpp"

# Formats: names of ``export=``; an unquantized folder is DENSE.
CT, BNB, GPTQ, AWQ, GGUF, DENSE = (
    "compressed-tensors", "bitsandbytes", "gptq", "awq", "gguf", "dense",
)  # fmt: skip
# Kinds of numbers, and how people say them.
KINDS = {"int": "integers", "fp8": "FP8", "nvfp4": "NVFP4", "mxfp4": "MXFP4", "16 bits": "16 bits"}
# Inputs that are left alone; others are named as ``InputScheme.name`` does.
WIDE = "16-bit"
# Numbers of columns that share a scale: multiples of 2, of 32.
EVEN, BLOCKS = range(2, 1 << 20, 2), range(32, 1 << 20, 32)
Group = int | str | range


@dataclass(frozen=True)
class Proof:
    """Checkpoints that an engine loaded and answered with, as eval.engines.serve_check asks.

    kinds: schemes as they name themselves, with ``+kv-CACHE`` where the cache has one; PLAIN: 16 bits
    version: of the engine; model_types: what they were of
    """

    engine: str
    format: str
    kinds: tuple[str, ...]
    version: str
    date: str
    device: str = "CPU"
    model_types: tuple[str, ...] = ("llama",)

    def __str__(self) -> str:
        return f"loaded with {self.version} on {self.device}, {self.date}"


@dataclass(frozen=True)
class Engine:
    """version: which its rows are about; caches: what checkpoints may state of theirs, beside 16 bits
    shares: whether its tensor parallelism was looked at; serves: whether people serve with it, so that a run
    warns of what it would not load"""

    name: str
    version: str
    caches: tuple[str, ...] = ()
    shares: bool = True
    serves: bool = True


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(VLLM, "0.33", ("fp8-tensor", "fp8-head")),
        Engine(VLLM_CPU, "0.32.0", ("fp8-tensor",)),
        Engine(SGLANG, "0.5.23", ("fp8-tensor",)),
        Engine(TENSORRT, "main 2026", ("fp8-tensor",)),
        Engine(TRANSFORMERS, "5.23", ("fp8-tensor", "fp8-head"), shares=False, serves=False),
        Engine(LLAMA_CPP, "2026.10.11549", shares=False),
    )
}


@dataclass(frozen=True)
class Unread:
    """Model types whose checkpoints in some formats an engine does not read, whatever their numbers.

    reason: a sentence without its subject; zeros: only those with zero points
    """

    engine: str
    formats: tuple[str, ...]
    model_types: tuple[str, ...]
    reason: str
    zeros: bool = False


@dataclass(frozen=True)
class Row:
    """One kind of checkpoint. Empty: anything.

    numbers: of KINDS, of the weights; inputs: how they may be rounded; bits: of integers
    groups: what shares a scale, columns or channel, tensor, block (128 x 128)
    zeros: bits at which there may be zero points
    shapes: pairs of which N and K must be multiples of one; pads: others are filled up, slower
    head: whether embedding and head may be quantized
    cuda: least compute capability; native: that below which weights are widened and inputs left alone
    note: to know; refused: it does not load, and why
    source: where it was read
    """

    engine: str
    format: str
    numbers: str = ""
    inputs: tuple[str, ...] = (WIDE,)
    bits: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    zeros: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    pads: bool = False
    head: bool = False
    cuda: float | None = None
    native: float | None = None
    note: str | None = None
    refused: str | None = None
    source: str = ""


MARLIN_GROUPS: tuple[Group, ...] = (32, 64, 128, "channel")
MARLIN_TILES = ((64, 128), (128, 64))
WHOLE: tuple[Group, ...] = ("channel", "tensor")
ALL = tuple(range(2, 9))
ROUNDED = ("int8-token", "int8-tensor")
FLOATED = ("fp8-token", "fp8-tensor", WIDE)
OUTLIERS = ("int8-token-dynamic-outliers", "int8-token-static-outliers")
BLOCK_TYPES = "as Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0; where 256 columns share a scale, as Q2_K to Q6_K"
UNPACKED = "unpacked to 16 bits when it runs: the memory and speed of 16 bits"
JIT = "CUDA alone, through humming-kernels, which compile with nvcc (SM75 or newer)"
GPTQMODEL = "with gptqmodel installed"
PARSER = "compressed-tensors parser of _torch/model_config"


ROWS = (
    # vLLM on CUDA. Of several rows that fit the first counts.
    Row(VLLM, CT, "int", bits=(4, 8), groups=MARLIN_GROUPS, zeros=(4,), shapes=MARLIN_TILES, pads=True,
        cuda=7.5, source="Marlin: mixed_precision/marlin.py, marlin_utils.py"),
    Row(VLLM, CT, "int", bits=ALL, zeros=ALL, cuda=7.5, note=JIT,
        source="#46389; compressed_tensors_wNa16.py, mixed_precision/humming.py"),
    Row(VLLM, CT, "int", ROUNDED, (8,), WHOLE, cuda=7.5, source="compressed_tensors_w8a8_int8.py"),
    Row(VLLM, CT, "int", ("int8-token",), ALL[:-1], cuda=7.5, note=JIT, source="compressed_tensors_wNa8.py"),
    Row(VLLM, CT, "fp8", FLOATED, groups=WHOLE, cuda=7.5, native=8.9,
        source="compressed_tensors_w8a8_fp8.py, w8a16_fp8.py"),
    Row(VLLM, CT, "fp8", ("fp8-group", WIDE), groups=("block",), cuda=7.5, native=8.9,
        source="compressed_tensors.py, fp8_utils.py"),
    Row(VLLM, CT, "nvfp4", groups=(16,), cuda=7.5, source="compressed_tensors_w4a4_nvfp4.py"),
    Row(VLLM, CT, "mxfp4", groups=(32,), cuda=8.0, source="compressed_tensors_w4a4_mxfp4.py"),
    Row(VLLM, GPTQ, "int", bits=(4, 8), groups=MARLIN_GROUPS, shapes=MARLIN_TILES, pads=True, cuda=7.5,
        source="auto_gptq.py TYPE_MAP; no desc_act"),
    Row(VLLM, AWQ, "int", bits=(4,), groups=MARLIN_GROUPS, zeros=(4,), shapes=MARLIN_TILES, pads=True,
        cuda=7.5, source="auto_awq.py TYPE_MAP"),
    Row(VLLM, DENSE, "16 bits", cuda=7.5, source="unquantized"),
    Row(VLLM, BNB, inputs=(), refused="does not read bitsandbytes by itself any more: install "
        "vllm-bnb-plugin, or choose export=compressed-tensors", source="RFC #39583"),
    Row(VLLM, GGUF, inputs=(), refused="does not read gguf any more: choose export=compressed-tensors",
        source="RFC #39583; quantization/__init__.py"),
    # vLLM's CPU build.
    Row(VLLM_CPU, CT, "int", bits=(4,), groups=(EVEN, "channel"), zeros=(4,), shapes=((32, 32),),
        source="mixed_precision/cpu.py"),
    Row(VLLM_CPU, CT, "int", ROUNDED, (8,), WHOLE, source="scaled_mm/cpu.py"),
    Row(VLLM_CPU, CT, "fp8", ("fp8-token",), groups=("channel",), source="scaled_mm/pytorch.py",
        note="about one token a second without AMX"),
    Row(VLLM_CPU, CT, "fp8", ("fp8-tensor", "fp8-group"), groups=("tensor", "block"),
        refused="needs a CPU with AMX (Sapphire Rapids or newer) for FP8 in blocks or with one scale a "
        "tensor: recipe=fp8", source="scaled_mm/cpu.py"),
    Row(VLLM_CPU, GPTQ, "int", bits=(4,), groups=(EVEN, "channel"), shapes=((32, 32),),
        source="auto_gptq.py, mixed_precision/cpu.py"),
    Row(VLLM_CPU, AWQ, "int", bits=(4,), groups=(EVEN, "channel"), zeros=(4,), shapes=((32, 32),),
        source="auto_awq.py, mixed_precision/cpu.py"),
    Row(VLLM_CPU, DENSE, "16 bits", source="unquantized"),
    # SGLang.
    Row(SGLANG, CT, "int", bits=(4, 8), groups=MARLIN_GROUPS, zeros=(4,), shapes=MARLIN_TILES, cuda=8.0,
        source="compressed_tensors_wNa16.py, marlin_utils.py; dense tiles are not padded"),
    Row(SGLANG, CT, "int", ROUNDED, (8,), WHOLE, cuda=8.0, source="compressed_tensors_w8a8_int8.py"),
    Row(SGLANG, CT, "fp8", FLOATED, groups=WHOLE, cuda=8.0, native=8.9,
        source="compressed_tensors_w8a8_fp8.py, w8a16_fp8.py"),
    Row(SGLANG, CT, "fp8", ("fp8-group",), groups=("block",), cuda=8.9,
        source="compressed_tensors_w8a8_fp8.py"),
    Row(SGLANG, CT, "nvfp4", groups=(16,), cuda=8.0, source="compressed_tensors_w4a16_nvfp4.py"),
    Row(SGLANG, CT, "mxfp4", refused="loads MXFP4 of experts alone, not of dense linears: scheme=nvfp4",
        source="compressed_tensors.py: no scheme for dense linears"),
    Row(SGLANG, GPTQ, "int", bits=(4, 8), groups=MARLIN_GROUPS, shapes=MARLIN_TILES, cuda=8.0,
        source="gptq.py TYPE_MAP; the kernel without Marlin is gone"),
    Row(SGLANG, AWQ, "int", bits=(4,), groups=MARLIN_GROUPS, zeros=(4,), cuda=8.0, source="awq.py"),
    Row(SGLANG, BNB, "int", OUTLIERS, (8,), ("channel",), cuda=7.5,
        source="bitsandbytes.py; bitsandbytes 0.46.1"),
    Row(SGLANG, GGUF, "int", bits=ALL, groups=(BLOCKS, "channel"), zeros=(2, 3, 4, 5), shapes=((1, 32),),
        head=True, cuda=7.5, note=BLOCK_TYPES, source="gguf.py STANDARD_QUANT_TYPES, KQUANT_TYPES"),
    Row(SGLANG, GGUF, "16 bits", cuda=7.5, note="F16, BF16", source="gguf.py UNQUANTIZED_TYPES"),
    Row(SGLANG, DENSE, "16 bits", cuda=7.5, source="unquantized"),
    # TensorRT-LLM.
    Row(TENSORRT, CT, "fp8", ("fp8-token",), groups=("channel",), cuda=8.9, source=PARSER),
    Row(TENSORRT, CT, "fp8", ("fp8-group",), groups=("block",), cuda=8.9, source=PARSER),
    Row(TENSORRT, CT, "mxfp4", refused="reads MXFP4 for experts (W4A16_MXFP4); dense linears were not looked "
        "at: recipe=fp8", source=PARSER),
    Row(TENSORRT, CT, "nvfp4", refused="loads NVFP4 with inputs in NVFP4 too, this leaves them in 16 bits: "
        "recipe=fp8", source=PARSER),
    Row(TENSORRT, CT, "int", ROUNDED, (8,), refused="takes 8 bits by row and token for FP8 whatever their "
        "type, and would compute nonsense: recipe=fp8", source=PARSER),
    Row(TENSORRT, AWQ, inputs=(), refused="reads AWQ in ModelOpt's layout alone: recipe=fp8",
        source="ModelOpt's W4A16_AWQ"),
    Row(TENSORRT, DENSE, "16 bits", cuda=8.0, source="unquantized"),
    # transformers.
    Row(TRANSFORMERS, CT, "int", (WIDE, *ROUNDED), ALL, zeros=ALL, head=True, note=UNPACKED,
        source="quantizer_compressed_tensors.py"),
    Row(TRANSFORMERS, CT, "fp8", (*FLOATED, "fp8-group"), groups=(*WHOLE, "block"), note=UNPACKED,
        source="quantizer_compressed_tensors.py"),
    Row(TRANSFORMERS, CT, "nvfp4", groups=(16,), note=UNPACKED, source="quantizer_compressed_tensors.py"),
    Row(TRANSFORMERS, CT, "mxfp4", groups=(32,), note=UNPACKED, source="quantizer_compressed_tensors.py"),
    Row(TRANSFORMERS, BNB, "int", OUTLIERS, (8,), ("channel",), source="quantizer_bnb_8bit.py"),
    Row(TRANSFORMERS, GPTQ, "int", bits=(2, 3, 4, 8), groups=(16, 32, 64, 128, 256, 512, 1024, "channel"),
        zeros=(2, 3, 4, 8), note=GPTQMODEL, source="GPTQConfig; GPTQModel 7.7, qlinear/torch.py"),
    Row(TRANSFORMERS, AWQ, "int", bits=(4,), groups=(16, 32, 64, 128, "channel"), zeros=(4,), note=GPTQMODEL,
        source="quantizer_awq.py; GPTQModel 7.7, torch_awq.py"),
    Row(TRANSFORMERS, GGUF, "int", bits=(2, 3, 4, 6, 7, 8), groups=(BLOCKS, "channel"), zeros=(2, 3, 4),
        shapes=((1, 32),), head=True, note=f"as Q4_0, Q4_1, Q8_0 or k-quants; {UNPACKED}",
        source="integrations/gguf/dequant.py"),
    Row(TRANSFORMERS, GGUF, "16 bits", note="F16, BF16, F32", source="integrations/gguf"),
    Row(TRANSFORMERS, DENSE, "16 bits", source="unquantized"),
    # llama.cpp.
    Row(LLAMA_CPP, GGUF, "int", bits=ALL, groups=(BLOCKS, "channel"), zeros=(2, 3, 4, 5), shapes=((1, 32),),
        head=True, note=BLOCK_TYPES, source="ggml-quants.c"),
    Row(LLAMA_CPP, GGUF, "mxfp4", groups=(32,), shapes=((1, 32),), head=True, note="MXFP4",
        source="ggml-quants.c"),
    Row(LLAMA_CPP, GGUF, "16 bits", note="F16, BF16, F32", source="ggml.c"),
)  # fmt: skip


# Types with experts, but for gpt_oss.
EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "jamba", "qwen3_next",
)  # fmt: skip
# As eval/results/families.md has them, of random models of every type.
UNREAD = (
    Unread(TRANSFORMERS, (CT,), EXPERTS, "reads experts without zero points alone: scheme.symmetric=true",
        zeros=True),
    Unread(TRANSFORMERS, (CT, GPTQ, AWQ), ("gpt_oss",), "reads the experts of gpt_oss in one tensor alone: "
        "export=dense"),
    Unread(TRANSFORMERS, (CT, GPTQ, AWQ), ("gpt2",), "does not find the quantized weights of gpt2, whose "
        "layers are no Linear: export=dense"),
    Unread(TRANSFORMERS, (GPTQ, AWQ), (*EXPERTS, "falcon", "mamba2"), "does not read this type in this "
        "format: export=compressed-tensors"),
    Unread(TRANSFORMERS, (AWQ,), ("gpt_neox",), "looks for scales of an activation in AWQ files of gpt_neox: "
        "export=compressed-tensors"),
    Unread(VLLM_CPU, (CT,), (*EXPERTS, "gpt_oss"), "has no kernel for quantized experts on a CPU without "
        "AMX: export=dense"),
)  # fmt: skip

PLAIN = "16 bits"
FOUR_BITS = ("int4-g64-asym", "int4-g64-sym")
VLLM_RUN, HF_RUN, LLAMA_RUN = (
    (version, "2026-11-27") for version in ("0.32.0", "5.23", "2026.10.11549")
)
DENSE_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "phi3", "opt",
)  # fmt: skip
TRIED = ("int4-g32-sym", "int4-g32-asym")
SPLIT_ROWS = "int8-channel-sym+int8-token-dynamic-outliers"
# As eval/results/serve-check.json has them, of the demo model; then families.json, of random ones.
PROOFS = (
    Proof(
        VLLM_CPU,
        CT,
        (*FOUR_BITS, "int8-channel-sym+int8-token", "fp8-channel+fp8-token"),
        *VLLM_RUN,
    ),
    Proof(VLLM_CPU, CT, ("int4-g64-asym+kv-fp8-tensor",), *VLLM_RUN),
    Proof(VLLM_CPU, GPTQ, ("int4-g64-sym",), *VLLM_RUN),
    Proof(VLLM_CPU, AWQ, ("int4-g64-asym",), *VLLM_RUN),
    Proof(VLLM_CPU, DENSE, (PLAIN, f"{PLAIN}+kv-fp8-tensor"), *VLLM_RUN),
    Proof(TRANSFORMERS, CT, (*FOUR_BITS, "int4-g64-asym+kv-fp8-tensor"), *HF_RUN),
    Proof(TRANSFORMERS, CT, ("int8-channel-sym", "int8-channel-sym+int8-token"), *HF_RUN),
    Proof(TRANSFORMERS, CT, ("fp8-channel+fp8-token", "fp8-tensor+fp8-tensor"), *HF_RUN),
    Proof(TRANSFORMERS, CT, ("nvfp4", "mxfp4"), *HF_RUN),
    Proof(TRANSFORMERS, BNB, ("int8-channel-sym+int8-token-dynamic-outliers",), *HF_RUN),
    Proof(TRANSFORMERS, GGUF, (*FOUR_BITS, "int8-channel-sym", PLAIN), *HF_RUN),
    Proof(TRANSFORMERS, DENSE, (PLAIN, f"{PLAIN}+kv-fp8-tensor"), *HF_RUN),
    Proof(LLAMA_CPP, GGUF, (*FOUR_BITS, "int8-channel-sym", "mxfp4", PLAIN), *LLAMA_RUN),
    Proof(
        TRANSFORMERS,
        CT,
        TRIED,
        *HF_RUN,
        model_types=(*DENSE_TYPES, "gpt_neox", "falcon", "mamba2"),
    ),
    Proof(TRANSFORMERS, CT, TRIED[:1], *HF_RUN, model_types=EXPERTS),
    Proof(TRANSFORMERS, GPTQ, TRIED[:1], *HF_RUN, model_types=(*DENSE_TYPES, "gpt_neox")),
    Proof(TRANSFORMERS, AWQ, TRIED[1:], *HF_RUN, model_types=DENSE_TYPES),
    Proof(
        TRANSFORMERS,
        BNB,
        (SPLIT_ROWS,),
        *HF_RUN,
        model_types=(*DENSE_TYPES, "gpt_neox", "mamba2"),
    ),
    Proof(
        TRANSFORMERS,
        DENSE,
        (PLAIN,),
        *HF_RUN,
        model_types=(
            *DENSE_TYPES,
            *EXPERTS,
            "gpt_neox",
            "falcon",
            "mamba2",
            "gpt2",
            "gpt_oss",
        ),
    ),
    Proof(
        VLLM_CPU,
        CT,
        TRIED[:1],
        *VLLM_RUN,
        model_types=(*DENSE_TYPES, "gpt_neox", "falcon", "mamba2", "gpt2"),
    ),
)


def proof_of(engine: str, form: str, kinds: Iterable[str], model_type: str) -> Proof | None:
    """The load that was run of such a checkpoint, all its kinds; None if there is none."""
    proofs = [
        p for p in PROOFS if (p.engine, p.format) == (engine, form) and model_type in p.model_types
    ]
    found = [next((p for p in proofs if kind in p.kinds), None) for kind in kinds]
    return None if None in found else found[0]


def words(values: Iterable[object], last: str = "or") -> str:
    """As in ``32, 64 or channel``."""
    every = list(dict.fromkeys(map(_word, values)))
    return f" {last} ".join(part for part in (", ".join(every[:-1]), *every[-1:]) if part)


def _word(value: object) -> str:
    return f"multiples of {value.step}" if isinstance(value, range) else str(value)


HEADER = """# Engines: what loads what

Written by `python -m compress.engines` from the rows in `compress/engines.py`: change them there. A row
is one kind of checkpoint: its format (`export=`), the numbers of the weights, how inputs are rounded,
what shares a scale, at how many bits there may be zero points; of what N (outputs) and K (inputs) of a
linear must be multiples on one device, q, k, v and gate, up taken together; whether embedding and head
may be quantized; the least CUDA compute capability, and from which on 8-bit floats are multiplied as
they are. Of several rows that fit the first counts. A row that says "no" is refused although the engine
knows the format.

**Proved** is what was loaded, by the schemes' own names, of which model types, with which version, on what,
and when: it answered as our own reader does (`make serve-check` of the demo model, `make families-check` of
random models of every type). All else was read in the engine's source and not
run: vLLM's rows in 0.33 and again in the files that 0.32's CPU build installs, SGLang's in the wheel of
0.5.23, TensorRT-LLM's on main in 2026, transformers' in 5.23.

Beside the rows, engines that share a model out over `serve.tp` devices need query heads that tp divides,
heads of keys and values that it divides or is a multiple of, outputs and inputs in whole shares, whole
groups in every share of K, and in FP8 blocks every part of N in multiples of 128. `compress plan ...
serve.engines=[NAME] serve.tp=N` and every run with `serve.engines` ask all of it, and refuse what would
not load.
"""


def markdown() -> str:
    """docs/engines.md."""
    parts = [HEADER]
    for engine in ENGINES.values():
        caches = words((*engine.caches, "16 bits"), "or")
        lines = [
            f"## {engine.name} {engine.version}\n",
            f"Cache as checkpoints state it: {caches}.\n",
        ]
        header = ("format", "numbers", "inputs", "a scale for", "zero points", "N x K", "head", "CUDA",
                  "to know", "read in")  # fmt: skip
        lines += [_line(header), _line(["---"] * len(header))]
        lines += [_line(_cells(row)) for row in ROWS if row.engine == engine.name]
        if proofs := [proof for proof in PROOFS if proof.engine == engine.name]:
            lines += ["\nProved:\n"]
            lines += [
                f"- {p.format}, {', '.join(p.kinds)}, of {', '.join(p.model_types)}: {p}"
                for p in proofs
            ]
        if unread := [one for one in UNREAD if one.engine == engine.name]:
            lines += ["\nWhat it does not read, by model type:\n"]
            lines += [
                f"- {', '.join(one.formats)}{' with zero points' if one.zeros else ''}, of "
                f"{', '.join(one.model_types)}: it {one.reason}"
                for one in unread
            ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    numbers = KINDS.get(row.numbers, "any")
    if row.bits:
        numbers = f"{numbers} of {words(row.bits)}"
    shapes = words(f"{n} x {k}" for n, k in row.shapes) if row.shapes else "any"
    native = f", native {row.native}" if row.native else ""
    return [
        row.format,
        numbers,
        words(row.inputs) if row.inputs else "any",
        words(row.groups) if row.groups else "any",
        words(row.zeros) if row.zeros else "-",
        f"{shapes}, others padded" if row.pads else shapes,
        "yes" if row.head else "-",
        f"{row.cuda}{native}" if row.cuda else "-",
        f"no: {row.refused}" if row.refused else row.note or "",
        row.source,
    ]


if __name__ == "__main__":
    sys.stdout.write(markdown())
