"""``python -m espkernels segment``: photographs to coloured overlays, with what is in them."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from espkernels import backends, freeze
from espkernels.commands.photographs import Photographs
from espkernels.models import ESPNetv2Segmentation, classes, load
from espkernels.models import segment as segmenting
from espkernels.models.recipes.arguments import existing_file, whole_number

CLASS_SETS = {"cityscapes": classes.CITYSCAPES, "voc": classes.VOC}

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGE", help="a photograph, or a folder of photographs")
    parser.add_argument(
        "--weights", type=existing_file, required=True, help="a segmentation checkpoint, .pth or .safetensors"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the picture to write; a folder when IMAGE is one"
    )
    parser.add_argument(
        "--classes",
        choices=["auto", *CLASS_SETS],
        default="auto",
        help="names and colours of the classes; auto goes by their number",
    )
    parser.add_argument(
        "--size",
        type=whole_number(1),
        nargs=2,
        metavar=("H", "W"),
        help="what the network sees; default: from the checkpoint's name, else 512 1024 (Cityscapes) or 384 384",
    )
    parser.add_argument(
        "--scale", type=_scale, default=None, metavar="S|auto", help="the network's width; auto reads the checkpoint's"
    )
    parser.add_argument("--backend", choices=backends.NAMES, help="the kernels to run; default: the device's own")
    parser.add_argument("--threads", type=whole_number(1), help="threads of torch")


def _scale(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected auto or a number such as 2.0") from error


def run(args: argparse.Namespace) -> int:
    """0 when every image was segmented, 1 when one was not, 2 when nothing could begin."""
    try:
        photographs = Photographs("segment", args.images, args.output)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model = load.from_official(args.weights, scale=args.scale)
        count = _outputs(model, args.weights)
        class_set = _class_set(args.classes, count)
        size = _size(args.size, args.weights, count)
        with backends.use_backend(args.backend) if args.backend else nullcontext():
            _segment_all(freeze(model), photographs, size, class_set)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"segment: {error}", file=sys.stderr)
        return 2
    return 1 if photographs.failed else 0


def _outputs(model: nn.Module, weights: Path) -> int:
    if not isinstance(model, ESPNetv2Segmentation):
        raise ValueError(
            f"--weights: {weights} is of an {type(model).__name__}, expected a checkpoint for segmentation"
        )
    return model.num_classes


def _class_set(name: str, count: int) -> classes.ClassSet:
    fitting = classes.of_count(count)
    if name != "auto" and fitting.title != CLASS_SETS[name].title:
        raise ValueError(f"--classes {name}: it has {len(CLASS_SETS[name])} classes, the checkpoint {count}")
    return fitting


def _size(given: list[int] | None, weights: Path, count: int) -> tuple[int, int]:
    if given is not None:
        return given[0], given[1]
    # Official names end in width x height: espnetv2_s_2.0_city_1024x512.pth.
    named = re.search(r"(\d+)x(\d+)$", weights.stem)
    if named:
        return int(named[2]), int(named[1])
    return (512, 1024) if count in (19, 20) else (384, 384)


def _segment_all(
    model: nn.Module, photographs: Photographs, size: tuple[int, int], class_set: classes.ClassSet
) -> None:
    """Segments each image and says what is in it."""
    for source, target, photo in photographs:
        result = segmenting.segment(model, photo, size, class_set)
        segmenting.save(segmenting.overlay(photo, result), target)
        photographs.say(_summary(source, target, size, result))


def _summary(source: Path, target: Path, size: tuple[int, int], result: segmenting.Segmentation) -> str:
    lines = [f"{source} -> {target} ({size[1]}x{size[0]} in {1000 * result.seconds:.0f} ms)"]
    for name, share in result.shares.items():
        lines.append(f"  {name:<14}" + (f"{100 * share:6.1f} %" if share >= 0.0005 else " < 0.1 %"))
    return "\n".join(lines)
