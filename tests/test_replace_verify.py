"""replace(verify=): each layer beside the old one, wrong kernels caught, and a model that is left as it was."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replacing import LAYERS, REACHED, assert_same_state, close, image, state, trained
from somebody import Down, Network, Unit
from torch import Tensor, nn

from espkernels import fused_unit, ops, reference
from espkernels import nn as fused
from espkernels.models import plain
from espkernels.replace import replace, restore

pytestmark = pytest.mark.usefixtures("same_each_time")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verified(training: bool, dtype: torch.dtype) -> None:
    model = Network().to(dtype).train(training)
    report = replace(model, verify=(image(dtype=dtype),))
    assert report.replaced == REACHED
    assert (report.skipped, report.layers[-1].reason) == (["unused"], "the sample does not reach it")
    eps = torch.finfo(dtype).eps
    for layer in report.layers[:-1]:
        assert layer.forward_error is not None
        assert layer.gradient_error is not None
        assert 0 <= layer.forward_error < 30 * eps
        assert 0 <= layer.gradient_error < 300 * eps
    assert any(layer.forward_error for layer in report.layers)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "status", "forward", "gradients", "reason"]
    assert len(lines) == len(LAYERS) + 2
    assert lines[-1] == "8 replaced, 1 skipped, 0 reverted"
    assert "\x1b" not in str(report)


def test_verified_under_autocast_and_in_channels_last() -> None:
    model = Network().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = replace(model, verify=image(dtype=torch.float32).contiguous(memory_format=torch.channels_last))
    assert report.replaced == REACHED
    assert max(layer.forward_error or 0 for layer in report.layers) > 1e-4  # it was bfloat16 that was compared


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_verify_leaves_no_trace(context: Any) -> None:
    model = Network()
    trained(model, image(dtype=torch.float32))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
    model.head.register_forward_hook(lambda *args: args[2] + 0 * torch.rand(1))  # advances the random state
    before, random = state(model), torch.get_rng_state()
    sample = image(dtype=torch.float32)
    with context():
        report = replace(model, verify=sample)
    assert report.replaced == REACHED
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])  # type: ignore[arg-type]
    assert sample.grad is None
    restore(model)
    assert_same_state(state(model), before)


def wrong_at_one_pixel(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    output = reference.spatial_pyramid(x, *arguments, **named)
    factor = torch.ones_like(output)
    factor[0, -1, -1, -1] = 1.0001
    return output * factor


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is off in one place, by a share of its largest number that depends on its type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Callable[[torch.dtype], float]) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wrong = grad.clone()
        wrong[0, 0, 0, 0] += ctx.share(grad.dtype) * grad.abs().max()
        return wrong, None


def wrong_gradient(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    return reference.spatial_pyramid(WrongGradient.apply(x, lambda _: 1e-4), *arguments, **named)


def without_hff(x: Tensor, weight: Tensor, dilations: Any, stride: int = 1, hff: bool = True) -> Tensor:
    return reference.spatial_pyramid(x, weight, dilations, stride, False)


def raising(*arguments: Any, **named: Any) -> Tensor:
    raise RuntimeError("no kernel for this device")


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit runs as one operator."""
    for module in ("fused_unit", "fused_shortcut"):
        monkeypatch.setattr(f"espkernels.{module}.fits", lambda *_: False)


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (wrong_at_one_pixel, "output is off by .* in float64"),
        (wrong_gradient, "gradient of .* is off by .* in float64"),
        (without_hff, "output is off by"),
        (raising, "the comparison raised RuntimeError: no kernel for this device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_kernel_is_caught_and_put_back(
    broken: Any, reason: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Network().train(training)
    before, expected = state(model), copy.deepcopy(model)(image(dtype=torch.float32))
    monkeypatch.setattr(ops, "spatial_pyramid", broken)
    report = replace(model, verify=image(dtype=torch.float32))
    assert report.reverted == ["level2_0.eesp", "level3_0.eesp", "level3.0", "level3.1"]
    # Right without their unit, which runs as it did.
    assert report.replaced == ["level1", "level2_0", "level2_0.inp_reinf.0", "level3_0"]
    for layer in report.layers:
        if layer.status == "reverted":
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(layer.reason)
    assert type(model.level3[0]) is Unit
    close(model(image(dtype=torch.float32)), expected, 1e-5)  # images are pooled by another kernel
    restore(model)
    if not training:
        assert_same_state(state(model), before)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda unit, x: WrongGradient.apply(unit(x), lambda _: 1e-4), "gradient of .* is off by .* in float64"),
        (lambda unit, x: unit(x) * 1.0001, "output is off by .* in float64"),
        (raising, "the comparison raised RuntimeError: no kernel for this device"),
    ],
    ids=["gradient", "output", "raising"],
)
def test_a_broken_unit_in_training_is_caught(broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fused_unit.run
    monkeypatch.setattr(fused_unit, "run", lambda unit, layers, x: broken(lambda x: original(unit, layers, x), x))
    report = replace(Network(), verify=image(dtype=torch.float32))
    assert report.reverted == ["level2_0.eesp", "level3_0.eesp", "level3.0", "level3.1"]
    for layer in report.layers:
        if layer.status == "reverted":
            assert re.match(reason, layer.reason)


def test_a_kernel_wrong_without_gradients_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval mode a unit runs other kernels without gradients than with them."""
    original = ops.pyramid_pointwise
    monkeypatch.setattr(ops, "pyramid_pointwise", lambda *arguments: 1.0001 * original(*arguments))
    report = replace(Unit(16, 16).eval(), verify=image(2, 16, 9, 9, dtype=torch.float32))
    assert report.reverted == [""]
    assert "output is off by" in report.layers[0].reason


@pytest.mark.usefixtures("layer_by_layer")
def test_a_kernel_wrong_in_one_type_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops.spatial_pyramid

    def wrong_in_single(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        output = original(x, *arguments, **named)
        return output * 1.001 if x.dtype == torch.float32 else output

    monkeypatch.setattr(ops, "spatial_pyramid", wrong_in_single)
    unit = Unit(16, 16).eval()
    report = replace(unit, verify=image(2, 16, 9, 9, dtype=torch.float32))
    assert report.reverted == [""]
    assert "in float32" in report.layers[0].reason


def test_another_type_of_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "norm_prelu", lambda norm, act, x: act(norm(x)).to(x.dtype))
    block = nn.Sequential(plain.BR(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = replace(block, verify=image(2, 4, 5, 6, dtype=torch.float32))
    assert report.reverted == ["0"]
    assert report.layers[0].reason == "output is float32, the original's bfloat16, train mode"


@pytest.mark.usefixtures("layer_by_layer")
def test_kinks_do_not_hide_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 many values next to zero fall on the other side of a PReLU: no excuse for the kernel."""
    original = ops.spatial_pyramid

    def wrong(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return original(WrongGradient.apply(x, lambda dtype: float(dtype == torch.bfloat16)), *arguments, **named)

    monkeypatch.setattr(ops, "spatial_pyramid", wrong)
    unit = Unit(16, 16).bfloat16().eval()
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            if name.endswith("act.weight"):
                parameter.fill_(-3)
    report = replace(unit, verify=image(2, 16, 40, 40, dtype=torch.bfloat16))
    assert report.reverted == [""]
    assert "gradient of input 0 is off by" in report.layers[0].reason
    assert "in bfloat16" in report.layers[0].reason


def test_memory_reaches_every_unit() -> None:
    model = Network()
    replace(model, memory="recompute")
    units = [part for part in model.modules() if isinstance(part, fused.EESP)]
    assert [unit.memory for unit in units] == ["recompute"] * 5
    restore(model)
    assert not any(hasattr(part, "memory") for part in model.modules())
    replace(model)
    assert {unit.memory for unit in units} == {"save"}
    with pytest.raises(ValueError, match="memory: got 'much', expected 'save' or 'recompute'"):
        replace(model, memory="much")


def test_memory_reaches_units_that_already_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.ModuleList([Unit(16, 16), fused.EESP(16, 16), fused.DownSampler(16, 32), nn.Identity()]).double()
    units = [model[0], model[1], model[2].eesp]
    other = copy.deepcopy(model[1])
    replace(model)
    report = replace(model, memory="recompute")
    assert [unit.memory for unit in units] == ["recompute"] * 3
    assert {layer.name: layer.reason for layer in report.layers if "memory='recompute'" in layer.reason}.keys() == {
        "0", "1", "2.eesp",
    }  # fmt: skip
    assert "memory" not in str(replace(model))
    assert [unit.memory for unit in units] == ["recompute"] * 3
    for actual, expected in zip(
        trained(model[1], image(2, 16, 9, 9), 2), trained(other, image(2, 16, 9, 9), 2), strict=True
    ):
        close(actual, expected)

    # A failure at the last layer gives the earlier ones their memory back.
    model[3] = Unit(16, 16).double()
    module = sys.modules["espkernels.replace"]
    before, calls = state(model), iter([module._swap, interrupting])  # the first is the trial
    monkeypatch.setattr(module, "_swap", lambda layer: next(calls)(layer))
    with pytest.raises(KeyboardInterrupt):
        replace(model, memory="save")
    assert_same_state(state(model), before)
    restore(model)
    assert not hasattr(model[0], "memory")


def test_a_layer_with_another_forward_is_caught_by_verify_alone() -> None:
    class Swish(Unit):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.silu(super().forward(input))

    x = image(2, 16, 9, 9)
    assert replace(Swish(16, 16).double()).replaced == [""]  # the structure is the same: hence verify
    report = replace(nn.Sequential(Swish(16, 16), Unit(16, 16)).double(), verify=x)
    assert (report.reverted, report.replaced) == (["0"], ["1"])


def test_verify_when_rounding_is_amplified() -> None:
    """Constant maps in train mode: batch norm divides rounding errors by almost nothing. No false alarm."""
    model = Network()
    for value in (0.0, 1.0, 1000.0):
        report = replace(model, verify=torch.full((2, 3, 33, 48), value))
        assert report.replaced == REACHED, str(report)
        restore(model)


def test_verify_with_nan_and_infinity() -> None:
    model = Network().eval()
    sample = image(dtype=torch.float32)
    sample[0, 0, 0, 0], sample[1, 1, 5, 5] = torch.nan, torch.inf
    assert replace(model, verify=sample).replaced == REACHED


def test_a_run_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network()
    model.level3[0].register_forward_pre_hook(lambda *_: None)
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="channels"):
        replace(model, verify=image(2, 4, 33, 48, dtype=torch.float32))
    assert_same_state(state(model), before)

    before = state(model)
    handle = model.head.register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        replace(model, verify=image(dtype=torch.float32))
    handle.remove()
    assert_same_state(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def interrupting(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_failure_in_the_middle_of_replacing_undoes_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["espkernels.replace"]
    model = Network()
    before = state(model)
    swap, swapped = module._swap, []

    def failing(layer: Any) -> None:
        if layer.name == "level3.0" and layer.name in swapped:  # the first is the trial
            raise MemoryError
        swapped.append(layer.name)
        swap(layer)

    monkeypatch.setattr(module, "_swap", failing)
    with pytest.raises(MemoryError):
        replace(model)
    assert len(swapped) > len(LAYERS)
    assert_same_state(state(model), before)


def test_hooks_that_change_the_input_are_applied_once() -> None:
    unit = Unit(16, 16).double().eval()
    seen: list[Tensor] = []
    unit.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    unit.proj_1x1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x = image(2, 16, 9, 9)
    assert replace(unit, verify=x).replaced == [""]
    assert len(seen) > 1
    assert all(torch.equal(each, 3 * x) for each in seen)


def test_one_run_without_gradients_and_one_comparison_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["espkernels.replace"]
    compare, compared, runs = module.compare, [], []
    monkeypatch.setattr(module, "compare", lambda layer, *rest: compared.append(layer) or compare(layer, *rest))
    model = Network().double()
    model.head.register_forward_hook(lambda *args: runs.append(args[2].requires_grad))
    replace(model, verify=image())
    assert runs == [False]
    names = {module: name for name, module in model.named_modules()}
    # The inner unit ends first; the unit that stands in two places is called twice.
    expected = [
        "level1", "level2_0.eesp", "level2_0.inp_reinf.0", "level2_0", "level3_0.eesp", "level3_0",
        "level3.0", "level3.1", "level3.0",
    ]  # fmt: skip
    assert [names[layer] for layer in compared] == expected


def test_keyword_arguments_reach_the_comparison() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = Down(8, 24)

        def forward(self, x: Tensor, picture: Tensor) -> Tensor:
            return self.down(x, input2=picture)

    model = Keyword().double()
    report = replace(model, verify=(image(2, 8, 9, 9), image(2, 3, 36, 36)))
    assert report.replaced == ["down", "down.eesp", "down.inp_reinf.0"]


def test_report_is_plain_data() -> None:
    report = replace(Network())
    assert pickle.loads(pickle.dumps(report)) == report
    assert isinstance(replace, types.FunctionType)
