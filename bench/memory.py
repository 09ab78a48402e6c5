"""Peak memory of one provider's step, read in a fresh process: ``python -m bench.memory``.

The resident set's high-water mark counts what the allocator really took, temporary buffers of kernels included. Only
Linux can reset the mark; elsewhere there is no figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.comparison import Provider
from bench.layers import Task, network

__all__ = ["peak", "peak_of_network"]

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew at most during the second of two steps, above what there was before both."""
    try:
        before = _field("VmRSS")
        step()
        RESET.write_text("5")
        step()
        return max(0, _field("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _field(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def peak_of_network(scale: float, shape: tuple[int, ...], mode: str, threads: int, provider: Provider) -> int | None:
    """:func:`peak` of the classification network, in a fresh process."""
    request = json.dumps([scale, shape, mode, threads, provider.implementation, provider.layout])
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", request], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: int | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(request: str) -> None:
    scale, shape, mode, threads, implementation, layout = json.loads(request)
    torch.set_num_threads(threads)
    task = Task(lambda: network(scale), tuple(shape), torch.float32, mode)
    print(json.dumps(peak(task.run(Provider(implementation, layout)))))


if __name__ == "__main__":
    main(sys.argv[1])
