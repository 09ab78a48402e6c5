"""``python -m espkernels classify``: the five likeliest names of what is on images, printed and drawn as bars."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from espkernels import freeze
from espkernels.commands.photographs import Photographs

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGE", help="an image, or a folder of images")
    parser.add_argument(
        "--folder", type=Path, required=True, help="the run's folder, which 'train classification' made"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the picture to write; a folder when IMAGE is one"
    )


def run(args: argparse.Namespace) -> int:
    """0 when every image was named, 1 when one was not, 2 when nothing could begin."""
    from espkernels.models import classify
    from espkernels.models.recipes import engine
    from espkernels.models.recipes.classification import Classification
    from espkernels.models.segment import save

    try:
        photographs = Photographs("classify", args.images, args.output)
        task, network = engine.trained_as(Classification, args.folder)
        frozen = freeze(network)
        for source, target, image in photographs:
            guesses = classify.classify(frozen, task.prepared(image), task.labels)
            save(classify.draw_guesses(image, guesses), target)
            lines = [f"  {guess.label:<20}{100 * guess.probability:6.1f} %" for guess in guesses]
            photographs.say("\n".join([f"{source} -> {target}", *lines]))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"classify: {error}", file=sys.stderr)
        return 2
    return 1 if photographs.failed else 0
