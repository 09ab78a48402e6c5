"""Layers that look like ours and are not, and others that do not and are: what replace leaves alone, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replacing import REACHED, assert_same_state, close, image, state, trained
from somebody import CBR, Down, Network, Unit
from torch import Tensor, nn

from espkernels.replace import Report, replace, restore

pytestmark = pytest.mark.usefixtures("same_each_time")


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
