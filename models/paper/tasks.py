"""Tables 3 and 4 and Fig. 7: detection, language and segmentation, beside the networks that the paper compares with."""

from __future__ import annotations

from collections.abc import Iterator

from espkernels.models.detection import espnetv2_detection
from espkernels.models.espnet import espnet
from espkernels.models.language_model import eru_language_model
from espkernels.models.paper.counted import counted
from espkernels.models.paper.printed import NOT_BUILT, Row, Table
from espkernels.models.segmentation import espnetv2_segmentation

__all__ = ["figure_7", "table_3", "table_4"]

# Network, FLOPs and mAP on PASCAL VOC 2007 and on MS-COCO; None where the paper has a dash.
TABLE_3 = [
    ("SSD-512", "90.2 B", "74.9", "99.5 B", "26.8"),
    ("SSD-300", "31.3 B", "72.4", "35.2 B", "23.2"),
    ("YOLOv2", "6.8 B", "69.0", "17.5 B", "21.6"),
    ("MobileNetv1-320", None, None, "1.3 B", "22.2"),
    ("MobileNetv2-320", None, None, "0.8 B", "22.1"),
    ("ESPNetv2-512", "2.5 B", "68.2", "2.8 B", "26.0"),
    ("ESPNetv2-384", "1.4 B", "65.6", "1.6 B", "23.2"),
    ("ESPNetv2-256", "0.6 B", "63.8", "0.7 B", "21.9"),
]


def table_3() -> Table:
    """Object detection with the network at width 2."""
    rows: list[Row] = []
    for name, voc_flops, voc_map, coco_flops, coco_map in TABLE_3:
        for data, classes, configuration, flops, precision in (
            ("VOC07", 21, "released", voc_flops, voc_map),
            ("COCO", 81, "paper", coco_flops, coco_map),
        ):
            if flops is None or precision is None:
                continue
            if not name.startswith("ESPNetv2"):
                rows += _others(f"{name}, {data}", ("FLOPs", flops), ("mAP", precision))
                continue
            side = int(name.rpartition("-")[2])
            found = counted(espnetv2_detection, (side, side), 2.0, classes, side, configuration=configuration)
            rows += [Row(f"{name}, {data}", "FLOPs", flops, found.macs), Row(f"{name}, {data}", "mAP", precision)]
    note = "Configuration 'released' for VOC07, 'paper' for COCO: no single one has the FLOPs of both columns."
    return Table("Table 3: object detection", tuple(rows), note)


def _others(name: str, *cells: tuple[str, str]) -> Iterator[Row]:
    """Rows of a network that is not the paper's own."""
    return (Row(name, quantity, value, None, NOT_BUILT) for quantity, value in cells)


# Model, parameters, perplexity.
TABLE_4 = [
    ("Variational LSTM", "20 M", "78.6"),
    ("SRU", "24 M", "60.3"),
    ("Quantized LSTM", None, "89.8"),
    ("QRNN", "18 M", "78.3"),
    ("Skip-connection LSTM", "24 M", "58.3"),
    ("AWD-LSTM", "24 M", "57.3"),
    ("PRU", "19 M", "62.42"),
    ("AWD-PRU", "19 M", "56.56"),
]


def table_4() -> Table:
    """Language models on Penn Treebank."""
    rows: list[Row] = []
    for name, parameters, perplexity in TABLE_4:
        cells = [("parameters", parameters)] if parameters else []
        rows += _others(name, *cells, ("perplexity", perplexity))
    for hidden, parameters, perplexity in ((320, "7 M", "73.63"), (768, "15 M", "63.47")):
        found = counted(eru_language_model, None, 10_000, 400, hidden, 3)
        name = f"ERU, hidden {hidden}"
        rows += [Row(name, "parameters", parameters, found.parameters), Row(name, "perplexity", perplexity)]
    note = "The paper gives no hidden widths and no code: these are a design of ours with its parameters."
    return Table("Table 4: language models", tuple(rows), note)


# Data, network, FLOPs, mIOU.
FIGURE_7 = [
    ("Cityscapes", "SegNet", "82 B", "57.0"),
    ("Cityscapes", "ContextNet", "33 B", "66.1"),
    ("Cityscapes", "ICNet", "31 B", "69.5"),
    ("Cityscapes", "ERFNet", "26 B", "69.7"),
    ("Cityscapes", "MobileNetv2", "21 B", "70.7"),
    ("Cityscapes", "RTSeg-MobileNet", "13.8 B", "61.5"),
    ("Cityscapes", "RTSeg-ShuffleNet", "6.2 B", "58.3"),
    ("Cityscapes", "ESPNet", "4.5 B", "60.3"),
    ("Cityscapes", "ENet", "3.8 B", "58.3"),
    ("Cityscapes", "ESPNetv2-val", "2.7 B", "66.4"),
    ("Cityscapes", "ESPNetv2-test", "2.7 B", "66.2"),
    ("VOC 2012", "FCN-8s", "181 B", "62.2"),
    ("VOC 2012", "DeepLabv3", "81 B", "80.49"),
    ("VOC 2012", "SegNet", "31 B", "59.1"),
    ("VOC 2012", "MobileNetv1", "14 B", "75.29"),
    ("VOC 2012", "MobileNetv2", "5.8 B", "75.7"),
    ("VOC 2012", "ESPNet", "2.2 B", "63.01"),
    ("VOC 2012", "ESPNetv2-val", "0.76 B", "67.0"),
    ("VOC 2012", "ESPNetv2-test", "0.76 B", "68.0"),
]


def figure_7() -> Table:
    """Semantic segmentation with the network at width 2, and with ESPNet."""
    rows: list[Row] = []
    for data, network, flops, precision in FIGURE_7:
        name, city = f"{network}, {data}", data == "Cityscapes"
        if network == "ESPNet":
            found = counted(espnet, (512, 1024) if city else (512, 512), 20 if city else 21)
            transposed = sum(found.by_module[part].macs for part in ("up_l3", "up_l2", "classifier"))
            rows += [
                Row(name, "FLOPs", flops, found.macs - transposed),
                Row(name, "FLOPs, transposed convolutions too", flops, found.macs),
            ]
        elif network.startswith("ESPNetv2"):
            size, classes = ((512, 1024), 20) if city else ((384, 384), 21)
            rows.append(Row(name, "FLOPs", flops, counted(espnetv2_segmentation, size, 2.0, classes).macs))
        else:
            rows += _others(name, ("FLOPs", flops), ("mIOU", precision))
            continue
        rows.append(Row(name, "mIOU", precision))
    note = "1024x512 and 384x384; ESPNet on VOC at 512x512, a size that the paper does not give."
    return Table("Figure 7: semantic segmentation", tuple(rows), note)
