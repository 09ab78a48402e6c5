"""Whole units in training on the Triton kernels: the layers one by one are the specification, in float64."""

from __future__ import annotations

import pytest
import torch
from layer_results import randomised, results, twin
from torch import Tensor, nn
from triton_tests import DEVICE, gpu_or_interpreter

import espkernels
from espkernels import backends
from espkernels import nn as fused
from espkernels.fused_unit import fits

pytestmark = gpu_or_interpreter()

UNITS = {
    "residual": (lambda: fused.EESP(16, 16, r_lim=9), (2, 16, 7, 9)),
    "strided with its prelu": (lambda: fused.EESP(16, 16, 2, r_lim=9), (2, 16, 8, 7)),
    "no hff": (lambda: fused.EESP(6, 18, k=3, r_lim=7, hff=False), (2, 6, 5, 6)),
    "strided, wider, without prelu": (lambda: fused.EESP(8, 24, 2, k=2, r_lim=5, down_method="avg"), (2, 8, 5, 6)),
    "several tiles": (lambda: fused.EESP(48, 48, r_lim=9), (1, 48, 9, 10)),
    "map smaller than a dilation": (lambda: fused.EESP(16, 16, r_lim=9), (4, 16, 3, 2)),
}


def there(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layer = layer.to(DEVICE)
    with espkernels.use_backend("triton"):
        assert fits(layer.layers(), x.to(DEVICE)), "the unit runs layer by layer"  # type: ignore[operator]
        return {name: value.cpu() for name, value in results(layer, x.to(DEVICE)).items()}


@pytest.mark.parametrize("name", UNITS, ids=lambda n: n.replace(" ", "-"))
def test_unit_in_double(name: str) -> None:
    """The bound is that of tests/test_eesp_training.py."""
    build, shape = UNITS[name]
    torch.manual_seed(0)
    layer, x = randomised(build()).double(), torch.randn(shape, dtype=torch.float64)
    layer.memory = "recompute" if shape[2] % 2 else "save"  # type: ignore[assignment]
    expected, actual = results(twin(layer), x), there(layer, x)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def test_running_statistics() -> None:
    """In evaluation, and with one norm frozen among others in training; a norm without vectors and statistics too."""
    torch.manual_seed(1)
    layer, x = randomised(fused.EESP(8, 16, 2, k=2, r_lim=5)).double(), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    frozen = layer.br_after_cat.bn
    layer.proj_1x1.bn = nn.BatchNorm2d(8, affine=False, track_running_stats=False, dtype=torch.float64)
    for training in (False, True):
        layer.train(training)
        frozen.eval()
        expected, actual = results(twin(layer), x), there(layer, x)
        layer.cpu()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def test_only_norms_and_slopes_learn() -> None:
    torch.manual_seed(0)
    layer, x = randomised(fused.EESP(8, 8, k=2)).double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(".bn." in name or name.endswith("act.weight"))
    other = twin(layer)
    layer = layer.to(DEVICE)
    with espkernels.use_backend("triton"):
        assert fits(layer.layers(), x.to(DEVICE))
        layer(x.to(DEVICE)).square().sum().backward()
    other(x).square().sum().backward()
    learnt = 0
    for found, expected in zip(layer.parameters(), other.parameters(), strict=True):
        if expected.grad is not None:
            learnt += 1
            assert found.grad is not None
            torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-9, atol=1e-9)
    assert learnt == 9


def test_each_norm_has_its_eps() -> None:
    torch.manual_seed(0)
    layer, x = randomised(fused.EESP(8, 8, k=2)).double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    layer.proj_1x1.bn.eps, layer.br_after_cat.bn.eps, layer.conv_1x1_exp.bn.eps = 0.5, 0.01, 0.1
    expected, actual = results(twin(layer), x), there(layer, x)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def test_variance_far_from_zero() -> None:
    """Mean 1e4 and variance about 1 in float32; the bounds are those of tests/test_eesp_training.py."""
    torch.manual_seed(0)
    unit = fused.EESP(16, 16, r_lim=9)
    x = (1e4 + torch.randn(2, 16, 12, 14)).contiguous(memory_format=torch.channels_last)
    d, n = 4, 16
    pick = torch.zeros(d, 4)
    pick[:, 0] = 1.0
    ones, zeros = torch.ones(d + 2 * n), torch.zeros(d + 2 * n)
    tensors = (x, pick, unit.pyramid_weight().detach(), torch.eye(4).repeat(4, 1), ones, 1e4 + zeros)
    x, pick, weight, expand, ones, bias = (tensor.to(DEVICE) for tensor in tensors)
    with espkernels.use_backend("triton"):
        _, *maps, statistics = torch.ops.espkernels.eesp_training(
            x, pick, 4, weight, list(unit.dilations), expand, 4, ones, bias, ones, None, None,
            [1e-5] * 3, [True] * 3, 1, True, False, True,
        )  # fmt: skip
    first = 0
    for stored in maps:
        double, channels = stored.double().transpose(0, 1).flatten(1), stored.shape[1]
        mean, variance = statistics[:, first : first + channels]
        torch.testing.assert_close(mean, double.mean(1), rtol=4e-6, atol=0)
        torch.testing.assert_close(variance, double.var(1, correction=0), rtol=1e-5, atol=0)
        first += channels
    assert (maps[0].mean() - 1e4).abs() < 1


def test_the_same_bits_each_time() -> None:
    torch.manual_seed(0)
    layer, x = randomised(fused.EESP(16, 16, r_lim=5)), torch.randn(2, 16, 6, 7)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    first = there(layer, x)
    layer.load_state_dict(state)
    assert all(torch.equal(value, first[name]) for name, value in there(layer, x).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["autocast", "pure"])
def test_half_types(dtype: torch.dtype, kind: str) -> None:
    """Not much further from float64 than torch's own layers in the same type are: see tests/test_eesp_training.py.

    The interpreter cuts bfloat16 where a GPU rounds it: twice the error.
    """
    torch.manual_seed(0)
    layer = randomised(fused.EESP(32, 32, k=2, r_lim=5)).to(dtype).float()
    x = torch.randn(4, 32, 6, 6).to(dtype).float()
    truth = results(twin(layer).double(), x.double())
    if kind == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            eager = results(twin(layer), x)
        with torch.autocast(DEVICE, dtype=dtype):
            found = there(layer, x)
        assert found["output"].dtype == dtype
    else:
        eager, found = results(twin(layer).to(dtype), x.to(dtype)), there(layer.to(dtype), x.to(dtype))

    def errors(results: dict[str, Tensor]) -> dict[str, float]:
        return {
            n: ((v.double() - truth[n]).norm() / truth[n].norm()).item()
            for n, v in results.items() if v.is_floating_point()
        }  # fmt: skip

    cut = 2 if backends.interprets() and dtype == torch.bfloat16 else 1
    ours, torchs = errors(found), errors(eager)
    assert ours.pop("output") <= 2 * cut * torchs.pop("output")
    assert max(ours.values()) <= 2 * cut * max(torchs.values()), ours
