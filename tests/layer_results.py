"""A layer with nothing at its initial value, the same layer in plain torch modules, and all that a step gives."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.models import plain

__all__ = ["pixels", "randomised", "results", "twin"]


def pixels(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random map in channels_last."""
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def randomised(layer: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its initial value, where mistakes would not show."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("act.weight"):
                tensor.uniform_(-0.5, 0.5)
            elif tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    return layer


def results(layer: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters, and buffers afterwards."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    layer.zero_grad()
    output = layer(*leaves)
    grad = torch.linspace(-1, 1, output.numel()).to(output.dtype).reshape(output.shape).cos()
    output.backward(grad.to(output.device))
    found = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    found |= {name: b.clone() for name, b in layer.named_buffers()}
    return {"output": output.detach()} | {name: value for name, value in found.items() if value is not None}


def twin(layer: nn.Module) -> nn.Module:
    """The same layer in plain torch modules; shares nothing."""
    other = copy.deepcopy(layer)
    for part in other.modules():
        for kind in ("EESP", "DownSampler", "CBR", "BR"):
            if type(part) is getattr(fused, kind):
                part.__class__ = getattr(plain, kind)
    return other
