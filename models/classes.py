"""Names and colours of the classes of Cityscapes (train ids) and PASCAL VOC."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CITYSCAPES", "VOC", "ClassSet", "numbered", "of_count"]

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSet:
    """Names and RGB colours of a network's classes, in the order of its output channels.

    ``background`` is the class that stands for "none of these", which a picture leaves uncoloured.
    """

    title: str
    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    background: int | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours):
            raise ValueError(f"colours: got {len(self.colours)}, expected one for each of {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.names)


def _bit_shift_colour(index: int) -> Colour:
    """Colour ``index`` of the VOC map: bits 0, 3, 6 ... of the index become red's bits from the top down, and so on."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


CITYSCAPES = ClassSet(
    "Cityscapes",
    (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "background",
    ),
    (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32), (0, 0, 0),
    ),
    background=19,
)  # fmt: skip

_VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC = ClassSet("PASCAL VOC", _VOC_NAMES, tuple(_bit_shift_colour(i) for i in range(len(_VOC_NAMES))), background=0)


def numbered(count: int) -> ClassSet:
    """``count`` classes without names, "class 0" and up, for networks trained on other data."""
    return ClassSet(
        f"{count} classes",
        tuple(f"class {i}" for i in range(count)),
        tuple(_bit_shift_colour(i + 1) for i in range(count)),
    )


def of_count(count: int) -> ClassSet:
    """The class set of a network with ``count`` outputs: 19 or 20 Cityscapes, 21 VOC, otherwise :func:`numbered`."""
    if count == 19:
        return ClassSet("Cityscapes", CITYSCAPES.names[:19], CITYSCAPES.colours[:19])
    if count == len(CITYSCAPES):
        return CITYSCAPES
    if count == len(VOC):
        return VOC
    return numbered(count)
