"""ESPNetv2 for object detection: a single-shot detector over six maps (paper section 4.3, Table 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.models.detections import Detections, detections
from espkernels.models.espnetv2 import DeepEncoder, Switches, widths
from espkernels.models.priors import boxes_per_location, prior_boxes, ratios_of
from espkernels.models.pyramid_pooling import CBR, EfficientPyramidPooling, FusedPyramidPooling, resized

__all__ = ["CONFIGURATIONS", "Configuration", "ESPNetv2Detection", "espnetv2_detection"]

# Channels of levels 6 to 8.
EXTRA = (512, 256, 128)


@dataclass(frozen=True)
class Configuration:
    """Where the paper and the released code differ: whether level 5 ends with its grouped 1x1 ``expansion``, and the
    aspect ``ratios`` of the priors on each of the six maps, of which each gives two more boxes a pixel.
    """

    expansion: bool
    ratios: tuple[tuple[float, ...], ...]


# No one configuration has the multiply-adds of both columns of Table 3: the first has those of MS-COCO, the second
# those of PASCAL VOC.
CONFIGURATIONS = {
    "paper": Configuration(expansion=False, ratios=tuple(map(ratios_of, (4, 6, 6, 6, 4, 4)))),
    "released": Configuration(expansion=True, ratios=tuple(map(ratios_of, (6, 6, 6, 6, 6, 6)))),
}


class Backbone(DeepEncoder):
    """Levels 1 to 5; unlike the classification network, this one feeds the image to level 5 too.

    ``forward``: image [B, in_channels, H, W] -> five maps, the last of 1/32 of its height and width (rounded up).
    """

    def stages(self) -> list[tuple[nn.Module, Iterable[nn.Module]]]:
        return [*super().stages(), (self.level5_0, self.level5)]


class ExtraLevel(nn.Module):
    """Depthwise 3x3 with stride 2, then 1x1, each with batch norm and PReLU: [B, M, H, W] -> [B, N, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            CBR(in_channels, in_channels, 3, groups=in_channels, stride=2), CBR(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class FeaturePyramid(nn.Module):
    """The six maps that the heads look at: levels 3 to 6, each joined from above, then levels 7 and 8.

    ``forward``: image [B, in_channels, H, W] -> maps of 1/8, 1/16 ... 1/128 of its height and width (rounded up) and
    one pixel. Names of the modules are those of the official checkpoints, which go by the sides at 300x300.
    """

    def __init__(self, scale: float, in_channels: int, switches: Switches, expansion: bool) -> None:
        super().__init__()
        self.basenet = Backbone(scale, in_channels, switches, expansion)
        self.channels = (*widths(scale)[2:4], self.basenet.out_channels, *EXTRA)
        level3, level4, level5, level6, level7, level8 = self.channels
        self.extra_level6 = ExtraLevel(level5, level6)
        self.extra_level7 = ExtraLevel(level6, level7)
        self.extra_level8 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(level7, level8, 1, bias=False), nn.ReLU())
        self.bu_3x3_5x5 = self._join(level7, level6, (2.0, 1.0))
        self.bu_5x5_10x10 = self._join(level6, level5, (2.0, 1.0, 0.5))
        self.bu_10x10_19x19 = self._join(level5, level4, (2.0, 1.0, 0.5, 0.25))
        self.bu_19x19_38x38 = self._join(level4, level3, (2.0, 1.0, 0.5, 0.25))

    def _join(self, above: int, channels: int, scales: Sequence[float]) -> EfficientPyramidPooling:
        pooling = EfficientPyramidPooling if self.basenet.switches.plain else FusedPyramidPooling
        return pooling(above + channels, channels // 5, channels, scales)

    def forward(self, image: Tensor) -> list[Tensor]:
        _, _, level3, level4, level5 = self.basenet(image)
        level6 = self.extra_level6(level5)
        level7 = self.extra_level7(level6)
        maps = [level7, self.extra_level8(level7)]
        above = level7
        for join, map_ in (
            (self.bu_3x3_5x5, level6),
            (self.bu_5x5_10x10, level5),
            (self.bu_10x10_19x19, level4),
            (self.bu_19x19_38x38, level3),
        ):
            larger = resized(above, map_.shape[2], map_.shape[3], self.basenet.runs_plain)
            above = join(torch.cat([larger, map_], dim=1))
            maps.insert(0, above)
        return maps


class ESPNetv2Detection(nn.Module):
    """The detection network; :func:`espnetv2_detection` describes it.

    ``forward``: image [B, in_channels, image_size, image_size] -> confidences [B, P, num_classes], before any softmax,
    and locations [B, P, 4], offsets from the P priors.
    """

    def __init__(
        self,
        scale: float,
        num_classes: int,
        image_size: int,
        configuration: Configuration,
        in_channels: int = 3,
        switches: Switches | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 2: the background and one of objects")
        self.num_classes = num_classes
        self.image_size = image_size
        self.ratios = configuration.ratios
        prior_boxes(image_size, self.ratios)  # refuses what does not fit before anything is built
        boxes = [boxes_per_location(ratios) for ratios in self.ratios]
        self.base_net = FeaturePyramid(scale, in_channels, switches or Switches(), configuration.expansion)
        channels = self.base_net.channels
        self.loc_layers = nn.ModuleList(nn.Conv2d(m, 4 * n, 1) for m, n in zip(channels, boxes, strict=True))
        self.cls_layers = nn.ModuleList(nn.Conv2d(m, num_classes * n, 1) for m, n in zip(channels, boxes, strict=True))
        self._init_parameters()
        if not self.base_net.basenet.switches.plain:
            fused.Chain.everywhere(self)

    def _init_parameters(self) -> None:
        """Official: Xavier for everything that ImageNet's weights, which the backbone starts from, do not overwrite."""
        fused.init_parameters(self)
        inside = set(self.base_net.basenet.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in inside:
                nn.init.xavier_uniform_(module.weight)

    @property
    def priors(self) -> Tensor:
        """Centres [P, 4] of the prior boxes in shares of the image, on the device of the weights."""
        weight = next((t for t in (*self.parameters(), *self.buffers())), None)
        priors = prior_boxes(self.image_size, self.ratios)
        return priors if weight is None else priors.to(weight.device)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        confidences, locations = [], []
        for map_, classes, offsets in zip(self.base_net(image), self.cls_layers, self.loc_layers, strict=True):
            confidences.append(_by_prior(classes(map_), self.num_classes))
            locations.append(_by_prior(offsets(map_), 4))
        return torch.cat(confidences, dim=1), torch.cat(locations, dim=1)

    @torch.no_grad()
    def detect(
        self,
        image: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        least_score: float = 0.01,
        overlap: float = 0.45,
        most: int = 200,
    ) -> list[Detections]:
        """The objects on each image of a batch, in the mode that the network is in.

        ``sizes`` are the heights and widths of the photographs before they were resized to the square that the network
        sees, in whose pixels the boxes are given; those of ``image`` itself unless given. The rest is that of
        :func:`espkernels.models.detections.detections`.

        Raises ValueError for an image of another size than the priors are laid for.
        """
        side = self.image_size
        if image.dim() != 4 or tuple(image.shape[2:]) != (side, side):
            raise ValueError(f"image: got shape {list(image.shape)}, expected [B, C, {side}, {side}]")
        if sizes is None:
            sizes = [(side, side)] * len(image)
        confidences, locations = self(image)
        return detections(
            confidences, locations, self.priors, sizes, least_score=least_score, overlap=overlap, most=most
        )


def _by_prior(map_: Tensor, numbers: int) -> Tensor:
    """[B, n * numbers, H, W] -> [B, H * W * n, numbers]: pixel by pixel, as the priors are ordered."""
    return map_.permute(0, 2, 3, 1).reshape(len(map_), -1, numbers)


def espnetv2_detection(
    scale: float,
    num_classes: int,
    image_size: int,
    *,
    configuration: str | Configuration = "paper",
    in_channels: int = 3,
    plain: bool = False,
    hff: bool = True,
    long_range_shortcut: bool = True,
    dilated: bool = True,
) -> ESPNetv2Detection:
    """ESPNetv2 at width ``scale`` in a single-shot detector for square images of ``image_size``: 512, 384, 256 or 300.

    ``num_classes`` counts the background, class 0: 21 for PASCAL VOC, 81 for MS-COCO. Any other size above 0 works by
    the same rule of priors; it changes no parameter.

    ``configuration`` "released" is the network of the official checkpoints, with their state_dict keys (659); at
    scale 2.0 it has the multiply-adds of Table 3 for PASCAL VOC (2520, 1418 and 630 M). "paper" has those for MS-COCO
    (2817, 1585 and 704 M): level 5 gives its maps without the last convolution, and three of the six maps have four
    boxes a pixel instead of six. Table 3 mixes the two; a :class:`Configuration` of one's own works as well.

    ``in_channels``, ``plain`` and the switches are those of :func:`espkernels.models.espnetv2`. Raises ValueError for
    an unknown configuration and for a scale, size, class or channel count that is too small.
    """
    if isinstance(configuration, str):
        if configuration not in CONFIGURATIONS:
            known = ", ".join(map(repr, CONFIGURATIONS))
            raise ValueError(f"configuration: got {configuration!r}, expected {known} or a Configuration")
        configuration = CONFIGURATIONS[configuration]
    switches = Switches(hff, long_range_shortcut, dilated, plain)
    return ESPNetv2Detection(scale, num_classes, image_size, configuration, in_channels, switches)
