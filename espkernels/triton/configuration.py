"""The tile of each kernel, chosen by the shape alone: the one place to look at, and to change, for speed.

Plain functions of integers, without Triton or a device, so that a test can ask them. A choice depends on nothing but
its arguments: the sums that a tile orders are then the same on every device and in every run. None was timed on a GPU;
the reasons beside the constants are counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "Tile",
    "WholeMap",
    "average_tile",
    "block_of",
    "branches_together",
    "candidates",
    "eesp_tile",
    "fused_tile",
    "gradient_chunks",
    "gradient_tile",
    "group_tile",
    "pointwise_tile",
    "power_of_two",
    "product_tile",
    "pyramid_tile",
    "sums_tile",
]

# Two programs for each multiprocessor of a large GPU: with fewer, a smaller tile fills more of it.
ENOUGH_PROGRAMS = 264
WARPS = 4


@dataclass(frozen=True)
class Tile:
    """What one program computes: ``channels`` x (``rows`` x ``columns``) outputs, ``inputs`` at a time; warps."""

    channels: int
    rows: int
    columns: int
    inputs: int = 1
    warps: int = WARPS

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


def candidates(tile: Tile) -> tuple[Tile, ...]:
    """What autotuning tries beside ``tile``: twice its pixels, twice its warps, and both. No sum changes its order."""
    wider = replace(tile, columns=2 * tile.columns)
    return tile, wider, replace(tile, warps=2 * tile.warps), replace(wider, warps=2 * tile.warps)


def power_of_two(size: int) -> int:
    """The least power of two that is at least ``size`` and 1."""
    return 1 << max(size - 1, 0).bit_length()


def block_of(size: int, least: int, most: int) -> int:
    """The largest power of two from ``least`` to ``most`` that pads ``size`` hardly more than the best of them does."""
    blocks = [least << i for i in range(most.bit_length()) if least << i <= min(most, max(power_of_two(size), least))]
    padded = {block: -(-size // block) * block for block in blocks}
    # A seventh: 56 columns run as 64, but 20 channels as 24 rather than 32.
    return max(block for block in blocks if 7 * padded[block] <= 8 * min(padded.values()))


def _pixel_tile(pixels: int, height: int, width: int, columns: int) -> tuple[int, int]:
    columns = block_of(width, min(power_of_two(width), 8), min(columns, pixels))
    return block_of(height, 1, pixels // columns), columns


def pyramid_tile(channels: int, height: int, width: int, channels_last: bool) -> Tile:
    """The tile of the depthwise kernels over a map [channels, height, width]: 512 numbers, four a thread.

    Nine taps, their 64-bit addresses and masks of eight numbers took 200 registers a thread, of four about half.

    Threads lie along what is dense: columns of a plane, whose rows above and below are still in L1 for the next tap,
    or channels of a pixel, at least eight so that a 32-byte sector is read whole.
    """
    if channels_last:
        block = block_of(channels, min(power_of_two(channels), 8), 32)
        rows, columns = _pixel_tile(512 // block, height, width, 8)
        return Tile(block, rows, columns)
    rows, columns = _pixel_tile(512, height, width, 64)
    return Tile(block_of(channels, 1, 512 // (rows * columns)), rows, columns)


def sums_tile(channels: int, height: int, width: int, channels_last: bool) -> Tile:
    """The tile of a depthwise kernel that leaves sums of each: four times the pixels of :func:`pyramid_tile`.

    As many warps more, so the same numbers a thread. Of 16 pixels the 36 sums of a weight gradient were nearly as many
    bytes in bfloat16 as all that was read; of 64 they are a quarter.
    """
    small = pyramid_tile(channels, height, width, channels_last)
    rows, columns = _pixel_tile(4 * small.pixels, height, width, 8 if channels_last else 64)
    return replace(small, rows=rows, columns=columns, warps=small.warps * max(rows * columns // small.pixels, 1))


def average_tile(channels: int, pixels: int, channels_last: bool) -> Tile:
    """The sums of one program of a mean over all pixels: 512 at once, threads along what is dense."""
    if channels_last:
        block = block_of(channels, min(power_of_two(channels), 8), 32)
        return Tile(block, 1, 512 // block)
    columns = min(power_of_two(pixels), 512)
    return Tile(block_of(channels, 1, 512 // columns), 1, columns)


def product_tile(outputs: int, inputs: int, dot: bool) -> tuple[int, int]:
    """Outputs and inputs a step of a matrix product: what tl.dot takes, or what a sum of products holds."""
    if dot:
        return min(max(power_of_two(outputs), 16), 64), min(max(power_of_two(inputs), 16), 32)
    return min(power_of_two(outputs), 8), min(power_of_two(inputs), 4)


def pointwise_tile(outputs: int, inputs: int, pixels: int, repeats: int, dot: bool) -> Tile:
    """The tile of a 1x1 convolution of one group; ``repeats`` counts images times groups."""
    channels, step = product_tile(outputs, inputs, dot)
    columns = 128 if dot else 64
    while columns > 32 and repeats * -(-outputs // channels) * -(-pixels // columns) < ENOUGH_PROGRAMS:
        columns //= 2
    return Tile(channels, 1, columns, step)


def gradient_tile(outputs: int, inputs: int, dot: bool, in_registers: bool = False) -> Tile:
    """The sums of one program of a pointwise weight gradient, ``columns`` pixels a step.

    Float32 that passes a batch norm on its way to the product is ``in_registers``: of 64 pixels 4 KB a thread spilled.
    """
    if dot:
        pixels = 16 if in_registers else 64
        return Tile(min(power_of_two(max(outputs, 16)), 64), 1, pixels, min(power_of_two(max(inputs, 16)), 64))
    return Tile(min(power_of_two(outputs), 8), 1, 32, min(power_of_two(inputs), 8))


def gradient_chunks(steps: int, repeats: int) -> int:
    """Into how many partial sums the ``steps`` pixel blocks of a weight gradient are cut, ``repeats`` blocks beside."""
    return max(1, min(-(-steps // 4), -(-ENOUGH_PROGRAMS // max(repeats, 1))))


def _unit_tile(channels: int, inputs: int, height: int, width: int, dot: bool) -> Tile:
    # Four numbers of z a thread, as in the depthwise kernels: with sixteen every kernel spilled registers.
    pixels = 32 if inputs <= 16 else 16
    rows, columns = _pixel_tile(pixels, height, width, 16)
    rows = max(rows, pixels // columns) if dot else rows  # tl.dot takes no fewer, so small maps are padded
    if not dot:
        channels = max(1, min(channels, 2048 // (inputs * rows * columns)))  # a sum holds all products
    return Tile(channels, rows, columns, inputs, min(max(power_of_two(inputs * rows * columns // 128), 4), 16))


def fused_tile(channels: int, outputs: int, height: int, width: int, dot: bool) -> Tile:
    """The tile of pyramid_pointwise in K groups, all ``channels`` of z at once; ``outputs`` are those of one group."""
    block, _ = product_tile(outputs, channels, dot)
    return _unit_tile(min(block, 32), max(power_of_two(channels), 16 if dot else 1), height, width, dot)


def branches_together(
    channels: int, branches: int, groups: int, tile: Tile, height: int, width: int, images: int
) -> bool:
    """Whether one program of pyramid_pointwise carries the prefix sums through all branches.

    It reads the map once and computes each branch once, where a program a group computes (K + 1) / 2 times as many, but
    there are K times fewer programs: it waits for maps that fill the device.
    """
    programs = images * -(-height // tile.rows) * -(-width // tile.columns)
    return groups == branches and channels <= 128 and programs >= ENOUGH_PROGRAMS


def group_tile(inputs: int, outputs: int, height: int, width: int, dot: bool) -> Tile:
    """The tile of pyramid_pointwise with one program a group, whose ``inputs`` channels of z it takes in steps."""
    block, step = product_tile(outputs, inputs, dot)
    return _unit_tile(block, step, height, width, dot)


@dataclass(frozen=True)
class WholeMap:
    """What one program of the whole unit computes: ``outputs`` channels of a branch from a map of ``pixels``."""

    outputs: int
    channels: int  # of the reduced map, a step
    inputs: int  # of the reduction, a step
    pixels: int
    warps: int


def eesp_tile(
    outputs: int, reduced_channels: int, inputs: int, pixels: int, dot: bool, reduce_dot: bool
) -> WholeMap | None:
    """The tile of the EESP unit in one launch, or None where two launches are better: see espkernels/triton/eesp.py.

    ``outputs`` of a branch, ``reduced_channels`` and ``inputs`` of one group of the reduction.
    """
    if pixels > 64:
        return None
    block, channels = product_tile(outputs, reduced_channels, dot)
    _, step = product_tile(reduced_channels, inputs, reduce_dot)
    map_pixels = max(power_of_two(pixels), 16)
    channels = min(channels, 16)  # four numbers a thread once more
    if not dot:
        block = max(1, min(block, 4096 // (channels * map_pixels)))
    if not reduce_dot:
        step = max(1, min(step, 8192 // (channels * map_pixels)))
    return WholeMap(min(block, 16), channels, step, map_pixels, 8)
