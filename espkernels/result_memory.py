"""Memory of large results of a replay: it comes back when the last tensor on it is gone.

C libraries give blocks of some megabytes back to the system, which hands them out afresh, cleared page by page as a
kernel first writes there: of a map of 12 MiB that is a fifth of the time of the network that makes it. Other engines
for inference have one such block and overwrite it with the next result; here a result is the caller's own for as long
as it is held.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["KEPT_BYTES", "ResultMemory"]

# Results from this size on: of 3 MiB an allocator's own block is a hundredth faster, of 6 MiB this a twentieth.
KEPT_BYTES = 4 << 20


class ResultMemory:
    """One block at most that no tensor uses, of the size that was asked for last."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, count: int) -> Tensor:
        """A tensor of ``count`` numbers that nobody else has; its storage cannot be enlarged in place (``resize_``)."""
        memory = self._take(count * dtype.itemsize)
        block = memory.numpy()
        # The storage holds the block, as do its views and everything that shares them, in any thread.
        weakref.finalize(block, self._give_back, memory).atexit = False
        storage = torch.frombuffer(block, dtype=dtype).untyped_storage()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, size, stride)

    def _take(self, count: int) -> Tensor:
        try:
            memory = self._free.pop()  # one step, whatever other threads do
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        return memory if len(memory) == count else torch.empty(count, dtype=torch.uint8, device="cpu")

    def _give_back(self, memory: Tensor) -> None:
        if not self._free:
            self._free.append(memory)
