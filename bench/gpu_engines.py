"""The ways of running a model on a GPU that are compared.

Peers run the plain layers: as they are; with each branch of a pyramid on a stream of its own, as the paper timed them;
by torch.compile in its default mode and in max-autotune, which replays graphs of its own. Everything but that last one
is also captured into a CUDA graph, by the same function for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda, nn

from bench.comparison import LAYOUTS
from bench.engines import OURS
from espkernels.freeze import freeze
from espkernels.graphs import captured
from espkernels.models import plain

__all__ = ["ENGINES", "RACES", "Engine"]

Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Engine:
    """``prepare`` makes what is called of a plain model in eval mode; ``graph``: its calls are captured."""

    prepare: Callable[[nn.Module], Call]
    layout: str = "channels_last"
    graph: bool = False

    def opened(self, model: nn.Module, x: Tensor) -> Callable[[], Any]:
        """A call without arguments that runs the model, which it may change, on ``x``."""
        layout = LAYOUTS[self.layout]
        call = self.prepare(model.to(memory_format=layout))  # type: ignore[call-overload]
        x = x.contiguous(memory_format=layout)
        return _Replays.of(call, x) if self.graph else functools.partial(call, x)


@dataclass(frozen=True)
class _Replays:
    """Replays of one graph of ``call(x)``. It has addresses alone: the model behind ``call`` and ``x`` live with it."""

    call: Call
    x: Tensor
    graph: Any
    result: Any

    @staticmethod
    def of(call: Call, x: Tensor) -> _Replays:
        return _Replays(call, x, *captured(call, x))

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def _branches_on_streams(unit: plain.EESP, streams: list[cuda.Stream], x: Tensor) -> Tensor:
    """The forward pass of a plain unit, its depthwise convolutions side by side.

    Both ways one stream waits for the other before it reads or allocates, so no memory is given away too early.
    """
    reduced = unit.proj_1x1(x)
    here = cuda.current_stream()
    outputs: list[Tensor] = []
    for branch, stream in zip(unit.spp_dw, streams, strict=False):
        stream.wait_stream(here)
        with cuda.stream(stream):
            outputs.append(branch(reduced))
    for stream in streams[: len(outputs)]:
        here.wait_stream(stream)
    if unit.hff:
        for k in range(1, len(outputs)):
            outputs[k] = outputs[k - 1] + outputs[k]
    return unit.end(unit.conv_1x1_exp(unit.br_after_cat(torch.cat(outputs, dim=1))), x)


def _on_streams(model: nn.Module) -> nn.Module:
    streams = [cuda.Stream() for _ in range(8)]
    for unit in model.modules():
        if isinstance(unit, plain.EESP):
            unit.forward = functools.partial(_branches_on_streams, unit, streams)  # type: ignore[method-assign]
    return model


def _compiled(model: nn.Module, **options: Any) -> Call:
    torch.compiler.reset()
    compiled: Call = torch.compile(model, dynamic=False, **options)
    return compiled


def _same(model: nn.Module) -> nn.Module:
    return model


ENGINES = {
    OURS: Engine(freeze),
    f"{OURS} graph": Engine(freeze, graph=True),
    **{
        f"{name} {layout}{' graph' if graph else ''}": Engine(prepare, layout, graph)
        for name, prepare in (("eager", _same), ("streams", _on_streams))
        for layout in LAYOUTS
        for graph in (False, True)
    },
    "compile": Engine(_compiled),
    "compile graph": Engine(_compiled, graph=True),
    "max-autotune contiguous": Engine(functools.partial(_compiled, mode="max-autotune"), "contiguous"),
    "max-autotune channels_last": Engine(functools.partial(_compiled, mode="max-autotune")),
}

# Raced together, always beside ours; what compiles for minutes comes when every row has been in the first race.
RACES = {
    "eager": tuple(name for name in ENGINES if name.startswith(("eager", "streams"))),
    "compile": tuple(name for name in ENGINES if name.startswith(("compile", "max-autotune"))),
}
