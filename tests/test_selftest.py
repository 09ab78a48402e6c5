"""The self-test passes a right library, and fails a wrong one, a missing one and one that never ran."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from espkernels import backends, ops, problem, reference, selftest
from espkernels.__main__ import main

LAYOUTS = (torch.contiguous_format, torch.channels_last)

compiled = pytest.mark.skipif(backends.library is None, reason=str(backends.why_not("cpu")))


@compiled
def test_every_check_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert backends.library is not None
    before = backends.library.isa()
    assert main(["selftest"]) == 0
    assert backends.library.isa() == before
    *lines, last = capsys.readouterr().out.splitlines()
    sets = backends.library.available_isas()
    assert len(lines) == len(sets) * len(problem.OPERATORS) * len(selftest.DTYPES)
    assert all(line.startswith("pass") for line in lines)
    for name in (*sets, *problem.OPERATORS):
        assert any(name in line for line in lines)
    assert last.startswith(f"{len(lines)} passed, 0 failed")


def _one_value_off(*args: object, **options: object) -> Tensor:
    output = torch.ops.espkernels.spatial_pyramid(*args, **options)
    return output + torch.nn.functional.one_hot(torch.tensor(3), output.shape[-1]).to(output)


def _input_gradient_doubled(x: Tensor, *args: object, **options: object) -> Tensor:
    return torch.ops.espkernels.spatial_pyramid(2 * x - x.detach(), *args, **options)


def _raises(*args: object, **options: object) -> Tensor:
    raise RuntimeError("illegal instruction")


@compiled
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_one_value_off, "output"),
        (_input_gradient_doubled, "gradient of x"),
        (_raises, "illegal instruction"),
        (reference.spatial_pyramid, "did not run"),
    ],
)
def test_wrong_operator_fails(
    function: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "spatial_pyramid", function)
    monkeypatch.setattr(problem, "OPERATORS", ("spatial_pyramid",))
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))
    assert main(["selftest", "--quiet"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("FAIL") and reason in line for line in lines)
    assert last.startswith(f"0 passed, {len(lines)} failed")


def test_missing_library_fails_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "library", None)
    monkeypatch.setattr(backends, "why_not", lambda name: "it was never built")
    assert main(["selftest"]) == 1
    assert "it was never built" in capsys.readouterr().err


@pytest.mark.parametrize("operator", problem.OPERATORS)
def test_problems_are_worth_checking(operator: str) -> None:
    for one in selftest.problems(operator):
        for name, values in (one.expected | one.expected_gradients).items():
            assert (values != 0).double().mean() > 0.25, name
            # What float32 must hold to the last bit; and halves of whole numbers, so not all alike.
            assert torch.equal(values, values.float().double()), name


@pytest.mark.parametrize("dtype", selftest.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("operator", problem.OPERATORS)
def test_plain_torch_passes_the_check(operator: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    # torch 2.13 (oneDNN with AVX512_BF16) gives wrong weight gradients of dilated depthwise convolutions here.
    gradients = not (dtype == torch.bfloat16 and layout == torch.channels_last)
    for one in selftest.problems(operator):
        assert one.difference(getattr(reference, operator), dtype, layout, gradients) is None


@pytest.mark.parametrize("operator", problem.OPERATORS)
def test_wrong_shapes_dtypes_and_nan_are_differences(operator: str) -> None:
    one = selftest.problems(operator)[0]
    right = getattr(reference, operator)

    def difference(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> str:
        return str(one.difference(function, dtype, LAYOUTS[0], gradients=False))

    assert "shape" in difference(lambda **a: right(**a)[:, 1:])
    assert "dtype" in difference(lambda **a: right(**a).double())
    assert "values" in difference(lambda **a: right(**a) * float("nan"))
    assert difference(lambda **a: right(**a) * float("nan"), torch.bfloat16) != "None"
    assert difference(lambda **a: right(**a) * 1.25, torch.bfloat16) != "None"
