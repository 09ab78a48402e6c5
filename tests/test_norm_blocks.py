"""Batch norms with the PReLU behind them run as one operator in any block, and only where that is the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_results import pixels, randomised, results
from test_freeze import trained
from torch import Tensor, nn

import espkernels
from espkernels import backends, fused_norm, models
from espkernels import nn as fused
from espkernels.models import plain
from espkernels.training_blocks import recognise_blocks

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("same_each_time"),
]


@pytest.fixture
def norm_calls(calls_of: Callable[[Any, str], list[str]]) -> list[str]:
    """A name for each call of the operator so far."""
    return calls_of(fused_norm, "batch_norm_prelu")


class Reversed(nn.Module):
    """The official parts in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.act(self.conv(x)))


class InTrainingOnly(plain.CBR):
    """Another function in training than in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


def sequential(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), *between, nn.PReLU(6))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "CBR": (lambda: plain.CBR(4, 6, 3), "CBR"),
    "BR": (lambda: plain.BR(4), "BR"),
    "sequential": (sequential, "Sequential"),
    "nothing between": (lambda: sequential(nn.Identity()), ""),
    "one slope": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.PReLU()), "Sequential"),
    "another order": (Reversed, ""),
    "in training only": (lambda: InTrainingOnly(4, 6, 3), ""),
    "ours": (lambda: fused.CBR(4, 6, 3), ""),
    "other norm": (lambda: nn.Sequential(nn.InstanceNorm2d(4), nn.PReLU(4)), ""),
}


@pytest.mark.parametrize("name", BLOCKS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_blocks_are_recognised_and_do_the_same(name: str, training: bool, norm_calls: list[str]) -> None:
    make, kind = BLOCKS[name]
    block = randomised(make()).double().train(training)
    other = copy.deepcopy(block)
    if name == "ours":
        other.__class__ = plain.CBR
    buffers = [b.clone() for b in block.buffers()]
    assert [layer.kind for layer in recognise_blocks(nn.ModuleList([block]))] == ([kind] if kind else [])
    assert all(map(torch.equal, block.buffers(), buffers))
    report = espkernels.replace(nn.ModuleList([block]))
    assert report.replaced == (["0"] if kind else [])
    for _ in range(3):
        x = pixels(2, 4, 6, 5)
        actual, expected = results(block, x), results(other, x)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9)
    assert len(norm_calls) == (3 if (kind and name != "one slope") or name == "ours" else 0)
    espkernels.restore(nn.ModuleList([block]))
    assert name == "ours" or type(block) is type(other)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_norm_that_begins_at_zero_hides_no_other_order(bias: float) -> None:
    block = Reversed().double().eval()
    nn.init.zeros_(block.bn.weight)
    nn.init.constant_(block.bn.bias, bias)
    model = nn.Sequential(block)
    assert espkernels.replace(model).replaced == []
    assert type(espkernels.freeze(model)[0]) is Reversed
    official = plain.CBR(4, 6, 3).double()
    nn.init.zeros_(official.bn.weight)
    assert espkernels.replace(official).replaced == [""]


def test_where_the_modules_themselves_run(norm_calls: list[str]) -> None:
    """Another memory format, a hook, another backend, one value a channel, a batch norm of another class."""
    block = randomised(fused.BR(4)).double()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(pixels(1, 4, 1, 1))
    block(torch.randn(2, 4, 5, 6, dtype=torch.float64))
    with espkernels.use_backend("reference"):
        block(pixels(2, 4, 5, 6))
    seen: list[Any] = []
    handle = block.bn.register_forward_hook(lambda *_: seen.append("bn"))
    block(pixels(2, 4, 5, 6))
    assert seen == ["bn"] and norm_calls == []
    handle.remove()
    block(pixels(2, 4, 5, 6))
    assert norm_calls == ["batch_norm_prelu"]
    block.bn = nn.SyncBatchNorm(4).double().eval()  # type: ignore[assignment]
    block(pixels(2, 4, 5, 6))
    assert norm_calls == ["batch_norm_prelu"]


def test_half_types_and_autocast(norm_calls: list[str]) -> None:
    block = randomised(fused.CBR(4, 16, 3))
    x = pixels(2, 4, 9, 8, dtype=torch.float32)
    exact = copy.deepcopy(block).double()(x.double())
    norm_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        result = block(x)
    assert result.dtype == torch.bfloat16 and norm_calls == ["batch_norm_prelu"]
    # Bfloat16 keeps 8 bits; the convolution's result is rounded, then normalised by a deviation of about one.
    assert (result.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_any_map(lower: torch.dtype, norm_calls: list[str]) -> None:
    """A norm keeps its map's type, and the PReLU behind it has autocast's, also of a map that no convolution gave."""
    block = randomised(fused.BR(4)).eval()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = pixels(2, 4, 5, 6, dtype=dtype)
        with torch.autocast("cpu", lower):
            actual, expected = block(x), nn.Sequential(block.bn, block.act)(x)
        assert actual.dtype == expected.dtype == lower
        torch.testing.assert_close(actual, expected)
    assert norm_calls == ["batch_norm_prelu"]


def test_a_segmentation_network_trains_alike(norm_calls: list[str]) -> None:
    ours, theirs = (models.espnetv2_segmentation(0.5, 5, plain=flag) for flag in (False, True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    trained(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = pixels(2, 3, 48, 64)
    expected = results(theirs.double().train(), x)
    assert norm_calls == []
    actual = results(ours.double().train(), x)
    # Every batch norm with a PReLU that is not inside a unit, and where skip connections join.
    assert len(norm_calls) == 1 + 3 + 4 * 3 + 3 + 3 + 3
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-7, atol=1e-7, msg=key)

    replaced = copy.deepcopy(theirs)
    report = espkernels.replace(replaced)
    norm_calls.clear()
    again = results(replaced, x)
    assert len(norm_calls) == 1 + 3 + 4 * 3 + 3 + 3 + 3
    for key, value in results(theirs, x).items():
        torch.testing.assert_close(again[key], value, rtol=1e-7, atol=1e-7, msg=key)
    assert "bu_dec_l1.projection_layer.cbr" in report.replaced


def test_chains_are_copied_pickled_and_frozen() -> None:
    network = trained(models.espnetv2_segmentation(0.5, 5)).eval()
    assert any(type(part) is fused.Chain for part in network.modules())
    x = pixels(1, 3, 33, 40, dtype=torch.float32)
    replaced = copy.deepcopy(models.espnetv2_segmentation(0.5, 5, plain=True).eval())
    replaced.load_state_dict(network.state_dict())
    espkernels.replace(replaced)
    with torch.no_grad():
        expected = espkernels.freeze(network)(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), replaced):
            frozen: Any = espkernels.freeze(other)
            assert torch.equal(frozen(x), expected)
            assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules())
