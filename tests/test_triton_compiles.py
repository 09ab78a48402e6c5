"""Every Triton kernel compiles ahead of time for three GPUs that are not here, as real layers would launch it.

The launching functions run as they are, on tensors without memory; in place of a launch the kernel is compiled for the
target. What comes out must fit the GPU: its shared memory, and its registers.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case, matching
from espkernels import backends

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
if backends.interprets():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

ROOM = Path(backends.__file__).parent / "triton"
KIB = 1024
# Shared memory that one program may ask for.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
# Bytes a thread that may leave its registers; ptxas stops some kernels at 128 registers and moves a few words.
SPILLED = 64


class NoDriver:
    """Names the target and has no device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels are kept by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@pytest.fixture(params=TARGETS, ids=str)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Makes every launch a compilation for the target; what came out, by the kernel's name."""
    target, _ = TARGETS[request.param]
    kernels: dict[str, list[Any]] = {}

    def compile_instead(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
        assert programs > 0
        made = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, **constants)
        kernels.setdefault(kernel.__name__, []).append(made)

    for file in ROOM.glob("*.py"):
        module = importlib.import_module(f"espkernels.triton.{file.stem}") if file.stem != "__init__" else None
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", compile_instead)
    monkeypatch.setattr(torch.version, "hip", "6.0" if target.backend == "hip" else None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(ROOM.parent.parent / "build" / "triton"))
    monkeypatch.setattr(driver, "_active", NoDriver(target))
    return kernels


def check(kernels: dict[str, list[Any]], target: str, expected: set[str], tmp_path: Path) -> None:
    assert set(kernels) == expected
    _, shared = TARGETS[target]
    for name, kernel in ((name, kernel) for name, all_of_it in kernels.items() for kernel in all_of_it):
        assert kernel.metadata.shared <= shared, f"{name}: {kernel.metadata.shared} bytes of shared memory"
        assert spilled(kernel, tmp_path) <= SPILLED, f"{name}: {spilled(kernel, tmp_path)} bytes a thread spilled"


def spilled(kernel: Any, tmp_path: Path) -> int:
    if "amdgcn" in kernel.asm:
        (size,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
        return int(size)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    (size,) = re.findall(r"STACK:(\d+)", done.stdout)
    return int(size)


def case(name: str) -> Case:
    (found,) = matching([name])
    return found


VARIANTS = {
    "float32-contiguous": (torch.float32, torch.contiguous_format),
    "bfloat16-channels_last": (torch.bfloat16, torch.channels_last),
}
each_variant = pytest.mark.parametrize("dtype, layout", VARIANTS.values(), ids=VARIANTS.keys())


class Layer:
    """The tensors of one layer, without memory."""

    def __init__(self, case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.case, self.dtype, self.layout = case, dtype, layout

    def map(self, channels: int, reduced: bool = False) -> torch.Tensor:
        size = self.case.output_size if reduced else (self.case.height, self.case.width)
        tensor = torch.empty(self.case.batch, channels, *size, dtype=self.dtype, device="meta")
        return tensor.contiguous(memory_format=self.layout)

    def weight(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def vector(self, channels: int) -> torch.Tensor:
        return torch.empty(channels, device="meta")


@each_variant
def test_operators(
    compiled: dict[str, list[Any]], request: pytest.FixtureRequest, dtype: torch.dtype, layout: torch.memory_format,
    tmp_path: Path,
) -> None:  # fmt: skip
    from espkernels.triton.group_pointwise import group_pointwise, group_pointwise_backward_input
    from espkernels.triton.group_pointwise_backward_weight import group_pointwise_backward_weight
    from espkernels.triton.pyramid_pointwise import pyramid_pointwise
    from espkernels.triton.spatial_pyramid import spatial_pyramid
    from espkernels.triton.spatial_pyramid_backward_input import spatial_pyramid_backward_input
    from espkernels.triton.spatial_pyramid_backward_weight import spatial_pyramid_backward_weight

    target = request.node.callspec.params["compiled"]
    layer = Layer(case("s2-1024x512-level3").with_batch(4), dtype, layout)
    c, d, n = layer.case, layer.case.channels, layer.case.out_channels
    x, wide, weight, vector = layer.map(d), layer.map(n), layer.weight(c.k, d, 3, 3), layer.vector(n)
    pointwise = layer.weight(n, d)
    spatial_pyramid(x, weight, c.dilations, 1, True)
    spatial_pyramid_backward_input(wide, weight, c.dilations, 1, True, c.height, c.width)
    spatial_pyramid_backward_weight(wide, x, c.dilations, 1, True)
    group_pointwise(wide, pointwise, c.k, None, vector, wide, vector)
    group_pointwise_backward_input(wide, pointwise, c.k)
    group_pointwise_backward_weight(wide, wide, c.k)
    vectors = (vector, vector, vector)
    pyramid_pointwise(x, weight, c.dilations, pointwise, c.k, *vectors, None, vector, wide, vector, 1, True)
    expected = {
        "spatial_pyramid_kernel", "spatial_pyramid_backward_input_kernel", "spatial_pyramid_backward_weight_kernel",
        "group_pointwise_kernel", "group_pointwise_backward_weight_kernel", "partial_sums_kernel",
        "all_branches_kernel",
    }  # fmt: skip
    check(compiled, target, expected, tmp_path)


@each_variant
@pytest.mark.parametrize(
    "name, kernels",
    [
        ("s1-224x224-level5", {"eesp_kernel"}),
        ("s2-224x224-level5_0", {"group_pointwise_kernel", "one_group_kernel", "pooled_kernel"}),
    ],
)
def test_units(
    compiled: dict[str, list[Any]], request: pytest.FixtureRequest, dtype: torch.dtype, layout: torch.memory_format,
    name: str, kernels: set[str], tmp_path: Path,
) -> None:  # fmt: skip
    from espkernels.triton.down_sampler import down_sampler
    from espkernels.triton.eesp import eesp

    target = request.node.callspec.params["compiled"]
    layer = Layer(case(name), dtype, layout)
    c, d, n = layer.case, layer.case.channels, layer.case.out_channels
    unit = (
        layer.weight(d, c.in_channels // c.k), c.k, layer.vector(d), layer.vector(d), layer.weight(c.k, d, 3, 3),
        c.dilations, *(layer.vector(n) for _ in range(3)), layer.weight(n, d), c.k, layer.vector(n),
    )  # fmt: skip
    x = layer.map(c.in_channels)
    if c.stride == 1:
        eesp(x, *unit, x, layer.vector(n), 1, True)
    else:
        both = c.in_channels + n
        shortcut = (layer.weight(both, 3), layer.vector(both), layer.vector(both))
        down_sampler(x, layer.map(3, reduced=True), *unit, *shortcut, True)
    check(compiled, target, kernels, tmp_path)


@pytest.mark.parametrize("name, dtype", [("s1-224x224-level4", torch.bfloat16), ("s2-224x224-level5_0", torch.float32)])
def test_units_in_training(
    compiled: dict[str, list[Any]], request: pytest.FixtureRequest, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from espkernels.triton.eesp_training import eesp_training, eesp_training_backward

    layer = Layer(case(name).with_batch(16), dtype, torch.channels_last)
    c, d, n = layer.case, layer.case.channels, layer.case.out_channels
    reduce, pyramid, expand = layer.weight(d, c.in_channels // c.k), layer.weight(c.k, d, 3, 3), layer.weight(n, d)
    weights = reduce, c.k, pyramid, c.dilations, expand, c.k
    vectors = [layer.vector(d + 2 * n) for _ in range(3)]
    eps, batch, residual = [1e-5] * 3, [True] * 3, c.stride == 1
    x = layer.map(c.in_channels)
    options = (c.stride, True, residual)
    result, *kept = eesp_training(x, *weights, *vectors, None, None, eps, batch, *options, True)
    eesp_training_backward(result, x, *kept, *weights, *vectors, eps, batch, *options, [True] * 7)
    expected = {
        "affine_kernel", "batch_norm_backward_kernel", "group_pointwise_backward_weight_kernel",
        "group_pointwise_kernel", "norm_gradient_kernel", "norm_kernel", "normalised_output_backward_kernel",
        "partial_sums_kernel", "spatial_pyramid_backward_input_kernel", "spatial_pyramid_backward_weight_kernel",
        "spatial_pyramid_kernel",
    }  # fmt: skip
    check(compiled, request.node.callspec.params["compiled"], expected, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_around_the_units(
    compiled: dict[str, list[Any]], request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path: Path
) -> None:
    from espkernels.triton.batch_norm_prelu import batch_norm_prelu, batch_norm_prelu_backward
    from espkernels.triton.long_range_shortcut import long_range_shortcut, long_range_shortcut_backward

    layer = Layer(case("s2-224x224-level4").with_batch(16), dtype, torch.channels_last)
    x, image, both = layer.map(256), layer.map(3), layer.map(512)
    norm, shift, slope = [layer.vector(256) for _ in range(3)], layer.vector(512), layer.vector(512)
    _, statistics = batch_norm_prelu(x, *norm, None, None, 1e-5, True)
    batch_norm_prelu_backward(x, x, statistics, *norm, 1e-5, True, True)
    end = x, x, image, torch.empty(512, 3, device="meta"), shift, slope
    long_range_shortcut(*end)
    long_range_shortcut_backward(both, *end, [True] * 3)
    expected = {
        "affine_kernel", "batch_norm_backward_kernel", "group_pointwise_backward_weight_kernel",
        "group_pointwise_kernel", "long_range_shortcut_backward_kernel", "map_moments_kernel", "norm_gradient_kernel",
        "norm_kernel", "normalised_output_backward_kernel", "partial_sums_kernel",
    }  # fmt: skip
    check(compiled, request.node.callspec.params["compiled"], expected, tmp_path)


@each_variant
def test_layers_around_the_units(
    compiled: dict[str, list[Any]], request: pytest.FixtureRequest, dtype: torch.dtype, layout: torch.memory_format,
    tmp_path: Path,
) -> None:  # fmt: skip
    from espkernels.triton.affine import affine
    from espkernels.triton.average_pool import average_pool
    from espkernels.triton.convolution import convolution
    from espkernels.triton.global_average import global_average
    from espkernels.triton.pyramid_pooling import pyramid_pooling
    from espkernels.triton.resize import resize
    from espkernels.triton.resized_argmax import resized_argmax

    def map_(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(channels: int) -> torch.Tensor:
        return torch.empty(channels, device="meta")

    # Those of a segmentation network of scale 2 for an image of 384x384 and 21 classes.
    image, skip, few = map_(1, 3, 384, 384), map_(1, 32, 192, 192), map_(1, 10, 96, 96)
    convolution(image, weight(32, 3, 3, 3), vector(32), vector(32), 2, 1, 1, 1)
    average_pool(image)
    affine(skip, vector(32), vector(32), skip, vector(32))
    global_average(skip)
    resize(map_(1, 32, 96, 96), 192, 192, skip, map_(1, 32, 1, 1), *(vector(32) for _ in range(3)))
    resized_argmax(map_(1, 21, 192, 192), 384, 384)
    sizes = [192, 192, 144, 144, 96, 96, 48, 48, 10, 10]
    vectors = (vector(50) for _ in range(3))
    pyramid_pooling(few, weight(5, 10, 3, 3), sizes, 2, *vectors, weight(10, 5, 3, 3), vector(10), vector(10))
    expected = {
        "adaptive_average_kernel", "affine_kernel", "channel_sums_kernel", "convolution_kernel", "partial_sums_kernel",
        "pooled_kernel", "resize_kernel", "resized_argmax_kernel",
    }  # fmt: skip
    check(compiled, request.node.callspec.params["compiled"], expected, tmp_path)
