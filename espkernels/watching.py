"""The base of what looks at every operation of torch's in a block."""

from __future__ import annotations

import threading

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ALONE", "Watching"]

# Held while a mode of these is on: torch notes in flags of the whole process that some mode is, and leaving one puts
# back what entering it found. Two threads by turns would leave them set, and torch's compiler may then refuse all code.
ALONE = threading.RLock()


class Watching(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` torch does not hide from its compiler: for that it would import the compiler.

    Two seconds, in the first forward pass of every process, for code that nobody compiles.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
