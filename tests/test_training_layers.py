"""What runs around the units in training: a batch norm with its PReLU, and the end of a down-sampler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_tests import DTYPES
from torch import Tensor, nn

from espkernels import backends
from espkernels.inference import average_pool
from espkernels.norms import folded
from espkernels.training_layers import batch_norm_prelu, long_range_shortcut

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("poison", "same_each_time"),
]

# Channels below, at and above a vector, and more pixels than a chunk and a run have.
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 4), (2, 32, 9, 7), (1, 37, 30, 31), (4, 65, 3, 3)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(result: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    grad = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape).cos()
    return list(torch.autograd.grad(result, [t for t in inputs if t is not None], grad, retain_graph=True))


def assert_near(actual: list[Tensor], expected: list[Tensor], eps: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        # Relative to the largest number, as sums cancel. Roundings of a thousand terms grow by their root, 32, and
        # each term has about six of its own.
        bound = 200 * eps * max(other.abs().max().item(), 1)
        assert (one.double() - other.double()).abs().max().item() <= bound


# --- a batch norm with its PReLU --------------------------------------------------------------------------------------


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    x = (3 + 2 * torch.randn(shape)).to(dtype)
    return [x, *(torch.randn(shape[1], dtype=vector) for _ in range(3))]


def norm_in_torch(inputs: list[Any], running: tuple[Tensor, Tensor] | None) -> Tensor:
    x, weight, bias, slope = (t.double() for t in inputs)
    mean, variance = (None, None) if running is None else running
    return F.prelu(F.batch_norm(x, mean, variance, weight, bias, running is None, 0.0, 1e-3), slope)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
def test_norm_and_prelu(isa: str, shape: tuple[int, ...], batch: bool) -> None:
    for dtype in DTYPES.values():
        given = norm_inputs(shape, dtype)
        running = None if batch else (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 0.5)
        wide = leaves(*(t.double() for t in given))
        expected = norm_in_torch(wide, running)
        for layout in LAYOUTS:
            narrow = leaves(given[0].contiguous(memory_format=layout), *given[1:])
            result, statistics = batch_norm_prelu(*narrow, *(running or (None, None)), 1e-3, batch)
            assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
            eps = torch.finfo(dtype).eps
            assert_near([result.detach()], [expected.detach()], eps)
            mean, variance = statistics
            if batch:
                assert torch.allclose(mean, given[0].double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
                assert torch.allclose(variance, given[0].double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)
            # A sign at the PReLU that rounding turns changes a gradient by more than rounding: not in float64.
            if dtype == torch.float64:
                assert_near(gradients(result, narrow), gradients(expected, wide), eps)
            elif dtype == torch.float32:
                for one, other in zip(gradients(result, narrow), gradients(expected, wide), strict=True):
                    assert (one - other).norm() <= 1e-3 * other.norm() + 1e-4


def test_norm_gradcheck() -> None:
    x, weight, bias, slope = norm_inputs((2, 3, 3, 2), torch.float64)
    running = (torch.randn(3).double(), torch.rand(3).double() + 0.5)
    for batch in (True, False):
        inputs = [t.requires_grad_() for t in (x, weight, bias, slope)]
        assert torch.autograd.gradcheck(
            lambda *t, batch=batch: batch_norm_prelu(*t, *running, 1e-3, batch)[0], inputs, nondet_tol=0.0
        )


def test_norm_with_a_mean_far_from_zero() -> None:
    """Mean 1e4 and variance 1: the sums go around a number of the sample."""
    x = (1e4 + torch.randn(4, 16, 20, 20)).contiguous(memory_format=torch.channels_last)
    ones = torch.ones(16)
    _, statistics = batch_norm_prelu(x, ones, ones, ones, None, None, 1e-5, True)
    # The numbers themselves are rounded to 1e-3 of the deviation.
    assert torch.allclose(statistics[1], x.double().var((0, 2, 3), unbiased=False), rtol=1e-5)


def test_an_infinity_is_none_of_the_slopes(isa: str) -> None:
    inputs = norm_inputs((2, 3, 4, 5), torch.float64)
    inputs[0][0, 1, 2, 3], inputs[1][1] = torch.inf, 2.0
    running = (torch.randn(3).double(), torch.rand(3).double() + 0.5)
    ours, plain = leaves(*inputs), leaves(*inputs)
    result = batch_norm_prelu(*ours, *running, 1e-3, False)[0]
    torch.testing.assert_close(gradients(result, ours)[3], gradients(norm_in_torch(plain, running), plain)[3])


# --- the end of a down-sampler ----------------------------------------------------------------------------------------


def end_inputs(shape: tuple[int, ...], image_channels: int, dtype: torch.dtype) -> list[Tensor | None]:
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    batch, pooled, height, width = shape
    expanded = pooled + 5
    maps = [torch.randn(batch, channels, height, width).to(dtype) for channels in (pooled, expanded, image_channels)]
    vectors = [torch.randn(pooled + expanded, image_channels), torch.randn(pooled + expanded)]
    slope = torch.randn(pooled + expanded, dtype=vector)
    if image_channels == 0:
        return [*maps[:2], None, None, None, slope]
    return [*maps, *(v.to(vector) for v in vectors), slope]


def end_in_torch(inputs: list[Any]) -> Tensor:
    pooled, expanded, image, weight, shift, slope = (None if t is None else t.double() for t in inputs)
    joined = torch.cat([pooled, expanded], 1)
    if image is not None:
        joined = joined + F.conv2d(image, weight[:, :, None, None], shift)
    return F.prelu(joined, slope)


def test_an_infinity_at_the_end_is_none_of_the_slopes(isa: str) -> None:
    given = end_inputs((2, 3, 4, 5), 3, torch.float64)
    given[0][0, 1, 2, 3] = torch.inf  # type: ignore[index]
    ours, plain = leaves(*given), leaves(*given)
    actual, expected = gradients(long_range_shortcut(*ours), ours), gradients(end_in_torch(plain), plain)
    torch.testing.assert_close(actual[5], expected[5])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("image_channels", [0, 1, 3, 8])
def test_end_of_a_down_sampler(isa: str, shape: tuple[int, ...], image_channels: int) -> None:
    for dtype in DTYPES.values():
        given = end_inputs(shape, image_channels, dtype)
        wide = leaves(*(None if t is None else t.double() for t in given))
        expected = end_in_torch(wide)
        for layout in LAYOUTS:
            narrow = leaves(
                *(t.contiguous(memory_format=layout) if t is not None and t.dim() == 4 else t for t in given)
            )
            result = long_range_shortcut(*narrow)  # type: ignore[arg-type]
            assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
            eps = torch.finfo(dtype).eps
            assert_near([result.detach()], [expected.detach()], eps)
            if dtype == torch.float64:
                assert_near(gradients(result, narrow), gradients(expected, wide), eps)
            elif dtype == torch.float32:
                for one, other in zip(gradients(result, narrow), gradients(expected, wide), strict=True):
                    assert (one - other).norm() <= 1e-3 * other.norm() + 1e-4


def test_end_gradcheck() -> None:
    for image_channels in (0, 2):
        inputs = leaves(*end_inputs((2, 3, 2, 3), image_channels, torch.float64))
        assert torch.autograd.gradcheck(long_range_shortcut, inputs, nondet_tol=0.0)


def test_gradients_that_nobody_needs() -> None:
    given = [t.double() if t is not None else None for t in end_inputs((2, 9, 4, 5), 3, torch.float64)]
    expected = dict(enumerate(gradients(end_in_torch(full := leaves(*given)), full)))
    for alone in range(6):
        inputs = [t.clone().requires_grad_(i == alone) for i, t in enumerate(given) if t is not None]
        long_range_shortcut(*inputs).backward(  # type: ignore[arg-type]
            torch.linspace(-1, 1, 2 * 23 * 20, dtype=torch.float64).view(2, 23, 4, 5).cos()
        )
        for i, t in enumerate(inputs):
            assert (t.grad is None) == (i != alone)
        found = inputs[alone].grad
        assert found is not None and torch.allclose(found, expected[alone], rtol=1e-10, atol=1e-10)


# --- both -------------------------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads() -> None:
    def bits() -> list[Tensor]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            generator_state = torch.get_rng_state()
            norm = leaves(*norm_inputs((4, 40, 33, 31), dtype))
            end = leaves(*end_inputs((4, 40, 33, 31), 3, dtype))
            torch.set_rng_state(generator_state)
            for result, inputs in (
                (batch_norm_prelu(*norm, None, None, 1e-5, True)[0], norm),  # type: ignore[arg-type]
                (long_range_shortcut(*end), end),  # type: ignore[arg-type]
            ):
                found += [result.detach(), *gradients(result, inputs)]
        return found

    torch.manual_seed(0)
    expected = bits()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        assert all(map(torch.equal, bits(), expected))


def test_operators_are_what_they_say_to_torch() -> None:
    for shape in ((2, 5, 3, 4), (1, 16, 6, 6)):
        norm = leaves(*norm_inputs(shape, torch.float32))
        torch.library.opcheck(torch.ops.espkernels.batch_norm_prelu.default, (*norm, None, None, 1e-3, True))
        for image_channels in (0, 3):
            end = leaves(*end_inputs(shape, image_channels, torch.float32))
            torch.library.opcheck(torch.ops.espkernels.long_range_shortcut.default, tuple(end))


def test_second_derivative_says_what_has_none() -> None:
    x, *vectors = leaves(*norm_inputs((2, 3, 3, 2), torch.float64))
    result = batch_norm_prelu(x, *vectors, None, None, 1e-3, True)[0]  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(result.square().sum(), [x], create_graph=True)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="batch_norm_prelu has no second derivative"):
        grad.sum().backward()
    end = leaves(*end_inputs((2, 3, 2, 3), 2, torch.float64))
    (grad,) = torch.autograd.grad(long_range_shortcut(*end).square().sum(), [end[0]], create_graph=True)  # type: ignore
    with pytest.raises(RuntimeError, match="long_range_shortcut has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("change", range(7))
def test_wrong_arguments_are_refused(change: int) -> None:
    pooled, expanded, image, weight, shift, slope = end_inputs((2, 3, 4, 5), 3, torch.float32)
    assert expanded is not None and image is not None and weight is not None
    given: list[Any] = [
        [pooled, expanded[:, :, :3], image, weight, shift, slope],
        [pooled, expanded.double(), image, weight, shift, slope],
        [pooled, expanded, image[:, :2], weight, shift, slope],
        [pooled, expanded, image, weight[:5], shift, slope],
        [pooled, expanded, None, weight, shift, slope],
        [pooled, expanded, image, weight, shift, slope.double()],
        [pooled[:0], expanded[:0], image[:0], weight, shift, slope],  # type: ignore[index]
    ][change]
    with pytest.raises(RuntimeError, match="expected"):
        long_range_shortcut(*given)


# --- the folded norm of the shortcut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["train", "eval", "cumulative", "not affine"])
def test_folded_norm(way: str) -> None:
    norm = nn.BatchNorm2d(11, momentum=None if way == "cumulative" else 0.1, affine=way != "not affine").double()
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    norm.train(way != "eval")
    other = copy.deepcopy(norm)
    for _ in range(3):
        x, weight = leaves(2 + torch.randn(3, 3, 5, 4, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64))
        assert x is not None and weight is not None
        expected = other(F.conv2d(x, weight[:, :, None, None]))
        image, matrix, shift = folded(weight, norm, x)
        actual = F.conv2d(image, matrix[:, :, None, None], shift)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        parameters = [x, weight, *norm.parameters()]
        for one, another in zip(
            gradients(actual, parameters), gradients(expected, [x, weight, *other.parameters()]), strict=True
        ):
            torch.testing.assert_close(one, another, rtol=1e-9, atol=1e-9)
        for one, another in zip(norm.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(one, another, rtol=1e-12, atol=1e-12)


# --- the gradient of average pooling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 33, 8, 9), (1, 1, 1, 1), (2, 16, 1, 7), (1, 5, 2, 2)], ids=str)
def test_average_pooling_and_its_gradient(isa: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    for dtype in DTYPES.values():
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
        wide = x.detach().double().requires_grad_()
        result, expected = average_pool(x), F.avg_pool2d(wide, 3, 2, 1)
        assert_near([result.detach()], [expected.detach()], torch.finfo(dtype).eps)
        assert_near(gradients(result, [x]), gradients(expected, [wide]), torch.finfo(dtype).eps)


def test_average_pooling_twice_differentiable() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(average_pool, (x,), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(average_pool, (x,), nondet_tol=0.0)
    torch.library.opcheck(torch.ops.espkernels.average_pool.default, (x,))
