"""Where results go: a folder that is tried before anything is measured, and JSON that an interruption leaves whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from espkernels.models.recipes.run_folder import write_atomically

__all__ = ["RESULTS", "keep_whole", "make_folder", "write_json"]

# What is stored with the project.
RESULTS = Path(__file__).resolve().parent / "results"


def make_folder(folder: Path) -> None:
    """Makes ``folder``, the value of ``--output``, and tries whether it can be written.

    Raises:
        SystemExit: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f"--output: got {folder}, expected a folder that can be made and written ({error.strerror})"
        ) from None


def keep_whole(folder: Path, part: bool) -> None:
    """Refuses the folder of the stored results for a ``part`` of what they hold, which would replace them.

    Raises:
        SystemExit: it is that folder.
    """
    if part and folder.resolve() == RESULTS:
        raise SystemExit(
            f"--output: got {folder}, whose results are of all rows, expected another folder for a part of them"
        )


def write_json(run: dict[str, Any], file: Path) -> None:
    """Writes ``run``; a kill at any moment leaves the old ``file`` or the new."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(run, indent=1) + "\n")

    write_atomically(file, write)
