"""``python -m espkernels detect``: boxes around the objects on images, printed and drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

import torch

from espkernels import freeze
from espkernels.commands.photographs import Photographs

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGE", help="a photograph, or a folder of photographs")
    parser.add_argument("--folder", type=Path, required=True, help="the run's folder, which 'train detection' made")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the picture to write; a folder when IMAGE is one"
    )
    parser.add_argument("--least-score", type=float, default=0.3, help="of a box, 0 to 1; default 0.3")


def run(args: argparse.Namespace) -> int:
    """0 when every image was looked at, 1 when one was not, 2 when nothing could begin."""
    from espkernels.models.detection import ESPNetv2Detection
    from espkernels.models.draw_detections import draw_detections
    from espkernels.models.recipes import engine
    from espkernels.models.recipes.detection import Detection
    from espkernels.models.segment import preprocess, save

    try:
        photographs = Photographs("detect", args.images, args.output)
        task, network = engine.trained_as(Detection, args.folder)
        detector = cast(ESPNetv2Detection, freeze(network))
        size = (task.image_size, task.image_size)
        for source, target, image in photographs:
            with torch.no_grad():
                (found,) = detector.detect(
                    preprocess(image, size), [(image.height, image.width)], least_score=args.least_score
                )
            save(draw_detections(image, found, task.labels), target)
            lines = [f"{source} -> {target}"]
            for i in found.scores.argsort(descending=True).tolist():
                sides = " ".join(f"{side:.0f}" for side in found.boxes[i].tolist())
                lines.append(f"  {task.labels[int(found.labels[i]) - 1]:<14}{100 * found.scores[i]:5.1f} %  {sides}")
            photographs.say("\n".join(lines))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"detect: {error}", file=sys.stderr)
        return 2
    return 1 if photographs.failed else 0
