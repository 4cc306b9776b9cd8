"""A model repository of Triton Inference Server for its vLLM backend.

Read from triton-inference-server/vllm_backend, main of 2026 (src/model.py, samples/model_repository):
``NAME/1/model.json`` holds the arguments of vLLM's ``AsyncEngineArgs``; inputs and outputs the backend fills
in by itself. Not run here: it needs a GPU.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from compress.engines import VLLM
from compress.serve.command import engine_settings
from compress.serve.files import write_new

# Of the GPU's memory, for weights and cache; what is to be changed where several models share a GPU.
MEMORY_SHARE = 0.9
CONFIG = """\
name: "{name}"
backend: "vllm"

# vLLM makes the batches itself, and sends the tokens of an answer as they come.
max_batch_size: 0
model_transaction_policy {{
  decoupled: True
}}

# Which devices it takes is vLLM's business: all that tensor_parallel_size of model.json asks for.
instance_group [
  {{
    count: 1
    kind: KIND_MODEL
  }}
]
"""


def write_repository(
    folder: Path, target: Path, *, name: str, context: int | None = None, tp: int = 1
) -> Path:
    """Write the new folder ``target``, a repository with the one model ``name``. Raises UserError if
    ``target`` exists."""
    arguments = {
        "model": str(folder.resolve()),
        **engine_settings(VLLM, folder, context=context, tp=tp),
        "gpu_memory_utilization": MEMORY_SHARE,
    }
    return write_new(
        target,
        {
            f"{name}/config.pbtxt": CONFIG.format(name=name),
            f"{name}/1/model.json": json.dumps(arguments, indent=2) + "\n",
        },
    )


def how_to_run(folder: Path, target: Path, port: int) -> str:
    """The line that starts it, for this machine alone. The image's YY.MM decides its vLLM, which must be one
    that loads the folder."""
    place = folder.resolve()
    mounts = ("-v", f"{target.resolve()}:/models:ro", "-v", f"{place}:{place}:ro")
    return shlex.join(
        [
            *("docker", "run", "--rm", "--gpus", "all", "--shm-size", "2g"),
            *("-p", f"127.0.0.1:{port}:8000", *mounts),
            "nvcr.io/nvidia/tritonserver:YY.MM-vllm-python-py3",
            *("tritonserver", "--model-repository", "/models"),
        ]
    )
