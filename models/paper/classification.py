"""Tables 2, 5 and 6: ESPNetv2 at every width, and with parts of it exchanged or left out."""

from __future__ import annotations

import torch
from torch import nn

from espkernels.models.espnetv2 import espnetv2
from espkernels.models.paper.counted import counted
from espkernels.models.paper.printed import Row, Table

__all__ = ["table_2", "table_5", "table_6"]

FLOPS, PARAMETERS, TOP_1 = "FLOPs", "parameters", "top-1"
IMAGENET = (224, 224)

# Width, channels of all layers, FLOPs, parameters.
TABLE_2 = [
    (0.5, "16 32 64 64 128 128 256 256 256 1024 1000", "28 M", "1.24 M"),
    (1.0, "32 64 128 128 256 256 512 512 512 1024 1000", "86 M", "1.67 M"),
    (1.25, "32 80 160 160 320 320 640 640 640 1024 1000", "123 M", "1.97 M"),
    (1.5, "32 96 192 192 384 384 768 768 768 1024 1000", "169 M", "2.31 M"),
    (1.75, "32 112 224 224 448 448 896 896 896 1280 1000", "224 M", "3.03 M"),
    (2.0, "32 128 256 256 512 512 1024 1024 1024 1280 1000", "284 M", "3.49 M"),
]


def table_2() -> Table:
    """ESPNetv2 at six widths, with the larger one of Fig. 3 (c)."""
    stages = {scale: _stages(scale) for scale, *_ in TABLE_2}
    sizes, _, repeats = next(iter(stages.values()))
    rows = [
        Row("all", "output sizes", "112 56 28 28 14 14 7 7 7 7 1", sizes),
        Row("all", "repeats", "1 1 1 3 1 7 1 3 1 1", repeats),
    ]
    for scale, channels, flops, parameters in TABLE_2:
        found = counted(espnetv2, IMAGENET, scale)
        rows += [
            Row(f"s = {scale}", "output channels", channels, stages[scale][1]),
            Row(f"s = {scale}", FLOPS, flops, found.macs),
            Row(f"s = {scale}", PARAMETERS, parameters, found.parameters),
        ]
    found = counted(espnetv2, IMAGENET, 3.0)
    rows += [
        Row("s = 3.0, Fig. 3 (c)", FLOPS, "602 M", found.macs),
        Row("s = 3.0, Fig. 3 (c)", PARAMETERS, "5.9 M", found.parameters),
    ]
    for name, accuracy in (("s = 2.0, Fig. 3 (c)", "72.1"), ("s = 3.0, Fig. 3 (c)", "74.9")):
        rows.append(Row(name, TOP_1, accuracy))
    return Table("Table 2: ESPNetv2 for classification", tuple(rows), "224x224, 1000 classes.")


def _stages(scale: float) -> tuple[str, str, str]:
    """Sizes and channels of what comes out of each line of Table 2, and how many units each line has."""
    with torch.device("meta"):
        network = espnetv2(scale)
        *units, depthwise, group = network.level5
        lines: list[list[nn.Module]] = [
            [network.level1], [network.level2_0], [network.level3_0], [*network.level3], [network.level4_0],
            [*network.level4], [network.level5_0], units, [depthwise], [group], [network.classifier],
        ]  # fmt: skip
        shapes: list[torch.Size] = []
        for line in lines:
            line[-1].register_forward_hook(lambda _, __, output: shapes.append(output.shape))
        network.eval()(torch.empty(1, 3, *IMAGENET))
    # The classifier sees, and gives, one number a channel: the size after the global pooling.
    sizes = [shape[2] if len(shape) == 4 else 1 for shape in shapes]
    repeats = [len(line) for line in lines[:-1]]
    return " ".join(map(str, sizes)), " ".join(str(shape[1]) for shape in shapes), " ".join(map(str, repeats))


def table_5() -> Table:
    """ESPNetv2 with other convolutions."""
    rows = []
    for name, flops, accuracy, scale, options in (
        ("dilated (standard), s = 1.0", "478 M", "69.2", 1.0, {"unit": "esp"}),
        ("depth-wise separable, s = 1.25", "123 M", "66.5", 1.25, {"dilated": False}),
        ("depth-wise dilated separable, s = 1.25", "123 M", "67.9", 1.25, {}),
    ):
        found = counted(espnetv2, IMAGENET, scale, **options)
        rows += [Row(name, FLOPS, flops, found.macs), Row(name, TOP_1, accuracy)]
    note = "The paper gives no widths: these have its FLOPs. Its introduction says 426 M of the first row."
    return Table("Table 5: convolutions in ESPNetv2", tuple(rows), note)


def table_6() -> Table:
    """ESPNetv2 with and without hierarchical feature fusion and the long-range shortcut."""
    rows = []
    for name, hff, shortcut, parameters, flops, accuracy in (
        ("R1: neither HFF nor LRSC, fixed", False, False, "1.66 M", "84 M", "58.94"),
        ("R2: HFF, fixed", True, False, "1.66 M", "84 M", "60.07"),
        ("R3: HFF and LRSC, fixed", True, True, "1.67 M", "86 M", "61.20"),
        ("R4: HFF and LRSC, cyclic", True, True, "1.67 M", "86 M", "62.17"),
        ("R5: R4 for 300 epochs", True, True, "1.67 M", "86 M", "66.10"),
    ):
        found = counted(espnetv2, IMAGENET, 1.0, hff=hff, long_range_shortcut=shortcut)
        rows += [
            Row(name, PARAMETERS, parameters, found.parameters),
            Row(name, FLOPS, flops, found.macs),
            Row(name, TOP_1, accuracy),
        ]
    return Table("Table 6: settings of ESPNetv2, s = 1.0", tuple(rows))
