"""The layers: the official results, the official keys, every size, and what torch does to modules."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_results import randomised, results, twin
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from espkernels import nn as fused
from espkernels import ops
from espkernels.models import plain
from espkernels.replace import replace

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"
GOLDEN = sorted((SHARED / "golden").glob("*.safetensors"))
golden = pytest.mark.skipif(not GOLDEN, reason="the official layers' results are not at ../shared/golden")


pytestmark = pytest.mark.usefixtures("same_each_time")


# --- the official results -------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    return metadata["module"], json.loads(metadata["kwargs"]), tensors


def check_golden(
    path: Path,
    library: Any,
    dtype: torch.dtype,
    tolerance: float,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    kind, arguments, expected = load(path)
    layer = getattr(library, kind)(**arguments)
    state = {name.removeprefix("state."): t for name, t in expected.items() if name.startswith("state.")}
    assert list(layer.state_dict().keys() ^ state.keys()) == []
    layer.load_state_dict(state, strict=True)
    layer.to(dtype, memory_format=memory_format)
    inputs = [
        expected[name].to(dtype).contiguous(memory_format=memory_format)
        for name in ("input", "image")
        if name in expected
    ]

    compared: set[str] = set()

    def close(name: str, actual: Tensor | None) -> None:
        assert actual is not None, name
        truth = expected[name]
        scale = max(1.0, truth.abs().max().item())
        error = (actual.double() - truth).abs().max().item() / scale
        assert error <= tolerance, f"{name} is off by {error:.2e}"
        compared.add(name)

    layer.eval()
    with torch.no_grad():
        close("eval.output", layer(*inputs))
    assert all(torch.equal(state[name].to(value.dtype), value) for name, value in layer.state_dict().items())
    layer.train()
    leaves = [value.clone().requires_grad_() for value in inputs]
    output = layer(*leaves)
    close("train.output", output)
    assert output.is_contiguous(memory_format=memory_format)
    output.backward(expected["train.grad_output"].to(dtype))
    for name, leaf in zip(("train.grad_input", "train.grad_image"), leaves, strict=False):
        close(name, leaf.grad)
    for name, parameter in layer.named_parameters():
        if f"train.grad.{name}" in expected:
            close(f"train.grad.{name}", parameter.grad)
        else:
            assert parameter.grad is None, name  # the last PReLU of a strided unit
    for name, buffer in layer.named_buffers():
        close(f"train.buffer.{name}", buffer)
    truths = {name for name in expected if name.startswith(("train.", "eval."))} - {"train.grad_output"}
    assert compared == truths


@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("library", [fused, plain], ids=["kernels", "plain"])
def test_official_results_in_double(path: Path, library: Any) -> None:
    check_golden(path, library, torch.float64, 1e-12)


@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_official_results_in_single(path: Path) -> None:
    check_golden(path, fused, torch.float32, 2e-5)


@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_official_results_in_channels_last(path: Path) -> None:
    check_golden(path, fused, torch.float64, 1e-12, torch.channels_last)


@pytest.mark.skipif(not (SHARED / "golden/state_dict_keys.json").exists(), reason="../shared/golden is not there")
@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("level2_0.", fused.DownSampler(32, 64, r_lim=13)),
        ("level3_0.", fused.DownSampler(64, 128, r_lim=11)),
        ("level5_0.", fused.DownSampler(256, 512, r_lim=7)),
        ("level3.2.", fused.EESP(128, 128, r_lim=9)),
        ("level5.0.", fused.EESP(512, 512, r_lim=5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_official_keys_and_shapes(prefix: str, layer: nn.Module) -> None:
    checkpoint = json.loads((SHARED / "golden/state_dict_keys.json").read_text())["espnetv2_s_1.0_imagenet"]
    expected = {key.removeprefix(prefix): shape for key, shape in checkpoint.items() if key.startswith(prefix)}
    actual = {key: list(value.shape) for key, value in layer.state_dict().items()}
    assert actual == expected
    assert list(actual) == list(expected)  # an optimizer's state goes by the order of the parameters


# --- the receptive-field rule ---------------------------------------------------------------------------------------

# Level, input size at 224, limit, kernel sizes, dilations: the official networks'.
RECEPTIVE_FIELDS = [
    ("level2_0", 112, 13, (3, 5, 7, 9), (1, 2, 3, 4)),
    ("level3_0", 56, 11, (3, 5, 7, 9), (1, 2, 3, 4)),
    ("level3", 28, 9, (3, 5, 7, 9), (1, 2, 3, 4)),
    ("level4_0", 28, 9, (3, 5, 7, 9), (1, 2, 3, 4)),
    ("level4", 14, 7, (3, 3, 5, 7), (1, 1, 2, 3)),
    ("level5_0", 14, 7, (3, 3, 5, 7), (1, 1, 2, 3)),
    ("level5", 7, 5, (3, 3, 3, 5), (1, 1, 1, 2)),
]


@pytest.mark.parametrize(("level", "size", "limit", "sizes", "dilations"), RECEPTIVE_FIELDS, ids=lambda v: str(v))
def test_receptive_field_rule(
    level: str, size: int, limit: int, sizes: tuple[int, ...], dilations: tuple[int, ...]
) -> None:
    assert fused.kernel_sizes(4, limit) == sizes
    assert fused.branch_dilations(4, limit) == dilations
    # The paper's formula, 5 + Z / 7 floored to an odd size, gives the same branches as the official table.
    by_formula = 5 + size // 7
    assert fused.branch_dilations(4, by_formula - (by_formula + 1) % 2) == dilations
    unit = fused.EESP(16, 16, r_lim=limit)
    assert tuple(branch.conv.dilation[0] for branch in unit.spp_dw) == dilations  # type: ignore[union-attr]
    assert all(branch.conv.padding == branch.conv.dilation for branch in unit.spp_dw)  # type: ignore[union-attr]


def test_receptive_field_rule_at_its_ends() -> None:
    assert fused.kernel_sizes(1, 13) == (3,)
    assert fused.kernel_sizes(8, 17) == (3, 5, 7, 9, 11, 13, 15, 17)
    assert fused.kernel_sizes(8, 8) == (3, 3, 3, 3, 3, 3, 5, 7)
    assert fused.kernel_sizes(5, 3) == (3,) * 5
    assert fused.branch_dilations(4, 13, dilated=False) == (1, 1, 1, 1)


# --- sizes ----------------------------------------------------------------------------------------------------------


SIZES = [(1, 1), (1, 5), (7, 1), (2, 3), (5, 5), (9, 14), (16, 11)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (lambda: fused.EESP(16, 16, r_lim=9), 16),
        (lambda: fused.EESP(8, 32, k=4, r_lim=7), 8),
        (lambda: fused.EESP(8, 16, stride=2, down_method="esp"), 8),
        (lambda: fused.EESP(16, 16, stride=2, down_method="esp"), 16),
        (lambda: fused.EESP(8, 16, stride=2, down_method="avg"), 8),
        (lambda: fused.EESP(8, 16, stride=1, down_method="avg"), 8),
        (lambda: fused.EESP(6, 18, k=3, r_lim=5, hff=False), 6),
        (lambda: fused.EESP(16, 16, dilated=False), 16),
        (lambda: fused.DownSampler(8, 24, reinf=False), 8),
    ],
    ids=["same", "wider", "esp", "esp-square", "avg", "avg-stride-1", "no-hff", "no-dilation", "down"],
)
def test_every_size(build: Any, channels: int, size: tuple[int, int], training: bool) -> None:
    layer = randomised(build()).double().train(training)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    expected, actual = results(twin(layer), x), results(layer, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("stride", [1, 2])
def test_every_number_of_branches(k: int, stride: int) -> None:
    layer = randomised(fused.EESP(2 * k, 2 * k**2, stride, k, 2 * k + 1)).double()
    assert layer.dilations == tuple(range(1, k + 1))
    x = torch.randn(2, 2 * k, 11, 9, dtype=torch.float64)
    expected, actual = results(twin(layer), x), results(layer, x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_one_image_trains_and_one_pixel_says_so() -> None:
    layer = fused.EESP(8, 16).double()
    assert results(layer, torch.randn(1, 8, 3, 2, dtype=torch.float64))["output"].isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 8, 1, 1, dtype=torch.float64))
    assert layer.eval()(torch.randn(1, 8, 1, 1, dtype=torch.float64)).shape == (1, 16, 1, 1)


def test_empty_batch() -> None:
    assert fused.EESP(8, 16).eval()(torch.randn(0, 8, 5, 6)).shape == (0, 16, 5, 6)
    assert fused.DownSampler(8, 24).eval()(torch.randn(0, 8, 5, 6), torch.randn(0, 3, 20, 24)).shape == (0, 24, 3, 3)


# --- what the official code does ------------------------------------------------------------------------------------


def test_hff_is_a_running_sum() -> None:
    """Fig. 1c by hand: every branch on its own, summed up, then the rest of the unit."""
    layer = randomised(fused.EESP(8, 16, r_lim=9)).double().eval()
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    reduced = layer.proj_1x1(x)
    branches = [branch(reduced) for branch in layer.spp_dw]
    for hff in (True, False):
        layer.hff = hff
        maps = list(itertools.accumulate(branches)) if hff else branches
        expected = layer.module_act(layer.conv_1x1_exp(layer.br_after_cat(torch.cat(maps, 1))))
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_strided_unit_of_the_down_sampler_ends_before_its_prelu() -> None:
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    averaging = randomised(fused.EESP(8, 16, 2, down_method="avg")).double().eval()
    own = fused.EESP(8, 16, 2, down_method="esp").double().eval()
    own.load_state_dict(averaging.state_dict())
    torch.testing.assert_close(own(x), averaging.module_act(averaging(x)), rtol=0, atol=0)
    assert (averaging(x) < own(x).min()).any()


def test_residual_only_where_the_shapes_agree() -> None:
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    for layer, added in ((fused.EESP(16, 16), True), (fused.EESP(16, 16, 2), False), (fused.EESP(16, 32), False)):
        layer.double().eval()
        nn.init.zeros_(layer.conv_1x1_exp.conv.weight)
        nn.init.ones_(layer.module_act.weight)
        torch.testing.assert_close(layer(x), x if added else torch.zeros_like(layer(x)), rtol=0, atol=0)


def test_down_sampler_puts_the_pooled_map_first_and_adds_the_shortcut_before_its_prelu() -> None:
    layer = randomised(fused.DownSampler(8, 24, r_lim=11)).double().eval()
    x, image = torch.randn(2, 8, 10, 13, dtype=torch.float64), torch.randn(2, 3, 39, 52, dtype=torch.float64)
    pooled = image
    for _ in range(3):
        pooled = F.avg_pool2d(pooled, 3, 2, 1)
    maps = torch.cat([F.avg_pool2d(x, 3, 2, 1), layer.eesp(x)], 1)
    torch.testing.assert_close(layer(x), layer.act(maps), rtol=1e-12, atol=1e-12)
    expected = layer.act(maps + layer.inp_reinf(pooled))
    torch.testing.assert_close(layer(x, image), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, pooled), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, F.avg_pool2d(image, 3, 2, 1)), expected, rtol=1e-12, atol=1e-12)


def test_initial_values() -> None:
    layer = fused.DownSampler(64, 320)
    for part in layer.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            if part.weight.numel() > 2000:
                # torch counts all output channels, also of a grouped convolution.
                assert part.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            assert part.bias is None
        elif isinstance(part, nn.BatchNorm2d):
            assert (part.weight == 1).all()
            assert (part.bias == 0).all()
        elif isinstance(part, nn.PReLU):
            assert (part.weight == 0.25).all()
    linear = nn.Linear(400, 50)
    fused.init_parameters(linear)
    assert linear.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert (linear.bias == 0).all()


def test_ablations_change_neither_keys_nor_parameters() -> None:
    kinds = [{}, {"hff": False}, {"dilated": False}, {"hff": False, "dilated": False}]
    for build in (lambda **kw: fused.EESP(16, 16, **kw), lambda **kw: fused.DownSampler(16, 32, **kw)):
        shapes = [{n: v.shape for n, v in build(**kind).state_dict().items()} for kind in kinds]
        assert shapes[1:] == shapes[:1] * 3
    down = fused.DownSampler(16, 32, r_lim=9, hff=False, dilated=False)
    assert (down.eesp.hff, down.eesp.dilations, down.eesp.down_method) == (False, (1, 1, 1, 1), "avg")


# --- the image's pyramid --------------------------------------------------------------------------------------------


def test_pooled_image_goes_on_from_any_level() -> None:
    image = torch.randn(2, 3, 100, 61)
    sizes = [(50, 31), (25, 16), (13, 8), (7, 4), (4, 2), (2, 1), (1, 1)]
    stepwise, halved = image, image
    for size in sizes:
        halved = F.avg_pool2d(halved, kernel_size=3, stride=2, padding=1)
        stepwise = fused.pooled_image(stepwise, size)
        torch.testing.assert_close(stepwise, halved, rtol=1e-6, atol=1e-6)
        assert torch.equal(fused.pooled_image(image, size), stepwise)
    assert fused.pooled_image(image, (100, 61)) is image


@pytest.mark.parametrize("size", [(24, 15), (99, 61), (100, 60), (1, 61), (33, 2), (51, 31), (3, 1)], ids=str)
def test_pooled_image_ends_at_sizes_that_halving_misses(size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, 100, 61, dtype=torch.float64)
    pooled = fused.pooled_image(image, size)
    assert pooled.shape == (1, 3, *size)
    halved = image
    while (halved.shape[2] + 1) // 2 >= size[0] and (halved.shape[3] + 1) // 2 >= size[1]:
        halved = F.avg_pool2d(halved, kernel_size=3, stride=2, padding=1)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(halved, size))


@pytest.mark.parametrize("shape", [(1, 3, 4, 9), (1, 3, 9, 4), (3, 9, 9)], ids=str)
def test_image_that_is_too_small(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image: shape .*expected"):
        fused.pooled_image(torch.zeros(shape), (5, 5))
    with pytest.raises(ValueError, match=r"image: shape .*expected"):
        fused.DownSampler(8, 24).eval()(torch.zeros(1, 8, 10, 10), torch.zeros(shape))


def test_image_without_shortcut() -> None:
    with pytest.raises(ValueError, match=r"image: shape .*reinf=False"):
        fused.DownSampler(8, 24, reinf=False).eval()(torch.zeros(1, 8, 8, 8), torch.zeros(1, 3, 32, 32))


def test_images_of_other_channels() -> None:
    layer = fused.DownSampler(8, 24, image_channels=1).eval()
    assert layer(torch.zeros(1, 8, 8, 8), torch.zeros(1, 1, 32, 32)).shape == (1, 24, 4, 4)
    assert layer.inp_reinf[1].conv.in_channels == 3


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fused.EESP(16, 16, k=0), "k: got 0, expected from 1 to 8"),
        (lambda: fused.EESP(18, 18, k=9), "k: got 9, expected from 1 to 8"),
        (lambda: fused.EESP(16, 20), "out_channels: got 20, expected a positive multiple of k [*] k = 16"),
        (lambda: fused.EESP(15, 16), "in_channels: got 15, expected a positive multiple of k = 4"),
        (lambda: fused.EESP(16, 0), "out_channels: got 0, expected a positive multiple"),
        (lambda: fused.EESP(16, 16, 3), "stride: got 3, expected 1 or 2"),
        (lambda: fused.EESP(16, 16, down_method="max"), "down_method: got 'max', expected 'esp' or 'avg'"),
        (lambda: fused.DownSampler(16, 16), "out_channels: got 16 with in_channels = 16"),
        (lambda: fused.DownSampler(16, 30), "out_channels: got 30 with in_channels = 16"),
        (lambda: fused.DownSampler(16, 36), "out_channels: got 36 with in_channels = 16"),
        (lambda: fused.DownSampler(15, 31), "in_channels: got 15"),
        (lambda: fused.DownSampler(16, 32, k=0), "k: got 0"),
    ],
)
def test_wrong_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_official_positional_order() -> None:
    unit = fused.EESP(16, 32, 2, 4, 5, "avg")
    assert (unit.stride, unit.dilations, unit.down_method) == (2, (1, 1, 1, 2), "avg")
    down = fused.DownSampler(16, 32, 2, 5, False)
    assert (len(down.eesp.spp_dw), down.eesp.dilations, hasattr(down, "inp_reinf")) == (2, (1, 2), False)


# --- what torch and its users do to modules -------------------------------------------------------------------------


def test_the_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("spatial_pyramid", "group_pointwise", "pyramid_pointwise"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=original, **k: calls.append(n) or f(*a, **k))
    down = fused.DownSampler(8, 24).eval()
    with torch.no_grad():
        down(torch.randn(1, 8, 8, 8), torch.randn(1, 3, 32, 32))
        assert calls == ["group_pointwise", "pyramid_pointwise"]
        calls.clear()
        down.eesp.br_after_cat.register_forward_hook(lambda *_: None)
        down(torch.randn(1, 8, 8, 8), torch.randn(1, 3, 32, 32))
    assert calls == ["group_pointwise", "spatial_pyramid", "group_pointwise"]
    calls.clear()
    plain.DownSampler(8, 24).eval()(torch.randn(1, 8, 8, 8), torch.randn(1, 3, 32, 32))
    assert calls == []


def test_state_dict_copy_and_pickle_keep_the_function() -> None:
    layer = randomised(fused.DownSampler(8, 24, r_lim=5, hff=False)).eval()
    x, image = torch.randn(2, 8, 9, 6), torch.randn(2, 3, 36, 24)
    expected = layer(x, image)
    fresh = fused.DownSampler(8, 24, r_lim=5, hff=False).eval()
    assert not torch.equal(fresh(x, image), expected)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, image), expected)
        assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))
        assert repr(other) == repr(layer)


@pytest.mark.parametrize(
    "name", ["proj_1x1", "proj_1x1.conv", "spp_dw.2", "spp_dw.0.conv", "conv_1x1_exp", "conv_1x1_exp.conv"]
)
def test_hooks_on_convolutions_run_and_count(name: str) -> None:
    """A hook may watch or change a result: both must come out as in plain torch modules."""
    layer = randomised(fused.EESP(8, 16)).double().eval()
    other, x = twin(layer), torch.randn(2, 8, 7, 8, dtype=torch.float64)
    before = layer(x)
    seen: list[str] = []
    for each in (layer, other):
        each.get_submodule(name).register_forward_hook(lambda *args: seen.append(name) or 2 * args[2])
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    assert seen == [name, name]
    assert not torch.allclose(layer(x), before)


class LowRank(nn.Conv2d):
    """A convolution with a forward of its own, as adapters have."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * super().forward(input.flip(1))


def _with_bias(conv: nn.Conv2d) -> None:
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels, dtype=conv.weight.dtype))


def _dilated_more(conv: nn.Conv2d) -> None:
    conv.dilation = conv.padding = (4, 4)


def _padded_with_itself(conv: nn.Conv2d) -> None:
    conv.padding_mode = "circular"


def _forward_on_the_object(conv: nn.Conv2d) -> None:
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


CHANGES = (_with_bias, lambda conv: setattr(conv, "__class__", LowRank), _forward_on_the_object)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in ("proj_1x1.conv", "spp_dw.1.conv", "conv_1x1_exp.conv") for change in CHANGES),
        ("spp_dw.1.conv", _dilated_more),
        ("spp_dw.1.conv", _padded_with_itself),
    ],
)
@pytest.mark.parametrize("replaced", [False, True], ids=["ours", "replaced"])
def test_changed_convolutions(name: str, change: Any, training: bool, replaced: bool) -> None:
    """A convolution that is more than its weight, in a unit of ours and in one that was replaced before."""
    layer = randomised(fused.EESP(8, 16)).double().train(training)
    other = twin(layer)
    if replaced:
        layer = copy.deepcopy(other)
        assert replace(layer).replaced == [""]
    for each in (layer, other):
        change(each.get_submodule(name))
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64)
    expected, actual = results(other, x), results(layer, x)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda down: setattr(down, "avg", nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        lambda down: setattr(down, "avg", nn.AvgPool2d(3, 2, 1, divisor_override=5)),
        lambda down: setattr(down, "avg", nn.AvgPool2d(5, 2, 2)),
        lambda down: setattr(down, "act", nn.PReLU().double()),
        lambda down: _with_bias(down.inp_reinf[1].conv),
        lambda down: setattr(down.inp_reinf[1].conv, "__class__", LowRank),
        lambda down: setattr(down.inp_reinf[1], "conv", nn.Conv2d(3, 24, 1, groups=3, bias=False).double()),
        lambda down: down.inp_reinf.__setitem__(1, nn.Conv2d(3, 24, 1).double()),
        lambda down: down.inp_reinf.append(nn.Tanh()),
    ],
    ids=["padding", "divisor", "size", "slope", "bias", "class", "groups", "folded", "another"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_changed_end_of_a_down_sampler(change: Any, training: bool) -> None:
    layer = randomised(fused.DownSampler(8, 24)).double().train(training)
    change(layer)
    x, image = torch.randn(2, 8, 7, 8, dtype=torch.float64), torch.randn(2, 3, 14, 16, dtype=torch.float64)
    expected, actual = results(twin(layer), x, image), results(layer, x, image)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10)


def test_convolutions_with_their_norms_folded_in() -> None:
    layer = randomised(fused.EESP(8, 16)).double().eval()
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64)
    expected = twin(layer)(x)
    for part in (layer.proj_1x1, layer.conv_1x1_exp):
        part.conv, part.bn = nn.utils.fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    gradients = results(layer, x), results(twin(layer), x)
    for key, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], value, rtol=1e-10, atol=1e-10)


def test_pruning() -> None:
    from torch.nn.utils import prune

    layer = randomised(fused.EESP(8, 16)).double()
    for module in (layer.proj_1x1.conv, layer.spp_dw[1].conv, layer.conv_1x1_exp.conv):
        prune.l1_unstructured(module, "weight", amount=0.5)
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.spp_dw[1].conv.weight_orig.grad.count_nonzero() <= layer.spp_dw[1].conv.weight_mask.sum()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)  # the pruned weights follow in the next forward
    before = layer.proj_1x1.conv.weight.clone()
    layer(x)
    assert not torch.equal(layer.proj_1x1.conv.weight, before)


def test_gradients_have_the_layout_of_their_parameters() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = fused.DownSampler(8, 24).to(memory_format=memory_format)
        x, image = torch.randn(2, 8, 9, 8), torch.randn(2, 3, 36, 32)
        layer(x.contiguous(memory_format=memory_format), image.contiguous(memory_format=memory_format)).sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.stride() == parameter.stride(), name


def test_frozen_parts_get_no_gradient() -> None:
    layer = fused.EESP(8, 16)
    layer.spp_dw[1].requires_grad_(False)
    layer.proj_1x1.requires_grad_(False)
    layer(torch.randn(2, 8, 7, 7)).sum().backward()
    got = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert got == {n for n, _ in layer.named_parameters() if not n.startswith(("spp_dw.1.", "proj_1x1."))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    layer = randomised(fused.DownSampler(8, 24)).eval()
    x, image = torch.randn(2, 8, 9, 8), torch.randn(2, 3, 36, 32)
    expected = layer(x, image)
    with torch.autocast("cpu", dtype=dtype):
        mixed = layer(x, image)
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype), image.to(dtype))
    assert half.dtype == dtype
    for actual in (mixed, half):
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert 0 < error < 16 * torch.finfo(dtype).eps


def test_compiles_whole_and_once() -> None:
    layer = randomised(fused.DownSampler(8, 24)).eval()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for height, width in ((9, 7), (11, 14), (30, 17)):
            x, image = torch.randn(2, 8, height, width), torch.randn(2, 3, 4 * height, 4 * width)
            torch.testing.assert_close(compiled(x, image), layer(x, image))
    assert len(graphs) == 1


@pytest.mark.parametrize("training", [False, True])
def test_hooks_of_a_down_sampler_fire(training: bool) -> None:
    torch.manual_seed(0)
    layer = fused.DownSampler(8, 24).double().train(training)
    other = copy.deepcopy(layer)
    inputs = torch.randn(2, 8, 8, 6, dtype=torch.float64), torch.randn(2, 3, 16, 12, dtype=torch.float64)
    for name in ("inp_reinf", "inp_reinf.0", "inp_reinf.1", "inp_reinf.1.bn", "inp_reinf.1.conv", "avg", "act", "eesp"):
        calls: list[str] = []
        hook = layer.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append("called"))
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(layer(*inputs), other(*inputs), rtol=1e-12, atol=1e-12)
        assert calls == ["called"], name
        hook.remove()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("build", [lambda: fused.EESP(16, 16), lambda: fused.DownSampler(16, 48)])
def test_hooks_of_every_module_fire(build: Any, grad: bool) -> None:
    layer = build()
    x = torch.randn(1, 16, 8, 8), *([torch.randn(1, 3, 16, 16)] if hasattr(layer, "inp_reinf") else [])

    def called(one: nn.Module) -> set[str]:
        names, found = {part: name for name, part in one.named_modules()}, set()
        with torch.set_grad_enabled(grad), register_module_forward_hook(lambda part, *_: found.add(names[part])):
            one(*x)
        return found

    assert called(layer) == called(twin(layer)) and len(called(layer)) > 10
