"""A run's epochs for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["Events"]


class Events:
    """Event files under ``folder``, made when a first epoch is written; ``tensorboard --logdir`` takes the folder.

    Raises ImportError, with what to install, where TensorBoard is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("--tensorboard needs TensorBoard: pip install 'espkernels[train]'") from error
        self._new_writer = SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def write(self, row: Mapping[str, float]) -> None:
        """One epoch's numbers, on the disk when this returns.

        An epoch that is run again after an interruption takes the place of what it wrote before.
        """
        step = int(row["epoch"])
        if self._writer is None:
            self._writer = self._new_writer(str(self._folder), purge_step=step)
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
