"""One table of the real layer shapes: every EESP unit of every ESPNetv2, at the input sizes of the paper.

The rows follow from the paper's rule for widths (Table 2) and dilations (section 3.2) and need no torch. Classification
runs levels 2 to 5 at 224x224; segmentation stops at level 4 and runs at 384x384 (VOC) and 1024x512 (Cityscapes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

__all__ = [
    "CASES",
    "DEFAULT",
    "DETECTION",
    "IMAGES",
    "NETWORKS",
    "SCALES",
    "SEGMENTATION",
    "Case",
    "check",
    "fits",
    "matching",
    "units",
    "widths",
]

SCALES = (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0)

# Height and width, and the last level that runs at this size.
IMAGES = {"224x224": (224, 224, 5), "384x384": (384, 384, 4), "1024x512": (512, 1024, 4)}

# Level of the network: stride-1 units, dilations of the strided unit, dilations of the others.
LEVELS = {
    2: (0, (1, 2, 3, 4), ()),
    3: (3, (1, 2, 3, 4), (1, 2, 3, 4)),
    4: (7, (1, 2, 3, 4), (1, 1, 2, 3)),
    5: (3, (1, 1, 2, 3), (1, 1, 1, 2)),
}


@dataclass(frozen=True)
class Case:
    """One EESP unit: [batch, in_channels, height, width] -> [batch, out_channels, ...] by ``stride``.

    ``name`` tells one network and level that has it. ``repeats`` is how often that network runs it.
    """

    name: str
    in_channels: int
    out_channels: int
    dilations: tuple[int, ...]
    stride: int
    height: int
    width: int
    repeats: int = 1
    batch: int = 1

    def __str__(self) -> str:
        return self.name if self.batch == 1 else f"{self.name}-batch{self.batch}"

    @property
    def k(self) -> int:
        """Branches, and groups of both 1x1 convolutions."""
        return len(self.dilations)

    @property
    def channels(self) -> int:
        """d, the channels of the reduced map and of each branch."""
        return self.out_channels // self.k

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    @property
    def shape(self) -> tuple[object, ...]:
        """What makes two cases the same problem."""
        return self.in_channels, self.out_channels, self.dilations, self.stride, self.height, self.width, self.batch

    def with_batch(self, batch: int) -> Case:
        """The same unit on ``batch`` images."""
        return replace(self, batch=batch)


def widths(scale: float) -> tuple[int, int, int, int, int]:
    """Channels of levels 1 to 5 at ``scale`` (Table 2)."""
    base = math.ceil(32 * scale / 4) * 4
    return min(base, 32), base * 2, base * 4, base * 8, base * 16


def units(scale: float, image: str) -> list[Case]:
    """The distinct units of one network on one input size, in the order they run."""
    height, width, last = IMAGES[image]
    channels = widths(scale)
    prefix = f"s{scale:g}-{image}"
    height, width = _halved(height), _halved(width)
    rows: list[Case] = []
    for level in range(2, last + 1):
        repeats, strided, plain = LEVELS[level]
        before, after = channels[level - 2], channels[level - 1]
        # The average-pooled input is concatenated with the strided unit, which gives the other channels.
        rows.append(Case(f"{prefix}-level{level}_0", before, after - before, strided, 2, height, width))
        height, width = _halved(height), _halved(width)
        if repeats:
            rows.append(Case(f"{prefix}-level{level}", after, after, plain, 1, height, width, repeats))
    return rows


def _halved(size: int) -> int:
    return (size + 1) // 2


def _distinct(rows: Iterable[Case]) -> tuple[Case, ...]:
    first: dict[object, Case] = {}
    for row in rows:
        first.setdefault(row.shape, row)
    return tuple(first.values())


def matching(patterns: Sequence[str]) -> tuple[Case, ...]:
    """The cases whose name fits one of the shell patterns, such as ``s1-224x224-*``; all where there is no pattern."""
    return tuple(case for case in CASES if not patterns or fits(case.name, patterns))


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` fits one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(patterns: Sequence[str]) -> None:
    """Raises ValueError for a pattern that fits no case and no network."""
    for pattern in patterns:
        if not any(fits(name, [pattern]) for name in (*(case.name for case in CASES), *NETWORKS)):
            raise ValueError(
                f"cases: {pattern!r} fits none; they are named {CASES[0].name}, ..., {next(iter(NETWORKS))}, ..."
            )


CASES = _distinct(case for image in IMAGES for scale in SCALES for case in units(scale, image))

# Whole classification networks, by name.
NETWORKS = {f"s{scale:g}-224x224-network": scale for scale in SCALES}

# Whole segmentation networks, by name: scale, image and classes (Cityscapes, PASCAL VOC).
SEGMENTATION = {"s2-1024x512-network": (2.0, "1024x512", 20), "s2-384x384-network": (2.0, "384x384", 21)}

# Whole detectors, by name: scale, side of the square image and classes (PASCAL VOC).
DETECTION = {"s2-256x256-detector": (2.0, 256, 21), "s2-512x512-detector": (2.0, 512, 21)}

# Small enough for five minutes on two cores: one small and one large network, and the maps of a large image.
DEFAULT = (
    *matching(["s1-224x224-*"]),
    *matching(["s2-224x224-*"]),
    *matching(["s2-1024x512-level2_0", "s2-1024x512-level3", "s2-1024x512-level4"]),
)
