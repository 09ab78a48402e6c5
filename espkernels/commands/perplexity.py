"""``python -m espkernels perplexity``: how well a language model that 'train language' made foresees a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=Path, metavar="TEXT", help="a file of text in UTF-8")
    parser.add_argument("--folder", type=Path, required=True, help="the run's folder, which 'train language' made")


def run(args: argparse.Namespace) -> int:
    """0 when the perplexity was printed, 2 when there is none."""
    from espkernels.models.data.text import UNKNOWN, columns, tokens_of
    from espkernels.models.recipes import engine
    from espkernels.models.recipes.language import Language, perplexity

    try:
        task, network = engine.trained_as(Language, args.folder)
        tokens = task.vocabulary.encode(tokens_of(args.text.read_text(encoding="utf-8"), task.characters))
        value = perplexity(network, columns(tokens, 1), task.steps, torch.device("cpu"))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 2
    unknown = int((tokens == task.vocabulary.numbers[UNKNOWN]).sum())
    print(f"{value:.2f} over {len(tokens)} tokens, {unknown} of them not in the vocabulary of {len(task.vocabulary)}")
    return 0
