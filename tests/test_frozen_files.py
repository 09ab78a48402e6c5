"""Frozen networks on their way to other programmes: files of weights, exported programs, compiled packages."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from replaying import own, photograph
from somebody_segmentation import Segmenter
from test_freeze import trained
from torch import Tensor, nn
from torch_free_programme import compiler

import espkernels
from espkernels import backends, models

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("threads"),
]

NETWORKS = {
    "classification": lambda: models.espnetv2(0.5, num_classes=10),
    "segmentation": lambda: models.espnetv2_segmentation(0.5, 5),
    "somebody else's": lambda: Segmenter(6),
    "unit": lambda: nn.Sequential(espkernels.nn.EESP(16, 16)),
}

each_network = pytest.mark.parametrize("name", NETWORKS, ids=lambda name: name.replace(" ", "-"))


def frozen_network(name: str, seed: int = 0) -> Any:
    return espkernels.freeze(trained(NETWORKS[name](), seed).eval())


def input_of(name: str) -> Tensor:
    return torch.randn(2, 16, 9, 11) if name == "unit" else photograph(2, 3, 48, 64)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    for name in NETWORKS:
        frozen, other = frozen_network(name), frozen_network(name, seed=3)
        x = input_of(name)
        file = tmp_path / "frozen.safetensors"
        with torch.no_grad():
            expected = frozen(x)
            safetensors.save_file(frozen.state_dict(), file)
            assert not torch.equal(other(x), expected)
            other.load_state_dict(safetensors.load_file(file))
            assert torch.equal(other(x), expected)
            assert torch.equal(own(other, x), own(frozen, x))  # packs and plans both


@each_network
def test_whole_models_in_files(name: str, tmp_path: Path) -> None:
    frozen, x = frozen_network(name), input_of(name)
    with torch.no_grad():
        expected = frozen(x)
        torch.save(frozen, tmp_path / "frozen.pt")
        again = torch.load(tmp_path / "frozen.pt", weights_only=False)
        assert type(again) is type(frozen) and torch.equal(again(x), expected)


@each_network
def test_exported_programs_in_files(name: str, tmp_path: Path) -> None:
    frozen, x = frozen_network(name), input_of(name)
    with torch.no_grad():
        expected = own(frozen, x)
        torch.export.save(torch.export.export(frozen, (x,)), tmp_path / "frozen.pt2")
        assert torch.equal(torch.export.load(tmp_path / "frozen.pt2").module()(x), expected)


LOADER = """
    import sys
    import torch
    import espkernels

    package, inputs, results = sys.argv[1:]
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        torch.save([compiled(x) for x in torch.load(inputs)], results)
"""


@pytest.mark.parametrize("name", ["unit", "classification"])
def test_a_compiled_package_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    compiler("g++")
    frozen = frozen_network(name)
    inputs = [input_of(name), torch.flip(input_of(name), (0,))]
    with torch.no_grad():
        program = torch.export.export(frozen, (inputs[0],))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "frozen.pt2"))
    torch.save(inputs, tmp_path / "inputs.pt")
    programme = [sys.executable, "-c", textwrap.dedent(LOADER), package]
    files = [str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    done = subprocess.run([*programme, *files], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    for x, result in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        with torch.no_grad():
            expected = own(frozen, x)
        # Kernels of this library give the same bits. The mean before the classifier is torch's and may add its four
        # pixels in another order, 3 u of S apart; a logit sums 1024 of them of either sign, and their S is some
        # sqrt(1024) times the logit.
        bound = 0 if name == "unit" else 3 * 32 * torch.finfo(torch.float32).eps / 2 * expected.abs().max()
        assert result.shape == expected.shape and (result - expected).abs().max() <= bound
