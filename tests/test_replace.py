"""Replacing the layers of somebody else's model, checking that nothing but speed changed, and taking it back."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from somebody import CBR, Down, Network, Unit
from torch import Tensor, nn

from espkernels import fused_shortcut, fused_unit, ops, reference
from espkernels import nn as fused
from espkernels.models import plain
from espkernels.replace import Report, replace, restore

LAYERS = [
    "level1", "level2_0", "level2_0.eesp", "level2_0.inp_reinf.0", "level3_0", "level3_0.eesp", "level3.0", "level3.1",
    "unused",
]  # fmt: skip
REACHED = LAYERS[:-1]


pytestmark = pytest.mark.usefixtures("same_each_time")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, fused_calls: list[str]) -> list[str]:
    """The names of the operators called so far."""
    seen = fused_calls
    for module, name in (
        (ops, "spatial_pyramid"), (ops, "group_pointwise"), (fused_shortcut, "down_sampler_training"),
    ):  # fmt: skip
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original, **k: seen.append(n) or f(*a, **k))
    return seen


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (2, 3, 33, 48)), generator=torch.Generator().manual_seed(3), dtype=dtype)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a module is: its objects, their identities, classes and attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (id(module), type(module), dict(vars(module)))
        for own in (module._parameters, module._buffers, module._modules, module._forward_hooks):
            found[f"{name}: {id(own)}"] = {key: id(value) for key, value in own.items()}
    found["values"] = {name: value.clone() for name, value in model.state_dict().items()}
    return found


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    values, truth = actual.pop("values"), expected.pop("values")
    assert actual == expected
    assert values.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(values[name], value), name


def trained(
    model: nn.Module, x: Tensor, steps: int = 1, optimizer: torch.optim.Optimizer | None = None
) -> list[Tensor]:
    """Outputs of ``steps`` training steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the same network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_replaced_model_is_the_same_function(training: bool, calls: list[str]) -> None:
    model = Network().double().train(training)
    other = copy.deepcopy(model)
    x = image()
    expected = trained(other, x, 3)
    assert calls == []
    report = replace(model)
    assert report.replaced == LAYERS
    assert (report.skipped, report.reverted) == ([], [])
    for actual, truth in zip(trained(model, x, 3), expected, strict=True):
        close(actual, truth)
    # Five units run, one of them twice in each of three steps.
    assert calls.count("eesp_training") == 3 * 5
    for name, value in other.state_dict().items():
        close(model.state_dict()[name], value)


def test_replaced_layers_are_the_same_objects() -> None:
    model = Network()
    before = state(model)
    parameters = [id(p) for p in model.parameters()]
    replace(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert {name: value[0] for name, value in state(model).items() if isinstance(value, tuple)} == {
        name: value[0] for name, value in before.items() if isinstance(value, tuple)
    }
    assert model.again is model.level3[0]
    assert model.state_dict().keys() == before["values"].keys()


def test_restore_is_the_exact_undo() -> None:
    model = Network()
    model.level3[0].stride = "of the user"
    model.level3[0].hff = True
    del model.level3[1].stride
    before = state(model)
    assert replace(model).replaced == LAYERS
    assert model.level3[0].stride == 1
    assert restore(model) is model
    assert_same_state(state(model), before)
    assert restore(model) is model
    assert_same_state(state(model), state(model))


def test_new_layers_of_a_replaced_class_are_of_the_original_one() -> None:
    class Doubled(Unit):
        def wider(self, n: int) -> Unit:
            return type(self)(16, n)

    model = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 1)), Doubled(16, 16)])
    before = [(id(part), type(part)) for part in model.modules()]
    assert replace(model).replaced == ["0", "1"]
    model.head, model.wider = model[0][:2], model[1].wider(32)
    assert (type(model.head), type(model.wider)) == (nn.Sequential, Doubled)
    x, y = image(2, 4, 6, 5).float(), image(2, 16, 6, 5).float()
    close(model.head(x), nn.functional.prelu(copy.deepcopy(model[0][0])(x), model[0][1].weight))
    assert model.wider(y).shape == (2, 32, 6, 5)
    assert not hasattr(model.wider, "dilations")
    restore(model)
    del model.head, model.wider
    assert [(id(part), type(part)) for part in model.modules()] == before


def test_restore_keeps_what_was_trained_meanwhile() -> None:
    model = Network().double()
    other = copy.deepcopy(model)
    expected = trained(other, image(), 2)
    replace(model)
    actual = trained(model, image(), 2)
    restore(model)
    assert type(model.level3[0]) is Unit
    assert type(model.level2_0) is Down
    close(actual[1], expected[1])
    close(model(image()), other(image()))


def test_an_optimizer_made_before_goes_on() -> None:
    model = Network().double()
    other, x = copy.deepcopy(model), image()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        trained(m, x, 2, optimizer)
    replace(model)
    for actual, expected in zip(trained(model, x, 3, optimizers[0]), trained(other, x, 3, optimizers[1]), strict=True):
        close(actual, expected, 1e-7)


def test_replacing_twice_changes_nothing() -> None:
    model = Network()
    replace(model)
    before = state(model)
    report = replace(model, verify=image(dtype=torch.float32))
    assert report.skipped == LAYERS
    assert {layer.reason for layer in report.layers} == {"already runs on this library"}
    assert_same_state(state(model), before)


# --- what users hold on to ------------------------------------------------------------------------------------------


def test_hooks_flags_and_attributes_survive() -> None:
    model = Network().double()
    seen: list[str] = []
    for name in ("level3.0", "level3.0.br_after_cat", "level3.0.spp_dw.1.conv", "level2_0.inp_reinf.0", "level2_0"):
        model.get_submodule(name).register_forward_hook(lambda *_, n=name: seen.append(n))
    model.level3[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.level3[0].note = "the user's"
    model.level3[1].eval()
    model.level3[1].proj_1x1.requires_grad_(False)
    trained(model, image())
    expected, seen[:] = sorted(seen), []
    flags = {name: module.training for name, module in model.named_modules()}
    model.zero_grad(set_to_none=True)
    replace(model)
    trained(model, image())
    assert sorted(seen) == expected
    assert len(expected) == 2 * 4 + 2
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.level3[0].note == "the user's"
    assert model.level3[1].proj_1x1.conv.weight.grad is None


def test_both_classes_hold() -> None:
    model = Network()
    replace(model)
    unit, down = model.level3[0], model.level2_0
    assert isinstance(unit, Unit)
    assert isinstance(unit, fused.EESP)
    assert isinstance(down, Down)
    assert isinstance(down, fused.DownSampler)
    assert unit.widest() == 9
    assert type(unit) is type(model.level3[1])
    assert "dilations=(1, 2, 3, 4)" in repr(unit)


@pytest.mark.parametrize("replaced_first", [True, False])
def test_copies_and_pickles(replaced_first: bool) -> None:
    model = Network().double().eval()
    expected = model(image())
    if replaced_first:
        replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in others:
        if not replaced_first:
            assert replace(other).replaced == LAYERS
        assert isinstance(other.level3[0], fused.EESP)
        assert other.again is other.level3[0]
        assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
        close(other(image()), expected)
        assert type(restore(other).level3[0]) is Unit
        close(other(image()), expected)
    assert isinstance(model.level3[0], fused.EESP) == replaced_first


def test_checkpoints_move_both_ways() -> None:
    model, other = Network().double().eval(), Network().double().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    replace(model)
    model.load_state_dict(other.state_dict(), strict=True)
    close(model(image()), other(image()))
    fresh = Network().double().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    close(fresh(image()), other(image()))


def test_inputs_by_the_names_of_the_original() -> None:
    down = Down(8, 24).double().eval()
    x, picture = image(2, 8, 9, 12), image(2, 3, 36, 48)
    expected, without = down(input=x, input2=picture), down(input=x)
    assert replace(down).replaced == ["", "eesp", "inp_reinf.0"]
    close(down(x, input2=picture), expected)
    close(down(input2=picture, input=x), expected)
    close(down(x, picture), expected)
    close(down(input=x), without)
    with pytest.raises(TypeError, match="picture"):
        down(x, picture=picture)


def test_a_model_that_is_a_layer() -> None:
    unit = Unit(16, 16).double()
    x = image(2, 16, 7, 9)
    expected = unit(x)
    unit.load_state_dict(Unit.state_dict(unit))
    report = replace(unit, verify=x)
    assert report.replaced == [""]
    assert "(the model)" in str(report)
    assert isinstance(unit, fused.EESP)
    close(unit(x), expected)
    assert type(restore(unit)) is Unit


def test_wrappers(calls: list[str]) -> None:
    model = Network().double().eval()
    expected = model(image())
    wrapped = nn.DataParallel(model)
    report = replace(wrapped, verify=image())
    assert report.replaced == [f"module.{name}" for name in REACHED]
    calls.clear()
    close(wrapped(image()), expected)
    assert calls
    restore(wrapped)
    assert type(model.level3[0]) is Unit


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_distributed_model(tmp_path: Any) -> None:
    model = Network().double()
    other = copy.deepcopy(model)
    del model.unused  # every parameter must take part
    del other.unused
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
        assert replace(wrapped, verify=image()).replaced == [f"module.{name}" for name in REACHED]
        actual = trained(wrapped, image(), 3, optimizer)
    finally:
        torch.distributed.destroy_process_group()
    for step, expected in zip(actual, trained(other, image(), 3), strict=True):
        close(step, expected)


def test_a_compiled_model_notices(calls: list[str]) -> None:
    model = Unit(16, 16).double().eval()
    compiled = torch.compile(model, backend="eager")
    x = image(2, 16, 7, 9)
    with torch.no_grad():
        expected = compiled(x)
        assert replace(compiled, verify=x).replaced == ["_orig_mod"]
        calls.clear()
        close(compiled(x), expected)
        assert calls
        calls.clear()
        restore(compiled)
        close(compiled(x), expected)
        assert calls == []


def test_replaced_layers_compile_whole() -> None:
    model = Network().double().eval()
    expected = model(image())
    replace(model)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(image()), expected)


@pytest.mark.parametrize("reinf", [True, False])
def test_plain_layers_are_replaced_and_ours_are_left(reinf: bool, calls: list[str]) -> None:
    model = nn.ModuleDict({
        "plain": plain.DownSampler(8, 24, reinf=reinf),
        "no hff": plain.EESP(16, 16, hff=False, dilated=False),
        "ours": fused.DownSampler(8, 24, reinf=reinf),
        "strided": plain.EESP(16, 16, 2, down_method="esp"),
    }).double()  # fmt: skip
    x = image(2, 16, 9, 8)

    def outputs() -> list[Tensor]:
        return [model["no hff"](x), model["strided"](x), model["plain"](x[:, :8])]

    expected = outputs()
    assert calls == []
    report = replace(model)
    shortcut = ["plain.inp_reinf.0"] if reinf else []
    assert report.replaced == ["plain", "plain.eesp", *shortcut, "no hff", "strided"]
    assert report.skipped == ["ours", "ours.eesp"]
    for actual, truth in zip(
        [model["no hff"](x), model["strided"](x), model["plain"](x[:, :8])], expected, strict=True
    ):
        close(actual, truth)
    assert [calls.count(name) for name in ("eesp_training", "down_sampler_training")] == [2, 1]
    assert (model["no hff"].hff, model["no hff"].dilations) == (False, (1, 1, 1, 1))
    restore(model)
    assert type(model["plain"]) is plain.DownSampler
    assert type(model["plain"].eesp) is plain.EESP
    assert type(model["ours"]) is fused.DownSampler
    assert model["no hff"].dilations == (1, 1, 1, 1)


# --- what looks alike but is not ------------------------------------------------------------------------------------


def changed(change: Callable[[Unit], object]) -> Unit:
    unit = Unit(16, 16)
    change(unit)
    return unit


def with_conv(unit: Unit, name: str, **other: Any) -> None:
    """Replaces a convolution by one that differs in ``other``."""
    owner = unit.get_submodule(name)
    conv = owner.conv
    arguments = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": False,
    }
    owner.conv = nn.Conv2d(**(arguments | other))


LOOKALIKES: dict[str, tuple[Callable[[Unit], object], str]] = {
    "bias of the reduction": (lambda u: with_conv(u, "proj_1x1", bias=True), "proj_1x1.conv has a bias"),
    "bias of a branch": (lambda u: with_conv(u, "spp_dw.2", bias=True), "spp_dw.2.conv has a bias"),
    "bias of the expansion": (lambda u: with_conv(u, "conv_1x1_exp", bias=True), "conv_1x1_exp.conv has a bias"),
    "groups of the reduction": (lambda u: with_conv(u, "proj_1x1", groups=1), "proj_1x1.conv has groups 1, not 4"),
    "groups of the expansion": (
        lambda u: with_conv(u, "conv_1x1_exp", groups=2),
        "conv_1x1_exp.conv has groups 2, not 4",
    ),
    "a wide reduction": (
        lambda u: with_conv(u, "proj_1x1", kernel_size=3, padding=1),
        r"proj_1x1.conv has kernel_size \(3, 3\), not \(1, 1\)",
    ),
    "kernel of 5": (
        lambda u: with_conv(u, "spp_dw.0", kernel_size=5, padding=2),
        r"spp_dw.0.conv has kernel_size \(5, 5\), not \(3, 3\)",
    ),
    "padding": (lambda u: with_conv(u, "spp_dw.1", padding=1), r"spp_dw.1.conv has padding \(1, 1\), not \(2, 2\)"),
    "dilation of one side": (
        lambda u: with_conv(u, "spp_dw.1", dilation=(2, 1)),
        r"spp_dw.1.conv has dilation \(2, 1\), not \(2, 2\)",
    ),
    "padding mode": (
        lambda u: with_conv(u, "spp_dw.3", padding_mode="reflect"),
        "spp_dw.3.conv has padding_mode reflect, not zeros",
    ),
    "not depthwise": (lambda u: with_conv(u, "spp_dw.3", groups=1), "spp_dw.3.conv has groups 1, not 4"),
    "stride of one branch": (
        lambda u: with_conv(u, "spp_dw.1", stride=2),
        r"spp_dw.1.conv has stride \(2, 2\), not \(1, 1\)",
    ),
    "stride 3": (lambda u: [with_conv(u, f"spp_dw.{i}", stride=3) for i in range(4)], "has stride 3, not 1 or 2"),
    "ReLU": (lambda u: setattr(u, "module_act", nn.ReLU()), "module_act is a ReLU, not a PReLU"),
    "ReLU inside": (lambda u: setattr(u.br_after_cat, "act", nn.ReLU()), "br_after_cat.act is a ReLU, not a PReLU"),
    "one slope": (lambda u: setattr(u, "module_act", nn.PReLU()), "module_act has 1 slopes"),
    "group norm": (lambda u: setattr(u.proj_1x1, "bn", nn.GroupNorm(2, 4)), "proj_1x1.bn is a GroupNorm"),
    "no norm": (lambda u: setattr(u.conv_1x1_exp, "bn", nn.Identity()), "conv_1x1_exp.bn is a Identity"),
    "another part": (lambda u: setattr(u, "attention", nn.Conv2d(16, 16, 1)), "the unit also holds attention"),
    "another parameter": (
        lambda u: setattr(u, "gain", nn.Parameter(torch.ones(1))),
        "the unit also holds gain",
    ),
    "a part in a block": (lambda u: setattr(u.proj_1x1, "drop", nn.Dropout()), "proj_1x1 also holds drop"),
    "a norm in a branch": (lambda u: setattr(u.spp_dw[0], "bn", nn.BatchNorm2d(4)), "spp_dw.0 also holds bn"),
    "bare convolutions": (
        lambda u: setattr(u, "spp_dw", nn.ModuleList(branch.conv for branch in u.spp_dw)),
        "spp_dw.0 has no conv; it also holds bias, weight|spp_dw.0 has no conv",
    ),
    "a subclass of the convolution": (
        lambda u: setattr(u.spp_dw[0].conv, "__class__", type("Padded", (nn.Conv2d,), {})),
        "spp_dw.0.conv is a Padded, not a Conv2d",
    ),
    "one branch less": (lambda u: u.spp_dw.__delitem__(3), "proj_1x1.conv has groups 4, not 3"),
    "no branches": (lambda u: setattr(u, "spp_dw", nn.ModuleList()), "spp_dw holds 0 branches"),
    "own forward": (lambda u: setattr(u, "forward", lambda x: x), "its forward was replaced on the object"),
    "hff of another kind": (lambda u: setattr(u, "hff", "half"), "its attribute hff is 'half', not a bool"),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone_and_the_report_says_why(name: str) -> None:
    change, reason = LOOKALIKES[name]
    model = nn.Sequential(changed(change), Unit(16, 16))
    before = state(model)
    report = replace(model)
    assert (report.skipped, report.replaced) == (["0"], ["1"])
    assert report.layers[0].reason in str(report)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.layers[0].reason)
    restore(model)
    assert_same_state(state(model), before)


DOWN_LOOKALIKES: dict[str, tuple[Callable[[Down], object], str]] = {
    "max pooling": (lambda d: setattr(d, "avg", nn.MaxPool2d(3, 2, 1)), "avg is a MaxPool2d"),
    "pooling of 2": (lambda d: setattr(d, "avg", nn.AvgPool2d(2, 2)), "avg has kernel_size 2, not 3"),
    "padding not counted": (
        lambda d: setattr(d, "avg", nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        "avg does not count its padding",
    ),
    "ReLU": (lambda d: setattr(d, "act", nn.ReLU()), "act is a ReLU"),
    "channels": (lambda d: setattr(d, "act", nn.PReLU(16)), "act has 16 slopes, not one for each of 24"),
    "another part": (lambda d: setattr(d, "bn", nn.BatchNorm2d(24)), "the unit also holds bn"),
    "shortcut": (lambda d: setattr(d, "inp_reinf", nn.Conv2d(3, 24, 1)), "inp_reinf is a Conv2d"),
    "wide shortcut": (lambda d: setattr(d.inp_reinf, "0", CBR(3, 3, 5)), r"inp_reinf.0.conv has kernel_size \(5, 5\)"),
    "unit": (lambda d: with_conv(d.eesp, "proj_1x1", bias=True), "eesp is different: proj_1x1.conv has a bias"),
    "other unit": (lambda d: setattr(d, "eesp", nn.Conv2d(8, 16, 3, 2, 1)), "eesp is a Conv2d"),
    "unit that does not stride": (lambda d: setattr(d, "eesp", Unit(8, 16)), "eesp has stride 1"),
}


@pytest.mark.parametrize("name", DOWN_LOOKALIKES)
def test_lookalikes_of_the_down_sampler(name: str) -> None:
    change, reason = DOWN_LOOKALIKES[name]
    down = Down(8, 24)
    change(down)
    report = replace(down)
    assert type(down) is Down
    assert report.layers[0].status == "skipped"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.layers[0].reason)


def test_what_cannot_be_told() -> None:
    """A strided unit alone: only its own attribute says whether the last PReLU runs."""
    for attribute, value, method in (("downAvg", True, "avg"), ("down_method", "esp", "esp"), (None, None, None)):
        unit = Unit(16, 16, stride=2)
        del unit.downAvg
        if attribute is not None:
            setattr(unit, attribute, value)
        report = replace(unit)
        if method is None:
            assert "neither downAvg nor down_method" in report.layers[0].reason
        else:
            assert report.replaced == [""]
            assert unit.down_method == method
    # Inside a down-sampler the structure tells.
    down = Down(8, 24).double()
    del down.eesp.downAvg
    down.eesp.stride = 1
    assert replace(down).replaced == ["", "eesp", "inp_reinf.0"]
    assert (down.eesp.stride, down.eesp.down_method) == (2, "avg")


def test_other_batch_norms_are_fine() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(channels, dtype=torch.float64).view(1, -1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale - 0.1

    unit = nn.SyncBatchNorm.convert_sync_batchnorm(Unit(16, 16)).double().eval()
    unit.br_after_cat.bn = FrozenBatchNorm2d(16)
    x = image(2, 16, 7, 9)
    expected = unit(x)
    assert replace(unit, verify=x).replaced == [""]
    close(unit(x), expected)


def test_parametrized_and_pruned_weights_stay_so() -> None:
    from torch.nn.utils import parametrizations, prune

    model = Network().double()
    parametrizations.weight_norm(model.level3[0].proj_1x1.conv)
    parametrizations.weight_norm(model.level3[0].spp_dw[0].conv)
    prune.random_unstructured(model.level3[1].spp_dw[2].conv, "weight", 0.5)
    parametrizations.weight_norm(model.level3[1].conv_1x1_exp.conv)
    other, x = Network().double(), image()
    parametrizations.weight_norm(other.level3[0].proj_1x1.conv)
    parametrizations.weight_norm(other.level3[0].spp_dw[0].conv)
    prune.custom_from_mask(other.level3[1].spp_dw[2].conv, "weight", model.level3[1].spp_dw[2].conv.weight_mask)
    parametrizations.weight_norm(other.level3[1].conv_1x1_exp.conv)
    other.load_state_dict(model.state_dict())
    assert replace(model, verify=x).replaced == REACHED
    for actual, expected in zip(trained(model, x, 3), trained(other, x, 3), strict=True):
        close(actual, expected)


def test_classes_that_cannot_be_exchanged() -> None:
    class Registered(Unit):
        def __init_subclass__(cls, *, key: str) -> None:
            """Whoever inherits must register; our class does not."""

    class Wide(Unit):
        def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(input)

    model = nn.ModuleList([Registered(16, 16), Wide(16, 16), nn.Module()])
    container = model[2]  # what tracing leaves: the parts, but nothing that runs them
    for name, part in Unit(16, 16).named_children():
        setattr(container, name, part)
    before = state(model[0])
    report = replace(model)
    assert report.replaced == []
    reasons = [layer.reason for layer in report.layers]
    assert reasons[0].startswith("its class cannot be exchanged")
    assert reasons[1:] == [
        "its forward takes input, mask",
        "its class has no forward: a container, as tracing leaves it",
    ]
    assert_same_state(state(model[0]), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layers_are_left_alone() -> None:
    x = image(2, 16, 9, 9)
    scripted = torch.jit.trace(Down(16, 32).double().eval(), x)
    report = replace(nn.Sequential(Unit(16, 16).double().eval(), scripted), verify=x)
    assert report.replaced == ["0"]
    assert report.skipped == ["1", "1.eesp"]
    assert {layer.reason for layer in report.layers[1:]} == {"a scripted module"}


def test_metaclasses_go_along() -> None:
    class Meta(type):
        pass

    class Special(Unit, metaclass=Meta):
        pass

    unit = Special(16, 16)
    assert replace(unit).replaced == [""]
    assert type(type(unit)) is Meta
    assert type(restore(unit)) is Special


def test_nothing_to_replace() -> None:
    report = replace(nn.Sequential(nn.Conv2d(3, 3, 1)), verify=image(dtype=torch.float32))
    assert report == Report(())
    assert str(report).splitlines()[-1] == "0 replaced, 0 skipped, 0 reverted"


# --- verify ---------------------------------------------------------------------------------------------------------


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
    """The identity, whose gradient is off by a tenth of a thousandth in one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        wrong = grad.clone()
        wrong[0, 0, 0, 0] += 1e-4 * grad.abs().max()
        return wrong


def wrong_gradient(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    return reference.spatial_pyramid(WrongGradient.apply(x), *arguments, **named)


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
        (lambda unit, x: WrongGradient.apply(unit(x)), "gradient of .* is off by .* in float64"),
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


class WrongBfloat16Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        wrong = grad.clone()
        if grad.dtype == torch.bfloat16:
            wrong[0, 0, 0, 0] += grad.abs().max()
        return wrong


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
    monkeypatch.setattr(ops, "spatial_pyramid", lambda x, *a, **k: original(WrongBfloat16Gradient.apply(x), *a, **k))
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
