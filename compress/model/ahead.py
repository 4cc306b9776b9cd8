"""Reading the weights of the next block while one computes: never more than one ahead, so that no more than
two are in memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Named = list[tuple[str, Tensor]]


def pays(device: torch.device) -> bool:
    """Whether a block is read ahead if nobody says: on a GPU, which waits for each one otherwise. On a CPU
    reading takes of the cores that compute, and a block more of memory."""
    return device.type == "cuda"


class Ahead:
    """read: name -> tensor, on the CPU; device, dtype: where it is wanted, and as what by its name"""

    def __init__(
        self,
        read: Callable[[str], Tensor],
        device: torch.device,
        dtype: Callable[[str], torch.dtype],
    ) -> None:
        self._read_one, self._device, self._dtype = read, device, dtype
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-block")
        self._next: tuple[list[str], Future[Named]] | None = None
        # Copies go beside what the current stream computes.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, names: list[str]) -> None:
        """Read these in the background. What was read before and not taken is let go."""
        self.drop()
        self._next = names, self._pool.submit(self._read, names)

    def take(self, names: list[str]) -> Named:
        """These tensors, from the background if they were started there. Raises what reading them did."""
        waiting, self._next = self._next, None
        if waiting is None or waiting[0] != names:
            _let_go(waiting)
            found = self._read(names)
        else:
            found = waiting[1].result()
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            for _, tensor in found:
                # Its memory was asked for on the other stream.
                tensor.record_stream(now)
        return found

    def drop(self) -> None:
        waiting, self._next = self._next, None
        _let_go(waiting)

    @torch.no_grad()
    def _read(self, names: list[str]) -> Named:
        if self._stream is None:
            return [(name, _touched(self._read_one(name).to(self._dtype(name)))) for name in names]
        with torch.cuda.stream(self._stream):
            return [(name, self._copied(self._read_one(name), self._dtype(name))) for name in names]

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_cuda:
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(dtype)


def _let_go(waiting: tuple[list[str], Future[Named]] | None) -> None:
    """Its error, if it ends in one, is nobody's: the block is not wanted."""
    if waiting is not None:
        waiting[1].cancel()


def _touched(tensor: Tensor) -> Tensor:
    """A tensor of a mapped file is read when it is looked at: look at every page."""
    if tensor.is_contiguous() and tensor.numel():
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()
    return tensor
