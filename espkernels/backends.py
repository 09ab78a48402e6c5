"""Which backends exist, which can run here, and which one a call uses.

A backend is a set of kernels behind the same operators. Left alone, a tensor runs on the kernels of its device, and on
the reference where there are none; asked for by name, a backend that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

__all__ = [
    "DEFAULTS",
    "NAMES",
    "Default",
    "current",
    "gpu_backend",
    "interprets",
    "library",
    "runs_reference",
    "transforms_active",
    "use_backend",
    "why_not",
]

NAMES = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Default:
    """What serves tensors on one type of device: the first of ``order`` that can; ``measured`` says why this order."""

    order: tuple[str, ...]
    measured: str

    def __str__(self) -> str:
        return f"{', '.join(self.order)} (the first that can; {self.measured})"


DEFAULTS = {
    "cpu": Default(("cpu", "reference"), "measured, see bench/results"),
    "cuda": Default(("cuda", "triton", "reference"), "nothing was measured on a GPU"),
}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("espkernels._C"), None
    except ImportError as error:
        return None, f"the compiled library espkernels._C does not load ({error}); build it with 'make install'"


library, _load_error = _load()
if library is not None and (_asked_set := os.environ.get("ESPKERNELS_ISA")) not in (None, "", library.isa()):
    warnings.warn(
        f"ESPKERNELS_ISA is {_asked_set!r}, expected one of {', '.join(library.available_isas())}, which this binary "
        f"has and this machine runs: {library.isa()} is in use",
        stacklevel=2,
    )


def interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _cuda_library_missing() -> str | None:
    """Loads the CUDA C++ kernels; the reason where that fails. Only a torch built for CUDA has what they link to."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    file = Path(__file__).parent / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.exists():
        return "the library espkernels/_C_cuda is not built; build it with ESPKERNELS_BUILD_CUDA=1, which needs nvcc"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"the library {file.name} does not load ({error})"
    return None


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if torch.version.cuda is None and torch.version.hip is None and not interprets():
        return (
            "this torch is not built for a GPU; Triton kernels run on tensors on the CPU only with TRITON_INTERPRET=1"
        )
    return None


def _missing(name: str) -> str | None:
    """Why ``name`` cannot run wherever there is a GPU; looks at no device, which a later fork would not survive."""
    if name == "reference":
        return None
    if library is None:
        return _load_error  # it holds the operators' schemas
    if name == "cuda":
        return _cuda_library_missing()
    return _triton_missing() if name == "triton" else None


def why_not(name: str) -> str | None:
    """The sentence that says why backend ``name`` cannot run on this machine, or None where it can."""
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")
    reason = _missing(name)
    if reason is None and name in ("cuda", "triton") and not (name == "triton" and interprets()):
        return None if torch.cuda.is_available() else "torch finds no GPU here"
    return reason


def _checked(name: str | None) -> str | None:
    if name is None:
        return None
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    return name


def _named_by_environment() -> str | None:
    try:
        return _checked(os.environ.get("ESPKERNELS_BACKEND") or None)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"ESPKERNELS_BACKEND: {error}") from None


@dataclass(eq=False)
class _Choice:
    """What one ``with use_backend(...)`` asks for: two that ask for the same are two."""

    name: str | None


# The environment's choice, read once as a traced call must not look at it, and those of the blocks entered since; the
# last one counts. Blocks of several threads end in any order, and a list needs no lock to gain or lose an item.
_choices = [_Choice(_named_by_environment())]


def kernels_for(dispatch_key: str, namespace: str) -> frozenset[str]:
    """The operators of ``namespace`` that have a kernel for ``dispatch_key``; there may be more with schemas alone."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name.removeprefix(f"{namespace}::") for name in names if has_kernel(name, dispatch_key))


# What a tensor on a GPU gets where nothing was asked for, and what the CUDA C++ library has kernels of, decided once
# for the same reason.
_gpu_default = next(name for name in DEFAULTS["cuda"].order if _missing(name) is None)
_cuda_kernels = kernels_for("CUDA", "espkernels_cuda") if _missing("cuda") is None else frozenset()


def current() -> str | None:
    """The backend asked for by :func:`use_backend` or ``ESPKERNELS_BACKEND``; None where each device's own is used.

    "reference" where :func:`transforms_active`; RuntimeError is raised where another backend was asked for then.
    """
    name = _choices[-1].name
    if not transforms_active():
        return name
    if name not in (None, "reference"):
        raise RuntimeError(
            f"backend {name!r} was asked for, but transforms of torch.func and forward-mode AD take the reference alone"
        )
    return "reference"


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active, with rules for torch's operations alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_cpu_kernels(device: torch.device) -> bool:
    """Whether this library's kernels on the CPU run tensors on ``device``."""
    return device.type == "cpu" and library is not None and current() in (None, "cpu")


def trains_whole(operator: str, device: torch.device) -> bool:
    """Whether kernels of ours run ``operator``, one of whole layers in training, on tensors on ``device``.

    The reference has none of these: there the layers run one by one.
    """
    if device.type == "cuda":
        return library is not None and current() != "cpu" and gpu_backend(operator) != "reference"
    return runs_cpu_kernels(device) or (device.type == "cpu" and _interpreting())


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the operators inside the ``with`` block on backend ``name``: "cpu", "cuda", "triton" or "reference".

    None goes back to the automatic choice. Raises ValueError for an unknown name and RuntimeError, with the reason,
    for a backend that cannot run here. The choice holds for the whole process, not for one thread: of several blocks at
    a time the one entered last decides, and where it ends, the one before that has not ended. Under
    TRITON_INTERPRET=1 "triton" runs tensors on the CPU, in this thread, in Triton's interpreter.
    """
    choice = _Choice(_checked(name))
    _choices.append(choice)
    try:
        with importlib.import_module("espkernels.gpu").Interpreted() if _interpreting() else nullcontext():
            yield
    finally:
        _choices.remove(choice)


def _interpreting() -> bool:
    return current() == "triton" and interprets()


def gpu_backend(operator: str) -> str:
    """The backend, "cuda", "triton" or "reference", that runs ``operator`` on tensors on a GPU.

    The CUDA C++ library has the operators and the units; the layers around them have Triton kernels alone.
    """
    if current() == "cpu":
        raise RuntimeError("backend 'cpu' was asked for, but the tensors are on a GPU")
    backend = current() or _gpu_default
    if backend == "cuda" and operator not in _cuda_kernels:
        return "triton" if _missing("triton") is None else "reference"
    return backend


def runs_reference(device: torch.device) -> bool:
    """Whether a call with tensors on ``device`` runs the reference; raises where the named backend cannot."""
    asked = current()
    if asked == "reference":
        return True
    if device.type in ("cpu", "meta"):
        if device.type == "cpu" and asked in ("cuda", "triton") and not _interpreting():
            advice = ", which it takes only with TRITON_INTERPRET=1" if asked == "triton" else ""
            raise RuntimeError(f"backend {asked!r} was asked for, but the tensors are on the CPU{advice}")
        return library is None
    if asked == "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {device}")
    return library is None or device.type != "cuda" or (asked is None and _gpu_default == "reference")
