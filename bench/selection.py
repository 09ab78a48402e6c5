"""Which comparisons run: a default that fits five minutes on two cores, everything, or what is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.cases import CASES, DEFAULT, Case, matching
from bench.floor import MODES

__all__ = ["DTYPES", "Selection", "Variant"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One way to run a case: ``compile`` says whether torch.compile is among the providers."""

    mode: str
    dtype: str
    threads: int
    compile: bool


@dataclass(frozen=True)
class Selection:
    """What was asked for; an empty tuple leaves the choice to the selection.

    ``full`` is every shape, mode, dtype (float32, bfloat16), one thread and all of them, with torch.compile: hours.
    """

    full: bool = False
    patterns: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    batch: int = 1
    compile: bool | None = None

    def cases(self, default: tuple[Case, ...] = DEFAULT) -> tuple[Case, ...]:
        """The cases asked for, or ``default``."""
        chosen = matching(self.patterns) if self.patterns else CASES if self.full else default
        return tuple(case.with_batch(self.batch) for case in chosen)

    def variants(self, default: tuple[Variant, ...]) -> Iterator[Variant]:
        """``default``, or the product of what was asked for."""
        every = torch.get_num_threads()
        if self.full or self.modes or self.dtypes or self.threads:
            modes = self.modes or (MODES if self.full else ("forward", "full"))
            dtypes = self.dtypes or (("float32", "bfloat16") if self.full else ("float32",))
            threads = self.threads or (tuple(sorted({1, every})) if self.full else (every,))
            default = tuple(Variant(*asked, True) for asked in itertools.product(modes, dtypes, threads))
        for variant in dict.fromkeys(default):
            compiled = variant.compile if self.compile is None else self.compile
            yield Variant(variant.mode, variant.dtype, variant.threads, compiled)
