"""Verifies the kernels inside ESPNetv2, times them on the real layer shapes, and writes table, JSON and picture."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import espkernels
from espkernels import backends, models
from espkernels.commands import extras
from espkernels.models.recipes.arguments import whole_number
from espkernels.replace import replace

__all__ = ["add_arguments", "run"]

# The repository, of which an installed package is not a part.
ROOT = Path(espkernels.__file__).resolve().parent.parent
FOLDER = ROOT / "bench"
FILES = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise", "unit", "network")
EXTRA = ("pytest", "pytest_benchmark", "rich", "tqdm", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=FILES, help="one operator or layer; may be repeated")
    parser.add_argument("--cases", action="append", metavar="PATTERN", help="layers by name, such as 's1-224x224-*'")
    parser.add_argument("--modes", action="append", choices=("forward", "backward", "full"))
    parser.add_argument("--dtypes", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", action="append", type=whole_number(1), metavar="N")
    parser.add_argument("--batch", type=whole_number(1), metavar="N", help="images at once (1)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile in every comparison, or in none; by default where it fits the time",
    )
    parser.add_argument("--full", action="store_true", help="every shape, mode, dtype and thread count: hours")
    parser.add_argument(
        "--output", type=Path, default=FOLDER / "results", help="folder of bench.json, bench.md and bench.png"
    )


def run(args: argparse.Namespace) -> int:
    reason = _why_not()
    if reason is not None:
        print(f"bench: {reason}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from bench.output import make_folder

    make_folder(args.output)
    _warn_if_busy()
    _verify()
    json_path = args.output / "bench.json"
    progress = _Progress()
    status = _pytest(args, json_path, progress)
    if progress.interrupted:
        raise KeyboardInterrupt
    if not progress.measured:
        print("bench: nothing was measured", file=sys.stderr)
        return int(status) or 1
    report = _report()
    results = report.load(json_path)
    report.table(results)
    (args.output / "bench.md").write_text(report.markdown(results, "bench.png"))
    report.picture(results, args.output / "bench.png")
    print(f"{args.output}/bench.json, bench.md, bench.png; {time.perf_counter() - start:.0f} s")
    for name, text in progress.failures:
        print(f"failed: {name}\n{text}", file=sys.stderr)
    return int(status)


def _why_not() -> str | None:
    if not (FOLDER / "cases.py").is_file():
        return (
            "the benchmarks are part of the repository, not of an installed package; "
            "clone it and run 'make bench' there"
        )
    return extras.why_not("bench", EXTRA) or backends.why_not("cpu")


def _warn_if_busy() -> None:
    """Threads that wait for one another lose most on a shared machine: then even ratios say little."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"note: load average {load:.1f} on {cores} cores; where others work, the figures mean little")


def _verify() -> None:
    """Replaces the layers of a plain ESPNetv2, each compared with the original on the maps that reach it."""
    torch.manual_seed(0)
    model = models.espnetv2(1.0, plain=True)
    print(f"ESPNetv2 s = 1.0, {models.count(model, (224, 224)).macs / 1e6:.1f} M multiply-adds; replacing its layers:")
    # One thread: in float64 torch convolves channel by channel, and threads would mostly wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(replace(model, verify=torch.randn(2, 3, 224, 224)))
    torch.set_num_threads(threads)


def _pytest(args: argparse.Namespace, json_path: Path, progress: _Progress) -> int:
    import pytest

    given = [f"{FOLDER}/bench_{name}.py" for name in args.only or FILES]
    for option in ("cases", "modes", "dtypes", "threads"):
        for value in getattr(args, option) or ():
            given.append(f"--{option}={value}")
    if args.batch is not None:
        given.append(f"--batch={args.batch}")
    if args.compile is not None:
        given.append("--compile" if args.compile else "--no-compile")
    if args.full:
        given.append("--full")
    # Our own progress and table take the place of pytest's.
    given += [f"--rootdir={ROOT}", "-oaddopts=", "-pno:terminal", "-pno:cacheprovider", "-Wignore"]
    given += ["--benchmark-only", f"--benchmark-json={json_path}"]
    return int(pytest.main(given, plugins=[progress]))


def _report() -> ModuleType:
    return importlib.import_module("bench.report")


class _Progress:
    """A pytest plugin: a bar of benchmarks done, and what failed."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.measured = 0
        self.interrupted = False
        self.failures: list[tuple[str, str]] = []

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append((report.nodeid, report.longreprtext))

    def pytest_collection_finish(self, session: Any) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=len(session.items), unit="run", dynamic_ncols=True, mininterval=1.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # The first provider of a comparison measures all of them, so the name of the comparison is what is going on.
        comparison = nodeid.partition("[")[2].rstrip("]").rsplit("-", 2)[0]
        self.bar.set_description(f"{comparison:<60.60}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            # The last line says what is wrong; the rest is about the benchmark's own code.
            self.failures.append((report.nodeid, report.longreprtext.rstrip().splitlines()[-1]))
        if report.when == "call":
            self.measured += report.passed
            self.bar.update()

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        # pytest keeps Ctrl-C to itself, and calls this for its own ends too.
        self.interrupted = excinfo.type is KeyboardInterrupt

    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            self.bar.close()
