"""Threads and processes: the same bits whatever the number of threads, several callers at once, a fork after use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from arguments import Arguments
from evaluation import Values, answers, evaluate
from samples import SAMPLES, Sample, named
from torch import Tensor

import espkernels
from espkernels import backends

OPERATORS = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise")

# Enough multiplications that a launch is split, with numbers of rows and channels that no split divides evenly.
LARGE = Sample("split", batch=3, channels=13, height=31, width=37, groups=2, outputs=26)
LARGE_STRIDED = Sample("split, stride 2", batch=5, channels=20, height=41, width=39, stride=2, outputs=44)
WIDE = Sample("split of many channels", batch=1, channels=65, height=7, width=9, outputs=260)

pytestmark = pytest.mark.usefixtures("threads", "poison")

each_operator = pytest.mark.parametrize("operator", OPERATORS)


def problem(operator: str, sample: Sample, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Arguments, Tensor]:
    numbers = answers(operator, sample, "halves" if dtype.itemsize == 2 else "reals")
    arguments = {}
    for name, value in numbers.arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().to(dtype)
            value = value.contiguous(memory_format=layout) if name in ("x", "residual") else value
            value = value.requires_grad_()
        arguments[name] = value
    return arguments, numbers.gradient.to(dtype).contiguous(memory_format=layout)


def assert_same_bits(actual: Values, expected: Values, when: str) -> None:
    for value, tensor in expected.items():
        assert torch.equal(actual[value], tensor), f"{value} {when}"


@each_operator
@pytest.mark.parametrize("sample", [LARGE, LARGE_STRIDED, WIDE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_bits_for_any_number_of_threads(isa: str, operator: str, sample: Sample, dtype: torch.dtype) -> None:
    # Torch's own sums in the gradient of an epilogue are split by threads; ours are not.
    torch_sums = ("scale", "shift", "slope", "pyramid_scale", "pyramid_shift", "pyramid_slope")
    function = getattr(espkernels, operator)
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments, grad = problem(operator, sample, dtype, layout)
        torch.set_num_threads(1)
        alone = evaluate(function, arguments, grad)
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            together = evaluate(function, arguments, grad)
            ours = {n: v for n, v in alone.items() if n not in torch_sums}
            assert_same_bits(together, ours, f"with {threads} threads")


@each_operator
def test_threads_on_every_sample(operator: str) -> None:
    for sample in SAMPLES:
        numbers = answers(operator, sample)
        arguments = {n: v.detach().float() if isinstance(v, Tensor) else v for n, v in numbers.arguments.items()}
        torch.set_num_threads(3)
        assert torch.equal(getattr(espkernels, operator)(**arguments).double(), numbers.values["output"]), sample


@each_operator
def test_the_same_bits_every_time(isa: str, operator: str) -> None:
    torch.set_num_threads(2)
    function = getattr(espkernels, operator)
    for sample in (LARGE, LARGE_STRIDED):
        arguments, grad = problem(operator, sample, torch.float32, torch.contiguous_format)
        first = evaluate(function, arguments, grad)
        for run in range(5):
            assert_same_bits(evaluate(function, arguments, grad), first, f"in run {run}")


@each_operator
def test_the_same_bits_in_every_batch(isa: str, operator: str) -> None:
    # One image's result does not depend on the images beside it.
    arguments, _ = problem(operator, LARGE, torch.float32, torch.contiguous_format)
    maps = [name for name in ("x", "residual") if name in arguments]
    together = getattr(espkernels, operator)(**arguments)
    for image in range(LARGE.batch):
        one = arguments | {name: arguments[name][image : image + 1] for name in maps}
        assert torch.equal(getattr(espkernels, operator)(**one)[0], together[image])


def test_python_threads_call_at_once() -> None:
    # Different operators and sizes, so that memory shared between callers would be of the wrong size.
    torch.set_num_threads(2)
    work = [
        (operator, *problem(operator, sample, torch.float32, layout))
        for operator in OPERATORS
        for sample in (LARGE, LARGE_STRIDED, *named("width 17", "channels 17"))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    expected = [evaluate(getattr(espkernels, name), arguments, grad) for name, arguments, grad in work]
    failures: list[str] = []
    start = threading.Barrier(4)

    def caller(turn: int) -> None:
        try:
            start.wait(timeout=30)
            for step in range(2 * len(work)):
                index = (step * (turn + 1) + turn) % len(work)
                name, arguments, grad = work[index]
                own = {n: v.detach().requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}
                values = evaluate(getattr(espkernels, name), own, grad)
                assert_same_bits({"output": values["output"]}, {"output": expected[index]["output"]}, name)
                assert_same_bits({"x": values["x"]}, {"x": expected[index]["x"]}, name)
        except BaseException as error:
            failures.append(f"caller {turn}: {error!r}")

    callers = [threading.Thread(target=caller, args=(turn,)) for turn in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in callers)
    assert not failures


def run_script(text: str) -> None:
    """In a process of its own, so that a hang ends with a time-out and not with the tests."""
    paths = os.pathsep.join([str(Path(espkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_data_loader_workers_after_use() -> None:
    # Workers are forks of a process whose threads have run our kernels (OpenBLAS#343: libgomp's hang in the child).
    run_script(
        """
        import torch, espkernels
        from torch.utils.data import DataLoader, Dataset

        torch.manual_seed(0)
        images, weight = torch.randn(8, 16, 48, 48), torch.randn(4, 16, 3, 3)
        pyramid = lambda x: espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4))

        class Pyramids(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                return pyramid(images[index : index + 1])[0]

        torch.set_num_threads(2)
        before = pyramid(images)
        loader = DataLoader(Pyramids(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
        for _ in range(2):
            assert torch.equal(torch.cat(list(loader)), before)
            assert torch.equal(pyramid(images), before)
        print("done")
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_plain_fork_after_use_on_one_thread() -> None:
    run_script(
        """
        import os, torch, espkernels

        torch.set_num_threads(1)
        torch.manual_seed(0)
        x, weight = torch.randn(2, 16, 48, 48), torch.randn(4, 16, 3, 3)
        before = espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4))
        child = os.fork()
        if child == 0:
            same = torch.equal(espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4)), before)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """
    )


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
def test_a_large_call_uses_the_threads() -> None:
    run_script(
        """
        import os, torch, espkernels

        x, weight = torch.randn(4, 64, 64, 64), torch.randn(4, 64, 3, 3)
        torch.set_num_threads(2)
        before = len(os.listdir("/proc/self/task"))
        espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4))
        assert len(os.listdir("/proc/self/task")) > before
        print("done")
        """
    )
