"""llama.cpp on a CPU as a decoder, by node-llama-cpp, which brings it built:

    npm install --ignore-scripts --no-save node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

A node process beside answers line by line: a request is {"prompt": token ids, "tokens": how many} in JSON, an
answer one token id a line, each written as soon as it is there. One sequence at a time.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCRIPT = Path(__file__).with_suffix(".mjs")


class LlamaCppDecoder:
    """Greedy, never stopping early."""

    def __init__(self, modules: Path, gguf: Path, threads: int, context: int):
        from gguf import GGUFReader

        reader = GGUFReader(gguf)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.vocabulary = int(tensors["token_embd.weight"].shape[1])
        self._weights, self._states = step_bytes(reader)
        command = ["node", str(SCRIPT), str(modules), str(gguf), str(threads), str(context)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        release = json.loads(self._line())["release"]
        self.kernels = {f"llama.cpp {release} {gguf.stem.rpartition('.')[2]}": len(tensors)}

    def start(self, prompt: Tensor, tokens: int, padding: Tensor | None = None) -> Tensor:
        if len(prompt) != 1:
            raise ValueError(f"one sequence at a time, not {len(prompt)}")
        assert self._process.stdin is not None
        request = json.dumps({"prompt": prompt[0].tolist(), "tokens": tokens})
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self.step()

    def step(self) -> Tensor:
        return torch.tensor([[int(self._line())]])

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        return self._weights + batch * context * self._states

    def close(self) -> None:
        assert self._process.stdin is not None
        # The script reads the end of its input, and ends.
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"node ended with exit code {self._process.wait()}")
        return line


def step_bytes(reader: Any) -> tuple[int, int]:
    """Bytes of the weights that a step reads, and of a token in the cache, which is in float16."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    weights = sum(sizes.values())
    if "output.weight" in sizes:
        # Of an embedding that is not the head, a step reads a row.
        weights -= sizes["token_embd.weight"]
    family = reader.fields["general.architecture"].contents()

    def field(name: str) -> int:
        return int(reader.fields[f"{family}.{name}"].contents())

    head_dim = field("embedding_length") // field("attention.head_count")
    return weights, 2 * 2 * field("block_count") * field("attention.head_count_kv") * head_dim


def open_llama_cpp(modules: Path, gguf: Path, context: int) -> LlamaCppDecoder:
    """A decoder over a GGUF file with as many threads as torch has; picklable by name, for a process of its
    own. modules: the folder node_modules; context: tokens of a sequence at most"""
    return LlamaCppDecoder(modules, gguf, torch.get_num_threads(), context)
