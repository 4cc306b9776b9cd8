"""A model whose function is unchanged but whose activations carry outliers, and what 8 bits make of it.

    python -m eval.benchmarks.outlier_model --keep FOLDER [--channels 6] [--factor 64] [--tokens 6144]
        [--only ROW ...] [--out FILE.json]

In every block a few channels of each norm, and of the MLP's inner activations, are scaled up by a power of
two and the columns of the linears that read them scaled down by it: every product stays exactly what it
was in any floating-point type. The rows: what 16-bit arithmetic alone costs, int8 weights alone, plain W8A8
(absolute maxima), and LLM.int8 with columns found while it runs or fixed by calibration, each without and
with SmoothQuant scales. All calibrate on and are judged by the same tokens as the demo.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from compress.compose import compose_settings
from compress.environment import environment
from compress.export.shards import ShardWriter
from compress.measure.accuracy import open_windows
from compress.model.families import family_of
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.model.walk import Walk
from compress.report.table import METRICS, with_error
from compress.runtime.load import load_dense
from eval.text import evaluate_text

CPU = torch.device("cpu")
RECIPES = {
    "int8 weights alone": ["recipe=w8a16-int8"],
    "W8A8": ["recipe=w8a8-int8", "transforms=[]"],
    "LLM.int8 dynamic": ["recipe=llm-int8", "transforms=[]"],
    "LLM.int8 static": ["recipe=llm-int8-static"],
    "SmoothQuant W8A8": ["recipe=w8a8-int8"],
    "SmoothQuant, LLM.int8 dynamic": ["recipe=llm-int8"],
}


def add_outliers(
    source: ModelFolder, target: Path, *, channels: int, factor: float, seed: int = 0
) -> None:
    """Write a plain folder with the function of ``source`` and outliers among its activations.

    channels: how many of each input are scaled; those of one width are the same in every layer, as in
    large models. factor: a power of two
    """
    family = family_of(source.config)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[int, torch.Tensor] = {}
    walk = Walk(source, family, CPU)
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target)
    prefixes = tuple(f"{walk.prefix(index)}." for index in range(len(walk)))
    for name in source.names:
        if not name.startswith(prefixes):
            shards.add(name, source.tensor(name))
    for index in range(len(walk)):
        with walk.open(index) as module, torch.no_grad():
            for shared in family.inputs:
                readers: list[Any] = [module.get_submodule(name) for name in shared.linears]
                width = readers[0].weight.shape[1]
                maker: Any = None if shared.source is None else module.get_submodule(shared.source)
                # Not where heads share their values: there a row of v_proj makes several columns.
                if maker is None or maker.weight.shape[0] != width:
                    continue
                if width not in chosen:
                    chosen[width] = torch.randperm(width, generator=generator)[:channels]
                columns = chosen[width]
                for parameter in maker.parameters():
                    parameter[columns] *= factor
                for reader in readers:
                    reader.weight[:, columns] /= factor
            for name, parameter in module.named_parameters():
                # A copy: the block's memory is freed before the shard is written.
                shards.add(f"{walk.prefix(index)}.{name}", parameter.detach().clone())
    shards.close()
    write_json(target / "config.json", source.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, required=True, help="where the runs stay")
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--factor", type=float, default=64)
    parser.add_argument("--tokens", type=int, default=6144, help="of each text to judge by")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    words = ["data=sotu", "eval.tasks=[]", "eval.block_tokens=null", "speed=none"]
    words += [f"eval.tokens={asked.tokens}"]
    settings = compose_settings(["recipe=w8a8-int8", *words])
    original = ModelFolder(resolve_model(settings.model.source, None))
    model = asked.keep / "model"
    if not model.exists():
        add_outliers(original, model, channels=asked.channels, factor=asked.factor)
    results = {"16-bit arithmetic": arithmetic_noise(original, ModelFolder(model), settings)}
    for name, recipe in ((name, RECIPES[name]) for name in asked.only):
        run = asked.keep / name.replace(" ", "-")
        if not (run / METRICS).exists():
            command = [sys.executable, "-m", "compress", *recipe, *words]
            command += [f"model.source={model}", f"hydra.run.dir={run}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = read_json(run / METRICS)
        texts = metrics["candidate"]["texts"]
        results[name] = {
            "texts": {
                text: {k: found[k] for k in ("kl", "kl_stderr")} for text, found in texts.items()
            }
        }
        if "outliers" in metrics["compression"]:
            results[name]["outliers"] = kept_columns(metrics["compression"]["outliers"])
    texts = list(next(iter(results.values()))["texts"])
    print(f"| | {' | '.join(f'KL {text}' for text in texts)} |\n" + "|---" * (len(texts) + 1) + "|")
    for name, row in results.items():
        cells = [
            with_error(row["texts"][t]["kl"], row["texts"][t]["kl_stderr"], "{:.4f}") for t in texts
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if asked.out:
        facts = {"channels": asked.channels, "factor": asked.factor, "tokens": asked.tokens}
        write_json(asked.out, {**facts, "environment": environment(CPU), "results": results})


def arithmetic_noise(original: ModelFolder, model: ModelFolder, settings: Any) -> dict[str, Any]:
    """KL of the outlier model in its own 16 bits from the original in float32."""
    windows = open_windows(settings.eval, open_tokenizer(original))
    exact = load_dense(original, CPU, torch.float32)
    rounded = load_dense(model, CPU, model.dtype)
    texts = {}
    for text, blocks in windows.items():
        found = evaluate_text(
            lambda tokens: rounded(tokens).logits.float(),
            iter(blocks.tokens),
            lambda tokens: exact(tokens).logits,
        )
        texts[text] = {k: found["candidate"][k] for k in ("kl", "kl_stderr")}
    return {"texts": texts}


def kept_columns(outliers: Any) -> dict[str, Any]:
    """How many input columns reach the threshold, and how many are kept, as shares of all."""
    entries = outliers["inputs"].values()
    total = sum(entry["width"] * len(entry["layers"]) for entry in entries)
    layers = [layer for entry in entries for layer in entry["layers"]]
    found = {"reach_threshold": sum(layer["columns"] for layer in layers) / total}
    if "kept" in layers[0]:
        found["kept"] = sum(layer["kept"] for layer in layers) / total
    return found


if __name__ == "__main__":
    main()
