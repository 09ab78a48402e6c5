"""Builds the extension ``espkernels._C`` with ninja; everything else about the package is in pyproject.toml.

A kernel source is compiled once for each instruction set and the library picks one at run time, which is why the
ninja file is written here. It stays in ``build/ninja``, so that a second build compiles only what changed.

``espkernels._C_cuda`` is built too where torch is a CUDA build and nvcc is there, or where it is asked for; no GPU is
needed.

The environment may set CXX, CXXFLAGS, LDFLAGS, MAX_JOBS (how many compilers run at once), ESPKERNELS_WERROR=1
(warnings are errors), ESPKERNELS_BUILD_CUDA=0|1 (never, or always), CUDA_HOME (where the toolkit is) and
TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX", the default).
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

BUILD = Path("build/ninja")
OLDEST_TORCH = (2, 10)
STABLE_ABI = "0x020a000000000000"

TORCH_SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu_door.cpp",
    "csrc/cpu_unit_door.cpp",
    "csrc/cpu_inference_door.cpp",
    "csrc/cpu_pixel_door.cpp",
    "csrc/cpu_training_door.cpp",
    "csrc/cpu_training_norms_door.cpp",
    "csrc/cpu_training_layers_door.cpp",
    "csrc/cpu_recurrence_door.cpp",
]
PYBIND_SOURCES = ["csrc/module.cpp"]
DISPATCH_SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/plan.cpp"]
KERNEL_SOURCES = [
    "csrc/cpu/depthwise_taps.cpp",
    "csrc/cpu/matrix_product.cpp",
    "csrc/cpu/dot_products.cpp",
    "csrc/cpu/narrow_groups.cpp",
    "csrc/cpu/pointwise_weights.cpp",
    "csrc/cpu/branch_weights.cpp",
    "csrc/cpu/zero_bordered_tile.cpp",
    "csrc/cpu/normalise.cpp",
    "csrc/cpu/channel_sums.cpp",
    "csrc/cpu/pyramid_gradient.cpp",
    "csrc/cpu/spatial_pyramid.cpp",
    "csrc/cpu/spatial_pyramid_backward_input.cpp",
    "csrc/cpu/spatial_pyramid_backward_weight.cpp",
    "csrc/cpu/group_pointwise.cpp",
    "csrc/cpu/group_pointwise_backward_weight.cpp",
    "csrc/cpu/pyramid_pointwise.cpp",
    "csrc/cpu/eesp.cpp",
    "csrc/cpu/convolution.cpp",
    "csrc/cpu/average_pool.cpp",
    "csrc/cpu/global_average.cpp",
    "csrc/cpu/resize.cpp",
    "csrc/cpu/adaptive_average.cpp",
    "csrc/cpu/grouped_convolution.cpp",
    "csrc/cpu/depthwise.cpp",
    "csrc/cpu/pyramid_pooling.cpp",
    "csrc/cpu/resized_argmax.cpp",
    "csrc/cpu/affine.cpp",
    "csrc/cpu/change_layout.cpp",
    "csrc/cpu/concatenate.cpp",
    "csrc/cpu/normalised_pointwise.cpp",
    "csrc/cpu/normalised_pointwise_backward.cpp",
    "csrc/cpu/normalised_pyramid_backward.cpp",
    "csrc/cpu/normalised_output.cpp",
    "csrc/cpu/normalised_output_backward.cpp",
    "csrc/cpu/map_moments.cpp",
    "csrc/cpu/batch_norm_backward.cpp",
    "csrc/cpu/convolution_backward_weight.cpp",
    "csrc/cpu/grouped_convolution_backward_weight.cpp",
    "csrc/cpu/average_pool_backward.cpp",
    "csrc/cpu/resize_backward.cpp",
    "csrc/cpu/long_range_shortcut.cpp",
    "csrc/cpu/long_range_shortcut_backward.cpp",
    "csrc/cpu/recurrence.cpp",
    "csrc/cpu/recurrence_backward.cpp",
    "csrc/cpu/kernels.cpp",
]

# Under csrc; every kernel, or door, reads it, and reading it takes longer than compiling a small one.
PRECOMPILED = "cpu/intrinsics.h"
PRECOMPILED_OF_DOORS = "door.h"

BFLOAT16_SOURCES = ["csrc/cpu/bfloat16_product.cpp"]
SOURCES = TORCH_SOURCES + PYBIND_SOURCES + DISPATCH_SOURCES + KERNEL_SOURCES + BFLOAT16_SOURCES

# The CUDA library defines the same schemas in a namespace of its own.
CUDA_TORCH_SOURCES = [
    "csrc/ops.cpp",
    "csrc/cuda_door.cpp",
    "csrc/cuda_inference_door.cpp",
    "csrc/cuda_training_door.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/spatial_pyramid.cu",
    "csrc/cuda/spatial_pyramid_backward_input.cu",
    "csrc/cuda/spatial_pyramid_backward_weight.cu",
    "csrc/cuda/group_pointwise.cu",
    "csrc/cuda/group_pointwise_backward_weight.cu",
    "csrc/cuda/pyramid_pointwise.cu",
    "csrc/cuda/eesp.cu",
    "csrc/cuda/down_sampler.cu",
    "csrc/cuda/unit.cu",
    "csrc/cuda/batch_norm.cu",
    "csrc/cuda/normalised_pointwise.cu",
    "csrc/cuda/normalised_pointwise_backward.cu",
    "csrc/cuda/normalised_pyramid.cu",
    "csrc/cuda/normalised_pyramid_backward.cu",
    "csrc/cuda/normalised_output.cu",
    "csrc/cuda/normalised_output_backward.cu",
    "csrc/cuda/eesp_training.cu",
]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"

# Contraction and the two -fno- flags help loops, and keep NaN, infinity and the order of sums; -ffast-math does not.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Icsrc"]
AVX2 = ["-O3", "-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Of the kernel that multiplies bfloat16 for those of avx512; sets that the compiler does not know are left out.
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
BFLOAT16_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"avx512_bf16": AVX512_BF16, "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]},
}
# Compile time goes where the run time is: x86-64 without AVX2 is the last resort, and nothing runs in loops around
# the kernels.
AROUND_KERNELS = ["-O1"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"baseline": ["-O1"], "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"baseline": ["-O3"]},
}

# Of the environment, where a shell finds them: a build with and one without strict warnings make the same objects, and
# neither makes those of the other again.
STRICT = {"CXX_STRICT": "-Werror", "NVCC_STRICT": "-Werror all-warnings"}

RULES = """\
ninja_required_version = 1.8
builddir = {build}

rule cxx
  command = {cxx} {flags} $flags $$CXX_STRICT -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule precompile
  command = {cxx} {flags} $flags $$CXX_STRICT -MD -MF $out.d -x c++-header -include $in /dev/null -o $out
  depfile = $out.d
  deps = gcc
  description = precompile $out

rule nvcc
  command = {nvcc} {nvcc_flags} $flags $$NVCC_STRICT -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = {cxx} -shared {ldflags} -Wl,--as-needed $in $flags -o $out
  description = link $out
"""


@dataclass
class Compilation:
    """One object file: the rule that makes it from a source, and the flags it has beyond the common ones.

    It reads the header ``precompiled`` as it was compiled with the same flags, where the compiler accepts that, and
    csrc's where not.
    """

    source: str
    variant: str
    flags: list[str]
    rule: str = "cxx"
    precompiled: str = ""

    @property
    def object(self) -> str:
        return str(BUILD / self.variant / Path(self.source).with_suffix(".o").name)

    @property
    def header(self) -> str:
        return str(BUILD / self.variant / f"{self.precompiled}.gch")


@dataclass
class Library:
    """One shared library of the package: its objects and how they are linked."""

    name: str
    compilations: list[Compilation]
    link_flags: list[str]

    @property
    def file(self) -> str:
        return str(BUILD / (self.name + sysconfig.get_config_var("EXT_SUFFIX")))


def doors(sources: list[str], variant: str, flags: list[str]) -> list[Compilation]:
    return [Compilation(source, variant, flags, precompiled=PRECOMPILED_OF_DOORS) for source in sources]


def cpu_library() -> Library:
    torch = torch_folder()
    pybind_flags = [*AROUND_KERNELS, "-isystem", sysconfig.get_path("include"), "-isystem", pybind11_include()]
    sets, bfloat16_sets = instruction_sets(), known_bfloat16_sets()
    named = [*(name for name in sets if name != "baseline"), *bfloat16_sets]
    have = [*AROUND_KERNELS, *(f"-DESPK_HAVE_{name.upper()}" for name in named)]

    compilations = doors(TORCH_SOURCES, "torch", torch_flags())
    compilations += [Compilation(source, "pybind", pybind_flags) for source in PYBIND_SOURCES]
    compilations += [Compilation(source, "dispatch", have) for source in DISPATCH_SOURCES]
    for sources, table in ((KERNEL_SOURCES, sets), (BFLOAT16_SOURCES, bfloat16_sets)):
        for name, flags in table.items():
            # -Wno-psabi: vectors are passed between functions of one object only, so their calling convention is free.
            flags = [*flags, f"-DESPK_ISA={name}", "-Wno-psabi"]
            precompiled = PRECOMPILED if sources is KERNEL_SOURCES else ""
            compilations += [Compilation(source, name, flags, precompiled=precompiled) for source in sources]
    # No rpath: espkernels imports torch first, so the loader already has torch's libraries.
    return Library("_C", compilations, [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-lc10"])


def cuda_library() -> Library:
    torch, toolkit = torch_folder(), cuda_toolkit()
    if toolkit is None:
        raise PlatformError(
            "ESPKERNELS_BUILD_CUDA=1, but there is no CUDA toolkit here (bin/nvcc and lib64/libcudart_static.a, looked "
            f"for in {', '.join(map(str, cuda_folders()))}): install it, or set CUDA_HOME."
        )
    # USE_CUDA declares the stable ABI's CUDA functions, which a CPU build of torch declares too, but does not define.
    flags = [*torch_flags(), "-DUSE_CUDA", "-DESPK_NAMESPACE=espkernels_cuda"]
    compilations = doors(CUDA_TORCH_SOURCES, "torch_cuda", flags)
    compilations += [Compilation(source, "cuda", cuda_architectures(), "nvcc") for source in CUDA_SOURCES]
    # The runtime is linked in, so that any CUDA build of torch will do, whichever toolkit it brings.
    runtime = [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    torch_libraries = ["-ltorch_cuda"] if torch_has_cuda() else []
    return Library("_C_cuda", compilations, [f"-L{torch}/lib", *torch_libraries, "-ltorch_cpu", "-lc10", *runtime])


def torch_has_cuda() -> bool:
    return (Path(torch_folder()) / "lib" / "libtorch_cuda.so").exists()


def cuda_folders() -> list[Path]:
    """Where a CUDA toolkit may be: CUDA_HOME alone where it is set."""
    if os.environ.get("CUDA_HOME"):
        return [Path(os.environ["CUDA_HOME"])]
    nvcc = shutil.which("nvcc")
    return [*([Path(nvcc).resolve().parent.parent] if nvcc else []), Path("/usr/local/cuda")]


def cuda_toolkit() -> Path | None:
    needed = ("bin/nvcc", "lib64/libcudart_static.a")
    return next((folder for folder in cuda_folders() if all((folder / name).exists() for name in needed)), None)


def cuda_architectures() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST: machine code for each, and with +PTX what later devices compile.

    Without what comes before 8.0, which lists for other projects may name: those devices have no bfloat16 and no tf32,
    and Triton's kernels serve them.
    """
    options: list[str] = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    for word in asked.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if match is None:
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST has {word!r}; expected numbers such as 8.0, 9.0a or 9.0+PTX.")
        if int(match[1]) < 8:
            continue
        number = match[1] + match[2]
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    if not options:
        raise PlatformError(
            f"TORCH_CUDA_ARCH_LIST is {asked!r}; the CUDA kernels need 8.0 or later. Add one, or set "
            "ESPKERNELS_BUILD_CUDA=0."
        )
    return options


def torch_flags() -> list[str]:
    # -isystem: the warnings of other people's headers are not ours to mend.
    headers = f"{torch_folder()}/include"
    return [*AROUND_KERNELS, "-isystem", headers, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]


def instruction_sets() -> dict[str, list[str]]:
    """The instruction sets in the binary: all of the architecture built for, whatever this machine has."""
    platform = sysconfig.get_platform()
    system, _, machine = platform.partition("-")
    if system != "linux" or machine not in INSTRUCTION_SETS:
        raise PlatformError(
            f"espkernels has kernels for Linux on {' and '.join(INSTRUCTION_SETS)}, not for {platform}."
        )
    return INSTRUCTION_SETS[machine]


def known_bfloat16_sets() -> dict[str, list[str]]:
    """The sets that multiply bfloat16 and that the compiler knows: g++ 10 has no tiles."""
    sets = BFLOAT16_SETS.get(sysconfig.get_platform().partition("-")[2], {})
    return {name: flags for name, flags in sets.items() if compiles(compiler(), flags, "")}


def torch_folder() -> str:
    """Where torch is, found without the seconds that importing it takes."""
    needed = ".".join(map(str, OLDEST_TORCH))
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise PlatformError(
            f"torch is not installed here: install torch >= {needed} first, and build with --no-build-isolation."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise PlatformError(f"torch {version} is too old: espkernels needs torch >= {needed}.")
    return str(Path(spec.origin).parent)


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise PlatformError("pybind11 is not installed here: pip install pybind11.") from None
    return str(pybind11.get_include())


def ninja_program() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    program = shutil.which("ninja", path=BIN_DIR or None)
    if program is None:
        raise PlatformError("ninja is not installed here: pip install ninja.")
    return program


# C++20, and the shuffles of vectors that GCC has since 12.
PROBE = """#include <concepts>
typedef int Four __attribute__((vector_size(16)));
Four turned(Four v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }
"""


@functools.cache
def compiler() -> list[str]:
    """The C++ compiler ($CXX, else c++ or g++ or clang++), once it has shown that it knows C++20."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = [shlex.split(candidate) for candidate in candidates]
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        raise PlatformError(
            f"no C++ compiler found (looked for {', '.join(candidates)}): install g++ >= 12, or set CXX."
        )
    if not compiles(command, ["-std=c++20"], PROBE):
        raise PlatformError(
            f"{shlex.join(command)} cannot compile C++20: install g++ >= 12 or clang >= 12, or set CXX."
        )
    return command


def compiles(command: list[str], flags: list[str], source: str) -> bool:
    probe = [*command, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0


def wants_cuda() -> bool:
    asked = os.environ.get("ESPKERNELS_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise PlatformError(f"ESPKERNELS_BUILD_CUDA is {asked!r}; it can be 0 or 1.")
    return asked == "1" or (asked == "" and torch_has_cuda() and cuda_toolkit() is not None)


def ninja_text(libraries: list[Library]) -> str:
    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    cxx, toolkit = compiler(), cuda_toolkit()
    *launcher, host = itertools.takewhile(lambda word: not word.startswith("-"), cxx)  # CXX may be "ccache g++ -m64"
    text = RULES.format(
        build=BUILD,
        cxx=quote(cxx),
        flags=quote(shlex.split(os.environ.get("CXXFLAGS", "")) + FLAGS),
        nvcc=quote([*launcher, str(toolkit / "bin" / "nvcc") if toolkit else "nvcc", "-ccbin", host]),
        nvcc_flags=quote(NVCC_FLAGS),
        ldflags=quote(shlex.split(os.environ.get("LDFLAGS", ""))),
    )
    for library in libraries:
        headers = {one.header: one for one in library.compilations if one.precompiled}
        for header, one in headers.items():
            text += f"\nbuild {header}: precompile csrc/{one.precompiled}\n  flags = {quote(one.flags)}\n"
        for one in library.compilations:
            before, flags = "", one.flags
            if one.precompiled:
                before = f" | {one.header}"
                flags = ["-iquote", str(BUILD / one.variant), "-include", one.precompiled, *flags]
            text += f"\nbuild {one.object}: {one.rule} {one.source}{before}\n  flags = {quote(flags)}\n"
        objects = " ".join(one.object for one in library.compilations)
        text += f"\nbuild {library.file}: link {objects}\n  flags = {quote(library.link_flags)}\n"
    return text


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Lets ninja build the libraries and copies them to where setuptools wants them."""

    def run(self) -> None:
        libraries = [cpu_library(), *([cuda_library()] if wants_cuda() else [])]
        text, ninja = ninja_text(libraries), ninja_program()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        strict = STRICT if os.environ.get("ESPKERNELS_WERROR") == "1" else dict.fromkeys(STRICT, "")
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # 'make test' and 'make bench' at the same time share this folder
            (BUILD / "build.ninja").write_text(text)
            command = [ninja, "-f", str(BUILD / "build.ninja"), *jobs]
            if subprocess.run(command, env={**os.environ, **strict}).returncode:
                raise CompileError("the C++ sources did not compile; what the compiler says is above.")
            for library in libraries:
                target = Path(self.get_ext_fullpath(f"espkernels.{library.name}"))
                self.mkpath(str(target.parent))
                self.copy_file(library.file, str(target))
        if os.environ.get("ESPKERNELS_BUILD_CUDA") == "0":
            # One of an earlier build would go on serving GPUs.
            Path(self.get_ext_fullpath("espkernels._C_cuda")).unlink(missing_ok=True)
        if wants_cuda() and not torch_has_cuda():
            self.warn("torch is a CPU build here: espkernels._C_cuda is complete, but loads beside a CUDA build only.")


models = ["espkernels.models", *(f"espkernels.models.{name}" for name in find_packages("models"))]

setup(
    packages=[*find_packages(include=["espkernels", "espkernels.*"], exclude=["espkernels.models*"]), *models],
    package_dir={"espkernels.models": "models"},
    ext_modules=[Extension("espkernels._C", SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
)
