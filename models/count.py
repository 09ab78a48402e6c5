"""Parameters and multiply-adds in the paper's convention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from espkernels.backends import use_backend
from espkernels.frozen import Frozen, FrozenConvolution, FrozenEESP
from espkernels.running import running
from espkernels.watching import Watching

__all__ = ["Count", "count"]


@dataclass(frozen=True)
class Count:
    """What :func:`count` found; ``by_module`` holds the same for every named module, its inner modules included."""

    parameters: int
    macs: int
    by_module: dict[str, Count] = field(default_factory=dict, repr=False)


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    transposed = len(args) > 4 and args[4]
    return (x if transposed else out).numel() * weight[0].numel()


def _spatial_pyramid(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight.shape[-2] * weight.shape[-1]


def _group_pointwise(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _pyramid_pointwise(
    out: Tensor, x: Tensor, weight: Tensor, dilations: Any, pointwise_weight: Tensor, *_: Any, **__: Any
) -> int:
    pixels = out.numel() // out.shape[1] if out.numel() else 0
    return pixels * (weight.numel() + pointwise_weight.numel())


# Multiply-adds of one call, from its result and arguments. The layers here, frozen or not, run as their reference; the
# project's own operators are listed for modules that call torch.ops.espkernels themselves.
_MACS: dict[str, Callable[..., int]] = {
    "aten::convolution": _convolution,
    "aten::convolution_overrideable": _convolution,
    "espkernels::spatial_pyramid": _spatial_pyramid,
    "espkernels::group_pointwise": _group_pointwise,
    "espkernels::pyramid_pointwise": _pyramid_pointwise,
}


class _Counter(Watching):
    """Adds up the multiply-adds of the convolutions that run, for every module that is running at the time."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _MACS.get(func._schema.name)
        if formula is not None:
            macs = formula(out, *args, **(kwargs or {}))
            for name in {"", *self.running}:
                self.macs[name] = self.macs.get(name, 0) + macs
        return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    for module, _ in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def count(
    model: nn.Module,
    size: tuple[int, int] | None = None,
    *,
    in_channels: int | None = None,
    sample: Tensor | None = None,
) -> Count:
    """Parameters of ``model`` and multiply-adds of one image of ``size`` (height, width), as the paper counts them.

    ``macs`` are those of convolutions alone: linear layers, batch norms, activations, pooling, resizing and biases
    are left out (Table 2 and Figs. 3, 7 of the paper). ``parameters`` are all of them, also those that no forward
    pass uses and those set not to train. Layers count for what they execute, fused operators as the convolutions they
    stand for.

    The forward runs on the meta device: nothing is computed, no map is allocated whatever the size, and the model is
    left as it was. Tensors that it holds outside its parameters and buffers would stay where they are, and be refused.
    ``in_channels`` is that of the model's first convolution unless given. A model of something else than images is
    counted on ``sample``, of which only shape and dtype matter, in the place of ``size``.

    Raises ValueError for a size that is not two positive integers, and unless one of size and sample is given.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if (size is None) == (sample is None):
        raise ValueError(f"size: got {size} with {'no' if sample is None else 'a'} sample, expected either of them")
    if size is not None:
        if len(size) != 2 or any(side < 1 for side in size):
            raise ValueError(f"size: got {tuple(size)}, expected (height, width), both at least 1")
        dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.get_default_dtype())
        channels = _first_channels(model) if in_channels is None else in_channels
        sample = torch.empty(1, channels, *size, dtype=dtype, device="meta")
    assert sample is not None

    with (
        torch.no_grad(),
        use_backend("reference"),
        _evaluating(model),
        running(model) as names,
        _Counter(names) as counter,
    ):
        torch.func.functional_call(model, {name: t.to("meta") for name, t in state.items()}, (sample.to("meta"),))

    return Count(
        _parameters(model),
        counter.macs.get("", 0),
        {name: Count(_parameters(m), counter.macs.get(name, 0)) for name, m in model.named_modules() if name},
    )


def _first_channels(model: nn.Module) -> int:
    """Input channels of the first convolution, frozen or not, or of the first module's weight [N, M, h, w]; else 3."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            return module.in_channels
        if isinstance(module, FrozenConvolution):
            return module.weight.shape[1] * module.groups
        if isinstance(module, FrozenEESP):
            return module.reduce_weight.shape[1] * module.reduce_groups
        if not isinstance(module, Frozen):  # the others of those begin with one of the two
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dim() == 4:
                    return tensor.shape[1]
    return 3


def _parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters())
