"""``python -m espkernels train``: a network of the paper from random weights, in a folder that it can go on from.

The same command again goes on from the last whole epoch. Under torchrun every process takes its share of each batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from espkernels.commands import extras
from espkernels.commands.worker_errors import reason
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.task import TASKS, task_class

__all__ = ["add_arguments", "run"]

# What every epoch's weights, curves and progress are written with.
NEEDED = ("matplotlib", "safetensors", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{name}: {line}" for name, (_, line) in TASKS.items())
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=listed)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="'train TASK --help' lists them")


def task_parser(name: str) -> argparse.ArgumentParser:
    """The options of training the task ``name``."""
    parser = argparse.ArgumentParser(prog=f"espkernels train {name}", description=TASKS[name][1])
    task_class(name).add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation; default 0")
    parser.add_argument("--plain", action="store_true", help="plain PyTorch's layers in place of this library's")
    parser.add_argument("--folder", type=Path, required=True, help="the run's folder; new, or to go on in")
    parser.add_argument("--epochs", type=int, default=300, help="default 300")
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "bfloat16", "float16"], help="of autocast"
    )
    parser.add_argument(
        "--average", type=float, metavar="DECAY", help="evaluate and keep a moving average of the weights"
    )
    parser.add_argument("--threads", type=whole_number(1), help="threads of torch")
    parser.add_argument("--tensorboard", action="store_true", help="write events into FOLDER/tensorboard too")
    return parser


def run(args: argparse.Namespace) -> int:
    """0 when all epochs ended, 1 when the loss was no number, 2 when nothing could begin, 130 after Ctrl-C."""
    from espkernels.models.recipes import curves, engine
    from espkernels.models.recipes.distributed import is_first
    from espkernels.models.recipes.events import Events

    given = vars(task_parser(args.task).parse_args(args.options))
    missing = extras.why_not("train", NEEDED)
    if missing is not None:
        print(f"train: {missing}", file=sys.stderr)
        return 2
    folder, threads, tensorboard = (given.pop(name) for name in ("folder", "threads", "tensorboard"))
    settings = {name: given.pop(name) for name in ("epochs", "precision", "average")} | {"seed": given["seed"]}
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        task = task_class(args.task)(**given)
        events = Events(folder / "tensorboard") if tensorboard else None

        def tell(row: dict[str, float]) -> None:
            engine.said(row, settings["epochs"])
            if events is not None:
                events.write(row)

        rows = engine.train(task, folder, engine.Settings(**settings), engine.progress_bar, tell)
        if rows and is_first():
            curves.draw_curves(rows, folder / "curves.png")
    except FloatingPointError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"train: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on from the last whole epoch", file=sys.stderr)
        return 130
    if is_first():
        print(f"{folder}: config.json, metrics.csv, last.pt, best.safetensors, curves.png")
    return 0
