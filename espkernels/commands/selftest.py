"""Checks the installed kernels on this machine against the reference; exits with 1 where one is wrong."""

from __future__ import annotations

import argparse
import sys
import time

from espkernels import selftest

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print only what fails, and the last line")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    passed = failed = 0
    try:
        for check in selftest.run():
            passed, failed = passed + (check.reason is None), failed + (check.reason is not None)
            if check.reason is not None or not args.quiet:
                print(check, flush=True)
    except RuntimeError as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 1
    print(f"{passed} passed, {failed} failed in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0
