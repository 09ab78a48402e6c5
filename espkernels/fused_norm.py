"""A batch norm and the PReLU behind it as one call, where that is the same thing as the two modules.

What :mod:`espkernels.fused_unit` says of hooks and other classes holds here too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espkernels import backends
from espkernels.fused_unit import hooked
from espkernels.layout import vector_dtype
from espkernels.norms import bias_of, running, takes_batch, track, weight_of
from espkernels.training_layers import batch_norm_prelu

__all__ = ["fits", "norm_prelu"]


def fits(norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether the operator does for the map ``x`` what the two modules would do, on kernels of ours.

    Only where ``x`` is in channels_last: turning another map around and back would cost what the operator saves.
    """
    if not backends.trains_whole("batch_norm_prelu", x.device):
        return False
    if type(norm) is not nn.BatchNorm2d or type(act) is not nn.PReLU or hooked(norm, act):
        return False
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not x.shape[1] == norm.num_features == act.num_parameters:
        return False
    # A channel of one value has no variance, and nothing may be divided by none: torch's batch norm says so.
    if (x.numel() == x.shape[1] or norm.eps <= 0) and takes_batch(norm):
        return False
    if torch.is_autocast_enabled(x.device.type):  # it lowers what comes to a PReLU, whatever the norm gave
        return x.dtype == torch.get_autocast_dtype(x.device.type)
    return act.weight.dtype == x.dtype


def norm_prelu(norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """``act(norm(x))`` for a map [B, C, H, W], by one operator where :func:`fits` says so.

    Eager's two modules keep two maps for the backward pass, and make 5 passes forward and about 10 backward; the
    operator keeps x, and makes 3 and 5.
    """
    if not fits(norm, act, x):
        result: Tensor = act(norm(x))
        return result
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(act, nn.PReLU)
    compute = vector_dtype(x.dtype)
    vectors = weight_of(norm, compute, x.device), bias_of(norm, compute, x.device), act.weight.to(compute)
    result, moments = batch_norm_prelu(x, *vectors, *running([norm], x.device), norm.eps, takes_batch(norm))
    track([norm], moments, [x.numel() // x.shape[1]])
    return result
