"""One call of an operator on whole numbers, and what it must give: shared by the self-test and the benchmarks.

Whole numbers make the check sharp: every product and sum is exact in float32, so a right kernel equals the float64
reference to the last bit whatever its order of summation, and a wrong one is off by a visible amount.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from espkernels import reference
from espkernels.layout import out_size

__all__ = ["OPERATORS", "Function", "Problem", "group_pointwise", "pyramid_pointwise", "spatial_pyramid"]

OPERATORS = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise")

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of ``operator``: ``tensors`` in float64, with whole numbers or powers of two, and ``options``."""

    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def cast(
        self,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
        requires_grad: bool = False,
    ) -> dict[str, Tensor]:
        """The tensors as leaves in ``dtype``, the maps among them in ``layout``."""
        return {
            name: _cast(tensor, dtype, layout).requires_grad_(requires_grad) for name, tensor in self.tensors.items()
        }

    def grad_output(self, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """A gradient for the result, the same one each time."""
        return _cast(_whole(torch.Generator().manual_seed(1), *self.expected["output"].shape), dtype, layout)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """The result of the reference in float64, as "output"."""
        with torch.no_grad():
            return {"output": self._reference(**self.tensors, **self.options)}

    @cached_property
    def expected_gradients(self) -> dict[str, Tensor]:
        """Its gradients, by the name of the argument."""
        leaves = self.cast(torch.float64, requires_grad=True)
        output = self._reference(**leaves, **self.options)
        gradients = torch.autograd.grad(output, list(leaves.values()), self.grad_output(torch.float64))
        return dict(zip(leaves, gradients, strict=True))

    @property
    def _reference(self) -> Function:
        function: Function = getattr(reference, self.operator)
        return function

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether a right result in ``dtype`` is the exact one rounded once.

        A half type may also round the maps between the steps of the two operators that have several.
        """
        return dtype in (torch.float32, torch.float64) or self.operator == "spatial_pyramid"

    def difference(
        self, function: Function, dtype: torch.dtype, layout: torch.memory_format, gradients: bool
    ) -> str | None:
        """What is wrong with the result of ``function`` and, with ``gradients``, with those; None where nothing is.

        Values that need not be exact may be off by four roundings of ``dtype`` in the root mean square.
        """
        tensors = self.cast(dtype, layout, requires_grad=gradients)
        with torch.set_grad_enabled(gradients):
            output = function(**tensors, **self.options)
        results = {"output": output.detach()}
        expected = dict(self.expected)
        if gradients:
            grads = torch.autograd.grad(output, list(tensors.values()), self.grad_output(dtype, layout))
            results |= {f"gradient of {name}": grad for name, grad in zip(tensors, grads, strict=True)}
            expected |= {f"gradient of {name}": grad for name, grad in self.expected_gradients.items()}
        tolerance = 0.0 if self.is_exact(dtype) else 4 * torch.finfo(dtype).eps
        for name, result in results.items():
            reason = _difference(result, expected[name], dtype, tolerance)
            if reason is not None:
                return f"{name}: {reason}"
        return None


def _difference(result: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float) -> str | None:
    if result.shape != expected.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if result.dtype != dtype:
        return f"dtype {result.dtype}, expected {dtype}"
    if tolerance == 0:
        rounded = expected.to(dtype)
        if torch.equal(result, rounded):
            return None
        wrong = ~(result == rounded)
        where = tuple(wrong.nonzero()[0].tolist())
        return (
            f"{int(wrong.sum())} of {wrong.numel()} values are not the reference's, "
            f"at {where} {result[where].item():g} instead of {rounded[where].item():g}"
        )
    error = ((result.double() - expected).norm() / expected.norm()).item()
    # Written so that a NaN is a difference.
    return (
        None if error <= tolerance else f"off by {error:.2g} in the root mean square, expected at most {tolerance:.2g}"
    )


def _cast(tensor: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    tensor = tensor.detach().to(dtype, copy=True)
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 and tensor.shape[2:] != (3, 3) else tensor


def _whole(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=generator).double()


def _power_of_two(generator: torch.Generator, channels: int) -> Tensor:
    return 2.0 ** torch.randint(-1, 2, (channels,), generator=generator).double()


def spatial_pyramid(
    x: Sequence[int], dilations: Sequence[int], stride: int = 1, hff: bool = True, seed: int = 0
) -> Problem:
    """``espkernels.spatial_pyramid`` of a map of shape ``x``."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"x": _whole(draw, *x), "weight": _whole(draw, len(dilations), x[1], 3, 3)}
    return Problem("spatial_pyramid", tensors, {"dilations": tuple(dilations), "stride": stride, "hff": hff})


def group_pointwise(
    x: Sequence[int],
    out_channels: int,
    groups: int,
    affine: bool = True,
    residual: bool = False,
    slope: bool = False,
    seed: int = 0,
) -> Problem:
    """``espkernels.group_pointwise`` of a map of shape ``x``, with the chosen parts of its epilogue."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"x": _whole(draw, *x), "weight": _whole(draw, out_channels, x[1] // groups)}
    tensors |= _epilogue(draw, (x[0], out_channels, x[2], x[3]), affine, residual, slope)
    return Problem("group_pointwise", tensors, {"groups": groups})


def pyramid_pointwise(
    x: Sequence[int],
    dilations: Sequence[int],
    out_channels: int,
    groups: int,
    stride: int = 1,
    residual: bool = False,
    slope: bool = False,
    seed: int = 0,
) -> Problem:
    """``espkernels.pyramid_pointwise`` of a map of shape ``x``, with both affine steps and the first PReLU."""
    draw = torch.Generator().manual_seed(seed)
    first = spatial_pyramid(x, dilations, stride, seed=seed)
    concatenated = len(dilations) * x[1]
    height, width = (out_size(size, stride) for size in x[2:])
    tensors = {
        **first.tensors,
        "pointwise_weight": _whole(draw, out_channels, concatenated // groups),
        **{f"pyramid_{name}": tensor for name, tensor in _vectors(draw, concatenated).items()},
        **_epilogue(draw, (x[0], out_channels, height, width), True, residual, slope),
    }
    return Problem("pyramid_pointwise", tensors, {**first.options, "groups": groups})


def _vectors(draw: torch.Generator, channels: int) -> dict[str, Tensor]:
    scale, shift = _power_of_two(draw, channels), _whole(draw, channels)
    return {"scale": scale, "shift": shift, "slope": torch.full((channels,), 0.25, dtype=torch.float64)}


def _epilogue(
    draw: torch.Generator, shape: tuple[int, ...], affine: bool, residual: bool, slope: bool
) -> dict[str, Tensor]:
    vectors = _vectors(draw, shape[1])
    tensors = {name: vectors[name] for name in ("scale", "shift") if affine}
    if residual:
        tensors["residual"] = _whole(draw, *shape)
    if slope:
        tensors["slope"] = vectors["slope"]
    return tensors
