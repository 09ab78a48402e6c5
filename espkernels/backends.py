"""Which backends exist, which can run here, and which one a call uses.

A backend is a set of kernels behind the same operators. Left alone, a tensor runs on the kernels of its device, and on
the reference where there are none; asked for by name, a backend that cannot run says why.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

__all__ = ["NAMES", "current", "library", "runs_reference", "use_backend", "why_not"]

NAMES = ("cpu", "cuda", "triton", "reference")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("espkernels._C"), None
    except ImportError as error:
        return None, f"the compiled library espkernels._C does not load ({error}); build it with 'make install'"


library, _load_error = _load()


def why_not(name: str) -> str | None:
    """The sentence that says why backend ``name`` cannot run on this machine, or None where it can."""
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")
    if name == "cpu":
        return _load_error
    if name in ("cuda", "triton"):
        return f"this version has no {name} kernels yet"
    return None


def _checked(name: str | None) -> str | None:
    if name is None:
        return None
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    return name


# Read once: a traced call must not look at the environment.
_current: str | None = _checked(os.environ.get("ESPKERNELS_BACKEND") or None)


def current() -> str | None:
    """The backend asked for by :func:`use_backend` or ``ESPKERNELS_BACKEND``; None where each device's own is used."""
    return _current


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the operators inside the ``with`` block on backend ``name``: "cpu", "cuda", "triton" or "reference".

    None goes back to the automatic choice. Raises ValueError for an unknown name and RuntimeError, with the reason,
    for a backend that cannot run here. The choice holds for the whole process, not for one thread.
    """
    global _current
    before, _current = _current, _checked(name)
    try:
        yield
    finally:
        _current = before


def runs_reference(device: torch.device) -> bool:
    """Whether a call with tensors on ``device`` runs the reference; raises where the named backend cannot."""
    if _current == "reference":
        return True
    if _current == "cpu" and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {device}")
    if library is None:
        return True
    return device.type not in ("cpu", "meta")
