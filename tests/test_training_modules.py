"""Modules in the middle of training: copied, saved, averaged, sorted into groups of parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training_runs import batches, flat, pair, train

pytestmark = pytest.mark.usefixtures("same_each_time")


def saved_whole(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_state(both: tuple[nn.Module, torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What a checkpoint holds: state_dicts, loaded into a new network by the safe loader."""
    file = io.BytesIO()
    torch.save({"model": both[0].state_dict(), "optimizer": both[1].state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model = pair(torch.float32)[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": saved_whole,
    "state_dict": saved_state,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_training_goes_on_from_a_copy(way: Callable[[Any], Any]) -> None:
    """Model and optimizer, copied between two steps: both go on alike, to the bit, and neither knows of the other."""
    model = pair(torch.float32)[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, batches(3), optimizer)
    model.eval()
    between = model(next(batches(1))[0])  # evaluation in the middle of training leaves nothing behind
    model.train()
    copied, its_optimizer = way((model, optimizer))
    assert copied.training
    stood = flat(copied)
    expected = train(model, batches(3, seed=2), optimizer)
    assert torch.equal(flat(copied), stood)
    assert torch.equal(train(copied, batches(3, seed=2), its_optimizer), expected)
    assert torch.equal(flat(copied), flat(model))
    assert not torch.equal(stood, flat(model))
    assert torch.equal(copied.eval()(next(batches(1))[0]), model.eval()(next(batches(1))[0]))
    assert not torch.equal(copied(next(batches(1))[0]), between)


def test_moving_averages_and_their_statistics() -> None:
    """An average of weights has statistics of no network: update_bn measures them anew, with momentum None."""
    found = []
    for model in pair():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        for i in range(4):
            train(model, batches(2, seed=i), optimizer)
            average.update_parameters(model)
        stale = flat(average)
        update_bn([images.double() for images, _ in batches(3)], average)
        assert not torch.equal(flat(average), stale)
        found.append((flat(average), average.eval()(next(batches(1))[0].double()), flat(model)))
    for actual, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def decayed(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """As recipes write it: weights of convolutions decay; norms, PReLUs and biases, told by their modules, do not."""
    with_decay, without = [], []
    for part in model.modules():
        alone = isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.PReLU))
        for name, parameter in part.named_parameters(recurse=False):
            (without if alone or name == "bias" else with_decay).append(parameter)
    return with_decay, without


def test_parameters_with_and_without_weight_decay() -> None:
    found = []
    for model in pair():
        with_decay, without = decayed(model)
        assert {id(p) for p in with_decay} == {id(p) for p in model.parameters() if p.dim() > 1}
        assert len(with_decay) + len(without) == len(list(model.parameters()))
        groups = [{"params": with_decay, "weight_decay": 0.1}, {"params": without, "weight_decay": 0.0}]
        norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
        train(model, batches(5), torch.optim.AdamW(groups, lr=0.001))
        found.append((flat(model), norm.weight.detach()))
        # Without gradients decay alone moves anything.
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(groups, lr=1.0).step()
        moved = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
        assert moved == {id(p) for p in with_decay}
    for actual, expected in zip(*reversed(found), strict=True):
        # Adam divides by the root of a mean square: where a gradient is all rounding, so is the sign of its step.
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_gradients_are_added_up_over_backward_passes() -> None:
    """Accumulation over small batches, and a graph that is kept and run twice."""
    found = []
    for model in pair():
        for images, labels in batches(2):
            loss = nn.functional.cross_entropy(model(images.double()), labels)
            loss.backward(retain_graph=True)
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
