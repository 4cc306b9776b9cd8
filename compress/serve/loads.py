"""Which engines load a folder, and which folder of a run an engine takes.

The rules are those of ``compress.plan.loadable``; whatever asks about a folder asks ``answers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UserError
from compress.export.formats import Weights
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder
from compress.plan.checkpoint import linear_scheme, on_disk
from compress.plan.loadable import VERSIONS, loadable
from compress.plan.rows import served
from compress.quantize.scheme import Schemes

VLLM, VLLM_CPU, SGLANG = "vllm", "vllm-cpu", "sglang"
TENSORRT, TRANSFORMERS, LLAMA_CPP = "tensorrt-llm", "transformers", "llama.cpp"
# In the order in which they are looked for on a machine.
ENGINES = (VLLM, VLLM_CPU, SGLANG, TENSORRT, TRANSFORMERS, LLAMA_CPP)
# Of a run: the folder of its first format; those of others are named after it.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Answer:
    """Whether an engine loads a folder. reasons: why not; notes: what to know where it does"""

    version: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        return not self.reasons


def answers(path: Path, tp: int = 1) -> dict[str, Answer]:
    """engine -> whether it loads the folder on ``tp`` devices, for all of ENGINES. Raises UserError for a
    folder that is not understood here."""
    versions = {name.lower(): version for name, version in VERSIONS.items()}
    versions |= {VLLM_CPU: "0.32", LLAMA_CPP: "b11206"}
    if gguf_of(path) is not None:
        reasons = (f"{path.name} holds a GGUF file, which llama.cpp reads",)
        others = {name: Answer(versions[name], reasons) for name in ENGINES}
        return others | {LLAMA_CPP: Answer(versions[LLAMA_CPP])}
    folder = ModelFolder(path)
    schemes = schemes_of(folder)
    stated = folder.config.get("quantization_config") or {}
    given = served(
        ShapeFolder(str(path), folder.config),
        on_disk(folder, None),
        schemes,
        export=str(stated.get("quant_method", "compressed-tensors")),
        tp=tp,
    )
    found = {}
    for name, told in loadable(given).items():
        reasons, notes = (tuple(e["text"] for e in told[key]) for key in ("reasons", "notes"))
        found[name.lower()] = Answer(told["version"], reasons, notes)
    on_cpu = (*found[VLLM].reasons, *_no_kernel_on_cpu(schemes))
    found[VLLM_CPU] = Answer(versions[VLLM_CPU], on_cpu)
    found[LLAMA_CPP] = Answer(versions[LLAMA_CPP], ("it reads GGUF alone: export=gguf",))
    return {name: found[name] for name in ENGINES}


def _no_kernel_on_cpu(schemes: Schemes | None) -> tuple[str, ...]:
    """Run on vLLM 0.32: its CPU build multiplies 4-bit integers, and 8 bits with inputs rounded by token."""
    scheme = None if schemes is None else schemes.linears
    if scheme is None or (scheme.type, scheme.bits, scheme.inputs) == ("int", 4, None):
        return ()
    if scheme.bits == 8 and scheme.inputs is not None and scheme.inputs.per == "token":
        return ()
    return (f"its CPU build has no kernel for {scheme.name}",)


def schemes_of(folder: ModelFolder) -> Schemes | None:
    """The schemes of a quantized folder: that of its first linear, those that differ, the embedding's."""
    weights, family = Weights(folder), family_of(folder.config)
    found = {name: linear_scheme(folder, weights.format, name) for name in weights.linears}
    head = found.pop(family.embedding, found.pop(family.head, None))
    if not found:
        return None
    first = next(iter(found.values()))
    return Schemes(first, {name: own for name, own in found.items() if own != first}, head)


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder; None if it has none. Raises UserError if there are several."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{folder} holds {len(files)} GGUF files, one is needed")
    return files[0] if files else None


def checkpoints(folder: Path) -> list[Path]:
    """The folders that can be served: of a run its checkpoint/ and then those of other formats, else the
    folder itself. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if (folder / CHECKPOINT).is_dir():
        found = [folder / CHECKPOINT, *sorted(folder.glob(f"{CHECKPOINT}-*"))]
        return [path for path in found if path.is_dir() and path.suffix != ".partial"]
    if (folder / "config.json").exists() or gguf_of(folder) is not None:
        return [folder]
    raise UserError(f"{folder} is neither a run with a {CHECKPOINT}/ nor a model folder")


def place(folders: Mapping[Path, Mapping[str, Answer]], engine: str) -> tuple[Path, Answer]:
    """The first folder that an engine loads; if it loads none, the first one and what is in the way."""
    for path, found in folders.items():
        if found[engine].loads:
            return path, found[engine]
    first = next(iter(folders))
    return first, folders[first][engine]
