"""The Triton kernels of pyramid_pointwise against the reference: all branches in one program, and a group in each."""

from __future__ import annotations

import pytest
import torch
from arguments import cast
from closeness import assert_exact
from evaluation import answers
from samples import Sample, named
from triton_tests import DEVICE, LAYOUTS, compare_exactly, compare_within_rounding, gpu_or_interpreter, on_device

import espkernels

pytestmark = gpu_or_interpreter()

WITHOUT_HFF = Sample("groups without hff", batch=1, channels=3, height=3, width=5, hff=False)

# Groups that are branches, parts of branches and several branches.
EDGES = [
    *named("one pixel", "batch 0", "map smaller than the dilation", "stride 2 odd", "branches 3"),
    *named("one group", "five groups of odd sizes", "outputs 17 a group", "channels 20"),
    WITHOUT_HFF,
]
BRANCHES = [*named("width 17", "stride 2 odd", "branches 3", "channels 20"), WITHOUT_HFF]


@pytest.mark.parametrize("sample", EDGES, ids=str)
def test_exact_on_integers(sample: Sample) -> None:
    layout = list(LAYOUTS.values())[len(sample.name) % 2]
    compare_exactly("pyramid_pointwise", sample, torch.float32, layout)


@pytest.mark.parametrize("sample", BRANCHES, ids=str)
def test_all_branches_in_one_program(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large maps choose it; a small one is made to.
    import espkernels.triton.pyramid_pointwise as kernels

    monkeypatch.setattr(kernels, "branches_together", lambda *_: True)
    problem = answers("pyramid_pointwise", sample)
    for layout, dtype in zip(LAYOUTS.values(), (torch.float32, torch.float64), strict=True):
        arguments = cast(problem.arguments, dtype, layout, requires_grad=False)
        with espkernels.use_backend("triton"):
            output = espkernels.pyramid_pointwise(**on_device(arguments))
        assert_exact("output", output.cpu(), problem.values["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reals_err_by_rounding(dtype: torch.dtype) -> None:
    compare_within_rounding("pyramid_pointwise", named("outputs 17 a group")[0], dtype, torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [1, 16])
def test_the_concatenated_map_is_not_rounded(dtype: torch.dtype, outputs: int) -> None:
    # 1 + 2^-14 is no half number: a kernel that rounds the map between its two steps returns zero.
    channels = outputs
    x = torch.ones(1, channels, 1, 1, dtype=dtype, device=DEVICE)
    weight = torch.zeros(2, channels, 3, 3, dtype=dtype, device=DEVICE)
    weight[0, 0, 1, 1], weight[1, 0, 1, 1] = 2.0**-14, 1.0
    shift = torch.zeros(2 * channels, device=DEVICE)
    shift[0] = 1.0
    difference = torch.zeros(outputs, 2 * channels, dtype=dtype, device=DEVICE)
    difference[:, 0], difference[:, channels] = 1.0, -1.0
    with espkernels.use_backend("triton"):
        output = espkernels.pyramid_pointwise(x, weight, (1, 1), difference, 1, pyramid_shift=shift, hff=False)
    assert (output == 2.0**-14).all()
