"""Products of bfloat16 pairs, where the machine has them: alone, between pages nobody may touch, and in operators."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator

import pytest
import torch
from arguments import cast
from closeness import assert_exact, assert_within_rounding, terms
from conftest import AVX512
from evaluation import answers, evaluate
from operator_tests import LAYOUTS, each_sample
from samples import SAMPLES, Sample
from test_group_pointwise import TestGroupPointwise as GroupPointwise
from test_pyramid_pointwise import TestPyramidPointwise as PyramidPointwise
from torch_free_programme import build_bfloat16_product, compiler, setup_table

import espkernels
from espkernels import backends

SETS = ("avx512_bf16", "amx")


@pytest.mark.parametrize("name", SETS)
def test_alone(name: str) -> None:
    flags = setup_table()["BFLOAT16_SETS"].get(platform.machine(), {}).get(name)
    if flags is None:
        pytest.skip(f"{name} is no instruction set of {platform.machine()}")
    if backends.library is None or name not in backends.library.available_isas():
        pytest.skip(f"this machine, or its compiler, has no {name}")
    programme = build_bfloat16_product(compiler(os.environ.get("CXX") or "g++"), name, flags)
    result = subprocess.run([str(programme)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.split() == [str(2 * (2 * 13 * 10 * 11 * 4 + 11)), "checks,", "0", "failures"]


# What the fixture `isa` leaves out.
@pytest.fixture(params=AVX512)
def other_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if backends.library is None or request.param not in backends.library.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    before = backends.library.isa()
    backends.library.set_isa(request.param)
    yield request.param
    backends.library.set_isa(before)


@each_sample
@pytest.mark.parametrize("tests", [GroupPointwise, PyramidPointwise])
def test_operators(other_isa: str, tests: type[GroupPointwise | PyramidPointwise], sample: Sample) -> None:
    problem, whole_numbers = answers(tests.name, sample, "halves"), answers(tests.name, sample)
    for layout in LAYOUTS.values():
        arguments = cast(problem.arguments, torch.bfloat16, layout)
        grad = problem.gradient.to(torch.bfloat16).contiguous(memory_format=layout)
        for value, actual in evaluate(getattr(espkernels, tests.name), arguments, grad).items():
            assert_within_rounding(
                value,
                actual,
                problem.values[value],
                problem.magnitudes[value],
                terms(tests.name, arguments, value, problem.gradient),
                tests().stores(value, torch.bfloat16),
            )
        if tests().is_exact("output", torch.bfloat16):
            arguments = cast(whole_numbers.arguments, torch.bfloat16, layout, requires_grad=False)
            assert_exact("output", getattr(espkernels, tests.name)(**arguments), whole_numbers.values["output"])


def test_an_infinity_stays_in_its_group(other_isa: str) -> None:
    for channels, outputs, groups in ((12, 12, 6), (32, 8, 4), (64, 64, 2), (24, 40, 2)):
        x = torch.ones(1, channels, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        x[0, channels // groups - 1, 2, 3] = torch.inf
        output = espkernels.group_pointwise(x, torch.ones(outputs, channels // groups, dtype=torch.bfloat16), groups)
        reached = ~output.isfinite()
        assert reached[0, : outputs // groups, 2, 3].all()
        assert int(reached.sum()) == outputs // groups


def test_samples_reach_the_pairs() -> None:
    # Odd depths are multiplied in float32: there are to be enough of the others.
    even = [sample for sample in SAMPLES if sample.concatenated // sample.groups % 2 == 0]
    assert len(even) > 5
