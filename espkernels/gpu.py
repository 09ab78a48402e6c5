"""How a tensor on a GPU finds its kernel: one python kernel for each operator on torch's CUDA key (AMD's key as well).

Everything above that key, gradients, autocast and fake tensors, is in registration.py and fakes.py: no device is there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

from espkernels import backends, reference, reference_gradients
from espkernels.precision import allows_tf32

__all__ = ["OPERATORS", "Interpreted"]

# Each operator and the file of its Triton kernel.
OPERATORS = {
    "spatial_pyramid": "spatial_pyramid",
    "spatial_pyramid_backward_input": "spatial_pyramid_backward_input",
    "spatial_pyramid_backward_weight": "spatial_pyramid_backward_weight",
    "group_pointwise": "group_pointwise",
    "group_pointwise_backward_input": "group_pointwise",
    "group_pointwise_backward_weight": "group_pointwise_backward_weight",
    "pyramid_pointwise": "pyramid_pointwise",
    "eesp": "eesp",
    "down_sampler": "down_sampler",
    "eesp_training": "eesp_training",
    "eesp_training_backward": "eesp_training",
    "batch_norm_prelu": "batch_norm_prelu",
    "batch_norm_prelu_backward": "batch_norm_prelu",
    "long_range_shortcut": "long_range_shortcut",
    "long_range_shortcut_backward": "long_range_shortcut",
    "adaptive_average": "adaptive_average",
    "affine": "affine",
    "average_pool": "average_pool",
    "convolution": "convolution",
    "global_average": "global_average",
    "pyramid_pooling": "pyramid_pooling",
    "resize": "resize",
    "resized_argmax": "resized_argmax",
}

# Plain copies, which torch makes in one kernel each.
COPIES = ("change_layout", "concatenate")

_library = Library("espkernels", "IMPL")


@functools.cache
def _triton(operator: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f"espkernels.triton.{OPERATORS[operator]}"), operator)


@functools.cache
def _reference(operator: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] | None
    for module in (reference, reference_gradients):
        function = getattr(module, operator, None)
        if function is not None:
            return function
    raise RuntimeError(f"espkernels::{operator} has no reference: without a kernel its layers run one by one")


_tf32_allowed = False  # as the library was told last


def _follow_torch() -> None:
    """Tells the CUDA library whether torch allows tf32, where that has changed: a flag of torch's, for all threads."""
    global _tf32_allowed
    allowed = allows_tf32()
    if allowed != _tf32_allowed:
        torch.ops.espkernels_cuda.allow_tf32(allowed)
        _tf32_allowed = allowed


def _on_gpu(operator: str, *args: Any, packed: Tensor | None = None) -> Tensor:
    """The operator on tensors on a GPU; ``packed``, the weights in a CPU's order, stays unread."""
    backend = backends.gpu_backend(operator)
    if backend == "cuda":
        _follow_torch()
        return getattr(torch.ops.espkernels_cuda, operator)(*args)
    return _triton(operator)(*args) if backend == "triton" else _reference(operator)(*args)


class Interpreted(TorchDispatchMode):
    """Inside the block our operators run Triton's kernels on tensors on the CPU, which needs TRITON_INTERPRET=1.

    A mode, so that the CPU's own path has nothing to ask: it costs nothing where it is not entered.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name().removeprefix("espkernels::"), kwargs or {}
        mine = func.namespace == "espkernels" and name in OPERATORS and backends.current() == "triton"
        if mine and all(type(a) is Tensor and a.is_cpu for a in args if isinstance(a, Tensor)):
            return _triton(name)(*args, **kwargs)
        return func(*args, **kwargs)


def _register() -> None:
    for operator in OPERATORS:
        if hasattr(torch.ops.espkernels, operator):
            _library.impl(operator, functools.partial(_on_gpu, operator), "CUDA")
    for operator in COPIES:
        if hasattr(torch.ops.espkernels, operator):
            _library.impl(operator, _reference(operator), "CUDA")


_register()
if backends.current() == "triton" and backends.interprets():
    Interpreted().__enter__()  # ESPKERNELS_BACKEND asked for it, for the whole process
