"""Whole networks on a GPU: frozen, each layer runs on a kernel of ours; results and gradients are the plain ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from operator_tests import calls
from torch import Tensor, nn

import espkernels
from espkernels import backends, gpu, models

pytestmark = pytest.mark.skipif(backends.library is None, reason="the compiled library, with the schemas, is not built")

Make = Callable[..., nn.Module]
NETWORKS: dict[str, tuple[Make, int]] = {
    "classification": (functools.partial(models.espnetv2, 0.5, dropout=0.0), 224),
    "segmentation": (functools.partial(models.espnetv2_segmentation, 0.5, 21), 256),
    "detection": (functools.partial(models.espnetv2_detection, 0.5, 5, 256), 256),
}
# New shapes and formats of what is there.
VIEWS = {"alias", "detach", "expand", "permute", "select", "slice", "squeeze", "unsqueeze", "view", "_unsafe_view"}
# Copies, as gpu.COPIES are; and what the operators' own stand-ins on that device make.
COPIES = {"cat", "clone", "empty", "as_strided_"}
# Behind the detector's last level, a map of one pixel.
TORCHS = {"relu"}

each_network = pytest.mark.parametrize("make, size", NETWORKS.values(), ids=NETWORKS.keys())


def joined(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else torch.cat([part.flatten(1) for part in result], 1)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@each_network
def test_every_layer_has_a_kernel(make: Make, size: int, plain: bool) -> None:
    # On the meta device every operator is called as on a GPU, and nothing runs.
    frozen = espkernels.freeze(make(plain=plain).eval()).to("meta")
    with torch.no_grad(), calls() as ran:
        frozen(torch.empty(2, 3, size, size, device="meta"))
    ours = {name.removeprefix("espkernels::") for name in ran.names if name.startswith("espkernels::")}
    others = {name.removeprefix("aten::") for name in ran.names if not name.startswith("espkernels::")}
    assert {"eesp", "down_sampler", "convolution", "average_pool"} <= ours <= {*gpu.OPERATORS, *gpu.COPIES}
    assert others <= VIEWS | COPIES | TORCHS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_network
def test_results_on_a_device(make: Make, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad(), espkernels.use_backend("reference"):
        expected = joined(model.double()(x.double()))
    frozen = espkernels.freeze(model.to(dtype)).cuda()
    for backend in ("cuda", "triton"):
        if backends.why_not(backend) is None:
            with torch.no_grad(), espkernels.use_backend(backend):
                output = joined(frozen(x.to("cuda", dtype))).cpu().double()
            # Some hundred layers, each of which rounds numbers of the size of its map once or twice, at random.
            assert (output - expected).norm() <= 32 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_network
def test_training_on_a_device(make: Make, size: int) -> None:
    """Every gradient of a step in float64, where no sign at a PReLU turns by rounding.

    On the CPU the plain layers in one memory format and the other differ by up to 4e-10 of a gradient's norm.
    """
    torch.manual_seed(0)
    model, x = make(plain=True).double().train(), torch.randn(2, 3, size, size, dtype=torch.float64)

    def step(model: nn.Module, x: Tensor) -> list[Tensor]:
        output = joined(model(x))
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=x.device).view_as(output))
        return [output.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]

    expected = step(copy.deepcopy(model), x)
    for backend in ("cuda", "triton"):
        if backends.why_not(backend) is None:
            ours = copy.deepcopy(model).cuda()
            espkernels.replace(ours)
            with espkernels.use_backend(backend):
                found = step(ours, x.cuda().contiguous(memory_format=torch.channels_last))
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= 4e-9 * other.norm()
