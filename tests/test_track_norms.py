"""The buffers of batch norms in one call, and in the loop beside it: what the definition makes of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from espkernels import backends, norms

pytestmark = pytest.mark.skipif(backends.library is None, reason="needs the compiled library")

CHANNELS = (3, 20, 1)
COUNTS = (24, 6, 1)


def _moments() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2, sum(CHANNELS), dtype=torch.float64, generator=draw) + 0.1


def _norms(dtype: torch.dtype, momenta: tuple[float | None, ...]) -> list[nn.BatchNorm2d]:
    found = [nn.BatchNorm2d(c, momentum=m).to(dtype) for c, m in zip(CHANNELS, momenta, strict=True)]
    for norm in found:
        assert norm.running_mean is not None
        norm.running_mean.copy_(torch.linspace(-2, 3, norm.num_features))
    return found


def _expected(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """In float64, from the definition: a weighted mean of the old and the batch's unbiased statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    share = 1 / (int(norm.num_batches_tracked) + 1) if norm.momentum is None else norm.momentum
    unbiased = variance * count / max(count - 1, 1)
    return (
        (1 - share) * norm.running_mean.double() + share * mean,
        (1 - share) * norm.running_var.double() + share * unbiased,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (None, 0.7, 0.0), (1.0, None, 0.5)])
@pytest.mark.parametrize("one_call", [True, False])
def test_buffers_follow_the_moments(
    dtype: torch.dtype, momenta: tuple[float | None, ...], one_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_call:
        monkeypatch.setattr(norms, "_in_one_call", lambda buffers: False)
    every, moments = _norms(dtype, momenta), _moments()
    for step in range(3):
        parts = moments.split(CHANNELS, 1)
        expected = [_expected(norm, *part, count) for norm, part, count in zip(every, parts, COUNTS, strict=True)]
        norms.track(every, moments, COUNTS)
        # Three roundings of numbers of at most 4.
        tolerance = 12 * torch.finfo(dtype).eps
        for norm, (mean, variance) in zip(every, expected, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            torch.testing.assert_close(norm.running_mean.double(), mean, rtol=0, atol=tolerance)
            torch.testing.assert_close(norm.running_var.double(), variance, rtol=0, atol=tolerance)
            assert int(norm.num_batches_tracked) == step + 1  # type: ignore[arg-type]
        moments = moments * 1.5 - 0.2


def test_only_norms_that_track_are_touched() -> None:
    every = _norms(torch.float32, (0.5, 0.5, 0.5))
    every[1].eval()
    every[2].track_running_stats = False
    before = copy.deepcopy(every)
    norms.track(every, _moments(), COUNTS)
    assert not torch.equal(every[0].running_mean, before[0].running_mean)  # type: ignore[arg-type]
    for one, other in zip(every[1:], before[1:], strict=True):
        for name, buffer in one.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name


def test_strided_buffers_are_written_where_they_lie() -> None:
    (norm,) = [nn.BatchNorm2d(3, momentum=1.0)]
    whole = torch.full((3, 2), 7.0)
    norm.running_mean = whole[:, 0]
    moments = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    norms.track([norm], moments, (10,))
    assert torch.equal(whole, torch.tensor([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["in one call", "one by one"])
def test_versions_stay_as_torchs_norm_leaves_them(dtype: torch.dtype) -> None:
    # A graph of torch's norm keeps the buffers, in training too, where it never reads them.
    (norm,) = [nn.BatchNorm2d(3).to(dtype)]
    result = norm(torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    versions, before = (norm.running_mean._version, norm.running_var._version), norm.running_mean.clone()
    norms.track([norm], torch.ones(2, 3, dtype=torch.float64), (10,))
    assert (norm.running_mean._version, norm.running_var._version) == versions
    assert not torch.equal(norm.running_mean, before)
    result.sum().backward()


def _arguments() -> tuple[object, ...]:
    every = _norms(torch.float32, (0.1, 0.1, 0.1))
    return (
        [norm.running_mean for norm in every],
        [norm.running_var for norm in every],
        [norm.num_batches_tracked for norm in every],
        _moments(),
        [0.1, math.nan, 1.0],
        list(COUNTS),
    )


def test_operator_holds_what_its_schema_says() -> None:
    torch.library.opcheck(torch.ops.espkernels.track_norms.default, _arguments())


@pytest.mark.parametrize(
    ("place", "wrong", "named"),
    [
        (0, [torch.zeros(3), torch.zeros(19), torch.zeros(1)], "means, variances"),
        (1, [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(20), torch.zeros(1)], "means, variances"),
        (2, [torch.tensor(0.0)] * 3, "batches"),
        (3, torch.zeros(2, 23, dtype=torch.float64), "moments"),
        (3, torch.zeros(2, 24), "moments"),
        (4, [0.1], "shares"),
        (5, [1, 2], "counts"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(place: int, wrong: object, named: str) -> None:
    arguments = list(_arguments())
    arguments[place] = wrong
    before = [copy.deepcopy(argument) for argument in arguments[:3]]
    with pytest.raises(RuntimeError, match=named):
        torch.ops.espkernels.track_norms.default(*arguments)
    for one, other in zip(arguments[:3], before, strict=True):
        assert all(map(torch.equal, one, other))  # type: ignore[call-overload]
