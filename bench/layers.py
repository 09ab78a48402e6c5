"""EESP units and whole networks: as plain torch layers, replaced by this library, and frozen for inference."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.comparison import LAYOUTS, Provider, WrongResult, largest_error
from bench.floor import Floor
from bench.interleave import Run
from bench.training_step import Step
from espkernels import models
from espkernels.freeze import freeze
from espkernels.models import plain
from espkernels.replace import replace

__all__ = ["Task", "detection", "network", "output_shape", "segmentation", "unit", "variant"]


def unit(case: Case) -> nn.Module:
    """The plain EESP unit of ``case``, in a container, since a module cannot replace itself."""
    # Every row of the table comes from a limit; 3 + 2 * dilation is the size of the largest branch.
    limit = 1 + 2 * max(case.dilations)
    method = "avg" if case.stride == 2 else "esp"
    made = plain.EESP(case.in_channels, case.out_channels, case.stride, case.k, limit, method)
    assert made.dilations == case.dilations, f"{case}: {made.dilations}"
    return _lively(nn.Sequential(made))


def network(scale: float) -> nn.Module:
    """The plain classification network, without dropout so that two runs agree."""
    return _lively(models.espnetv2(scale, plain=True, dropout=0.0))


def segmentation(scale: float, classes: int) -> nn.Module:
    """The plain segmentation network."""
    return _lively(models.espnetv2_segmentation(scale, classes, plain=True))


class _Joined(nn.Module):
    """A model of several results as one of one: [B, all their numbers], since not every engine gives several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([result.flatten(1) for result in self.model(x)], dim=1)


def detection(scale: float, size: int, classes: int) -> nn.Module:
    """The plain detector; its result is the offsets of all boxes, then their logits."""
    return _lively(_Joined(models.espnetv2_detection(scale, classes, size, plain=True)))


def _lively(model: nn.Module) -> nn.Module:
    """Gives the batch norms statistics and weights that a trained network could have: 0 and 1 would hide mistakes."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.7, 1.4)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor, std=0.1)
    return model.eval()


def variant(model: nn.Module, implementation: str) -> nn.Module:
    """A copy of the plain ``model`` as ``implementation``: "eager", "compile", "replaced" or "frozen"."""
    model = copy.deepcopy(model)
    if implementation == "replaced":
        replace(model)
    elif implementation == "frozen":
        model = freeze(model)
    elif implementation == "compile":
        model.compile(dynamic=False)
    return model


def output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of ``model(x)``, by the model itself on the meta device."""
    with torch.no_grad():
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        meta = {name: tensor.to("meta") for name, tensor in state.items()}
        output: Tensor = torch.func.functional_call(model, meta, (x.to("meta"),))
    return tuple(output.shape)


class Task:
    """One model on one input: "forward" in evaluation, "training" with a loss, or "inside": training with the gradient
    of the result given (:mod:`bench.training_step`).

    Each result is compared with float64. Rounding through many layers has no sharp bound, so plain torch in the same
    dtype is the measure: eight times its own error is allowed, and in training what a few signs that turn at a PReLU
    change, where a map is large enough to have any.
    """

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
        self.make, self.shape, self.dtype, self.mode = make, shape, dtype, mode

    @functools.cached_property
    def model(self) -> nn.Module:
        """The plain model in float32."""
        return self.make().train(self.mode != "forward")

    @functools.cached_property
    def input(self) -> Tensor:
        """The input in float32."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(2))

    @functools.cached_property
    def gradient(self) -> Tensor | None:
        """The gradient of the result in float32, where it is given."""
        if self.mode != "inside":
            return None
        return torch.randn(output_shape(self.model, self.input), generator=torch.Generator().manual_seed(3))

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The results in float64: the output and, in training, the gradients."""
        return self._results(copy.deepcopy(self.model).double(), self.input.double())

    @functools.cached_property
    def _allowed(self) -> float:
        eager = self._results(*self.cast("eager", torch.contiguous_format))
        epsilon, numbers = torch.finfo(self.dtype).eps, self.input.numel()
        rounding = 8 * max(largest_error(eager, self.exact), epsilon)
        # In front of a PReLU rounding, here of some 16 steps, turns the sign of one number in 1 / (16 eps), and the
        # gradient there changes by up to itself. Four of n, twice as large as most, change the whole by 4 / sqrt(n); a
        # map in which not even a tenth of a sign is expected to turn has none.
        signs_turn = self.mode != "forward" and 16 * epsilon * numbers > 0.1
        return rounding + (4 / math.sqrt(numbers) if signs_turn else 0)

    def cast(self, implementation: str, layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
        """The model as ``implementation`` (:func:`variant`), and the input, both in the task's dtype and a layout."""
        model = copy.deepcopy(self.model).to(self.dtype)
        # A person who wants channels_last converts both, so that no convolution has to.
        model = variant(model.to(memory_format=layout), implementation)  # type: ignore[call-overload]
        return model, self.input.to(self.dtype).contiguous(memory_format=layout)

    def _step(self, model: nn.Module, x: Tensor) -> Step:
        gradient = self.gradient
        if gradient is not None:
            layout = (
                torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            )
            gradient = gradient.to(x.dtype).contiguous(memory_format=layout)
        return Step(model, x, gradient)

    def _results(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        if self.mode == "forward":
            with torch.no_grad():
                return [model(x)]
        return self._step(model, x).results()

    def prepare(self) -> None:
        """Computes what results are compared with."""
        _ = self.exact

    def build(self, provider: Provider) -> Run:
        """Checks the provider's result, and returns what is timed."""
        model, x = self.cast(provider.implementation, LAYOUTS[provider.layout])
        self.check(provider, self._results(model, x))
        return Run(self.step(model, x))

    def check(self, provider: Provider, results: list[Tensor]) -> None:
        """Raises :class:`WrongResult` where ``results`` differ from float64 by more than rounding may."""
        shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (results, self.exact))
        if shapes != expected:
            raise WrongResult(f"{provider}: results of shapes {shapes}, expected {expected}")
        error = largest_error(results, self.exact)
        if not error <= self._allowed:
            raise WrongResult(
                f"{provider}: off by {error:.2g} in the root mean square, expected at most {self._allowed:.2g}"
            )

    def run(self, provider: Provider) -> Callable[[], object]:
        """One unchecked step of the provider, for a process that only looks at memory."""
        return self.step(*self.cast(provider.implementation, LAYOUTS[provider.layout]))

    def step(self, model: nn.Module, x: Tensor) -> Callable[[], object]:
        """One inference, or one training step up to the gradients."""
        return torch.no_grad()(functools.partial(model, x)) if self.mode == "forward" else self._step(model, x)

    def floor(self) -> Floor:
        """Parameters and input read once, the output written once; training three times the multiply-adds.

        In training the gradients of parameters are written, and "inside" that of the result read, the input's written.
        """
        counted = models.count(self.make(), (self.shape[2], self.shape[3]), in_channels=self.shape[1])
        training = self.mode != "forward"
        maps = self.input.numel() + math.prod(output_shape(self.model, self.input))
        values = counted.parameters * (2 if training else 1) + maps * (2 if self.mode == "inside" else 1)
        return Floor(values * self.dtype.itemsize, 2 * counted.macs * self.shape[0] * (3 if training else 1))
