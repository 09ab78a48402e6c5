"""What a bug report or a benchmark must say: versions, machine, build, instruction sets, backends, threads."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

import espkernels
from espkernels import backends

__all__ = ["Info", "collect"]

# They change speed or memory without a trace in the code: allocators, thread pools, our own switches.
_PREFIXES = ("ESPKERNELS_", "GOMP_", "KMP_", "MALLOC_", "MIMALLOC_", "MKL_", "OMP_", "TORCH", "TRITON_")
_NAMES = ("ATEN_CPU_CAPABILITY", "GLIBC_TUNABLES", "LD_PRELOAD", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Info:
    """Facts, ready for JSON by :meth:`as_dict`. ``backends`` maps each name to "usable" or the reason why not.

    ``defaults`` says for each type of device which backends are tried, in which order, and whether that was measured.
    """

    versions: dict[str, str]
    machine: dict[str, Any]
    build: dict[str, Any]
    instruction_sets: dict[str, Any]
    backends: dict[str, str]
    defaults: dict[str, str]
    threads: dict[str, int]
    environment: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines: list[str] = []
        for section, facts in self.as_dict().items():
            lines.append(section.replace("_", " "))
            lines += [f"  {name:<18} {_text(value)}" for name, value in facts.items()] or ["  none"]
        return "\n".join(lines)


def collect() -> Info:
    """The facts of this process and machine. Reads a few files under /proc and /sys and runs nothing."""
    library = backends.library
    build = {} if library is None else dict(library.build_info())
    sets: dict[str, Any] = {"torch uses": torch.backends.cpu.get_cpu_capability()}
    if library is not None:
        sets |= {"in use": library.isa(), "available": list(library.available_isas())}
    versions = {
        "espkernels": espkernels.__version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    return Info(
        versions=versions,
        machine=_machine(),
        build=build,
        instruction_sets=sets,
        backends={name: backends.why_not(name) or "usable" for name in backends.NAMES},
        defaults={device: str(default) for device, default in backends.DEFAULTS.items()},
        threads={"torch": torch.get_num_threads(), "torch interop": torch.get_num_interop_threads()},
        environment={
            name: value for name, value in sorted(os.environ.items()) if name in _NAMES or name.startswith(_PREFIXES)
        },
    )


def _machine() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "logical cores": os.cpu_count() or 1,
        "cores for us": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory GiB": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge pages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {name: value for name, value in facts.items() if value is not None}


def _cpu_model() -> str:
    # x86 names the model; ARM only its implementer and part number.
    facts = dict(line.partition(":")[::2] for line in (_read("/proc/cpuinfo") or "").splitlines() if ":" in line)
    stripped = {name.strip(): value.strip() for name, value in facts.items()}
    name = stripped.get("model name") or platform.processor() or platform.machine()
    if "model" in stripped and "cpu family" in stripped:
        # Cloud machines hide the product name; family and model still tell the generation.
        name += f" (family {stripped['cpu family']} model {stripped['model']} stepping {stripped.get('stepping', '?')})"
    return name


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(options: str | None) -> str | None:
    return options.partition("[")[2].partition("]")[0] or options if options else None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
