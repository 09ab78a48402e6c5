"""What the tests of the Triton kernels share: where they run, and the comparison with the reference.

Two places: Triton's interpreter, on tensors on the CPU, for which tests/test_triton.py starts a pytest of its own (the
variable TRITON_INTERPRET counts when triton is imported, and would reach every other test); and a GPU, by
``pytest -m gpu``. Elsewhere they skip. The interpreter runs a kernel program by program in NumPy: the samples are few.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arguments import Arguments, cast
from closeness import assert_exact, assert_within_rounding, terms
from evaluation import Values, answers, evaluate
from samples import Sample
from torch import Tensor

import espkernels
from espkernels import backends

__all__ = ["DEVICE", "LAYOUTS", "compare_exactly", "compare_within_rounding", "gpu_or_interpreter", "on_device"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DEVICE = "cpu" if backends.interprets() else "cuda"


def _skip_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not backends.interprets() and not torch.cuda.is_available():
        return "needs a GPU; tests/test_triton.py runs these in Triton's interpreter"
    return None


def gpu_or_interpreter() -> list[pytest.MarkDecorator]:
    """The marks of a file of tests that run in one of the two places."""
    reason = _skip_reason()
    marks = [pytest.mark.skipif(reason is not None, reason=reason or "")]
    return marks if backends.interprets() else [*marks, pytest.mark.gpu]


def on_device(arguments: Arguments) -> Arguments:
    """The same arguments on the device under test; gradients flow back to those given."""
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _run(operator: str, arguments: Arguments, grad: Tensor | None) -> Values:
    function: Callable[..., Tensor] = getattr(espkernels, operator)

    def there(**given: Any) -> Tensor:
        return function(**on_device(given)).cpu()

    with espkernels.use_backend("triton"):
        return evaluate(there, arguments, grad)


def compare_exactly(operator: str, sample: Sample, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Whole numbers give the float64 reference bit for bit, forward and in every gradient."""
    problem = answers(operator, sample)
    arguments = cast(problem.arguments, dtype, layout)
    grad = problem.gradient.to(dtype).contiguous(memory_format=layout)
    values = _run(operator, arguments, grad)
    assert set(values) == set(problem.values)
    for name, actual in values.items():
        assert_exact(f"{name} in {dtype}", actual, problem.values[name])
    output, x = values["output"], arguments["x"]
    if not (x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)):
        assert output.is_contiguous(memory_format=layout)


def compare_within_rounding(operator: str, sample: Sample, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Real numbers err by no more than rounding, forward and in every gradient.

    The interpreter cuts bfloat16 where a GPU rounds it to the nearest: twice the error, as if it was stored once more
    for every time that it is.
    """
    problem = answers(operator, sample, "halves" if dtype.itemsize == 2 else "reals")
    arguments = cast(problem.arguments, dtype, layout)
    grad = problem.gradient.to(dtype).contiguous(memory_format=layout)
    steps = {"spatial_pyramid": 1, "group_pointwise": 4, "pyramid_pointwise": 8}[operator]
    cut = 2 if backends.interprets() and dtype == torch.bfloat16 else 1
    for name, actual in _run(operator, arguments, grad).items():
        stores = 1 if name == "output" else steps
        assert_within_rounding(
            f"{name} in {dtype}", actual, problem.values[name], problem.magnitudes[name],
            terms(operator, arguments, name, problem.gradient), cut * stores,
        )  # fmt: skip
