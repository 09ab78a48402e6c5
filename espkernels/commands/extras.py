"""What a command needs beside torch and numpy, looked for before it begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

__all__ = ["why_not"]


def why_not(extra: str, modules: Sequence[str]) -> str | None:
    """Which of the ``modules`` of ``extra`` are missing and how they are installed, None where all are there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} not found; install the extra {extra!r}: pip install 'espkernels[{extra}]'"
