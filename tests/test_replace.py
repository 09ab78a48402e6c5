"""Replacing the layers of somebody else's model: the same network, what users hold on to, and taking it back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from replacing import LAYERS, REACHED, assert_same_state, close, image, state, trained
from somebody import Down, Network, Unit
from torch import Tensor, nn

from espkernels import fused_shortcut, ops
from espkernels import nn as fused
from espkernels.models import plain
from espkernels.replace import replace, restore

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
