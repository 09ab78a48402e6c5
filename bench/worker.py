"""One engine in a process of its own, which the kernel stops whenever it is not that engine's turn.

Engines keep threads that spin for a while after a call, because that makes the next call start sooner. In one process
the spinning threads of one engine would take the cores from the next; told not to spin, the engine would be slower
than its users know it. A stopped process (SIGSTOP) does neither: each engine runs with its own defaults, alone on the
machine, and the samples of all still follow one another within milliseconds. It also keeps one engine's crash, memory
and OpenMP runtime out of the others. The price is that its caches are cold when it goes on, so a call that is short
enough to feel it runs once before it is timed.

The parent and ``python -m bench.worker`` talk over a pipe: a model to open, then numbers of calls to time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.engines import OURS, Engine, Job, Opened
from bench.interleave import Run
from bench.memory import held, peak

__all__ = ["Lost", "Refused", "Worker"]

ROOT = Path(__file__).resolve().parent.parent
# Refilling 32 MiB of cache takes a few milliseconds: a call this long no longer feels it.
FEELS_COLD = 0.1
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """An engine cannot open or run a model; the message says why."""


class Lost(Refused):
    """The model of ``worker`` is gone: the process crashed, gave no answer, or raised while it was timed."""

    def __init__(self, worker: Worker, message: str) -> None:
        super().__init__(message)
        self.worker = worker


class Worker:
    """The process of one engine of a ``room`` (:mod:`bench.race`), seen from here; stopped but while it answers."""

    def __init__(
        self, engine: str, log: Path, room: str = "bench.engines", environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.connection, theirs = Pipe()
        number = str(theirs.fileno())
        # Converters do not know this library's operators, and peers may not use them: a plain model is all torch.
        backend = {} if engine.startswith(OURS) else {"ESPKERNELS_BACKEND": "reference"}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", room, engine, number, str(os.getpid())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **backend, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        theirs.close()

    def open(self, files: Path, threads: int, way: str, seconds: float) -> list[Tensor]:
        """Opens the model in the folder ``files`` and runs it once: its results, or :class:`Refused`."""
        return [torch.from_numpy(result) for result in self._ask(("open", files, threads, way), seconds)]

    def memory(self, files: Path, threads: int, way: str, seconds: float) -> dict[str, int | None]:
        """Bytes ``held`` after a first call, of the ``peak`` of another, and ``kept`` for the backward pass.

        The process must be a new one, which has run nothing before.
        """
        found: dict[str, int | None] = self._ask(("memory", files, threads, way), seconds)
        return found

    def time(self, calls: int) -> float:
        """Seconds that ``calls`` calls take."""
        seconds: float = self._ask(("time", calls), 600)
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _ask(self, request: tuple[object, ...], seconds: float) -> Any:
        try:
            self.process.send_signal(signal.SIGCONT)
            self.connection.send(request)
            if not self.connection.poll(seconds):
                raise Lost(self, f"no answer within {seconds:g} s")
            done, answer = self.connection.recv()
        except (EOFError, OSError):
            raise Lost(self, f"its process died with status {self.process.wait()}: {self._last_words()}") from None
        self.process.send_signal(signal.SIGSTOP)
        # The next engine starts only when every thread of this one has stopped.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if not done:
            # Its process lives, but what it had opened is gone.
            raise Lost(self, str(answer)) if request[0] == "time" else Refused(str(answer))
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "no message"


def main(room: str, engine: str, number: str, parent: str) -> None:
    """Answers requests until the parent goes away."""
    # A stopped process would outlive a parent that was killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(number))
    opened: Opened | None = None
    run: Run | None = None
    engines: dict[str, Engine] = importlib.import_module(room).ENGINES
    longest = 0.0
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if request == "open":
                opened = run = None
                gc.enable()
                gc.collect()
                opened = engines[engine].open(_job(*arguments))
                opened.call()
                run, longest = Run(opened.call), 0.0
                answer: object = [result.numpy() for result in opened.results()]
                gc.collect()
                gc.disable()
            elif request == "memory":
                opened = engines[engine].open(_job(*arguments))
                # In this order: what comes later finds memory that earlier calls have left to the allocator.
                answer = {"held": held(opened.call), "peak": peak(opened.call)}
                answer["kept"] = None if opened.kept is None else opened.kept()
            else:
                assert run is not None
                if longest < FEELS_COLD:
                    longest = max(longest, run.time(1))
                answer = run.time(arguments[0])
        except Exception as error:
            opened = run = None
            connection.send((False, f"{type(error).__name__}: {str(error).strip()[:500]}"))
        else:
            connection.send((True, answer))


def _job(files: Path, threads: int, way: str) -> Job:
    model = torch.load(files / "model.pt", weights_only=False)  # the parent wrote it
    gradient = files / "gradient.pt"
    given = torch.load(gradient) if gradient.exists() else None
    dtype = torch.load(files / "dtype.pt")["dtype"]
    return Job(model, torch.load(files / "input.pt"), threads, way, files, given, dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
