"""transformers' ``generate`` as a decoder: the call that anybody makes, watched token by token.

Its loop runs as it is, in a thread of its own, and hands over every token where it asks whether to stop.
(A streamer would do the same, but takes no batches, and waits for each token to reach the host.)
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    StoppingCriteria,
    StoppingCriteriaList,
)

from compress.errors import UserError
from compress.model.families import check_applies, heads_of, size_of
from compress.model.folder import ModelFolder

# A token (batch, 1), on CUDA with the event that tells when it is computed; or what ended the request.
Handed = tuple[Tensor, torch.cuda.Event | None] | BaseException


class TransformersDecoder:
    """Greedy, never stopping early. Quantized folders run as transformers runs them."""

    def __init__(self, model: Any, device: torch.device):
        self.model = model
        self.device = device
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
        self.kernels = {f"transformers {transformers.__version__}": linears}
        # One thread for all requests: a new one would make OpenMP start its threads anew.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._request: Future[None] | None = None
        self._handed: SimpleQueue[Handed] = SimpleQueue()

    def start(self, prompt: Tensor, tokens: int, padding: Tensor | None = None) -> Tensor:
        if self._request is not None:
            self._request.result()
        self._handed = SimpleQueue()
        self._request = self._thread.submit(self._generate, prompt, tokens, padding, self._handed)
        return self.step()

    def step(self) -> Tensor:
        handed = self._handed.get()
        if isinstance(handed, BaseException):
            raise handed
        token, computed = handed
        if computed is not None:
            computed.synchronize()
        return token

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        """Of plain models: what a library keeps of packed weights while they run is its own affair."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if getattr(self.model.config, "quantization_config", None) or (window and window < context):
            return None
        weights = sum(p.nbytes for p in self.model.parameters())
        if (
            self.model.get_input_embeddings().weight
            is not self.model.get_output_embeddings().weight
        ):
            # Of an embedding that is not the head, a step reads a row a sequence.
            weights -= self.model.get_input_embeddings().weight.nbytes
        states = _states(config.to_dict())
        return (
            None
            if states is None
            else weights + batch * context * states * self.model.dtype.itemsize
        )

    def _generate(
        self, prompt: Tensor, tokens: int, padding: Tensor | None, handed: SimpleQueue[Handed]
    ) -> None:
        try:
            seen = torch.ones_like(prompt)
            if padding is not None:
                seen = (torch.arange(prompt.shape[1]) >= padding[:, None]).to(seen)
            prompt = prompt.to(self.device)
            self.model.generate(
                prompt,
                attention_mask=seen.to(self.device),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([_HandOver(handed, prompt)]),
            )
        except BaseException as error:  # for step() to raise
            # Without the frames of this thread, which hold what did not fit.
            handed.put(error.with_traceback(None))


def _states(config: dict[str, Any]) -> int | None:
    """Numbers of the cache a token; None for models of which a step reads something else than all weights and
    keys and values of all before."""
    try:
        family = check_applies("plan", config)
    except UserError:
        return None
    if family.experts is not None:
        return None
    _, heads, size = heads_of(config)
    return 2 * size_of("num_hidden_layers", config) * heads * size


class _HandOver(StoppingCriteria):
    """Never stops; passes every new token on."""

    def __init__(self, handed: SimpleQueue[Handed], prompt: Tensor):
        self.handed = handed
        self.no = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        computed = None
        if input_ids.device.type == "cuda":
            computed = torch.cuda.Event()
            computed.record()
        self.handed.put((input_ids[:, -1:], computed))
        return self.no


def load_transformers(path: Path, device: torch.device) -> Any:
    """The model of a folder as transformers itself loads it."""
    whole = AutoModelForCausalLM if ModelFolder(path).outer is None else AutoModelForImageTextToText
    model = whole.from_pretrained(
        path, dtype="auto", device_map=device, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def open_transformers(path: Path, device: str) -> TransformersDecoder:
    """A decoder over the folder at ``path``; picklable by name, for a process of its own."""
    # Warnings on requests are for people; here they would come once a request.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = torch.device(device)
    return TransformersDecoder(load_transformers(path, target), target)
