"""The layers of ESPNetv2: the EESP unit and the strided unit that down-samples (paper section 3, Fig. 1c and 2).

Constructors and state_dict keys are those of the official code, so a checkpoint moves both ways unchanged. The
convolutions run through the operators of this library; batch norms and PReLUs are torch modules, which in training run
through its operators too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels import fused_shortcut, fused_unit, inference, ops, single_layers
from espkernels.fused_norm import norm_prelu
from espkernels.fused_unit import UnitLayers, hooked, is_global_average, is_pointwise, is_pyramid, laid_out
from espkernels.layout import layout_of, out_size

__all__ = [
    "BR",
    "CB",
    "CBR",
    "EESP",
    "CDilated",
    "Chain",
    "DownSampler",
    "branch_dilations",
    "init_parameters",
    "kernel_sizes",
    "pooled_image",
]


def kernel_sizes(k: int, r_lim: int) -> tuple[int, ...]:
    """Effective kernel sizes of the ``k`` branches under the receptive-field limit ``r_lim`` (paper section 3.2).

    Branch i has size 3 + 2i; one above the limit falls back to 3; the result is ascending.
    """
    return tuple(sorted(size if size <= r_lim else 3 for size in range(3, 3 + 2 * k, 2)))


def branch_dilations(k: int, r_lim: int, dilated: bool = True) -> tuple[int, ...]:
    """Dilation (size - 1) / 2 of each branch of :func:`kernel_sizes`; all 1 without ``dilated`` (paper, Table 5)."""
    return tuple((size - 1) // 2 if dilated else 1 for size in kernel_sizes(k, r_lim))


def init_parameters(module: nn.Module) -> None:
    """The official initialisation, for ``module`` and all below it.

    Convolutions Kaiming normal over the fan out with bias 0, batch norms 1 and 0, linear layers N(0, 0.001) with bias
    0, PReLU 0.25.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            if part.affine:
                nn.init.ones_(part.weight)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.001)
        elif isinstance(part, nn.PReLU):
            nn.init.constant_(part.weight, 0.25)
        else:
            continue
        bias = getattr(part, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)


def pooled_image(
    image: Tensor, size: tuple[int, int], pool: Callable[[Tensor], Tensor] = inference.average_pool
) -> Tensor:
    """``image`` [B, C, H, W] average-pooled to ``size`` (height, width) for the long-range shortcut (section 3.2).

    Repeats the official 3x3 pooling of stride 2 and padding 1 (padding counted) until the size matches, so pooling on
    from the image of the level before gives the very same values as pooling from the full one. Where halving steps
    over the size, the last step is an adaptive average pooling to exactly ``size``. An image of that size comes back
    as it is. ``pool`` does one of these poolings.

    Raises ValueError where the image is smaller than ``size``.
    """
    height, width = size
    if image.dim() != 4 or image.shape[2] < height or image.shape[3] < width:
        raise ValueError(
            f"image: shape {tuple(image.shape)}, expected [B, C, H, W] with H >= {height} and W >= {width}, "
            "the size of the map it is added to"
        )
    while image.shape[2] != height or image.shape[3] != width:
        if out_size(image.shape[2], 2) < height or out_size(image.shape[3], 2) < width:
            return F.adaptive_avg_pool2d(image, (height, width))
        image = pool(image)
    return image


def check_memory(memory: str) -> None:
    """What a unit may keep for its backward pass."""
    if memory not in ("save", "recompute"):
        raise ValueError(f"memory: got {memory!r}, expected 'save' or 'recompute'")


class CBR(nn.Module):
    """Convolution without bias, batch norm, PReLU; padded to keep the size: [B, M, H, W] -> [B, N, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return norm_prelu(self.bn, self.act, single_layers.run(self.conv, x))


class CB(nn.Module):
    """Convolution without bias and batch norm, padded like :class:`CBR`: [B, M, H, W] -> [B, N, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class BR(nn.Module):
    """Batch norm and PReLU. [B, N, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return norm_prelu(self.bn, self.act, x)


class Chain(nn.Sequential):
    """``nn.Sequential`` in which a batch norm and the PReLU behind it are one step (:mod:`espkernels.fused_norm`).

    Its other layers run as :mod:`espkernels.single_layers` says.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether ``module`` is just a ``nn.Sequential`` and has such a step, or such a mean."""
        kinds = itertools.pairwise(map(type, module.children()))
        steps = (nn.BatchNorm2d, nn.PReLU) in kinds or any(map(is_global_average, module.children()))
        return type(module) is nn.Sequential and steps

    @staticmethod
    def everywhere(model: nn.Module) -> None:
        """Makes every ``nn.Sequential`` of ``model`` a chain where that changes anything."""
        for module in model.modules():
            if Chain.fits(module):
                module.__class__ = Chain

    def forward(self, input: Tensor) -> Tensor:
        parts = list(self)
        while parts:
            part = parts.pop(0)
            if parts and isinstance(part, nn.BatchNorm2d) and isinstance(parts[0], nn.PReLU):
                input = norm_prelu(part, parts.pop(0), input)
            else:
                input = single_layers.run(part, input)
        return input


class CDilated(nn.Module):
    """One branch: a depthwise 3x3 convolution without bias, padded by its dilation. [B, d, H, W] -> [B, d, H', W']."""

    def __init__(self, channels: int, dilation: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def containers(unit: Any) -> list[nn.Module]:
    """The modules of an EESP unit, of whatever class, that its layers lie in."""
    return [unit.proj_1x1, unit.br_after_cat, unit.conv_1x1_exp, *unit.spp_dw]


class EESP(nn.Module):
    """Extremely efficient spatial pyramid of depthwise dilated separable convolutions (paper section 3.1, Fig. 1c).

    ``forward``: [B, in_channels, H, W] -> [B, out_channels, H', W'] with H' = (H - 1) // stride + 1, in any floating
    dtype of the operators and in x's memory format. Reduce (1x1 in ``k`` groups to d = out_channels / k channels, batch
    norm, PReLU), ``k`` depthwise 3x3 branches, hierarchical feature fusion, batch norm, PReLU, 1x1 in ``k`` groups,
    batch norm; then, as in the official code:

    * stride 2 with ``down_method`` "avg" returns this expansion, because :class:`DownSampler` concatenates it with its
      pooled map before the PReLU; ``module_act`` exists all the same and is never run;
    * otherwise x is added where its shape equals the result's, and ``module_act`` follows. So "avg" at stride 1 means
      "esp", and "esp" at stride 2 ends with the PReLU.

    ``r_lim`` is the receptive-field limit of :func:`kernel_sizes`. ``hff=False`` concatenates the branches as they are
    (Table 6), ``dilated=False`` makes every dilation 1 (Table 5); neither changes parameters or keys.

    Without gradients the unit is two operators, into which its norms and PReLUs go. In training it is one
    (:mod:`espkernels.training`), and ``memory`` says what that keeps for the backward pass besides x: the reduced map,
    the map in front of the last batch norm and, with "save", the concatenated map, which "recompute" makes again. Its
    gradients have none of their own.

    A hook on any submodule runs: a unit with one, or with another class of layers inside, runs layer by layer then. A
    convolution that carries one (or whose container does), or that is no longer what the constructor made, by its
    class, bias, stride, padding or dilation, is called as a module instead of through the operators.

    Raises ValueError for a ``stride`` other than 1 and 2, a ``k`` outside 1 to 8, ``in_channels`` that ``k`` does not
    divide, ``out_channels`` that ``k`` squared does not divide, and an unknown ``down_method`` or ``memory``.
    """

    memory = "save"  # of units pickled before there was a choice
    cbr_type: type[CBR] = CBR
    br_type: type[BR] = BR

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        k: int = 4,
        r_lim: int = 7,
        down_method: str = "esp",
        *,
        hff: bool = True,
        dilated: bool = True,
        memory: str = "save",
    ) -> None:
        super().__init__()
        if not 1 <= k <= 8:
            raise ValueError(f"k: got {k}, expected from 1 to 8 branches")
        check_memory(memory)
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, expected 1 or 2")
        if down_method not in ("esp", "avg"):
            raise ValueError(f"down_method: got {down_method!r}, expected 'esp' or 'avg'")
        if in_channels < 1 or in_channels % k:
            raise ValueError(f"in_channels: got {in_channels}, expected a positive multiple of k = {k}")
        if out_channels < 1 or out_channels % k**2:
            raise ValueError(
                f"out_channels: got {out_channels}, expected a positive multiple of k * k = {k**2}: "
                f"each of k branches has out_channels / k channels, which come from a convolution in k groups"
            )
        self.stride = stride
        self.dilations = branch_dilations(k, r_lim, dilated)
        self.down_method = down_method
        self.hff = hff
        self.memory = memory
        channels = out_channels // k
        self.proj_1x1 = self.cbr_type(in_channels, channels, 1, groups=k)
        self.spp_dw = nn.ModuleList(CDilated(channels, dilation, stride) for dilation in self.dilations)
        self.conv_1x1_exp = CB(out_channels, out_channels, 1, groups=k)
        self.br_after_cat = self.br_type(out_channels)
        self.module_act = nn.PReLU(out_channels)
        self.container_types = tuple(map(type, containers(self)))
        init_parameters(self)

    def _as_known(self) -> bool:
        """Whether the parts are of the classes that they had when the unit was built, or replaced."""
        return tuple(map(type, containers(self))) == self.container_types

    def pyramid_weight(self) -> Tensor:
        """The weights of the K branches as one tensor [K, d, 3, 3]; gradients reach the branches through it."""
        weights = (laid_out(cast(CDilated, branch).conv.weight) for branch in self.spp_dw)
        return torch.cat([weight.reshape(1, -1, 3, 3) for weight in weights])

    def layers(self) -> UnitLayers:
        """What :mod:`espkernels.fused_unit` asks of a unit."""
        branches = [cast(CDilated, branch) for branch in self.spp_dw]
        ends_with_prelu = not (self.stride == 2 and self.down_method == "avg")
        inner = [self.proj_1x1.act, self.br_after_cat.act]
        return UnitLayers(
            reduce=self.proj_1x1.conv,
            branches=[branch.conv for branch in branches],
            expand=self.conv_1x1_exp.conv,
            norms=(self.proj_1x1.bn, self.br_after_cat.bn, self.conv_1x1_exp.bn),
            activations=[*inner, self.module_act] if ends_with_prelu else inner,
            containers=containers(self),
            as_known=self._as_known(),
            dilations=self.dilations,
            stride=self.stride,
            hff=self.hff,
            adds_input=ends_with_prelu,
            memory=self.memory,
        )

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers()
        if fused_unit.fits(layers, x):
            if fused_unit.wanted(layers, x):
                return fused_unit.run(self, layers, x)
            if fused_unit.settled(layers, x):
                return fused_unit.infer(self, layers, x)
        reduced = self._reduce(x)
        expanded = self._expand(self.br_after_cat(self._pyramid(reduced)))
        if self.stride == 2 and self.down_method == "avg":
            return expanded
        if expanded.shape == x.shape:
            expanded = expanded + x
        return self.module_act(expanded)

    def _reduce(self, x: Tensor) -> Tensor:
        unit = self.proj_1x1
        if not self._as_known() or hooked(unit) or not is_pointwise(unit.conv):
            return unit(x)
        return unit.act(unit.bn(ops.group_pointwise(x, laid_out(unit.conv.weight).flatten(1), unit.conv.groups)))

    def _pyramid(self, reduced: Tensor) -> Tensor:
        branches = [cast(CDilated, branch) for branch in self.spp_dw]
        convolutions = [branch.conv for branch in branches]
        if self._as_known() and not hooked(*branches) and is_pyramid(convolutions, self.dilations, self.stride):
            return ops.spatial_pyramid(reduced, self.pyramid_weight(), self.dilations, self.stride, self.hff)
        outputs: list[Tensor] = []
        for branch in branches:
            output = branch(reduced)
            outputs.append(outputs[-1] + output if self.hff and outputs else output)
        return torch.cat(outputs, dim=1)

    def _expand(self, z: Tensor) -> Tensor:
        unit = self.conv_1x1_exp
        if not self._as_known() or hooked(unit) or not is_pointwise(unit.conv):
            return unit(z)
        return unit.bn(ops.group_pointwise(z, laid_out(unit.conv.weight).flatten(1), unit.conv.groups))

    def extra_repr(self) -> str:
        text = f"stride={self.stride}, dilations={self.dilations}, down_method={self.down_method!r}"
        return text if self.hff else text + ", hff=False"


class DownSampler(nn.Module):
    """The strided EESP unit with the efficient long-range shortcut to the image (paper section 3.2, Fig. 2).

    ``forward``: x [B, in_channels, H, W] -> [B, out_channels, (H - 1) // 2 + 1, (W - 1) // 2 + 1]. The 3x3 average
    pooling of x comes first, the strided :class:`EESP` gives the other out_channels - in_channels channels, the
    shortcut is added where ``image`` is given, PReLU ends the unit.

    ``image`` [B, image_channels, H_i, W_i] is the network's input or one already pooled: :func:`pooled_image` takes it
    to the size of the result, and a network that hands on the pooled image of each level to the next pools it once.

    ``reinf=False`` leaves the shortcut's parameters out. ``hff``, ``dilated`` and ``memory`` are those of
    :class:`EESP`; in training the whole is one operator (:mod:`espkernels.training_down_sampler`), in which "recompute"
    makes the pooled map and the unit's result again too.

    Raises ValueError for channels that do not fit, for an image smaller than the result and for an image without
    shortcut.
    """

    eesp_type: type[EESP] = EESP
    cbr_type: type[CBR] = CBR

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 4,
        r_lim: int = 9,
        reinf: bool = True,
        *,
        hff: bool = True,
        dilated: bool = True,
        image_channels: int = 3,
        memory: str = "save",
    ) -> None:
        super().__init__()
        if not 1 <= k <= 8:
            raise ValueError(f"k: got {k}, expected from 1 to 8 branches")
        if out_channels <= in_channels or (out_channels - in_channels) % k**2:
            raise ValueError(
                f"out_channels: got {out_channels} with in_channels = {in_channels}, "
                f"expected in_channels plus a positive multiple of k * k = {k**2}"
            )
        check_memory(memory)
        self.eesp = self.eesp_type(
            in_channels, out_channels - in_channels, 2, k, r_lim, "avg", hff=hff, dilated=dilated
        )
        self.eesp.memory = memory  # the units that others are compared with have no choice, and take no argument
        self.avg = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
        if reinf:
            # The official shortcut reduces any image to 3 channels first.
            self.inp_reinf = nn.Sequential(self.cbr_type(image_channels, 3, 3), CB(3, out_channels, 1))
        self.act = nn.PReLU(out_channels)
        init_parameters(self)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        if image is not None:
            if not hasattr(self, "inp_reinf"):
                raise ValueError(f"image: shape {tuple(image.shape)}, expected None in a unit built with reinf=False")
            image = pooled_image(image, (out_size(x.shape[2], 2), out_size(x.shape[3], 2)))
        if fused_shortcut.fits(self, x, image):
            layout, strided = layout_of(x), None
            if type(self.eesp).forward is EESP.forward:  # its kernels and those of the end read channels_last
                x, strided = x.contiguous(memory_format=torch.channels_last), self.eesp
            return fused_shortcut.run(self, x, image, strided).contiguous(memory_format=layout)
        output = torch.cat([self.avg(x), self.eesp(x)], dim=1)
        return self.act(output if image is None else output + self.inp_reinf(image))
