"""ESPNetv2 for semantic segmentation: levels 1 to 4 and a decoder of pyramid poolings (the network of EdgeNets)."""

from __future__ import annotations

from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.models.espnetv2 import Encoder, Switches, widths
from espkernels.models.pyramid_pooling import (
    EfficientPyramidPooling,
    FusedJoin,
    FusedPyramidPooling,
    Join,
    SkipWeighting,
    resized,
)

__all__ = ["ESPNetv2Segmentation", "espnetv2_segmentation"]


class ESPNetv2Segmentation(nn.Module):
    """The segmentation network; :func:`espnetv2_segmentation` describes it.

    ``forward``: image [B, in_channels, H, W] -> logits [B, num_classes, H, W].
    """

    def __init__(
        self, scale: float, num_classes: int, base: int = 16, in_channels: int = 3, switches: Switches | None = None
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("base", base)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.num_classes = num_classes
        self.base_net = Encoder(scale, in_channels, switches)
        level1, level2, level3, level4, *_ = widths(scale)
        planes = 4 * base, 3 * base, 2 * base
        # Official code gives one class no channels at all.
        projection = max(min(num_classes // 2, 16), 1)

        plain = self.base_net.switches.plain
        pooling, join = (EfficientPyramidPooling, Join) if plain else (FusedPyramidPooling, FusedJoin)
        self.bu_dec_l1 = pooling(level4, projection, planes[0])
        self.bu_dec_l2 = pooling(planes[0], projection, planes[1])
        self.bu_dec_l3 = pooling(planes[1], projection, planes[2])
        self.bu_dec_l4 = pooling(planes[2], projection, num_classes, last=True)
        self.merge_enc_dec_l2 = SkipWeighting(level3, planes[0])
        self.merge_enc_dec_l3 = SkipWeighting(level2, planes[1])
        self.merge_enc_dec_l4 = SkipWeighting(level1, planes[2])
        self.bu_br_l2 = join(planes[0])
        self.bu_br_l3 = join(planes[1])
        self.bu_br_l4 = join(planes[2])
        fused.init_parameters(self)
        if not plain:
            fused.Chain.everywhere(self)

    def forward(self, image: Tensor) -> Tensor:
        level1, level2, level3, level4 = self.base_net(image)
        x = self.bu_dec_l1(level4)
        x = self.bu_dec_l2(self.bu_br_l2(x, *self.merge_enc_dec_l2.parts(level3)))
        x = self.bu_dec_l3(self.bu_br_l3(x, *self.merge_enc_dec_l3.parts(level2)))
        x = self.bu_dec_l4(self.bu_br_l4(x, *self.merge_enc_dec_l4.parts(level1)))
        plain = self.base_net.runs_plain
        if x.requires_grad and not plain:
            # A loss over classes reads them plane by plane: behind a map in channels_last torch's softmax, its gradient
            # and those of the resizing take twice as long as behind this one (bench/tried.md).
            x = x.contiguous()
        return resized(x, image.shape[2], image.shape[3], plain)


def espnetv2_segmentation(
    scale: float,
    num_classes: int,
    *,
    base: int = 16,
    in_channels: int = 3,
    plain: bool = False,
    hff: bool = True,
    long_range_shortcut: bool = True,
    dilated: bool = True,
) -> ESPNetv2Segmentation:
    """ESPNetv2 for segmentation at width ``scale`` with ``num_classes`` outputs: 20 for Cityscapes, 21 for PASCAL VOC.

    Parameters, multiply-adds and state_dict keys (526) are those of the official network. ``base`` sets the decoder's
    planes to 4, 3 and 2 times its value; EdgeNets uses 16, and 32 for COCO. Images of any height and width work: the
    decoder up-samples to the size of each skip connection, which for sides that 16 divides is the official doubling.

    ``in_channels``, ``plain`` and the switches are those of :func:`espkernels.models.espnetv2`. Raises ValueError for
    a scale, class or channel count that is not positive.
    """
    switches = Switches(hff, long_range_shortcut, dilated, plain)
    return ESPNetv2Segmentation(scale, num_classes, base, in_channels, switches)
