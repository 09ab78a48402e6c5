"""How times and sizes are written in tables and pictures."""

from __future__ import annotations

__all__ = ["amount", "duration"]


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def amount(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"
