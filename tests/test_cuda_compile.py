"""Every CUDA source compiles for sm_80 and sm_90 without a GPU, the doors to torch too, and no hot kernel spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch_free_programme import ROOT, compiler, setup_table

# Where the time of a network goes; float64 is for checking gradients and may spill.
HOT = [
    "spatial_pyramid_kernel",
    "spatial_pyramid_backward_input_kernel",
    "spatial_pyramid_backward_weight_kernel",
    "group_pointwise_kernel",
    "group_pointwise_backward_weight_kernel",
    "unit_kernel",
    "ordered_sum_kernel",
    "take_moments_kernel",
    "take_gradients_kernel",
    "normalised_pointwise_kernel",
    "normalised_pyramid_kernel",
    "normalised_pyramid_backward_kernel",
    "normalised_output_kernel",
    "normalised_output_backward_kernel",
]
ARCHITECTURES = ["8.0", "9.0"]


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    symbol: str
    architecture: str
    registers: int
    shared: int
    spilled: int

    def __str__(self) -> str:
        return f"{self.architecture} {self.registers:3} registers, {self.shared} B static shared, {self.symbol}"


def parse(text: str) -> list[Compiled]:
    """The kernels in the output of ``nvcc -Xptxas -v``."""
    found = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        symbol, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        # The longest name that the mangled one holds, with its length in front as the mangling has it.
        kernel = next((name for name in HOT if f"{len(name)}{name}" in symbol), "another")
        found.append(Compiled(kernel, symbol, architecture, registers, int(shared[1]) if shared else 0, spilled))
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    table = setup_table()
    toolkit = table["cuda_toolkit"]()
    if toolkit is None:
        pytest.skip("there is no CUDA toolkit here (nvcc): the CUDA sources are not compiled")
    folder: Path = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(ARCHITECTURES))
        options: list[str] = [*table["NVCC_FLAGS"], *table["cuda_architectures"]()]

    def compile_source(source: str) -> str:
        target = folder / Path(source).with_suffix(".o").name
        command = [str(toolkit / "bin" / "nvcc"), *options, "-Xptxas", "-v", "-Werror", "all-warnings"]
        done = subprocess.run([*command, "-c", source, "-o", str(target)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(compile_source, table["CUDA_SOURCES"]))
    return [kernel for text in texts for kernel in parse(text)]


@pytest.mark.parametrize("source", setup_table()["CUDA_TORCH_SOURCES"])
def test_doors_compile_with_a_torch_of_the_cpu_too(source: str) -> None:
    # They hold no CUDA code; where torch is a CPU build the library is not made, and nothing else reads them.
    table = setup_table()
    flags = [*table["FLAGS"], *table["torch_flags"](), "-DUSE_CUDA", "-DESPK_NAMESPACE=espkernels_cuda"]
    command = [compiler("g++"), *flags, "-Werror", "-fsyntax-only", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_setup_lists_every_source() -> None:
    assert sorted(setup_table()["CUDA_SOURCES"]) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu")
    )


@pytest.mark.parametrize("architecture", [f"sm_{name.replace('.', '')}" for name in ARCHITECTURES])
def test_hot_kernels_do_not_spill(
    compiled: list[Compiled], architecture: str, record_property: Callable[[str, object], None]
) -> None:
    here = [kernel for kernel in compiled if kernel.architecture == architecture]
    assert {kernel.kernel for kernel in here} >= set(HOT)
    for kernel in here:
        print(kernel)
        record_property(f"{kernel.architecture} {kernel.symbol}", f"{kernel.registers} registers")
    # A template argument double is a d in the mangled name, right behind the I of the arguments.
    hot = [k for k in here if k.kernel != "another" and not k.symbol.split(k.kernel)[1].startswith("Id")]
    assert len(hot) >= 3 * len(HOT)
    assert [str(kernel) for kernel in hot if kernel.spilled] == []


def test_shared_memory_is_dynamic(compiled: list[Compiled]) -> None:
    # Blocks are planned by what they ask for: static memory would not be counted.
    assert [str(kernel) for kernel in compiled if kernel.shared] == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0", ["-gencode", "arch=compute_80,code=sm_80"]),
        ("9.0a", ["-gencode", "arch=compute_90a,code=sm_90a"]),
        ("7.0 7.5 8.0", ["-gencode", "arch=compute_80,code=sm_80"]),  # earlier devices have no tf32
        (
            "8.6;9.0+PTX",
            [
                *("-gencode", "arch=compute_86,code=sm_86"),
                *("-gencode", "arch=compute_90,code=sm_90"),
                *("-gencode", "arch=compute_90,code=compute_90"),
            ],
        ),
    ],
)
def test_architecture_list(text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert setup_table()["cuda_architectures"]() == expected


def test_architecture_list_of_early_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX")
    with pytest.raises(Exception, match=r"is '7\.5\+PTX'; the CUDA kernels need 8\.0 or later"):
        setup_table()["cuda_architectures"]()


def test_architecture_list_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(Exception, match=r"has 'Ampere'; expected numbers such as 8\.0, 9\.0a or 9\.0\+PTX"):
        setup_table()["cuda_architectures"]()
