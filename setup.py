"""Builds the extension ``espkernels._C`` with ninja; everything else about the package is in pyproject.toml.

A kernel source is compiled once for each instruction set and the library picks one at run time, which is why the
ninja file is written here. It stays in ``build/ninja``, so that a second build compiles only what changed.

The environment may set CXX, CXXFLAGS, LDFLAGS, MAX_JOBS (how many compilers run at once), ESPKERNELS_WERROR=1
(warnings are errors) and ESPKERNELS_BUILD_CUDA=0|1.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
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

TORCH_SOURCES = ["csrc/ops.cpp", "csrc/cpu_door.cpp", "csrc/cpu_inference_door.cpp"]
PYBIND_SOURCES = ["csrc/module.cpp"]
DISPATCH_SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/plan.cpp"]
KERNEL_SOURCES = [
    "csrc/cpu/depthwise_taps.cpp",
    "csrc/cpu/matrix_product.cpp",
    "csrc/cpu/dot_products.cpp",
    "csrc/cpu/spatial_pyramid.cpp",
    "csrc/cpu/spatial_pyramid_backward_input.cpp",
    "csrc/cpu/spatial_pyramid_backward_weight.cpp",
    "csrc/cpu/group_pointwise.cpp",
    "csrc/cpu/group_pointwise_backward_weight.cpp",
    "csrc/cpu/pyramid_pointwise.cpp",
    "csrc/cpu/convolution.cpp",
    "csrc/cpu/average_pool.cpp",
    "csrc/cpu/global_average.cpp",
    "csrc/cpu/kernels.cpp",
]

# Contraction and the two -fno- flags help loops, and keep NaN, infinity and the order of sums; -ffast-math does not.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"baseline": [], "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"baseline": []},
}

RULES = """\
ninja_required_version = 1.8
builddir = {build}

rule cxx
  command = {cxx} {flags} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = {cxx} -shared {ldflags} -Wl,--as-needed $in $flags -o $out
  description = link $out
"""


@dataclass
class Compilation:
    """One object file: the rule that makes it from a source, and the flags it has beyond the common ones."""

    source: str
    variant: str
    flags: list[str]
    rule: str = "cxx"

    @property
    def object(self) -> str:
        return str(BUILD / self.variant / Path(self.source).with_suffix(".o").name)


@dataclass
class Library:
    """One shared library of the package: its objects and how they are linked."""

    name: str
    compilations: list[Compilation]
    link_flags: list[str]

    @property
    def file(self) -> str:
        return str(BUILD / (self.name + sysconfig.get_config_var("EXT_SUFFIX")))


def cpu_library() -> Library:
    torch = torch_folder()
    # -isystem: the warnings of other people's headers are not ours to mend.
    torch_flags = ["-isystem", f"{torch}/include", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    pybind_flags = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11_include()]
    sets = instruction_sets()
    have = [f"-DESPK_HAVE_{name.upper()}" for name in sets if name != "baseline"]

    compilations = [Compilation(source, "torch", torch_flags) for source in TORCH_SOURCES]
    compilations += [Compilation(source, "pybind", pybind_flags) for source in PYBIND_SOURCES]
    compilations += [Compilation(source, "dispatch", have) for source in DISPATCH_SOURCES]
    for name, flags in sets.items():
        # -Wno-psabi: vectors are passed between functions of one object only, so their calling convention is free.
        flags = [*flags, f"-DESPK_ISA={name}", "-Wno-psabi"]
        compilations += [Compilation(source, name, flags) for source in KERNEL_SOURCES]
    # No rpath: espkernels imports torch first, so the loader already has torch's libraries.
    return Library("_C", compilations, [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-lc10"])


def instruction_sets() -> dict[str, list[str]]:
    """The instruction sets in the binary: all of the architecture built for, whatever this machine has."""
    platform = sysconfig.get_platform()
    system, _, machine = platform.partition("-")
    if system != "linux" or machine not in INSTRUCTION_SETS:
        raise PlatformError(
            f"espkernels has kernels for Linux on {' and '.join(INSTRUCTION_SETS)}, not for {platform}."
        )
    return INSTRUCTION_SETS[machine]


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


def compiler() -> list[str]:
    """The C++ compiler ($CXX, else c++ or g++ or clang++), once it has shown that it knows C++20."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = [shlex.split(candidate) for candidate in candidates]
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        raise PlatformError(
            f"no C++ compiler found (looked for {', '.join(candidates)}): install g++ >= 10, or set CXX."
        )
    probe = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probe, input="#include <concepts>\n", text=True, capture_output=True).returncode:
        raise PlatformError(
            f"{shlex.join(command)} cannot compile C++20: install g++ >= 10 or clang >= 12, or set CXX."
        )
    return command


def wants_cuda() -> bool:
    asked = os.environ.get("ESPKERNELS_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise PlatformError(f"ESPKERNELS_BUILD_CUDA is {asked!r}; it can be 0 or 1.")
    return asked == "1"


def ninja_text(libraries: list[Library]) -> str:
    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    werror = ["-Werror"] if os.environ.get("ESPKERNELS_WERROR") == "1" else []
    text = RULES.format(
        build=BUILD,
        cxx=quote(compiler()),
        flags=quote(shlex.split(os.environ.get("CXXFLAGS", "")) + FLAGS + werror),
        ldflags=quote(shlex.split(os.environ.get("LDFLAGS", ""))),
    )
    for library in libraries:
        for one in library.compilations:
            text += f"\nbuild {one.object}: {one.rule} {one.source}\n  flags = {quote(one.flags)}\n"
        objects = " ".join(one.object for one in library.compilations)
        text += f"\nbuild {library.file}: link {objects}\n  flags = {quote(library.link_flags)}\n"
    return text


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Lets ninja build the libraries and copies them to where setuptools wants them."""

    def run(self) -> None:
        if wants_cuda():
            raise PlatformError("ESPKERNELS_BUILD_CUDA=1, but this version has no CUDA sources yet.")
        libraries = [cpu_library()]
        text, ninja = ninja_text(libraries), ninja_program()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # 'make test' and 'make bench' at the same time share this folder
            (BUILD / "build.ninja").write_text(text)
            if subprocess.run([ninja, "-f", str(BUILD / "build.ninja"), *jobs]).returncode:
                raise CompileError("the C++ sources did not compile; what the compiler says is above.")
            for library in libraries:
                target = Path(self.get_ext_fullpath(f"espkernels.{library.name}"))
                self.mkpath(str(target.parent))
                self.copy_file(library.file, str(target))


models = ["espkernels.models", *(f"espkernels.models.{name}" for name in find_packages("models"))]

setup(
    packages=[*find_packages(include=["espkernels", "espkernels.*"], exclude=["espkernels.models*"]), *models],
    package_dir={"espkernels.models": "models"},
    ext_modules=[Extension("espkernels._C", TORCH_SOURCES + PYBIND_SOURCES + DISPATCH_SOURCES + KERNEL_SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
)
