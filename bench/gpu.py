"""Units, operators and networks on a GPU beside torch's: ``python -m bench.gpu``, ``pytest -m gpu bench``.

Every engine is checked against float64, then all of a race are timed in turn, each sample by the device's own events.
What a run did not get to before its time was up is written down as that. The JSON, table and chart in bench/results
carry the device's name.
"""

from __future__ import annotations

import argparse
import functools
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import cuda

import bench.providers as operators
from bench import gpu_report
from bench.cases import IMAGES, NETWORKS, fits, matching
from bench.gpu_engines import RACES
from bench.gpu_tasks import Gradients, Inference, Task, Training
from bench.interleave import Run, Timed, interleave
from bench.layers import network, unit
from bench.output import RESULTS, keep_whole, make_folder, write_json
from espkernels.info import collect

__all__ = ["Row", "main", "measured", "results", "rows"]

COPIED = 1 << 30  # bytes of the copy that measures the bandwidth


@dataclass(frozen=True)
class Row:
    """One problem; ``task(device)`` makes what is built and checked. Energy is measured of networks."""

    name: str
    kind: str
    batch: int
    dtype: str
    task: Callable[[str], Task]


def rows(patterns: Sequence[str] = ()) -> list[Row]:
    """The rows whose names fit; the most telling ones first, for runs that end early."""
    found = list(_rows())
    return [row for row in found if not patterns or fits(row.name, patterns)]


def _rows() -> Iterator[Row]:
    half = torch.bfloat16
    units = matching(["s2-224x224-level3", "s2-224x224-level4", "s2-224x224-level5"])
    for batch in (256, 1):
        for case in units:
            shape = (batch, case.in_channels, case.height, case.width)
            task = functools.partial(Inference, functools.partial(unit, case), shape, half)
            yield Row(case.name, "unit", batch, "bfloat16", task)
    for batch in (1, 32, 512, 8, 128):
        shape = (batch, 3, *IMAGES["224x224"][:2])
        task = functools.partial(Inference, functools.partial(network, NETWORKS["s2-224x224-network"]), shape, half)
        yield Row("s2-224x224-network", "network", batch, "bfloat16", task)
    for case in units:
        shape = (32, case.in_channels, case.height, case.width)
        training = functools.partial(Training, functools.partial(unit, case), shape, half)
        yield Row(case.name, "training", 32, "bfloat16", training)
    case = units[0].with_batch(32)
    for name, make in (("spatial_pyramid", operators.spatial_pyramid), ("group_pointwise", operators.expand)):
        gradients = functools.partial(Gradients, make, case, half)
        yield Row(f"{case.name}-{name}", "operator", case.batch, "bfloat16", gradients)


@dataclass(frozen=True)
class OnDevice:
    """Seconds of calls by the events of the device's stream: what waits for a launch counts."""

    call: Callable[[], object]

    def time(self, calls: int) -> float:
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            self.call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _timed(call: Callable[[], object], device: str) -> Timed:
    return OnDevice(call) if device == "cuda" else Run(call)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.zeros(COPIED if device == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = interleave({"copy": _timed(functools.partial(target.copy_, source), device)})
    return 2 * source.numel() / samples.median("copy")


def joules(call: Callable[[], object], seconds: float = 1.0) -> float | None:
    """Energy of a call by the device's own counter, over about ``seconds``; None where there is none to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(cuda.current_device())
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no such package, device or counter: every one of its errors is a class of its own
        return None
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            call()
        cuda.synchronize()
        calls += 8
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / calls


def measured(row: Row, race: str, device: str, until: float, seconds: float = 0.4) -> dict[str, Any]:
    """One race of one row: ours and the peers, built and checked while there is time, then timed in turn."""
    task = row.task(device)
    calls: dict[str, Callable[[], Any]] = {}
    engines: dict[str, dict[str, Any]] = {}
    task.prepare()
    for name in (*task.ours, *task.races[race]):
        if time.monotonic() > until:
            engines[name] = {"refused": gpu_report.NO_TIME}
            continue
        before = _peak(device, reset=True)
        try:
            calls[name] = task.build(name)
        except Exception as error:  # told in the report; the others are still compared
            engines[name] = {"refused": _reason(error)}
            continue
        engines[name] = {"peak": _peak(device) - before}
    samples = interleave({name: _timed(call, device) for name, call in calls.items()}, seconds)
    for name, call in calls.items():
        engines[name] |= {"seconds": samples.median(name)}
        if isinstance(task, Training):
            engines[name]["kept"] = task.kept(name)
        if row.kind == "network" and device == "cuda" and time.monotonic() < until:
            engines[name]["joules"] = joules(call)
    best = min((name for name in task.ours if name in calls), key=samples.median, default="")
    over = {name: samples.speedup(best, name) for name in calls if best and name not in task.ours}
    return {"bytes": task.bytes, "engines": engines, "best of ours": best, "speedup": over}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _peak(device: str, reset: bool = False) -> int:
    """Most bytes allocated since the last reset; after a reset, those allocated now."""
    if device != "cuda":
        return 0
    if reset:
        gc.collect()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
    return int(cuda.max_memory_allocated())


def results(chosen: Sequence[Row], device: str, until: float) -> Iterator[dict[str, Any]]:
    """Every row in the first race, then in the second."""
    for race in RACES:
        for row in chosen:
            facts = {"row": row.name, "kind": row.kind, "batch": row.batch, "dtype": row.dtype, "race": race}
            if time.monotonic() > until:
                yield facts | {"refused": gpu_report.NO_TIME}
                continue
            try:
                yield facts | measured(row, race, device, until)
            except Exception as error:  # one row is too large for the device, say
                yield facts | {"refused": _reason(error)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of ours is wrong or does not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--rows", action="append", default=[], metavar="PATTERN", help="rows by name")
    parser.add_argument("--minutes", type=float, default=6.0, help="no engine is built after that (6)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not cuda.is_available():
        parser.error("torch finds no GPU here")
    keep_whole(options.output, bool(options.rows))
    make_folder(options.output)
    device = "cuda"
    run: dict[str, Any] = {
        "device": cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "espkernels": collect().as_dict(),
        "copy bandwidth": copy_bandwidth(device),
        "rows": [],
    }
    file = options.output / re.sub("[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    until = time.monotonic() + 60 * options.minutes
    for result in results(rows(options.rows), device, until):
        run["rows"].append(result)
        print(gpu_report.line(result), flush=True)
        write_json(run, file.with_suffix(".json"))
    gpu_report.write(run, file)
    return int(any(gpu_report.failed(row) for row in run["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
