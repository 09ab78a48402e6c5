"""Named edge cases: one table for every operator, each row named for the edge it hits.

A row describes one ``pyramid_pointwise`` problem. ``spatial_pyramid`` takes its first half; ``group_pointwise`` takes
its second half, from the concatenated map of ``K * channels`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SAMPLES", "SMALL", "Sample", "named"]


@dataclass(frozen=True)
class Sample:
    """Sizes of one problem: x [batch, channels, height, width], K = len(dilations) branches, then a group pointwise."""

    name: str
    batch: int = 2
    channels: int = 4
    height: int = 5
    width: int = 6
    dilations: tuple[int, ...] = (1, 2, 3, 4)
    stride: int = 1
    hff: bool = True
    groups: int = 4
    outputs: int = 8

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def concatenated(self) -> int:
        """Channels of the concatenated map."""
        return len(self.dilations) * self.channels

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width after the stride."""
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1


def _widths() -> list[Sample]:
    # Vectors hold 4, 8 or 16 floats, half as many doubles, twice as many halves: one below, at and above each, and a
    # few that need several vectors and a tail.
    widths = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70)
    return [Sample(f"width {width}", batch=1, channels=3, height=3, width=width) for width in widths]


def _strided_widths() -> list[Sample]:
    widths = (1, 2, 3, 4, 8, 9, 15, 16, 17, 18, 31, 32, 33, 34, 64, 65, 70)
    return [
        Sample(f"stride 2 width {width}", batch=1, channels=2, height=4, width=width, stride=2, outputs=4)
        for width in widths
    ]


def _channels() -> list[Sample]:
    # The same edges along the channels, where channels_last kernels vectorise; 20, 24 and 28 are the paper's.
    counts = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 28, 31, 32, 33, 48, 64, 65, 80)
    return [Sample(f"channels {count}", batch=1, channels=count, dilations=(1, 1, 2, 3)) for count in counts]


def _branches() -> list[Sample]:
    dilations = (1, 3, 2, 4, 1, 5, 9, 2)
    return [
        Sample(f"branches {k}", channels=5, height=7, width=9, dilations=dilations[:k], groups=k, outputs=2 * k)
        for k in range(1, 9)
    ] + [
        Sample(f"branches {k} without hff", channels=5, dilations=dilations[:k], hff=False, groups=1, outputs=3)
        for k in (1, 2, 4, 7, 8)
    ]


def _groups() -> list[Sample]:
    # group_pointwise sees concatenated = 4 * channels inputs.
    return [
        Sample("one group", channels=6, groups=1, outputs=7),
        Sample("one output", channels=6, groups=1, outputs=1),
        Sample("one input a group", channels=5, groups=20, outputs=20),
        Sample("one input a group, three outputs", channels=3, groups=12, outputs=36),
        Sample("one output a group", channels=9, groups=4, outputs=4),
        Sample("five groups of odd sizes", channels=15, groups=5, outputs=35),
        Sample("outputs 16 a group", batch=1, channels=8, groups=2, outputs=32),
        Sample("outputs 17 a group", batch=1, channels=8, groups=2, outputs=34),
        Sample("outputs 33 a group", batch=1, channels=8, groups=2, outputs=66),
        Sample("inputs 129 a group", batch=1, channels=129, height=2, width=3, groups=4, outputs=12),
        Sample("outputs 19 a group of images", batch=3, channels=10, height=7, width=7, groups=2, outputs=38),
        Sample("outputs 300", batch=1, channels=4, height=3, width=3, groups=1, outputs=300),
    ]


def _maps() -> list[Sample]:
    return [
        Sample("one pixel", height=1, width=1),
        Sample("one row", height=1, width=19),
        Sample("one column", height=19, width=1),
        Sample("two by two", height=2, width=2),
        Sample("map smaller than the dilation", height=3, width=2, dilations=(1, 3, 5, 9)),
        Sample("height equals the dilation", height=4, width=11, dilations=(4, 4, 4, 4)),
        Sample("width equals the dilation", height=11, width=4, dilations=(4, 4, 4, 4)),
        Sample("dilation one below the size", height=5, width=5, dilations=(4, 4, 4, 4)),
        Sample("dilation far above the size", height=2, width=5, dilations=(1, 100, 1000, 2)),
        Sample("dilations falling", height=9, width=11, dilations=(4, 3, 2, 1)),
        Sample("dilations equal", height=6, width=7, dilations=(2, 2, 2, 2)),
        Sample("dilations unsorted and repeated", height=8, width=21, dilations=(3, 1, 3, 2)),
        Sample("dilations of the last level", height=7, width=7, dilations=(1, 1, 1, 2)),
        Sample("dilation 9 inside the map", batch=1, height=21, width=40, dilations=(1, 9, 5, 7)),
        Sample("batch 0", batch=0),
        Sample("batch 0, stride 2", batch=0, stride=2),
        Sample("batch 1", batch=1),
        Sample("batch 7", batch=7, channels=1, outputs=4),
        Sample("more rows than a thread takes", batch=3, channels=7, height=33, width=9),
        Sample("several blocks", batch=1, channels=12, height=37, width=45, outputs=24),
        Sample("several blocks, stride 2", batch=1, channels=12, height=37, width=46, stride=2, outputs=24),
        Sample("result outgrows the cache", batch=1, channels=20, height=52, width=61),
        Sample("result outgrows the cache, stride 2", batch=1, channels=24, height=91, width=95, stride=2),
        Sample("wide", batch=1, channels=2, height=2, width=300),
        Sample("level 2 of the network", batch=1, channels=16, height=28, width=28, outputs=64),
        Sample("without hff", channels=8, height=9, width=17, hff=False),
    ]


def _strides() -> list[Sample]:
    return [
        Sample("stride 2 even", height=8, width=10, stride=2),
        Sample("stride 2 odd", height=9, width=11, stride=2),
        Sample("stride 2 one pixel", height=1, width=1, stride=2),
        Sample("stride 2 one row", height=1, width=18, stride=2),
        Sample("stride 2 without hff", height=7, width=9, stride=2, hff=False),
        Sample("stride 2 map smaller than the dilation", height=3, width=4, dilations=(5, 3, 4, 2), stride=2),
        Sample("stride 2 channels 17", channels=17, height=6, width=7, stride=2),
        Sample("stride 3", height=10, width=19, stride=3),
        Sample("stride 3 left over", height=8, width=33, stride=3),
        Sample("stride 4 equals a dilation", height=9, width=21, stride=4),
        Sample("stride above the size", height=3, width=4, stride=5),
    ]


SAMPLES: tuple[Sample, ...] = tuple(
    _maps() + _strides() + _branches() + _groups() + _channels() + _widths() + _strided_widths()
)


def named(*names: str) -> list[Sample]:
    """The rows of these names, in this order."""
    table = {sample.name: sample for sample in SAMPLES}
    return [table[name] for name in names]


# A handful that crosses every code path once, for tests whose price is per case (compilers, views, threads).
SMALL: tuple[Sample, ...] = tuple(
    named(
        "width 17",
        "stride 2 odd",
        "channels 17",
        "branches 3",
        "branches 7 without hff",
        "map smaller than the dilation",
        "one pixel",
        "batch 0",
    )
)
