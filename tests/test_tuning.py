"""Tuned networks keep the fastest cut of each unit, its bits, and the choice in their files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from replaying import layers, photograph, the_plan
from test_freeze import trained
from torch import nn

import espkernels
from espkernels import backends, models, tuning
from espkernels.replay import Recorded

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("threads"),
]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(models.espnetv2(0.5, num_classes=10)).eval()


def clock(recorded: Recorded, *_: Any) -> list[float]:
    """Times as if the best cut went 1, 2, 4, 1, 2, 4 ... through the steps that have a choice, by a tenth."""
    seconds, at = [], 0
    for cut in recorded.plan.cuts:
        best = tuning.CUTS[at % len(tuning.CUTS)]
        seconds.append(0.9 if cut == best else 1.0)
        at += cut > 0
    return seconds


def chosen(frozen: Any) -> list[int]:
    return [cut for cut in the_plan(frozen).plan.cuts if cut]


@torch.no_grad()
def test_every_cut_has_the_same_bits(isa: str, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network)
    x = photograph(3, 3, 97, 130)
    torch.set_num_threads(2)
    expected = layers(frozen, x)
    assert torch.equal(frozen(x), expected)
    plan = the_plan(frozen).plan
    for cut in (1, 2, 4, 64):
        plan.cuts = [cut if before else 0 for before in plan.cuts]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(frozen(x), expected), (cut, threads)


@torch.no_grad()
def test_the_fastest_cut_is_kept(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "profile", clock)
    x = photograph(2, 3, 64, 96)
    frozen: Any = espkernels.freeze(network, tune=x)
    units = sum(isinstance(part, espkernels.nn.EESP) for part in network.modules())
    wanted = [tuning.CUTS[at % 3] for at in range(units)]
    assert chosen(frozen) == wanted
    assert torch.equal(frozen(x), layers(frozen, x))
    # Another shape was not measured.
    frozen(photograph(1, 3, 64, 64))
    assert {cut for recorded in list(frozen.plans.values())[1:] for cut in recorded.plan.cuts} == {0, 1}


@torch.no_grad()
def test_a_difference_of_a_hundredth_is_noise(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "profile", lambda self, *_: [1 - 0.01 * (cut == 4) for cut in self.plan.cuts])
    assert set(chosen(espkernels.freeze(network, tune=photograph(1, 3, 32, 32)))) == {1}


@torch.no_grad()
def test_choices_travel(network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    x = photograph(1, 3, 48, 64)
    untuned: Any = espkernels.freeze(network, tune=x)
    monkeypatch.setattr(Recorded, "profile", clock)
    frozen: Any = espkernels.freeze(network, tune=x)
    expected = frozen(x)
    safetensors.save_file(frozen.state_dict(), tmp_path / "tuned.safetensors")
    untuned.load_state_dict(safetensors.load_file(tmp_path / "tuned.safetensors"))
    for other in (untuned, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(x), expected)
        assert chosen(other) == chosen(frozen) and len(set(chosen(other))) == 3
    # Of another number of steps, as another version of the library may have made them: not used.
    frozen.choices = {key: cuts[1:] for key, cuts in frozen.choices.items()}
    frozen.level1.load_state_dict(frozen.level1.state_dict())
    assert torch.equal(frozen(x), expected) and set(chosen(frozen)) == {1}


def in_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "state",
    [in_bytes(text) for text in ("[1]", "1", '{"a": ["b"]}', '{"a": [-3]}', '{"a": [65]}', '{"a": [true]}', '{"a": 1}')]
    + [in_bytes('{"a": [1'), torch.tensor([0.5]), torch.tensor([300]), torch.tensor(7), torch.tensor([255]), "{}"],
)
@torch.no_grad()
def test_a_bad_state_is_refused_before_anything_is_loaded(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "profile", clock)
    x = torch.randn(1, 16, 9, 11)
    frozen: Any = espkernels.freeze(trained(espkernels.nn.EESP(16, 16)), tune=x)  # weights and choices in one module
    expected, choices = frozen(x), dict(frozen.choices)
    bad = {name: 2 * value for name, value in frozen.state_dict().items()} | {"_extra_state": state}
    with pytest.raises(ValueError, match=r"_extra_state: got .+, expected the JSON of"):
        frozen.load_state_dict(bad)
    assert frozen.choices == choices and torch.equal(frozen(x), expected)
    assert torch.equal(layers(frozen, x), expected)


@torch.no_grad()
def test_really_measured(network: nn.Module) -> None:
    x = photograph(1, 3, 64, 64)
    frozen: Any = espkernels.freeze(network, tune=x)
    assert torch.equal(frozen(x), layers(frozen, x))
    assert set(chosen(frozen)) <= set(tuning.CUTS)


@torch.no_grad()
def test_explain_shows_the_choice(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "profile", clock)
    x = photograph(1, 3, 32, 32)
    found = espkernels.explain(espkernels.freeze(network, tune=x), x)
    assert "pyramid and expand (cut 4x)" in str(found) and "pyramid and expand (cut 2x)" in str(found)


def test_what_cannot_be_tuned_is_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"tune: expected a tensor \[B, C, H, W\]"):
        espkernels.freeze(network, tune=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"tune: the model cannot be replayed on this input: .*softmax"):
        espkernels.freeze(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1)), tune=photograph(1, 3, 4, 4))
    hooked = nn.Sequential(nn.Conv2d(3, 4, 1))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"tune: the model cannot be replayed on this input: .*hooks"):
        espkernels.freeze(hooked, tune=photograph(1, 3, 4, 4))
    with pytest.raises(ValueError, match="tune: got a tensor beside graph=True"):
        espkernels.freeze(network, tune=photograph(1, 3, 32, 32), graph=True)


@torch.no_grad()
def test_wrong_cuts_are_refused(network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network)
    frozen(photograph(1, 3, 32, 32))
    plan = the_plan(frozen).plan
    cuts = plan.cuts
    for wrong in ([], cuts[1:], [1] * len(cuts), [0] * len(cuts), [65 if cut else 0 for cut in cuts]):
        with pytest.raises(ValueError, match="cuts: expected"):
            plan.cuts = wrong
    assert plan.cuts == cuts
