"""Kinds of arguments that several commands take; their errors name the option, as argparse puts it in front."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

__all__ = ["existing_file", "whole_number"]


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"got {text}, expected a whole number of at least {least}")
        return value

    return read


def existing_file(text: str) -> Path:
    """The type of an argument that is a file to read."""
    path = Path(text)
    if not path.is_file():
        raise ArgumentTypeError(f"there is no file {path}")
    return path
