"""vLLM's offline engine as a decoder: requests of token ids, the engine's own steps.

On CUDA the engine runs in this process, with its graphs, so that its memory is seen; on a CPU it needs
processes beside for its threads, as ``vllm serve`` does, and they spin for a second after every request:
with few cores that slows down whoever is next in turn, so speed.together=false is fairer there. Sampling is
greedy, nothing stops early, nothing is detokenized, and no prompt is found in a cache of prefixes.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.model.families import heads_of, size_of
from compress.model.folder import ModelFolder

# Room in the cache beyond the tokens asked for: it is kept in blocks, of which one stays empty.
BLOCK, SPARE_BLOCKS = 128, 8
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class VllmDecoder:
    """A batch is as many requests, added together and stepped until each has its next token."""

    def __init__(self, engine: Any, version: str, vocabulary: int):
        self.engine = engine
        self.vocabulary = vocabulary
        self.kernels = {f"vllm {version}": 1}
        self._names = count()
        self._open: list[str] = []
        # Tokens that came and were not asked for yet, by request.
        self._come: dict[str, list[int]] = {}

    def start(self, prompt: Tensor, tokens: int, padding: Tensor | None = None) -> Tensor:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._open:
            # What an abandoned request left.
            self.engine.abort_request(self._open)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._open = [str(next(self._names)) for _ in prompt]
        self._come = {name: [] for name in self._open}
        left = [0] * len(prompt) if padding is None else padding.tolist()
        for name, row, first in zip(self._open, prompt.tolist(), left, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": row[first:]}, sampling)
        return self.step()

    def step(self) -> Tensor:
        # A long prompt is read in pieces, and some steps hand over nothing.
        while not all(self._come.values()):
            for output in self.engine.step():
                self._come[output.request_id] += output.outputs[0].token_ids
        return torch.tensor([[tokens.pop(0)] for tokens in self._come.values()])

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        return None

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def set_environment(on_cuda: bool) -> None:
    """What vLLM reads when it is imported."""
    os.environ.update(QUIET)
    # As many threads as the others get; left to itself it would bind one to every core.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Its own choice is a graphics card that is there.
    if not on_cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def open_vllm(path: Path, device: str, *, longest: int, most: int) -> VllmDecoder:
    """A decoder over the folder at ``path``; picklable by name, for a process of its own.

    longest: tokens of a sequence; most: sequences at a time. The cache has room for these
    """
    on_cuda = torch.device(device).type == "cuda"
    set_environment(on_cuda)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if on_cuda else "1"
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    config = ModelFolder(path).config
    arguments = EngineArgs(
        model=str(path),
        max_model_len=longest,
        max_num_seqs=most,
        enforce_eager=not on_cuda,
        enable_prefix_caching=False,
        # All else would be taken before others are loaded beside it; the cache is given its size below.
        gpu_memory_utilization=0.01,
        kv_cache_memory_bytes=cache_bytes(config, longest, most),
        disable_log_stats=True,
        seed=0,
    )
    return VllmDecoder(
        LLMEngine.from_engine_args(arguments), vllm.__version__, int(config["vocab_size"])
    )


def cache_bytes(config: dict[str, Any], longest: int, most: int) -> int:
    """Bytes for ``most`` sequences of ``longest`` tokens in 16 bits, in whole blocks and a few more."""
    _, heads, head_dim = heads_of(config)
    states = 2 * size_of("num_hidden_layers", config) * heads * head_dim
    blocks = most * -(-longest // BLOCK) + SPARE_BLOCKS
    return 2 * states * blocks * BLOCK
