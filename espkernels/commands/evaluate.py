"""``python -m espkernels evaluate``: the scores of a run's best weights, or of an official checkpoint, frozen."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from espkernels import backends, freeze
from espkernels.commands.worker_errors import reason
from espkernels.models.recipes.arguments import existing_file
from espkernels.models.recipes.task import TASKS, Task, task_class

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="'evaluate TASK --help' lists them")


def _parser(name: str) -> argparse.ArgumentParser:
    # Without abbreviations: what it does not know is the task's.
    parser = argparse.ArgumentParser(prog=f"espkernels evaluate {name}", allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--folder", type=Path, help="a run's folder, whose options are taken")
    which.add_argument(
        "--weights", type=existing_file, metavar="FILE", help="a checkpoint; the task's options say the rest"
    )
    parser.add_argument("--unfrozen", action="store_true", help="the layers as they were trained, not frozen")
    parser.add_argument("--backend", choices=backends.NAMES, help="the kernels to run; default: the device's own")
    return parser


def run(args: argparse.Namespace) -> int:
    """0 when the scores were printed, 2 when there are none."""
    from espkernels.models import load_official
    from espkernels.models.recipes import engine

    own, others = _parser(args.task).parse_known_args(args.options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task: Task
    try:
        if own.folder is not None:
            if others:
                raise ValueError(f"{others[0]}: a run brings its own options")
            task, network = engine.trained(own.folder)
            if task.name != args.task:
                raise ValueError(f"run: {own.folder} is of {task.name}, not of {args.task}")
        else:
            parser = argparse.ArgumentParser(prog=f"espkernels evaluate {args.task}")
            task_class(args.task).add_arguments(parser)
            task = task_class(args.task)(**vars(parser.parse_args(others)))
            network = task.network().eval()
            load_official(network, own.weights)
        with backends.use_backend(own.backend) if own.backend else nullcontext():
            network = network.to(device)
            found = engine.scores(task, network if own.unfrozen else freeze(network), device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"evaluate: {reason(error)}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name:<12}{value:10.3f}")
    return 0
