"""Prints what a bug report should say: versions, build, instruction sets, backends and why not, threads."""

from __future__ import annotations

import argparse
import json

from espkernels.info import collect

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info.as_dict(), indent=2) if args.json else info)
    return 0
