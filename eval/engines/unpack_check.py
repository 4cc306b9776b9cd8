"""Does GPTQModel read the weights that were exported? Every linear of GPTQ and AWQ checkpoints, through
transformers.

    ENV/bin/python -m eval.engines.unpack_check FOLDER ...

ENV has this project, gptqmodel and optimum: ``eval/engines/install_gptqmodel.sh ENV``. transformers loads the
folder by its config alone, with GPTQModel's linears in plain torch. Those of GPTQ say what their weight is;
those of AWQ are given the columns of the identity, so what comes out is the weight. It must equal, to the
last bit, what our reader's codes, scales and zero points stand for in float16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from compress.export.formats import Weights
from compress.model.folder import ModelFolder
from compress.quantize.qtensor import QTensor

CODES = "qweight"


def load(folder: ModelFolder) -> Any:
    """The model as transformers loads it, linears in plain torch."""
    stated = folder.config["quantization_config"]
    # Only the backend is taken from what is given beside a config in the folder.
    chosen = (
        AwqConfig(backend="torch_awq")
        if stated["quant_method"] == "awq"
        else GPTQConfig(bits=stated["bits"], backend="torch")
    )
    return AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.float16, quantization_config=chosen
    )


def weight_of(module: Any, inputs: int) -> Tensor:
    """The weight float16 (out, in) that one of GPTQModel's linears computes with."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T
    module.bias = None
    return module(torch.eye(inputs, dtype=torch.float16)).T


@torch.inference_mode()
def check(path: Path) -> bool:
    """Print how many linears are read alike; True if all are."""
    folder = ModelFolder(path)
    weights, model = Weights(folder), load(folder)
    theirs = {name: m for name, m in model.named_modules() if hasattr(m, CODES)}
    different = sorted(set(theirs) ^ set(weights.linears))
    for name in weights.linears:
        q = weights.get(f"{name}.weight")
        assert isinstance(q, QTensor), name
        if name not in theirs:
            continue
        if not torch.equal(weight_of(theirs[name], q.shape[1]), q.dequantize(torch.float16)):
            different.append(name)
    kinds = ", ".join(sorted({type(module).__name__ for module in theirs.values()}))
    good = bool(theirs) and not different
    first = f", {different[0]} first" if different else ""
    found = f"{len(theirs)} linears in {kinds}, {len(different)} different{first}"
    print(f"{'ok  ' if good else 'FAIL'} {path}: {found}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    results = [check(folder) for folder in parser.parse_args().folders]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
