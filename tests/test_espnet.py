"""ESPNet: the official counts and names, and its unit against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_freeze import trained

from espkernels import freeze, models
from espkernels.models.espnet import Unit


@pytest.fixture(autouse=True)
def one_thread(same_each_time: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""


@pytest.mark.parametrize(("q", "parameters", "tensors"), [(3, 202_649, 134), (5, 267_417, 156), (8, 364_569, 189)])
def test_parameters_and_names_of_the_official_sizes(q: int, parameters: int, tensors: int):
    with torch.device("meta"):
        network = models.espnet(20, q=q)
    assert models.count(network, (64, 64)).parameters == parameters
    # The official files are older than the counters of batch norms.
    names = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    assert len(names) == tensors
    assert {
        "encoder.level2_0.c1.conv.weight", "encoder.level3.0.d16.conv.weight", "encoder.level2.1.bn.act.weight",
        "encoder.classifier.conv.weight", "combine_l2_l3.1.bn.bn.weight", "up_l2.1.act.weight", "classifier.weight",
    } <= names  # fmt: skip


def test_multiply_adds():
    with torch.device("meta"):
        network = models.espnet(20)
    found = models.count(network, (512, 1024))
    transposed = sum(found.by_module[name].macs for name in ("up_l3", "up_l2", "classifier"))
    # Every pixel that goes in meets 20 x 20 x 2 x 2 weights.
    assert transposed == (64 * 128 + 128 * 256 + 256 * 512) * 1600
    assert round((found.macs - transposed) / 1e6, 1) == 4434.2


@pytest.mark.parametrize(("m", "n", "residual"), [(23, 23, True), (10, 17, False)])
def test_the_unit_against_its_definition(m: int, n: int, residual: bool):
    unit = trained(Unit(m, n, residual)).double().eval()
    x = torch.randn(2, m, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        reduced = F.conv2d(x, unit.c1.conv.weight)
        d1, d2, d4, d8, d16 = (
            F.conv2d(reduced, getattr(unit, f"d{r}").conv.weight, padding=r, dilation=r) for r in (1, 2, 4, 8, 16)
        )
        assert d1.shape[1] == n - 4 * (n // 5)
        merged = torch.cat([d1, d2, d2 + d4, d2 + d4 + d8, d2 + d4 + d8 + d16], dim=1) + (x if residual else 0)
        norm = unit.bn.bn
        merged = F.batch_norm(merged, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
        torch.testing.assert_close(unit(x), F.prelu(merged, unit.bn.act.weight))


def test_the_frozen_network_gives_the_same_and_every_parameter_learns():
    network = trained(models.espnet(5, p=1, q=1)).double()
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    network.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        expected = network.eval()(x)
        assert expected.shape == (2, 5, 64, 40)
        # Some thirty layers in float64.
        torch.testing.assert_close(freeze(network)(x), expected, rtol=1e-9, atol=1e-9)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"q: got 0"):
        models.espnet(20, q=0)
    with pytest.raises(ValueError, match=r"out_channels: got 4, expected at least 5"):
        models.espnet(4)
    with pytest.raises(ValueError, match=r"image: got shape \[1, 3, 64, 60\]"):
        models.espnet(5)(torch.zeros(1, 3, 64, 60))
