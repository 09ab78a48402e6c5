"""Peak memory of a step, read in a fresh process (``python -m bench.memory``), and what a forward pass keeps.

The resident set's high-water mark counts what the allocator really took, temporary buffers of kernels included. Only
Linux can reset the mark; elsewhere there is no figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.comparison import Provider
from bench.layers import Task, network

__all__ = ["held", "kept", "peak", "peak_of_network"]

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew at most during the second of two steps, above what there was before both."""
    try:
        before = _field("VmRSS")
        step()
        RESET.write_text("5")
        step()
        return max(0, _field("VmHWM") - before)
    except (OSError, KeyError):
        return None


def held(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident set has grown after a first step, freed memory given back before it and after.

    Gradients, threads, loaded and compiled code, and whatever a library keeps for the next step. :func:`peak` of later
    steps comes on top of it.
    """
    try:
        before = _given_back()
        step()
        return _given_back() - before
    except (OSError, KeyError, AttributeError):  # no Linux, or a C library that cannot
        return None


def _given_back() -> int:
    """The resident set without what the allocator keeps of freed blocks."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _field("VmRSS")


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that ``model(x)`` keeps for the backward pass.

    Each storage counts once and whole, however many views of it are saved. Parameters and buffers do not count, and
    ``x`` only where it wants a gradient: then it stands for the map of the layer before.
    """
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Detached: a node that held its own result would never be freed.
        alive.append(tensor.detach())
        return alive[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers(), *(() if x.requires_grad else (x,)))}
    sizes = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
    del output
    return sum(size for address, size in sizes.items() if address not in own)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _field(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def peak_of_network(scale: float, shape: tuple[int, ...], mode: str, threads: int, provider: Provider) -> int | None:
    """:func:`peak` of the classification network, in a fresh process."""
    request = json.dumps([scale, shape, mode, threads, provider.implementation, provider.layout])
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", request], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: int | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(request: str) -> None:
    scale, shape, mode, threads, implementation, layout = json.loads(request)
    torch.set_num_threads(threads)
    task = Task(lambda: network(scale), tuple(shape), torch.float32, mode)
    print(json.dumps(peak(task.run(Provider(implementation, layout)))))


if __name__ == "__main__":
    main(sys.argv[1])
