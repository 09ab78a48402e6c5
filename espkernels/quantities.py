"""How seconds and bytes are written in tables and pictures."""

from __future__ import annotations

__all__ = ["size", "time"]


def time(seconds: float) -> str:
    """Microseconds below a millisecond, else milliseconds."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def size(count: int) -> str:
    """KiB below a MiB, else MiB."""
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"
