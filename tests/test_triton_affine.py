"""The Triton kernel of affine against the reference."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_exact
from triton_tests import DEVICE, LAYOUTS, gpu_or_interpreter

import espkernels
from espkernels import inference, reference

pytestmark = gpu_or_interpreter()

STEPS = {
    "nothing": (), "scale": ("scale",), "residual": ("residual",), "slope": ("slope",),
    "all": ("scale", "shift", "residual", "slope"),
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 19, 5, 7), (0, 4, 2, 2)], ids=str)
def test_exact_on_integers(steps: tuple[str, ...], shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)

    def whole(*size: int) -> torch.Tensor:
        return torch.randint(-4, 5, size, generator=draw).double()

    x, given = whole(*shape), {name: whole(shape[1]) for name in ("scale", "shift")}
    given |= {"residual": whole(*shape), "slope": whole(shape[1]) / 4}
    given = {name: value for name, value in given.items() if name in steps}
    expected = reference.epilogue(x, **given)
    for number, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        layout = list(LAYOUTS.values())[number % 2]
        vector = torch.float64 if dtype == torch.float64 else torch.float32
        there = {n: v.to(DEVICE, dtype if v.dim() == 4 else vector) for n, v in given.items()}
        with espkernels.use_backend("triton"):
            output = inference.affine(x.to(DEVICE, dtype).contiguous(memory_format=layout), **there)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_exact(str(dtype), output.cpu(), expected)


def test_vectors_that_are_columns_of_a_matrix() -> None:
    draw = torch.Generator().manual_seed(1)
    x, columns = torch.randn(2, 7, 3, 4, generator=draw), torch.randn(7, 3, generator=draw)
    with espkernels.use_backend("triton"):
        output = inference.affine(x.to(DEVICE), *columns.to(DEVICE).unbind(1)[:2], slope=columns.to(DEVICE)[:, 2])
    expected = reference.epilogue(x, *columns.unbind(1)[:2], slope=columns[:, 2])
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-6, atol=1e-6)
