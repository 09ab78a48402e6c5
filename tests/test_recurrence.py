"""A recurrent layer's steps against numpy, torch's own LSTM and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espkernels import backends, reference, use_backend
from espkernels.recurrence import recurrence

# T, B, H: nothing, one of each, less than a vector, whole vectors, more rows than are kept in the cache at once.
SIZES = [(0, 2, 4), (3, 0, 4), (1, 1, 1), (4, 3, 5), (5, 2, 16), (3, 7, 33), (2, 101, 48)]
# Storing rounds each output, cell and gate once, and a step takes some of each. Float32 and float64 have the errors of
# their functions too, a few units of the last place a step.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

requires_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


def arguments(steps: int, batch: int, size: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(steps + 10 * batch + 100 * size)
    shapes = [(steps, batch, 4 * size), (4 * size, size), (4 * size,), (batch, size), (batch, size)]
    gates, weight, shift, hidden, cell = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = weight / size**0.5
    return [gates.to(dtype), weight.to(dtype), shift.to(compute) if bias else None, hidden.to(dtype), cell.to(dtype)]


def by_numpy(gates: Any, weight: Any, bias: Any, hidden: Any, cell: Any) -> tuple[Any, Any]:
    gates, weight, hidden, cell = (t.double().numpy() for t in (gates, weight, hidden, cell))
    outputs = np.zeros((*gates.shape[:2], hidden.shape[1]))
    for t, step in enumerate(gates):
        sums = step + hidden @ weight.T + (0 if bias is None else bias.double().numpy())
        entry, forget, candidate, exit_ = np.split(sums, 4, axis=1)
        cell = cell / (1 + np.exp(-forget)) + np.tanh(candidate) / (1 + np.exp(-entry))
        hidden = outputs[t] = np.tanh(cell) / (1 + np.exp(-exit_))
    return outputs, cell


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_against_numpy(isa: str, poison: None, sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    given = arguments(*sizes, dtype, bias)
    expected, last = by_numpy(*given)
    out, cell = recurrence(*given)
    assert out.dtype == cell.dtype == dtype
    assert out.shape == expected.shape and cell.shape == last.shape
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(cell.double().numpy(), last, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_and_tanh_to_a_few_units_of_the_last_place(isa: str, dtype: torch.dtype) -> None:
    tiny = torch.logspace(-30, 2, 4000, dtype=torch.float64)
    x = torch.cat([-tiny, torch.linspace(-30, 30, 20001, dtype=torch.float64), tiny]).to(dtype).double()
    open_, shut = torch.full_like(x, 200), torch.full_like(x, -200)
    for gates, expected in (
        ([open_, shut, x, open_], torch.tanh(x)),  # the cell is the candidate
        ([x, shut, open_, open_], torch.sigmoid(x)),  # the cell is the input gate
    ):
        stacked = torch.stack(gates, dim=1)[None].to(dtype)
        zeros = torch.zeros(len(x), 1, dtype=dtype)
        _, cell = recurrence(stacked, torch.zeros(4, 1, dtype=dtype), None, zeros, zeros)
        error = (cell[:, 0].double() - expected).abs()
        # float64's expected values have errors of their own. Below e^-87 a sigmoid is as good as 0 in float32.
        assert (error <= 6 * torch.finfo(dtype).eps * expected.abs() + 1e-38).all()


def test_what_is_no_number_stays_where_it_is(isa: str) -> None:
    gates, weight, bias, hidden, cell = arguments(3, 4, 5, torch.float32)
    gates[1, 2, 0] = torch.nan
    out, last = recurrence(gates, weight, bias, hidden, cell)
    assert not out[0].isnan().any() and out[2, 2].isnan().all()
    rows = [0, 1, 3]
    assert not out[:, rows].isnan().any() and not last[rows].isnan().any()
    gates = torch.tensor([torch.inf, -torch.inf, torch.inf, torch.inf]).view(1, 1, 4)
    zeros = torch.zeros(1, 1)
    out, last = recurrence(gates, torch.zeros(4, 1), None, zeros, zeros)
    assert last.item() == 1 and out.item() == pytest.approx(np.tanh(1.0), rel=1e-6)


def torch_lstm(gates: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The same through torch's LSTM, whose input weights are the identity."""
    size = weight.shape[1]
    lstm = nn.LSTM(4 * size, size).to(gates.dtype)
    parameters = {
        "weight_ih_l0": torch.eye(4 * size, dtype=gates.dtype), "weight_hh_l0": weight,
        "bias_ih_l0": bias, "bias_hh_l0": torch.zeros_like(bias),
    }  # fmt: skip
    out, (_, last) = torch.func.functional_call(lstm, parameters, (gates, (hidden[None], cell[None])))
    return out, last[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 3, 5), (5, 2, 16), (4, 50, 33)])
def test_gradients_beside_torch_lstm(isa: str, poison: None, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    gradients = []
    draw = torch.Generator().manual_seed(1)
    steps, batch, size = sizes
    of_out = torch.randn((steps, batch, size), generator=draw, dtype=torch.float64)
    of_last = torch.randn((batch, size), generator=draw, dtype=torch.float64)
    for function, kind in ((recurrence, dtype), (torch_lstm, torch.float64)):
        given = [tensor.detach().to(kind).requires_grad_() for tensor in arguments(*sizes)]
        out, last = function(*given)
        loss = (out * of_out.to(kind)).sum() + (last * of_last.to(kind)).sum()
        gradients.append([gradient.double() for gradient in torch.autograd.grad(loss, given)])
    # Sums over steps and rows of products of numbers near one.
    tolerance = (1e-13 if dtype == torch.float64 else 1e-5) * (1 + (steps * batch) ** 0.5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(0, 2, 4), (3, 0, 4)])
def test_gradients_of_nothing(isa: str, sizes: tuple[int, int, int]) -> None:
    """Without a step or a row the last cell is the first one, and the weights' gradients are sums of nothing."""
    given = [tensor.requires_grad_() for tensor in arguments(*sizes)]
    out, last = recurrence(*given)
    gates, weight, bias, hidden, cell = torch.autograd.grad(out.sum() + last.square().sum(), given)
    assert gates.numel() == 0 and not any(gradient.count_nonzero() for gradient in (weight, bias, hidden))
    assert torch.equal(cell, 2 * given[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_types(isa: str, dtype: torch.dtype) -> None:
    found = []
    for kind in (dtype, torch.float64):
        given = [tensor.detach() for tensor in arguments(6, 4, 24, dtype)]
        given = [t.to(kind if kind == torch.float64 or t.dtype == dtype else t.dtype).requires_grad_() for t in given]
        out, last = recurrence(*given)
        (out.double().square().sum() + last.double().sum()).backward()
        found.append([tensor.grad for tensor in given])
    assert [gradient.dtype for gradient in found[0]] == [dtype, dtype, torch.float32, dtype, dtype]
    # Gates, cells and outputs are kept in 8 or 11 bits; gradients of a step have errors of some of their last places.
    tolerance = 10 * torch.finfo(dtype).eps
    for half, whole in zip(*found, strict=True):
        assert (half.double() - whole).abs().max() <= tolerance * whole.abs().max()


@requires_library
def test_gradcheck_and_its_end() -> None:
    given = [tensor.requires_grad_() for tensor in arguments(3, 2, 5)]
    assert torch.autograd.gradcheck(recurrence, given)
    out, _ = recurrence(*given)
    (gradient,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="recurrence has no second derivative"):
        gradient.sum().backward()
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(recurrence, given)


@requires_library
def test_some_gradients_and_none() -> None:
    given = arguments(4, 3, 5)
    whole = [tensor.clone().requires_grad_() for tensor in given]
    out, last = recurrence(*whole)
    (out.sum() + last.sum()).backward()
    for i in range(5):
        some = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(given)]
        out, last = recurrence(*some)
        (out.sum() + last.sum()).backward()
        assert [tensor.grad is None for tensor in some] == [i != j for j in range(5)]
        assert torch.equal(some[i].grad, whole[i].grad)
    # The last cell alone, and the outputs alone.
    for which in (0, 1):
        once = [tensor.clone().requires_grad_() for tensor in given]
        again = [tensor.clone().requires_grad_() for tensor in given]
        recurrence(*once)[which].sum().backward()
        reference.recurrence(*again)[which].sum().backward()
        for ours, theirs in zip(once, again, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    # Without a gradient nothing is kept for one.
    *_, activated, cells = torch.ops.espkernels.recurrence.default(*given, False)
    assert activated.numel() == cells.numel() == 0


@requires_library
def test_a_row_has_the_same_bits_in_any_larger_batch_and_on_any_threads(isa: str, threads: None) -> None:
    gates, weight, bias, hidden, cell = arguments(9, 60, 40, torch.float32)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        given = [tensor.clone().requires_grad_() for tensor in (gates, weight, bias, hidden, cell)]
        out, last = recurrence(*given)
        out.square().sum().backward()
        results.append([out, last, given[0].grad, given[3].grad, given[4].grad])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    for row in (0, 31, 59):
        alone, _ = recurrence(gates[:, row : row + 1], weight, bias, hidden[row : row + 1], cell[row : row + 1])
        assert torch.equal(alone[:, 0], results[0][0][:, row])


@requires_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    given = [tensor.requires_grad_() for tensor in arguments(4, 3, 6, dtype)]
    torch.library.opcheck(torch.ops.espkernels.recurrence.default, (*given, True))
    torch.library.opcheck(torch.ops.espkernels.recurrence.default, (*(t.detach() for t in given), False))
    compiled = torch.compile(recurrence, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (4, 7):
        some = arguments(steps, 3, 6, dtype)
        for ours, theirs in zip(compiled(*some), recurrence(*some), strict=True):
            assert torch.equal(ours, theirs)


@requires_library
def test_autocast() -> None:
    gates, weight, bias, hidden, cell = arguments(4, 3, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, last = recurrence(gates, weight, bias, hidden, cell)
    lower = [tensor.bfloat16() for tensor in (gates, weight, hidden, cell)]
    expected, expected_last = recurrence(lower[0], lower[1], bias, lower[2], lower[3])
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected) and torch.equal(last, expected_last)


def test_arrays_that_are_not_dense() -> None:
    gates, weight, bias, hidden, cell = arguments(4, 3, 6)
    expected, last = recurrence(gates, weight, bias, hidden, cell)
    strided = [tensor.T.contiguous().T for tensor in (weight, hidden, cell)]
    turned = gates.transpose(0, 2).contiguous().transpose(0, 2)
    out, same = recurrence(turned, strided[0], bias.repeat_interleave(2)[::2], strided[1], strided[2])
    assert torch.equal(out, expected) and torch.equal(same, last)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(gates=torch.zeros(2, 8)), ValueError, r"gates: got shape \[2, 8\], expected \[T, B, 4 H\]"),
        (dict(gates=torch.zeros(2, 3, 10)), ValueError, r"gates: got shape \[2, 3, 10\], expected \[T, B, 4 H\]"),
        (dict(gates=torch.zeros(2, 3, 8, dtype=torch.int64)), TypeError, "gates: got dtype torch.int64"),
        (dict(weight=torch.zeros(8, 3)), ValueError, r"weight: got shape \[8, 3\], expected \[8, 2\]"),
        (dict(weight=torch.zeros(8, 2).double()), TypeError, "weight: got dtype torch.float64, expected torch.float32"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias: got shape \[4\], expected \[8\]"),
        (dict(hidden=torch.zeros(2, 2)), ValueError, r"hidden: got shape \[2, 2\], expected \[3, 2\]"),
        (dict(cell=torch.zeros(3)), ValueError, r"cell: got shape \[3\], expected \[3, 2\]"),
        (dict(cell=None), TypeError, "cell: got NoneType, expected a tensor"),
        (dict(cell=torch.zeros(3, 2, device="meta")), ValueError, "cell: is on meta, expected cpu"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    right = dict(zip(("gates", "weight", "bias", "hidden", "cell"), arguments(2, 3, 2, torch.float32), strict=True))
    with pytest.raises(error, match=message):
        recurrence(**(right | wrong))
