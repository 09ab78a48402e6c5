"""``python -m espkernels``: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each name is a module of espkernels.commands; the sentence is its line in the help.
COMMANDS = {
    "info": "versions, build, instruction sets, backends and threads",
    "selftest": "check the installed kernels on this machine, in seconds",
    "bench": "verify and time the kernels on the real layer shapes",
    "explain": "where the time of a network goes, layer by layer",
    "segment": "segment images with a trained ESPNetv2",
    "train": "train a network of the paper; the same command goes on after an interruption",
    "evaluate": "score a run's best weights, or a checkpoint, on validation data",
    "classify": "name what is on images, with a trained network",
    "detect": "boxes around the objects on images, with a trained network",
    "generate": "write text with a trained language model",
    "perplexity": "how well a trained language model foresees a text",
    "paper": "the tables of the paper beside what the networks here measure",
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``command`` in its result names the module."""
    result = argparse.ArgumentParser(prog="espkernels", description="Fast kernels for ESPNetv2's EESP unit.")
    commands = result.add_subparsers(dest="command", required=True, metavar="command")
    for name, line in COMMANDS.items():
        module = importlib.import_module(f"espkernels.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=line, description=module.__doc__))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status, 130 after Ctrl-C."""
    try:
        args = parser().parse_args(arguments)
        return importlib.import_module(f"espkernels.commands.{args.command}").run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
