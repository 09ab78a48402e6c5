"""A model of somebody else's before and after its layers are replaced: what the tests of replace share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYERS", "REACHED", "assert_same_state", "close", "image", "state", "trained"]

# Of somebody.Network.
LAYERS = [
    "level1", "level2_0", "level2_0.eesp", "level2_0.inp_reinf.0", "level3_0", "level3_0.eesp", "level3.0", "level3.1",
    "unused",
]  # fmt: skip
REACHED = LAYERS[:-1]


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (2, 3, 33, 48)), generator=torch.Generator().manual_seed(3), dtype=dtype)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a module is: its objects, their identities, classes and attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (id(module), type(module), dict(vars(module)))
        for own in (module._parameters, module._buffers, module._modules, module._forward_hooks):
            found[f"{name}: {id(own)}"] = {key: id(value) for key, value in own.items()}
    found["values"] = {name: value.clone() for name, value in model.state_dict().items()}
    return found


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    values, truth = actual.pop("values"), expected.pop("values")
    assert actual == expected
    assert values.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(values[name], value), name


def trained(
    model: nn.Module, x: Tensor, steps: int = 1, optimizer: torch.optim.Optimizer | None = None
) -> list[Tensor]:
    """Outputs of ``steps`` training steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
