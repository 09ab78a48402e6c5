"""The units that the paper compares EESP with: equal to what they should equal, and as large as the tables say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_freeze import trained

from espkernels import freeze, models, nn, replace
from espkernels.models import eesp_a, esp

# Multiply-adds in millions and parameters at width 1: the first row of Table 5, and what EESP has too.
NETWORKS = [("esp", 478.084, 4_645_720), ("eesp_a", 85.720, 1_670_072)]


@pytest.fixture(autouse=True)
def one_thread(same_each_time: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""


@pytest.mark.parametrize(("unit", "millions", "parameters"), NETWORKS)
def test_counts_of_networks(unit: str, millions: float, parameters: int):
    with torch.device("meta"):
        network = models.espnetv2(1.0, unit=unit)
    found = models.count(network, (224, 224))
    assert (round(found.macs / 1e6, 3), found.parameters) == (millions, parameters)


def test_eesp_learns_seven_times_fewer_weights_than_esp():
    def weights(unit: torch.nn.Module) -> int:
        return sum(p.numel() for p in unit.parameters() if p.dim() == 4)

    assert (weights(esp.ESP(240, 240)), weights(nn.EESP(240, 240))) == (144_000, 20_160)
    assert weights(eesp_a.EESPA(240, 240)) == 20_160


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("m", "n", "stride", "down"), [(32, 32, 1, "esp"), (16, 48, 1, "esp"), (32, 96, 2, "avg")])
def test_eesp_a_equals_eesp_with_the_same_weights(m: int, n: int, stride: int, down: str, training: bool):
    ours = trained(nn.EESP(m, n, stride, 4, 9, down)).double().train(training)
    theirs = eesp_a.EESPA(m, n, stride, 4, 9, down).double().train(training)
    theirs.load_state_dict(eesp_a.from_eesp(ours.state_dict()))
    x = torch.randn(2, m, 11, 14, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [unit(one) for unit, one in zip((ours, theirs), inputs, strict=True)]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    # The sums are the same ones in another order: a few hundred float64 terms of size 1.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-10)
    gradients = eesp_a.from_eesp({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-10)
        else:
            assert parameter.grad is None, name
    torch.testing.assert_close(theirs.state_dict(), eesp_a.from_eesp(ours.state_dict()), rtol=1e-11, atol=1e-11)


def test_a_network_of_eesp_a_takes_the_weights_of_espnetv2():
    ours = trained(models.espnetv2(0.5, 7)).double().eval()
    theirs = models.espnetv2(0.5, 7, unit="eesp_a").double().eval()
    theirs.load_state_dict(eesp_a.from_eesp(ours.state_dict()))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hff", [True, False])
def test_esp_against_its_definition(hff: bool):
    unit = trained(esp.ESP(12, 12, 1, 3, 9, hff=hff)).double().eval()
    assert unit.dilations == (1, 2, 3)
    x = torch.randn(2, 12, 9, 10, dtype=torch.float64)

    def normalised(x: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
        norm = part.bn
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return torch.where(x > 0, x, x * part.act.weight.view(1, -1, 1, 1))

    with torch.no_grad():
        reduced = normalised(F.conv2d(x, unit.proj_1x1.conv.weight), unit.proj_1x1)
        maps = [F.conv2d(reduced, b.weight, padding=r, dilation=r) for r, b in zip((1, 2, 3), unit.spp_dw, strict=True)]
        if hff:
            maps = [maps[0], maps[0] + maps[1], maps[0] + maps[1] + maps[2]]
        merged = normalised(torch.cat(maps, dim=1), unit.br_after_cat) + x
        expected = torch.where(merged > 0, merged, merged * unit.module_act.weight.view(1, -1, 1, 1))
        torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize("unit", ["esp", "eesp_a"])
def test_networks_of_other_units_train_freeze_and_keep_their_units_in_replace(unit: str):
    network = trained(models.espnetv2(0.5, 5, unit=unit)).double()
    network.train()(torch.randn(2, 3, 64, 64, dtype=torch.float64)).sum().backward()
    dead = {name for name, p in network.named_parameters() if p.grad is None}
    assert {name for name in dead if ".eesp.module_act." not in name and "level5_0.inp_reinf." not in name} == set()
    x = torch.randn(1, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = network.eval()(x)
        torch.testing.assert_close(freeze(network)(x), expected, rtol=1e-9, atol=1e-9)
    report = replace(network)
    assert {layer.kind for layer in report.layers if layer.status == "replaced"} == {"CBR", "BR"}
    assert report.named("skipped") == [f"level{i}_0" for i in (2, 3, 4, 5)]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"unit: got 'espnet', expected one of 'eesp', 'eesp_a', 'esp'"):
        models.espnetv2(1.0, unit="espnet")
    with pytest.raises(ValueError, match=r"out_channels: got 18, expected a positive multiple of k = 4"):
        esp.ESP(16, 18)
    with pytest.raises(ValueError, match=r"out_channels: got 20, expected a positive multiple of k \* k = 16"):
        eesp_a.EESPA(16, 20)
