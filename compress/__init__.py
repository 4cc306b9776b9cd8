"""Compress language models after training, prove the cost, hand over checkpoints that engines serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Libraries that would tell their makers what is read and run here, files of this machine included. They look
# when they are imported; whoever sets these otherwise is asked first.
QUIET = {"DO_NOT_TRACK": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def load(folder: Path | str, device: str = "auto") -> Any:
    """A transformers model of an exported folder whose quantized linears, embedding and head stay packed and
    run through the kernels of this project, and whose cache is the folder's: ``generate`` and lm-eval use
    them as they use any other model.

    device: auto takes a GPU if there is one. Raises UserError for a folder that cannot be read, or
        a device that is not there.
    """
    # Here, not above: the command line answers without importing torch.
    from compress.device import device_named
    from compress.model.folder import ModelFolder
    from compress.runtime.cached import load_running

    return load_running(ModelFolder(folder), device_named(device))
