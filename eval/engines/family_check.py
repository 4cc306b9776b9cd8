"""Which engine reads which family in which format: random models of every kind, exported, loaded, asked.

    python -m eval.engines.family_check --out eval/results/families [--vllm FOLDER] [--gptqmodel FOLDER]
        [--kinds NAME,...] [--engines NAME,...]

Each export is read by this project's own reader in float32 and by an engine in a process of its own, as
``family_load`` does. ``off``: the mean difference of the log probabilities of next tokens, in nats: of a
model that an engine reads right it is that of 16-bit arithmetic, and of experts that 16 bits choose
otherwise. What an engine says when it fails is kept. FOLDER: the environment of an engine. What is found is
added to what OUT holds of other kinds and engines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.engines import AWQ, BNB, CT, DENSE, GPTQ, TRANSFORMERS, VLLM_CPU
from compress.environment import environment
from compress.export.formats import FORMATS
from compress.export.outer import dress
from compress.model.families import family_of
from compress.model.folder import ModelFolder, read_json, write_json
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding.nearest import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.report.table import markdown
from compress.runtime.load import load_dense
from eval.engines.family_models import KINDS, SEEING, written_model, written_seeing_model

CPU = torch.device("cpu")
LOAD = Path(__file__).with_name("family_load.py")
GPTQMODEL = "gptqmodel"
INT4, ZEROS = Scheme(4, 32, True), Scheme(4, 32)
ROUNDED = Scheme(8, "channel", True, inputs=InputScheme())
SPLIT = Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))
# Most nats that arithmetic may differ by: of wrong weights it is half a nat and more.
MOST = 0.2
SECONDS = 400


@dataclass(frozen=True)
class Case:
    """A format with numbers, and the engines that are asked to read it. experts: models with experts alone"""

    name: str
    export: str
    scheme: Scheme
    engines: tuple[str, ...]
    experts: bool = False


CASES = (
    Case("compressed-tensors int4", CT, INT4, (TRANSFORMERS, VLLM_CPU)),
    Case("compressed-tensors int4, zero points", CT, ZEROS, (TRANSFORMERS,)),
    # On a CPU without AMX vLLM has no kernel for experts of 4 bits.
    Case("compressed-tensors w8a8", CT, ROUNDED, (VLLM_CPU,), experts=True),
    Case("gptq int4", GPTQ, INT4, (TRANSFORMERS, GPTQMODEL)),
    Case("awq int4", AWQ, ZEROS, (TRANSFORMERS, GPTQMODEL)),
    Case("bitsandbytes int8", BNB, SPLIT, (TRANSFORMERS,)),
    Case("dense", DENSE, INT4, (TRANSFORMERS,)),
)


@dataclass(frozen=True)
class Environments:
    """Python of each engine; transformers with GPTQModel, which its formats need, is that of GPTQModel."""

    vllm: Path | None
    gptqmodel: Path | None

    def python(self, engine: str, export: str) -> Path | None:
        if engine == VLLM_CPU:
            return self.vllm
        if engine == GPTQMODEL or export in (GPTQ, AWQ):
            return self.gptqmodel
        return Path(sys.executable)


def exported(folder: ModelFolder, case: Case, tokens: Tensor, place: Path) -> ModelFolder:
    """The model in the format of a case."""
    quantize(
        folder,
        place / "record",
        tokens=tokens,
        schemes=Schemes(case.scheme),
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    FORMATS[case.export].write(ModelFolder(place / "record"), place / "out")
    dress(place / "out", folder)
    return ModelFolder(place / "out")


@torch.no_grad()
def ours(folder: ModelFolder, tokens: Tensor) -> Tensor:
    logits = load_dense(folder, CPU, torch.float32)(tokens, use_cache=False).logits
    found: Tensor = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return found


def asked(engine: str, python: Path, folder: Path, expected: Tensor, place: Path) -> dict[str, Any]:
    """What an engine makes of a folder: {off}, or {error}."""
    name = "vllm" if engine == VLLM_CPU else engine
    words = [str(python), str(LOAD), name, str(folder), str(place / "tokens"), str(place / engine)]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Else it rounds inputs too.
        "VLLM_CPU_INT4_W4A8": "0",
    }
    log = place / "log"
    with log.open("w") as out:
        started = subprocess.Popen(
            words,
            env={**os.environ, **settings, "PYTHONPATH": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = started.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {SECONDS} s"}
    finally:
        # What it started does not always end with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    if code:
        return {"error": said(log.read_text(encoding="utf-8", errors="replace"))}
    found = load_file(place / engine)["log_probs"]
    return {"off": round(float((found - expected).abs().mean()), 5)}


def said(log: str) -> str:
    """The first error in the log of an engine that is more than that something failed, without paths."""
    lines = re.findall(r"(?:^|\s)(\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    vague = (
        "RuntimeError: Engine core",
        "Exception: WorkerProc",
        "EngineDeadError",
        "Tokenizer not",
    )
    told = [line for line in lines if not any(word in line for word in vague)]
    last = (told or lines or log.strip().splitlines() or ["it said nothing"])[0]
    return re.sub(r"/\S+/", "", last)[:240]


def check(
    kind: str, case: Case, place: Path, pythons: dict[str, Path]
) -> Iterator[tuple[str, Any]]:
    """engine -> what it makes of a kind in a format; n/a where the format is refused."""
    path = place / "model"
    if kind in KINDS:
        _, folder = written_model(kind, path, torch.bfloat16)
    else:
        _, folder = written_seeing_model(kind.removesuffix(" (sees)"), path, torch.bfloat16)
    if case.experts and family_of(folder.config).experts is None:
        return
    if (reason := family_of(folder.config).refuses.get(case.export)) is not None:
        yield from ((engine, {"refused": reason}) for engine in pythons)
        return
    tokens = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))
    out = exported(folder, case, tokens, place)
    expected = ours(out, tokens)
    save_file({"tokens": tokens}, place / "tokens")
    for engine, python in pythons.items():
        yield engine, asked(engine, python, out.path, expected, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="FILE without ending: .json, .md")
    parser.add_argument("--vllm", type=Path, help="environment of vLLM's CPU build")
    parser.add_argument("--gptqmodel", type=Path, help="environment of GPTQModel")
    parser.add_argument("--kinds", help="comma-separated; default: all")
    parser.add_argument("--engines", help="comma-separated; default: all that there are")
    given = parser.parse_args()
    every = [*KINDS, *(f"{kind} (sees)" for kind in SEEING)]
    kinds = given.kinds.split(",") if given.kinds else every
    there = Environments(
        *(f and f.absolute() / "bin" / "python" for f in (given.vllm, given.gptqmodel))
    )
    target = given.out.with_suffix(".json")
    found = read_json(target) if target.exists() else {"loads": {}}
    found["environment"] = environment(CPU)
    for kind in kinds:
        for case in CASES:
            wanted = given.engines.split(",") if given.engines else case.engines
            if kind not in KINDS:
                # These want an image processor, which the models have not.
                wanted = [engine for engine in wanted if engine == TRANSFORMERS]
            pythons = {
                engine: python
                for engine in case.engines
                if engine in wanted and (python := there.python(engine, case.export)) is not None
            }
            with tempfile.TemporaryDirectory() as place:
                for engine, answer in check(kind, case, Path(place), pythons):
                    answer["date"] = datetime.now(UTC).date().isoformat()
                    found["loads"].setdefault(kind, {}).setdefault(case.name, {})[engine] = answer
                    print(kind, case.name, engine, answer, flush=True)
            write_json(target, found)
    given.out.with_suffix(".md").write_text(table(found["loads"]), encoding="utf-8")


def table(loads: dict[str, Any]) -> str:
    """Kinds by formats and engines: the difference in nats, or why not, by number."""
    columns = [(case.name, engine) for case in CASES for engine in case.engines]
    reasons: list[str] = []
    rows = [["model", *(f"{name}: {engine}" for name, engine in columns)]]
    for kind, formats in loads.items():
        cells = []
        for name, engine in columns:
            answer = formats.get(name, {}).get(engine)
            cells.append("" if answer is None else _cell(answer, reasons))
        rows.append([kind, *cells])
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([markdown(rows), "", *notes, ""])


def reads(answer: dict[str, Any]) -> bool:
    """Whether an engine read a checkpoint as it is."""
    return float(answer.get("off", 1)) <= MOST


def _cell(answer: dict[str, Any], reasons: list[str]) -> str:
    if reads(answer):
        return f"{answer['off']:.4f}"
    if "refused" in answer:
        return "-"
    why = answer.get("error") or f"other weights: {answer['off']:.2f} nats off"
    if why not in reasons:
        reasons.append(why)
    return f"no ({reasons.index(why) + 1})"


if __name__ == "__main__":
    main()
