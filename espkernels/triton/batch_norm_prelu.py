"""A batch norm with its PReLU in training: 3 passes over the map forward, 5 backward; the map alone is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton.affine import run as run_affine
from espkernels.triton.batch_norm_backward import batch_norm_backward
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.map_moments import map_moments
from espkernels.triton.normalised_output_backward import normalised_output_backward
from espkernels.triton.training_norms import TrainingNorm

__all__ = ["batch_norm_prelu", "batch_norm_prelu_backward"]


def _norm(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float, batch_statistics: bool
) -> TrainingNorm:
    check_map("x", x)
    check_vectors(x, x.shape[1], weight=weight, bias=bias, slope=slope)
    check_tensor("statistics", statistics, x, (2, x.shape[1]))
    weight, bias, slope = (each.contiguous() for each in (weight, bias, slope))
    return TrainingNorm(weight, bias, slope, statistics[0], statistics[1], eps, batch_statistics)


def batch_norm_prelu(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, running_mean: Tensor | None,
    running_variance: Tensor | None, eps: float, batch_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result in channels_last and the statistics taken: see :mod:`espkernels.training_layers`."""
    statistics = torch.empty((2, x.shape[1]), dtype=torch.float64, device=x.device)
    norm = _norm(x, statistics, weight, bias, slope, eps, batch_statistics)
    if not batch_statistics:
        if running_mean is None or running_variance is None:
            raise RuntimeError("running_mean, running_variance: got None, expected both")
        check_vectors(x, x.shape[1], running_mean=running_mean, running_variance=running_variance)
        torch.stack((running_mean, running_variance), out=statistics)
    x = x.contiguous(memory_format=torch.channels_last)
    read = norm.normalise(map_moments(x) if batch_statistics else None)
    result = empty_pixels(x, *x.shape[1:])
    run_affine(x, read.scale, read.shift, None, slope, result)
    return result, statistics


def batch_norm_prelu_backward(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float,
    batch_statistics: bool, wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, or nothing where it is not wanted, weight, bias and slope."""
    norm = _norm(x, statistics, weight, bias, slope, eps, batch_statistics)
    check_tensor("grad", grad, x, x.shape)
    x, grad = (map.contiguous(memory_format=torch.channels_last) for map in (x, grad))
    read = norm.normalise()
    sums = normalised_output_backward(grad, norm.behind(x, read), None, None)
    vectors = [torch.empty_like(of, memory_format=torch.contiguous_format) for of in (weight, bias, slope)]
    gradient = norm.gradient(sums, x.numel() // x.shape[1], *vectors)
    grad_x = empty_pixels(x, *x.shape[1:]) if wants_x else x.new_empty(0)
    if wants_x:
        batch_norm_backward(grad, x, read, gradient, grad_x)
    return grad_x, vectors[0], vectors[1], vectors[2]
