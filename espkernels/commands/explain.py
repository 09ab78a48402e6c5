"""Says where the time of a frozen ESPNetv2 goes, layer by layer, against what this machine could do."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

import espkernels
from espkernels import models
from espkernels.models.espnetv2 import Encoder
from espkernels.models.recipes.arguments import existing_file, whole_number

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", type=float, metavar="S", help="the network's width (1.0, or that of --weights)")
    parser.add_argument("--segmentation", action="store_true", help="the network for segmentation")
    parser.add_argument("--classes", type=int, metavar="N", help="outputs (1000, for segmentation 20)")
    parser.add_argument(
        "--weights", type=existing_file, metavar="FILE", help="a checkpoint, .pth or .safetensors; else random"
    )
    parser.add_argument("--size", type=_size, metavar="HxW", help="of the image (224x224, for segmentation 512x1024)")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="threads of torch")
    parser.add_argument("-o", "--output", type=Path, metavar="PICTURE", help="a picture to write, such as explain.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected height x width such as 512x1024")
    return int(sides[1]), int(sides[2])


def run(args: argparse.Namespace) -> int:
    """0 when the model was explained, 2 when it could not be."""
    before = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        for name, path in (("--output", args.output), ("--json", args.json)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{name}: there is no folder {path.parent}")
        model = _model(args)
        encoder = next(part for part in model.modules() if isinstance(part, Encoder))
        found = espkernels.explain(model, torch.rand(1, encoder.in_channels, *(args.size or _usual_size(model))))
        print(found)
        if args.json is not None:
            args.json.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
        if args.output is not None:
            found.save(args.output)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    return 0


def _usual_size(model: nn.Module) -> tuple[int, int]:
    if isinstance(model, models.ESPNetv2Detection):
        return model.image_size, model.image_size
    return (512, 1024) if isinstance(model, models.ESPNetv2Segmentation) else (224, 224)


def _model(args: argparse.Namespace) -> nn.Module:
    if args.weights is None:
        scale = 1.0 if args.scale is None else args.scale
        if args.segmentation:
            return models.espnetv2_segmentation(scale, 20 if args.classes is None else args.classes)
        return models.espnetv2(scale, 1000 if args.classes is None else args.classes)
    model = models.from_official(args.weights, scale=args.scale)
    if args.segmentation and not isinstance(model, models.ESPNetv2Segmentation):
        raise ValueError(f"--segmentation: {args.weights} is no checkpoint for segmentation")
    if args.classes not in (None, model.num_classes):
        raise ValueError(f"--classes: got {args.classes}, {args.weights} has {model.num_classes}")
    return model
