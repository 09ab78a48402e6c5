"""The folder of a run: how to run it again, what it scored, and where it goes on after an interruption.

    config.json        task, options, settings, command and versions
    metrics.csv        a line an epoch
    last.pt            everything the next epoch needs
    best.safetensors   the weights with the best score
    curves.png         rate, loss and scores

Every file is written beside its name and then put in its place, so that a kill at any moment leaves the old or the new.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import espkernels
from espkernels.models import checkpoint

__all__ = ["RunFolder", "write_atomically"]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a file beside ``path``, with its ending, that takes its place when whole and on the disk.

    Its mode is that of a file that open() made, also where ``write`` puts a private file in its place.
    """
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with open(beside, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(beside)
        with open(beside, "rb+") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunFolder:
    """The files of one run under ``path``, which is made when something is first written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    def begin(self, config: Mapping[str, Any]) -> None:
        """Writes config.json, with what says how to run it again."""
        self.path.mkdir(parents=True, exist_ok=True)
        again = {
            "command": shlex.join([sys.executable, "-m", "espkernels", *sys.argv[1:]]),
            "folder": os.getcwd(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "espkernels": espkernels.__version__,
        }
        text = json.dumps({**config, "again": again}, indent=1) + "\n"
        write_atomically(self.path / "config.json", lambda path: _keep(path.write_text(text)))

    def config(self) -> dict[str, Any]:
        """What config.json holds. Raises FileNotFoundError where there is no run, ValueError where it is damaged."""
        path = self.path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"run: there is no {path}; a run's folder is what 'train --folder' was given")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"run: {path} is damaged: {error}") from error
        if not isinstance(config, dict) or not {"task", "options", "settings"} <= config.keys():
            raise ValueError(f"run: {path} is no configuration of a run: it lacks task, options or settings")
        return config

    def save(self, state: Mapping[str, Any]) -> None:
        """Keeps ``state`` as the checkpoint to go on from."""
        write_atomically(self.last, lambda path: torch.save(dict(state), path))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, None where there is none yet; ValueError for a file that is not one.

        Nothing in the file is executed.
        """
        if not self.last.is_file():
            return None
        state = checkpoint.content(self.last)
        if not isinstance(state, dict) or "epoch" not in state:
            raise ValueError(f"run: {self.last} is no checkpoint of a run")
        return state

    def save_best(self, weights: Mapping[str, Tensor], scores: Mapping[str, float]) -> None:
        """Keeps the best weights so far, their scores beside them in the file."""
        from safetensors.torch import save_file

        # Copies: the format has no place for tensors that share their memory, as tied weights do.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
        facts = {name: repr(value) for name, value in scores.items()}
        write_atomically(self.best, lambda path: save_file(tensors, path, facts))

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """All epochs' lines, those of epochs that an interruption had cut off among them only once."""
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics, lambda path: _keep(path.write_text(text.getvalue())))


def _keep(_: object) -> None:
    """Path.write_text says how much it wrote, which nobody asks."""
