"""The public operators: arguments are checked, then the call goes to the kernels of the tensors' device.

Every operator keeps the memory format of ``x``: channels_last in, channels_last out; contiguous in, contiguous out.
dtypes are float32, float64, bfloat16 and float16; half types are summed in float32. All are differentiable as often as
asked, and work under ``torch.compile``, ``torch.export`` and ``torch.autocast``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels import backends, checks, reference
from espkernels.layout import vector_dtype

if backends.library is not None:
    import espkernels.gpu  # kernels of tensors on a GPU
    import espkernels.layer_gradients  # and, of the other operators in the library, fakes, gradients and autocast
    import espkernels.registration  # noqa: F401

__all__ = [
    "group_pointwise",
    "pack_group_pointwise",
    "pack_pyramid_pointwise",
    "pyramid_pointwise",
    "spatial_pyramid",
]


def _vector(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """One number a channel, in the type that kernels compute in."""
    return None if vector is None else vector.to(vector_dtype(x.dtype))


def spatial_pyramid(x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int = 1, hff: bool = True) -> Tensor:
    """K depthwise 3x3 convolutions of one map, each with its dilation, in one pass (paper section 3.1, Fig. 1).

    Args:
        x: the reduced map [B, d, H, W].
        weight: one 3x3 filter for each branch and channel [K, d, 3, 3], 1 <= K <= 8; dtype and device of ``x``.
        dilations: K dilations of at least 1; branch k is padded by ``dilations[k]``.
        stride: step of the output pixels, at least 1.
        hff: hierarchical feature fusion: output k is the sum of branches 1..k instead of branch k alone.

    Returns:
        The concatenated map [B, K*d, H', W'], branch-major, H' = (H - 1) // stride + 1, in the format of ``x``.

    Raises:
        ValueError: a shape, device, dilation or stride is not as above; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
    """
    checks.check_pyramid(x, weight, dilations, stride)
    if backends.runs_reference(x.device):
        return reference.spatial_pyramid(x, weight, dilations, stride, hff)
    return torch.ops.espkernels.spatial_pyramid.default(x, weight, list(dilations), stride, hff)


def group_pointwise(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """1x1 convolution in groups, then ``prelu(y * scale + shift + residual, slope)``; None leaves a step out.

    Args:
        x: [B, M, H, W].
        weight: [N, M/groups], dtype and device of ``x``.
        groups: divides M and N.
        scale, shift, slope: one number an output channel [N], in the dtype of ``x`` or float32.
        residual: [B, N, H, W] like the result.
        packed: this weight from :func:`pack_group_pointwise`, which saves packing it in the call.

    Returns:
        [B, N, H, W] in the format of ``x``.

    Raises:
        ValueError: a shape or device is not as above; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
    """
    checks.check_group_pointwise(x, weight, groups, scale, shift, residual, slope)
    if backends.runs_reference(x.device):
        return reference.group_pointwise(x, weight, groups, scale, shift, residual, slope)
    return torch.ops.espkernels.group_pointwise.default(
        x, weight, groups, _vector(scale, x), _vector(shift, x), residual, _vector(slope, x), packed
    )


def pack_group_pointwise(weight: Tensor, groups: int, channels_last: bool) -> Tensor | None:
    """The ``weight`` of :func:`group_pointwise` in the order in which the kernels of this machine read it.

    Bytes for ``packed``, made from the values that the weight has now; for maps in channels_last or contiguous. A pack
    that does not fit its call (other layout, dtype, sizes or instruction set) is ignored. None where the weight's
    device has no kernels that take a pack, as GPUs.
    """
    if not backends.runs_cpu_kernels(weight.device):
        return None
    return torch.ops.espkernels.pack_group_pointwise.default(weight, groups, channels_last)


def pyramid_pointwise(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pointwise_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor | None = None,
    pyramid_shift: Tensor | None = None,
    pyramid_slope: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    hff: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """The EESP unit after its reduction in one pass (paper Fig. 1c); the concatenated map never reaches memory.

    ``z = prelu(spatial_pyramid(x, ...) * pyramid_scale + pyramid_shift, pyramid_slope)``, then
    ``group_pointwise(z, pointwise_weight, groups, scale, shift, residual, slope)``.

    Args:
        x: the reduced map [B, d, H, W].
        weight, dilations, stride, hff: as in :func:`spatial_pyramid`.
        pointwise_weight: [N, K*d/groups], dtype and device of ``x``.
        groups: divides K*d and N.
        pyramid_scale, pyramid_shift, pyramid_slope: one number a channel of the concatenated map [K*d].
        scale, shift, slope: one number an output channel [N].
        residual: [B, N, H', W'] like the result.
        packed: these weights and pyramid vectors from :func:`pack_pyramid_pointwise`.

    Returns:
        [B, N, H', W'] in the format of ``x``.

    Raises:
        ValueError: a shape, device, dilation or stride is not as above; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
    """
    checks.check_pyramid_pointwise(
        x, weight, dilations, pointwise_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope,
        scale, shift, residual, slope, stride,
    )  # fmt: skip
    if backends.runs_reference(x.device):
        return reference.pyramid_pointwise(
            x, weight, dilations, pointwise_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope,
            scale, shift, residual, slope, stride, hff,
        )  # fmt: skip
    return torch.ops.espkernels.pyramid_pointwise.default(
        x, weight, list(dilations), pointwise_weight, groups,
        _vector(pyramid_scale, x), _vector(pyramid_shift, x), _vector(pyramid_slope, x),
        _vector(scale, x), _vector(shift, x), residual, _vector(slope, x), stride, hff, packed,
    )  # fmt: skip


def pack_pyramid_pointwise(
    weight: Tensor,
    pointwise_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor | None,
    pyramid_shift: Tensor | None,
    pyramid_slope: Tensor | None,
    channels_last: bool,
) -> Tensor | None:
    """Weights and pyramid vectors of :func:`pyramid_pointwise` as bytes; see :func:`pack_group_pointwise`."""
    if not backends.runs_cpu_kernels(weight.device):
        return None
    return torch.ops.espkernels.pack_pyramid_pointwise.default(
        weight, pointwise_weight, groups,
        _vector(pyramid_scale, weight), _vector(pyramid_shift, weight), _vector(pyramid_slope, weight), channels_last,
    )  # fmt: skip
