"""``python -m espkernels generate``: text from a language model that 'train language' made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what the text begins with")
    parser.add_argument("--folder", type=Path, required=True, help="the run's folder, which 'train language' made")
    parser.add_argument("--length", type=int, default=100, help="tokens to write; default 100")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 for likelier text; default 1")
    parser.add_argument("--most-likely", type=int, metavar="K", help="draw from the K likeliest tokens alone")
    parser.add_argument("--seed", type=int, default=0, help="default 0")


def run(args: argparse.Namespace) -> int:
    """0 when the text was written, 2 when none could be."""
    from espkernels.models.data.text import END_OF_LINE, tokens_of
    from espkernels.models.generate import generate
    from espkernels.models.recipes import engine
    from espkernels.models.recipes.language import Language

    try:
        task, network = engine.trained_as(Language, args.folder)
        tokens = tokens_of(args.prompt, task.characters)
        if not task.characters:
            tokens = tokens[:-1] or [END_OF_LINE]  # the prompt's line goes on
        prompt = task.vocabulary.encode(tokens)
        drawn = generate(network, prompt, args.length, args.temperature, args.most_likely, args.seed)
        print(args.prompt, end="")
        for number in drawn:
            word = task.vocabulary.words[number]
            print(word if task.characters else "\n" if word == END_OF_LINE else f" {word}", end="", flush=True)
        print()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0
