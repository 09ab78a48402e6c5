"""ESPNetv2 for classification (paper section 3.3, Table 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from espkernels import inference, reference
from espkernels import nn as fused
from espkernels.layout import out_size
from espkernels.models import eesp_a, esp, plain

__all__ = ["DeepEncoder", "ESPNetv2", "Encoder", "Switches", "espnetv2", "widths"]

GROUPS = 4
# Receptive-field limits (section 3.2): smaller maps, smaller branches.
LIMIT_DOWN = {2: 13, 3: 11, 4: 9, 5: 7}
LIMIT = {3: 9, 4: 7, 5: 5}
# EESP units after the strided one.
REPEATS = {3: 3, 4: 7, 5: 3}
# A form of the unit, the down-sampler around it, and the convolution with batch norm and PReLU.
Layers = tuple[type[nn.Module], type[nn.Module], type[fused.CBR]]
UNITS: dict[str, Layers] = {
    "eesp": (fused.EESP, fused.DownSampler, fused.CBR),
    "eesp_a": (eesp_a.EESPA, eesp_a.DownSampler, plain.CBR),
    "esp": (esp.ESP, esp.DownSampler, plain.CBR),
}


@dataclass(frozen=True)
class Switches:
    """What the paper's ablations turn off (Tables 5 and 6), and which layers a network is built from.

    ``plain`` takes the layers of :mod:`espkernels.models.plain`, in which no operator of this library runs; the units
    other than "eesp" are plain as they are. Raises ValueError for an unknown ``unit``.
    """

    hff: bool = True
    long_range_shortcut: bool = True
    dilated: bool = True
    plain: bool = False
    unit: str = "eesp"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit: got {self.unit!r}, expected one of {', '.join(map(repr, UNITS))}")

    @property
    def layers(self) -> Layers:
        """What the network is built from."""
        return (plain.EESP, plain.DownSampler, plain.CBR) if self.plain and self.unit == "eesp" else UNITS[self.unit]


def widths(scale: float) -> tuple[int, int, int, int, int, int]:
    """Channels of levels 1 to 5 and of the last convolution for a width ``scale``: the rule behind Table 2.

    The paper's scales are 0.5, 1, 1.25, 1.5, 1.75, 2 and, in Fig. 3, 3. Others follow the same rule where 32 * scale,
    rounded up to a multiple of 4, is 16, 32 or a larger multiple of 8: so every multiple of 0.25 from 1 on.

    Raises ValueError for another scale: the channels that the strided unit of level 2 adds to its input's would not
    divide into branches and groups.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: got {scale}, expected a number above 0")
    base = math.ceil(32 * scale / GROUPS) * GROUPS
    first = min(base, 32)
    if (2 * base - first) % GROUPS**2:
        raise ValueError(
            f"scale: got {scale}, expected one whose 32 * scale, rounded up to a multiple of {GROUPS}, is 16, 32 or a "
            f"larger multiple of 8, not {base}: such as 0.5, 1, 1.25, 1.5, 1.75, 2"
        )
    return first, 2 * base, 4 * base, 8 * base, 16 * base, 1024 if scale <= 1.5 else 1280


class Encoder(nn.Module):
    """Levels 1 to 4: what classification, segmentation and detection share.

    ``forward``: image [B, in_channels, H, W], any H and W -> the maps of the four levels, with 1/2, 1/4, 1/8 and 1/16
    of its height and width (rounded up).
    """

    def __init__(self, scale: float, in_channels: int = 3, switches: Switches | None = None) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels: got {in_channels}, expected at least 1")
        self.scale = scale
        self.in_channels = in_channels
        self.switches = switches or Switches()
        width = dict(enumerate(widths(scale)[:5], start=1))
        *_, cbr = self.switches.layers
        self.level1 = cbr(in_channels, width[1], 3, 2)
        self.level2_0 = self._down_sampler(2, width)
        self.level3_0 = self._down_sampler(3, width)
        self.level3 = nn.ModuleList(self._units(3, width))
        self.level4_0 = self._down_sampler(4, width)
        self.level4 = nn.ModuleList(self._units(4, width))

    def _down_sampler(self, level: int, width: dict[int, int]) -> nn.Module:
        _, down_sampler, _ = self.switches.layers
        return down_sampler(
            width[level - 1],
            width[level],
            k=GROUPS,
            r_lim=LIMIT_DOWN[level],
            reinf=self.switches.long_range_shortcut,
            hff=self.switches.hff,
            dilated=self.switches.dilated,
            image_channels=self.in_channels,
        )

    def _units(self, level: int, width: dict[int, int]) -> list[nn.Module]:
        unit, *_ = self.switches.layers
        return [
            unit(
                width[level],
                width[level],
                k=GROUPS,
                r_lim=LIMIT[level],
                hff=self.switches.hff,
                dilated=self.switches.dilated,
            )
            for _ in range(REPEATS[level])
        ]

    def stages(self) -> list[tuple[nn.Module, Iterable[nn.Module]]]:
        """The levels whose strided units see the image: that unit, and the units after it."""
        return [(self.level2_0, ()), (self.level3_0, self.level3), (self.level4_0, self.level4)]

    @property
    def runs_plain(self) -> bool:
        """Whether no operator of this library is to run: so the network was built, and its layers run so still."""
        return self.switches.plain and type(self.level2_0).forward is plain.DownSampler.forward

    def encode(self, image: Tensor) -> list[Tensor]:
        """The maps of level 1 and of the levels of :meth:`stages`. Raises ValueError for what is no batch of images."""
        if image.dim() != 4:
            raise ValueError(f"image: shape {tuple(image.shape)}, expected [B, C, H, W]")
        maps = [self.level1(image)]
        shortcut = image if self.switches.long_range_shortcut else None
        pool = reference.average_pool if self.runs_plain else inference.average_pool
        for down_sampler, units in self.stages():
            x = maps[-1]
            if shortcut is not None:
                # Pooled on from the level before, so that every level of the image pyramid is computed once.
                size = (out_size(x.shape[2], 2), out_size(x.shape[3], 2))
                shortcut = fused.pooled_image(shortcut, size, pool)
            x = down_sampler(x, shortcut)
            for unit in units:
                x = unit(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.encode(image)


class DeepEncoder(Encoder):
    """An encoder with the layers of level 5, as classification and detection have them.

    Level 5 ends with a depthwise 3x3 and, with ``expansion``, a grouped 1x1 convolution to the last of :func:`widths`.
    """

    def __init__(
        self, scale: float, in_channels: int = 3, switches: Switches | None = None, expansion: bool = True
    ) -> None:
        super().__init__(scale, in_channels, switches)
        *levels, last = widths(scale)
        width = dict(enumerate(levels, start=1))
        self.level5_0 = self._down_sampler(5, width)
        *_, cbr = self.switches.layers
        self.level5 = nn.ModuleList([*self._units(5, width), cbr(width[5], width[5], 3, groups=width[5])])
        if expansion:
            self.level5.append(cbr(width[5], last, 1, groups=GROUPS))
        self.out_channels = last if expansion else width[5]


class ESPNetv2(DeepEncoder):
    """The classification network; :func:`espnetv2` describes it.

    ``forward``: image [B, in_channels, H, W] -> logits [B, num_classes].
    """

    def __init__(
        self,
        scale: float,
        num_classes: int = 1000,
        in_channels: int = 3,
        switches: Switches | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(scale, in_channels, switches)
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        self.num_classes = num_classes
        self.dropout = dropout
        self.classifier = nn.Linear(self.out_channels, num_classes)
        fused.init_parameters(self)

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        # The official network builds the shortcut of level 5 and feeds it no image: its weights stay unused.
        x = self.level5_0(self.encode(image)[-1])
        for unit in self.level5:
            x = unit(x)
        average = reference.global_average if self.runs_plain else inference.global_average
        x = average(x).flatten(1)
        return self.classifier(F.dropout(x, self.dropout, self.training))


def espnetv2(
    scale: float,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    plain: bool = False,
    hff: bool = True,
    long_range_shortcut: bool = True,
    dilated: bool = True,
    unit: str = "eesp",
    dropout: float = 0.2,
) -> ESPNetv2:
    """ESPNetv2 for classification at width ``scale``: 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0 or another of :func:`widths`.

    Parameters, multiply-adds and state_dict keys (487) are those of the official network, with the parameters that it
    never uses: the last PReLU of each strided EESP and the shortcut of level 5.

    With other than 3 ``in_channels`` the first convolution and the first one of every shortcut, which reduces the
    pooled image to 3 channels, take that many; the rest is the same.

    ``hff``, ``long_range_shortcut`` and ``dilated`` turn off hierarchical feature fusion, the shortcut from the image
    (parameters of level 5 included) and dilation, as in Tables 5 and 6. ``plain`` builds from plain torch layers with
    the same parameters. ``unit`` "esp" takes the unit of ESPNet (first row of Table 5) and "eesp_a" that of Fig. 1b in
    the place of EESP. ``dropout`` comes before the classifier.

    Raises ValueError for an unknown unit, a scale that :func:`widths` does not take, and a class or channel count that
    is not positive.
    """
    switches = Switches(hff, long_range_shortcut, dilated, plain, unit)
    return ESPNetv2(scale, num_classes, in_channels, switches, dropout)
