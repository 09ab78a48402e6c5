"""One training step up to the gradients, the same for everything that is compared."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Step"]


@dataclass(eq=False)
class Step:
    """Forward, cross entropy and backward; or, with a ``gradient``, a layer inside a network.

    Then the gradient of the result is given, as the next layer would hand it on, and that of the input is wanted too.
    A loss over the whole map would add five reads and writes of it to the twenty and more that are compared.
    """

    model: nn.Module
    input: Tensor
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        self.input = self.input.detach().requires_grad_(self.gradient is not None)

    def __call__(self) -> Tensor:
        """The output; gradients are where the parameters, and the input, keep them."""
        self.model.zero_grad(set_to_none=True)
        self.input.grad = None
        output: Tensor = self.model(self.input)
        if self.gradient is None:
            # The half types would lose the logarithm of the softmax.
            logits = output if output.dtype == torch.float64 else output.float()
            F.cross_entropy(logits, _labels(tuple(output.shape))).backward()
        else:
            output.backward(self.gradient)
        return output

    def results(self) -> list[Tensor]:
        """The output of a step, then the gradient of the input where it is wanted, then those of all parameters."""
        output = self().detach()
        grads = (self.input.grad, *(parameter.grad for parameter in self.model.parameters()))
        return [output, *(grad for grad in grads if grad is not None)]


@functools.lru_cache(maxsize=2)
def _labels(shape: tuple[int, ...]) -> Tensor:
    """A class for each image, or for each pixel, of logits [B, classes, ...]."""
    batch, classes, *size = shape
    return (torch.arange(batch * math.prod(size)) % classes).reshape(batch, *size)
