"""``python -m espkernels classify``: the five likeliest names of what is on images, printed and drawn as bars."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from espkernels import freeze
from espkernels.commands.segment import jobs_of

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
    from espkernels.models.segment import read_image

    try:
        from tqdm import tqdm

        jobs = jobs_of(args.images, args.output)
        task, network = engine.trained(args.folder)
        if task.name != Classification.name:
            raise ValueError(f"run: {args.folder} is of {task.name}, not of {Classification.name}")
        task = cast(Classification, task)
        frozen = freeze(network)
        failed = 0
        for source, target in tqdm(jobs, desc="classify", unit="image", disable=len(jobs) == 1):
            try:
                image = read_image(source)
            except ValueError as error:
                tqdm.write(f"classify: {error}", file=sys.stderr)
                failed += 1
                continue
            guesses = classify.classify(frozen, task.prepared(image), task.labels)
            classify.draw_guesses(image, guesses, target)
            lines = [f"  {guess.label:<20}{100 * guess.probability:6.1f} %" for guess in guesses]
            tqdm.write("\n".join([f"{source} -> {target}", *lines]))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"classify: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0
