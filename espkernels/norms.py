"""Batch norms of modules as the operators of training take them: whose statistics, which vectors, and their buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import compress
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.library import register_fake

from espkernels import backends
from espkernels.layout import vector_dtype

__all__ = ["NORMS", "Norm", "affine_of", "bias_of", "folded", "running", "takes_batch", "track", "weight_of"]

Norm = nn.BatchNorm1d | nn.BatchNorm2d
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def takes_batch(norm: Norm) -> bool:
    """Whether the norm takes the statistics of the batch, not its running ones."""
    return norm.training or norm.running_mean is None


def weight_of(norm: Norm, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _parameter(norm.weight, norm, 1.0, dtype, device)


def bias_of(norm: Norm, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _parameter(norm.bias, norm, 0.0, dtype, device)


def _parameter(
    parameter: Tensor | None, norm: Norm, otherwise: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if parameter is None:
        return torch.full((norm.num_features,), otherwise, dtype=dtype, device=device)
    return parameter.to(dtype)


def running(norms: Sequence[Norm], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The running means and variances of all norms, float64; zeros where the batch's will take their place.

    None where that is so of all.
    """
    if all(map(takes_batch, norms)):
        return None, None
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for norm in norms:
        for part, buffer in zip(parts, (norm.running_mean, norm.running_var), strict=True):
            if takes_batch(norm) or buffer is None:
                part.append(torch.zeros(norm.num_features, dtype=torch.float64, device=device))
            else:
                part.append(buffer.double())
    return torch.cat(parts[0]), torch.cat(parts[1])


@torch.no_grad()
def affine_of(norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift a channel of a batch norm with its running statistics, in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    return _affine(norm, norm.running_mean.double(), norm.running_var.double())


def _affine(norm: Norm, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift a channel of a batch norm with these statistics, float64."""
    scale = weight_of(norm, torch.float64, means.device) * (variances + norm.eps).rsqrt()
    return scale, bias_of(norm, torch.float64, means.device) - means * scale


@torch.no_grad()
def track(norms: Sequence[Norm], moments: Tensor, counts: Sequence[int]) -> None:
    """What the forward of each batch norm does to its buffers.

    ``moments`` are the mean and biased variance of all norms, float64 [2, channels]; ``counts`` the values a channel.
    As torch's norms it leaves the versions of the buffers alone: a graph of an earlier call may have saved them.
    """
    means, variances = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
    tracked = [
        norm.training and norm.track_running_stats and mean is not None for norm, mean in zip(norms, means, strict=True)
    ]
    buffers = [*means, *variances]
    if all(tracked) and _in_one_call(buffers):
        # Behind kernels that swept the caches each call of torch's takes 10 microseconds, and the loop below has 20.
        torch.ops.espkernels.track_norms.default(
            means,
            variances,
            [norm.num_batches_tracked for norm in norms],
            moments,
            [math.nan if norm.momentum is None else norm.momentum for norm in norms],
            list(counts),
        )
        return
    sizes = [norm.num_features for norm in norms]
    taken = zip(*(part.split(sizes) for part in moments.unbind()), strict=True)
    for norm, mean, variance, (batch_mean, batch_variance), count in compress(
        zip(norms, means, variances, taken, counts, strict=True), tracked
    ):
        assert mean is not None
        assert variance is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share: float | Tensor | None = norm.momentum
        if share is None:  # the mean of all batches
            share = norm.num_batches_tracked.to(mean.dtype).reciprocal()
        # torch.compile traces no such block, and keeps no version either.
        with nullcontext() if torch.compiler.is_compiling() else _unsafe_preserve_version_counter((mean, variance)):
            mean.lerp_(batch_mean.to(mean.dtype), share)
            variance.lerp_((batch_variance * (count / max(count - 1, 1))).to(variance.dtype), share)


def _in_one_call(buffers: list[Tensor | None]) -> TypeGuard[list[Tensor]]:
    """Whether an operator updates them: it takes vectors on the CPU of a type that norms compute in."""
    return backends.library is not None and all(
        buffer is not None and buffer.device.type == "cpu" and buffer.dtype in (torch.float32, torch.float64)
        for buffer in buffers
    )


def folded(weight: Tensor, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch norm of a 1x1 convolution of few channels, as one convolution: its input, weight and shift.

    The moments of ``y = weight x`` are those of x: the mean of y is ``weight mean(x)``, and the variance of a channel
    ``w^T cov(x) w``. So y, of many channels, need not be made to be normalised. The input is x without its mean, as the
    norm would subtract it from y before it divides by what may be almost nothing. Differentiable any number of times;
    updates the buffers of ``norm``. In float64 throughout.

    Args:
        weight: [N, I]; x: [B, I, H, W], of which I * I products a pixel are taken.

    Returns:
        [B, I, H, W] in channels_last and the dtype of ``x``; [N, I] and [N], float32, float64 where ``x`` is.
    """
    wide = weight.double()
    if takes_batch(norm):
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double()
        mean = pixels.mean(0)
        centred = pixels - mean
        covariance = centred.t() @ centred / len(pixels)
        variances = ((wide @ covariance) * wide).sum(1)
        track([norm], torch.stack([(wide @ mean).detach(), variances.detach()]), [len(pixels)])
        x = centred.to(x.dtype).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        means = torch.zeros_like(variances)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        means, variances = norm.running_mean.double(), norm.running_var.double()
    scale, shift = _affine(norm, means, variances)
    dtype = vector_dtype(x.dtype)
    return x, (scale[:, None] * wide).to(dtype), shift.to(dtype)


if backends.library is not None:
    register_fake("espkernels::track_norms", lambda *_: None)
