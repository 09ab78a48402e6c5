"""A whole down-sampler in training as one operator: beside its parts one by one, and beside plain torch modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_results import pixels, randomised, results, twin
from torch import Tensor, nn

from espkernels import backends, fused_shortcut, use_backend
from espkernels import nn as fused

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("poison", "same_each_time"),
]

# Channels of the map and of the result, rows, columns; below, at and above a vector, odd maps and single rows.
CASES = [(8, 24, 9, 10), (16, 48, 8, 7), (4, 20, 1, 6), (32, 64, 5, 5), (24, 40, 2, 2)]


@pytest.fixture
def whole_calls(calls_of: Callable[[Any, str], list[str]]) -> list[str]:
    """A word for each down-sampler that ran as one operator so far."""
    return calls_of(fused_shortcut, "down_sampler_training")


def in_parts(layer: nn.Module) -> nn.Module:
    """A copy that runs as its unit, its pooling and its end, as a hook on the unit makes it do."""
    other = copy.deepcopy(layer)
    other.eesp.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    return other


def given(case: tuple[int, int, int, int], dtype: torch.dtype, image: bool = True) -> list[Tensor]:
    channels, _, height, width = case
    maps = [pixels(3, channels, height, width)]
    maps += [pixels(3, 3, (height + 1) // 2, (width + 1) // 2)] if image else []
    return [map_.to(dtype) for map_ in maps]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_beside_plain_torch(isa: str, case: tuple[int, int, int, int], memory: str, whole_calls: list[str]) -> None:
    for training, reinf in ((True, True), (True, False), (False, True)):
        layer = randomised(fused.DownSampler(*case[:2], reinf=reinf, memory=memory)).double().train(training)
        inputs = given(case, torch.float64, reinf)
        expected, actual = results(twin(layer), *inputs), results(layer, *inputs)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert len(whole_calls) == 3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_the_bits_of_its_parts(isa: str, case: tuple[int, int, int, int], memory: str, whole_calls: list[str]) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = randomised(fused.DownSampler(*case[:2], memory=memory)).to(dtype)
        inputs, parts = given(case, dtype), in_parts(layer)
        expected, actual = (results(one, *inputs) for one in (parts, layer))
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key
    assert len(whole_calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(isa: str, dtype: torch.dtype, whole_calls: list[str]) -> None:
    """As near to float64 as its parts: the sum of two gradients of the map is rounded once, not twice."""
    layer = randomised(fused.DownSampler(16, 48))
    inputs = [map_.to(dtype) for map_ in given(CASES[1], torch.float32)]
    exact = results(copy.deepcopy(layer).double(), *(map_.double() for map_ in inputs))["input 0"]
    found = [results(one.to(dtype), *inputs)["input 0"].double() for one in (layer, in_parts(layer))]
    assert len(whole_calls) == 2
    ours, parts = ((one - exact).norm() for one in found)
    assert ours <= 1.05 * parts  # most of the error comes from the maps that both keep


def kept(layer: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes that a forward pass keeps beside parameters and inputs."""
    storages: dict[int, tuple[Tensor, int]] = {}
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *inputs)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(*inputs)
    return sum(size for _, size in storages.values())


def test_what_recompute_keeps_of_maps() -> None:
    channels, out_channels, height, width = 16, 48, 64, 60
    inputs = given((channels, out_channels, height, width), torch.float32)
    layers = [fused.DownSampler(channels, out_channels, memory=memory) for memory in ("save", "recompute")]
    save, recompute = (kept(layer, inputs) for layer in layers)
    unit = out_channels - channels
    maps = channels + 2 * unit  # pooled, concatenated, normalised
    assert save - recompute == 4 * maps * inputs[0].shape[0] * height * width // 4
    assert kept(in_parts(layers[1]), inputs) > recompute


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_each_norm_has_its_eps(memory: str, whole_calls: list[str]) -> None:
    torch.manual_seed(0)
    layer = randomised(fused.DownSampler(8, 24, r_lim=5)).double()
    layer.memory = layer.eesp.memory = memory  # type: ignore[assignment]
    unit = layer.eesp
    unit.proj_1x1.bn.eps, unit.br_after_cat.bn.eps, unit.conv_1x1_exp.bn.eps = 0.5, 0.01, 0.1
    inputs = pixels(2, 8, 7, 6), pixels(2, 3, 14, 12)
    expected, actual = results(twin(layer), *inputs), results(layer, *inputs)
    assert whole_calls
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck_and_second_derivative() -> None:
    layer = randomised(fused.DownSampler(4, 20, memory="recompute")).double()
    x, image = (map_.requires_grad_() for map_ in given((4, 20, 3, 4), torch.float64))
    assert torch.autograd.gradcheck(layer, (x, image), nondet_tol=0.0)
    (grad,) = torch.autograd.grad(layer(x, image).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_opcheck(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch.ops.espkernels.down_sampler_training.default
    seen: list[tuple[Any, ...]] = []
    watched = SimpleNamespace(default=lambda *a: seen.append(a) or operator(*a))
    monkeypatch.setattr(torch.ops.espkernels, "down_sampler_training", watched)
    randomised(fused.DownSampler(8, 24, memory=memory))(*given(CASES[0], torch.float32))
    monkeypatch.undo()
    (arguments,) = seen
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(operator, tuple(leaves))


@pytest.mark.parametrize("wanted", ["map", "image", "unit", "end", "none of the unit"])
def test_gradients_that_nobody_needs(wanted: str, whole_calls: list[str]) -> None:
    layer = randomised(fused.DownSampler(8, 24)).double()
    inputs = given(CASES[0], torch.float64)
    expected = results(layer, *inputs)
    chosen: dict[str, Callable[[str], bool]] = {
        "map": lambda name: name == "input 0",
        "image": lambda name: name == "input 1",
        "unit": lambda name: name.startswith("eesp"),
        "end": lambda name: name == "act.weight",
        "none of the unit": lambda name: not name.startswith("eesp") and name != "input 0",
    }
    leaves = [map_.requires_grad_(chosen[wanted](f"input {i}")) for i, map_ in enumerate(inputs)]
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(chosen[wanted](name))
    layer.zero_grad(set_to_none=True)
    output = layer(*leaves)
    output.backward(torch.linspace(-1, 1, output.numel()).double().reshape(output.shape).cos())
    found = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    for name, value in found.items():
        assert (value is not None) == (chosen[wanted](name) and name in expected), name
        if value is not None:
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert len(whole_calls) == 2


def test_autocast_lowers_the_map_of_a_whole_one_only_where_it_is_low_already(whole_calls: list[str]) -> None:
    layer = randomised(fused.DownSampler(8, 24))
    x, image = given(CASES[0], torch.float32)
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x.to(dtype), image)
        assert result.dtype == torch.bfloat16 and len(whole_calls) == count
        result.float().sum().backward()


def test_where_it_runs_in_parts(whole_calls: list[str]) -> None:
    inputs = given(CASES[0], torch.float64)
    layer: Any = fused.DownSampler(8, 24).double()
    expected = layer(*inputs)
    assert len(whole_calls) == 1
    torch.testing.assert_close(in_parts(layer)(*inputs), expected)
    with use_backend("reference"):
        torch.testing.assert_close(layer(*inputs), expected)
    with torch.no_grad():
        layer.eval()(*inputs)  # no gradient is wanted, and no norm takes the batch
    esp: Any = fused.DownSampler(8, 24).double()
    esp.eesp = fused.EESP(8, 16, 2).double()  # ends with a PReLU of its own
    esp(*inputs)
    assert len(whole_calls) == 1


def test_an_added_gradient_of_pooling_is_refused_where_it_does_not_fit() -> None:
    add = torch.ops.espkernels.add_average_pool_backward.default
    map_, grad = pixels(2, 3, 5, 4).float(), pixels(2, 3, 3, 2).float()
    torch.library.opcheck(add, (map_, grad))
    for arguments, message in (
        ((map_, grad[:, :, :2]), "half as many rows"),
        ((map_, grad[:, :2]), "batch and channels of grad"),
        ((map_, grad[:1]), "batch and channels of grad"),
        ((map_.contiguous(), grad), "in channels_last"),
        ((map_, grad.double()), "one dtype"),
        ((map_[0], grad), "4 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add(*arguments)
