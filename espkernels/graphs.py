"""CUDA graphs of frozen networks: one launch for a whole forward pass; with one a kernel a GPU would wait for them.

No graph has been captured on a device yet: the tests run this file's logic with stand-ins for torch's graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.utils._pytree import tree_map

from espkernels import backends, replay
from espkernels.precision import allows_tf32

__all__ = ["Graphed", "captured", "graphed"]

# Graphs of one model, each for another input; each keeps the memory of a forward pass.
KEPT = 8
# Passes before a capture: Triton compiles and tunes, libraries take their workspaces, which a capture may not.
WARM_UP = 3
DEVICE = "cuda"

# Captures run one at a time, and graphs are looked up under it.
_lock = threading.RLock()


@dataclass
class _Graph:
    """A captured forward pass from ``input`` to ``result``, both at their addresses for good."""

    graph: Any
    input: Tensor
    result: Any
    done: Any  # the event behind its last run
    layers: replay.Layers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, x: Tensor) -> Any:
        """Copies in, replays and copies out on the caller's stream, behind what earlier callers' streams still do."""
        with self.lock:
            stream = cuda.current_stream(x.device)
            stream.wait_event(self.done)
            self.input.copy_(x)
            self.graph.replay()
            result = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.result)
            self.done.record(stream)
        return result


def captured(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, Any]:
    """A graph of ``forward(x)``, which reads ``x`` and writes its result where they stand, and that result."""
    here, side = cuda.current_stream(x.device), cuda.Stream(x.device)
    side.wait_stream(here)
    with cuda.stream(side):
        for _ in range(WARM_UP):
            forward(x)
    here.wait_stream(side)
    graph = cuda.CUDAGraph()
    # Other threads may go on using the device.
    with cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        result = forward(x)
    return graph, result


def _capture(forward: Callable[[Tensor], Any], x: Tensor, layers: replay.Layers) -> _Graph:
    given = x.detach().clone()
    graph, result = captured(forward, given)
    done = cuda.Event()
    done.record(cuda.current_stream(x.device))
    return _Graph(graph, given, result, done, layers)


class Graphed(replay.Replayed):
    """Beside the class of a frozen model on a GPU: a graph for each shape, dtype and memory format of its input.

    Results are fresh tensors. Where no graph can serve a call (gradients, autocast, hooks, several arguments, inside
    another capture), the model's own forward runs; on the CPU a frozen model's plans do.
    """

    graphs: dict[Any, _Graph]

    def _replayable(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.device.type != DEVICE:
            return super()._replayable(x)
        return (
            type(x) in (Tensor, nn.Parameter)
            and x.numel() > 0
            and not self.training
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled(DEVICE)
            and not cuda.is_current_stream_capturing()
            and not backends.transforms_active()
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch._C._is_tracing()
        )

    def _replay(self, what: str, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        if x.device.type != DEVICE:
            return super()._replay(what, forward, x)
        choices = backends.current(), allows_tf32()
        key = (what, x.shape, x.stride(), x.dtype, x.device, *choices, replay.generation())
        known = self.graphs.get(key)
        layers = replay.Layers.of(self) if known is None or known.layers.exchanged() else known.layers
        if any(layers.hooks):
            return forward(x)
        # A graph's input that was made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad(), cuda.device(x.device):
            with _lock:
                graph = self.graphs.pop(key, None)
                if graph is not None and graph.layers.exchanged():
                    graph.done.synchronize()  # nothing runs in its memory any more
                    graph = None
                if graph is None:
                    self._make_room()
                    graph = _capture(forward, x, layers)
                self.graphs[key] = graph  # last in the order of use
            return graph.run(x)

    def _make_room(self) -> None:
        """Drops graphs of outdated weights, and the one that was used longest ago where there are too many."""
        outdated = [key for key in self.graphs if key[-1] != replay.generation()]
        for key in outdated or list(self.graphs)[: max(0, len(self.graphs) - KEPT + 1)]:
            self.graphs.pop(key).done.synchronize()  # nothing runs in its memory any more

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        replay.forget()  # the addresses in the graphs are no longer the weights'
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "graphs": {}}


def graphed(model: nn.Module) -> nn.Module:
    """``model`` itself, frozen, its class joined with :class:`Graphed`.

    Raises ValueError where its parameters and buffers are not all on one CUDA device.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    first = next((tensor.device for _, tensor in tensors if tensor.device.type == DEVICE), None)
    for name, tensor in tensors:
        if tensor.device != first:
            raise ValueError(
                f"graph: {name} of the model is on {tensor.device}, expected all of it on one CUDA device; "
                "call model.cuda() before freeze"
            )
    if first is None:
        raise ValueError("graph: the model has no parameters or buffers, expected some on a CUDA device")
    joined = replay.replayed(model, Graphed)
    joined.graphs = {}  # type: ignore[assignment]
    return joined
