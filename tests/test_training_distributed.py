"""Two processes with half of each batch, against one process with all of it: the same parameters.

torch's own nn.SyncBatchNorm has no CPU kernels and says so. What it needs of the layers is proved here by a norm of the
same function over gloo, which the layers must call as the module it is, and by frozen norms, which share nothing.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layer_results import results
from torch import nn
from training_process import WORLD, prepare
from training_runs import batches, pair, train

from espkernels import nn as fused

pytestmark = [
    pytest.mark.usefixtures("same_each_time"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where both processes left what they trained."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, str(Path(__file__).with_name("training_process.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("norms", ["frozen", "shared"])
def test_two_processes_are_one_with_the_joint_batch(norms: str, together: Path) -> None:
    alone = pair()[0]
    if norms == "frozen":
        prepare(alone, norms)
    losses = train(alone, batches(5))
    (first, state), (second, other) = (torch.load(together / f"{norms}{rank}.pt") for rank in range(WORLD))
    torch.testing.assert_close((first + second) / 2, losses, rtol=1e-9, atol=0)
    assert not torch.equal(first, second)
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(state[name], other[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(state[name], expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_norms_of_each_process_alone_are_not_the_joint_batch(together: Path) -> None:
    """What the test above would see if the layers went past a norm of another class."""
    alone = pair()[0]
    train(alone, batches(5))
    _, state = torch.load(together / "separate0.pt")
    name = "level3.0.proj_1x1.conv.weight"
    assert (state[name] - alone.state_dict()[name]).abs().max() > 1e-6


def test_torchs_own_synchronised_norm_refuses_the_cpu(together: Path) -> None:
    for rank in range(WORLD):
        assert "SyncBatchNorm layers only work with GPU modules" in (together / f"synchronised{rank}.txt").read_text()


@pytest.mark.parametrize("build", [lambda: fused.EESP(16, 16), lambda: fused.DownSampler(8, 24)], ids=["unit", "down"])
def test_converted_norms_alone_are_the_same_function(build: object) -> None:
    """In one process a converted norm is a batch norm: the layers run it as it is, and their keys stay."""
    layer = build().double()  # type: ignore[operator]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert type(converted) is type(layer)
    assert not any(type(part) is nn.BatchNorm2d for part in converted.modules())
    unit = layer.eesp if isinstance(layer, fused.DownSampler) else layer
    inputs = [torch.randn(3, unit.proj_1x1.conv.in_channels, 7, 6, dtype=torch.float64)]
    if isinstance(layer, fused.DownSampler):
        inputs.append(torch.randn(3, 3, 14, 12, dtype=torch.float64))
    expected, actual = results(layer, *inputs), results(converted, *inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
