"""Errors of the processes that read data, whose text is the whole traceback there."""

from __future__ import annotations

__all__ = ["reason"]


def reason(error: Exception) -> str:
    """What ``error`` says; of one that a worker of torch's DataLoader raised, the traceback's last line."""
    text = str(error)
    if "DataLoader worker process" not in text:
        return text
    return text.rstrip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
