"""What is built: the library's symbols, a second build, the wheel, what a build that cannot be says, and the import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import AVX512

import espkernels

ROOT = Path(__file__).resolve().parent.parent
NINJA_FILE = ROOT / "build" / "ninja" / "build.ninja"

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run([str(word) for word in command], **options)  # type: ignore[call-overload]


def succeeds(*command: str | Path, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def symbols(*arguments: str | Path) -> list[tuple[str, str]]:
    """(kind, mangled name) of what nm lists."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed here (binutils)")
    lines = (line.split() for line in succeeds("nm", *arguments).splitlines())
    return [(words[-2], words[-1].partition("@")[0]) for words in lines if len(words) >= 2]


def object_files(instruction_set: str) -> list[Path]:
    return sorted((NINJA_FILE.parent / instruction_set).glob("*.o"))


# --- symbols


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_library_asks_torch_for_c_functions_only(name: str) -> None:
    library = next((ROOT / "espkernels").glob(f"{name}.*.so"), None)
    if library is None:
        pytest.skip(f"espkernels.{name} is not built in this folder")
    names = [name for _, name in symbols("-D", "--undefined-only", library)]
    # Namespaces at, c10, caffe2 and torch as the compiler writes them: _ZN2at..., _ZNK3c10..., or inside another name.
    mangled = [name for name in names if name.startswith("_Z") and re.search(r"2at\d|3c10\d|6caffe2|5torch\d", name)]
    assert mangled == []
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in names), "nm does not list the stable ABI"


@pytest.mark.parametrize("instruction_set", ["avx2", *AVX512])
def test_no_function_leaves_its_instruction_set(instruction_set: str) -> None:
    # The linker keeps one of several equal inline functions: one that is compiled for AVX-512 and does not carry that
    # in its name could end up in the baseline's hands and stop an older machine.
    objects = object_files(instruction_set)
    if not objects:
        pytest.skip(f"no objects for {instruction_set} in build/ninja: not built here, or not for this architecture")
    own = f"{len(instruction_set)}{instruction_set}"
    defined = {path.name: symbols("-g", "--defined-only", path) for path in objects}
    found = [(file, name) for file, lines in defined.items() for kind, name in lines if kind in "TWiDRV"]
    assert found
    assert [(file, name) for file, name in found if own not in name] == []


@pytest.mark.skipif(not object_files("baseline"), reason="no objects in build/ninja")
def test_each_instruction_set_has_the_same_sources() -> None:
    names = [{path.name for path in object_files(name)} for name in ("baseline", "avx2", "avx512")]
    assert all(other in (names[0], set()) for other in names[1:])


@pytest.mark.parametrize(
    ("variant", "source", "header"),
    [(name, "cpu/affine", "cpu/intrinsics.h") for name in ("baseline", "avx2", "avx512")]
    + [("torch", "cpu_door", "door.h"), ("torch_cuda", "cuda_door", "door.h")],
)
def test_sources_read_the_precompiled_header(variant: str, source: str, header: str) -> None:
    # A compiler that refuses it says nothing and reads the header itself, which makes the build half as long again.
    if not object_files(variant):
        pytest.skip(f"no objects for {variant} in build/ninja: not built here, or not for this architecture")
    made = f"build/ninja/{variant}/{Path(source).name}.o"
    command = succeeds(ninja(), "-f", "build/ninja/build.ninja", "-t", "commands", made, cwd=ROOT).splitlines()[-1]
    compiler, *flags = command.replace("$CXX_STRICT", "").partition(" -MD")[0].split()
    if "Free Software Foundation" not in succeeds(compiler, "--version"):
        pytest.skip("only g++ looks for a precompiled header wherever it looks for the header")
    read = succeeds(compiler, *flags, "-H", "-fsyntax-only", f"csrc/{source}.cpp", cwd=ROOT)
    assert read.startswith(f"! build/ninja/{variant}/{header}.gch\n")
    assert "mmintrin.h" not in read
    assert "torch/csrc/stable/tensor.h" not in read


# --- building again, and a wheel; in a copy, so that nobody's library is replaced while it runs


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with what is built of them already; its own build compiles only what changed since."""
    if not NINJA_FILE.exists():
        pytest.skip("build/ninja is absent: nothing was built in this folder")
    folder = tmp_path_factory.mktemp("build") / "espkernels"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, folder)
    skip = shutil.ignore_patterns("*.so", "__pycache__", "models")
    shutil.copytree(ROOT / "espkernels", folder / "espkernels", ignore=skip)
    for name in ("models", "csrc", "build/ninja"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = build(folder)
    assert done.returncode == 0, done.stdout
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The environment in which build/ninja was made, so that its objects still count."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("ESPKERNELS_BUILD_CUDA", "PYTHONPATH")
    }
    return {**inherited, **changes}


def build(folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder, env=environment(**changes))


@pytest.mark.parametrize("strict", ["0", "1"])
def test_second_build_does_nothing(copy: Path, strict: str) -> None:
    assert "no work to do" in build(copy, ESPKERNELS_WERROR=strict).stdout


def test_warnings_end_a_strict_build_and_no_other(copy: Path) -> None:
    source = copy / "csrc" / "cpu" / "dispatch.cpp"
    before, text = source.stat(), source.read_text()
    try:
        source.write_text(text + "static int nobody_reads_this;\n")
        strict = build(copy, ESPKERNELS_WERROR="1")
        assert strict.returncode != 0 and "nobody_reads_this" in strict.stdout
        assert build(copy, ESPKERNELS_WERROR="0").returncode == 0
    finally:
        source.write_text(text)
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert build(copy).returncode == 0


def test_a_changed_header_builds_again_what_reads_it_and_nothing_else(copy: Path) -> None:
    def planned() -> str:
        return succeeds(ninja(), "-n", "-f", "build/ninja/build.ninja", cwd=copy)

    assert "no work to do" in planned()
    header = copy / "csrc" / "cpu" / "vector.h"
    before = header.stat()
    os.utime(header)
    plan = planned()
    os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "baseline/" in plan and "link" in plan
    assert "ops.o" not in plan and "module.o" not in plan


def ninja() -> str:
    folder = pytest.importorskip("ninja", reason="the ninja package is not installed").BIN_DIR
    return str(shutil.which("ninja", path=folder))


def test_wheel_holds_the_package_and_works_anywhere(copy: Path, tmp_path: Path) -> None:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q"]
    succeeds(sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, copy, env=environment())
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder, package in ((ROOT / "espkernels", "espkernels"), (ROOT / "models", "espkernels/models")):
        for module in folder.rglob("*.py"):
            assert f"{package}/{module.relative_to(folder)}" in names
    assert "espkernels/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"espkernels", f"espkernels-{espkernels.__version__}.dist-info"}

    script = "import espkernels.models, espkernels._C as C; print(espkernels.__file__, C.__file__, C.isa(), sep='\\n')"
    printed = succeeds(sys.executable, "-c", script, cwd="/", env=environment(PYTHONPATH=str(tmp_path / "site")))
    package, library, isa = printed.splitlines()[-3:]
    assert package.startswith(str(tmp_path)) and library.startswith(str(tmp_path))
    assert isa in ("baseline", "avx2", *AVX512)


def test_models_import_from_any_folder() -> None:
    script = "import espkernels.models; print(espkernels.models.__name__)"
    assert succeeds(sys.executable, "-c", script, cwd="/").split() == ["espkernels.models"]


# --- a build that cannot be says what is missing

Machine = Callable[..., str]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Runs setup.py on a pretended machine that has only the packages and programs named, and returns its last line."""
    pytest.importorskip("setuptools", reason="setuptools is not installed, so nothing can be built")

    def build_there(packages: list[str], programs: list[str], **variables: str) -> str:
        site, path = tmp_path / "site", tmp_path / "bin"
        site.mkdir()
        path.mkdir(exist_ok=True)
        # A torch of any version: setup.py looks at its version and its folder, and imports nothing.
        for name in packages:
            if name.startswith("torch-"):
                (site / "torch").mkdir()
                (site / "torch" / "__init__.py").touch()
                (site / f"{name}.dist-info").mkdir()
                version = name.removeprefix("torch-")
                (site / f"{name}.dist-info" / "METADATA").write_text(
                    f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
                )
            else:
                module = pytest.importorskip(name)
                (site / name).symlink_to(Path(module.__file__).parent)
        for name in programs:
            program = shutil.which(name)
            assert program is not None
            (path / name).symlink_to(program)
        command = [sys.executable, "-S", ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
        here = {"PATH": str(path), "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **variables}
        done = run(*command, cwd=tmp_path, env=here)
        assert done.returncode != 0
        return done.stdout.strip().splitlines()[-1]

    return build_there


BASE = ["setuptools", "_distutils_hack"]
EVERYTHING = [*BASE, "pybind11", "torch-2.13.0+cpu"]
COMPILERS = ["g++"] if shutil.which("g++") else []


def test_without_torch(machine: Machine) -> None:
    assert machine(BASE, COMPILERS) == (
        "error: torch is not installed here: install torch >= 2.10 first, and build with --no-build-isolation."
    )


def test_with_an_old_torch(machine: Machine) -> None:
    said = machine([*BASE, "pybind11", "torch-2.9.1+cpu"], COMPILERS)
    assert said == "error: torch 2.9.1+cpu is too old: espkernels needs torch >= 2.10."


def test_without_pybind11(machine: Machine) -> None:
    assert machine([*BASE, "torch-2.10.0"], COMPILERS) == "error: pybind11 is not installed here: pip install pybind11."


def test_without_a_compiler(machine: Machine) -> None:
    said = machine(EVERYTHING, [])
    assert said == "error: no C++ compiler found (looked for c++, g++, clang++): install g++ >= 12, or set CXX."


def test_with_a_compiler_that_does_not_exist(machine: Machine) -> None:
    said = machine(EVERYTHING, COMPILERS, CXX="/does/not/exist/g++")
    assert said == "error: no C++ compiler found (looked for /does/not/exist/g++): install g++ >= 12, or set CXX."


def test_with_a_compiler_too_old_for_the_language(machine: Machine, tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"unrecognized command line option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    said = machine(EVERYTHING, [], CXX=str(old))
    assert said == f"error: {old} cannot compile C++20: install g++ >= 12 or clang >= 12, or set CXX."


@pytest.mark.skipif(not COMPILERS, reason="g++ is not installed here")
def test_without_ninja(machine: Machine) -> None:
    assert machine(EVERYTHING, COMPILERS, CXX="g++") == "error: ninja is not installed here: pip install ninja."


@pytest.mark.skipif(not COMPILERS, reason="g++ is not installed here")
def test_with_sources_that_do_not_compile(machine: Machine) -> None:
    # The pretended machine has no csrc folder.
    said = machine([*EVERYTHING, "ninja"], COMPILERS, PATH=os.environ["PATH"])
    assert said == "error: the C++ sources did not compile; what the compiler says is above."


def test_with_cuda_asked_for(machine: Machine) -> None:
    said = machine(EVERYTHING, COMPILERS, ESPKERNELS_BUILD_CUDA="1", CUDA_HOME="/does/not/exist")
    assert said == (
        "error: ESPKERNELS_BUILD_CUDA=1, but there is no CUDA toolkit here (bin/nvcc and lib64/libcudart_static.a, "
        "looked for in /does/not/exist): install it, or set CUDA_HOME."
    )


@pytest.mark.skipif(not COMPILERS, reason="g++ is not installed here")
@pytest.mark.parametrize(("cxx", "nvcc"), [("g++ -m64", "nvcc -ccbin g++"), ("env A=1 g++", "env A=1 nvcc -ccbin g++")])
def test_a_launcher_in_front_of_the_compiler_starts_nvcc_too(
    cxx: str, nvcc: str, machine: Machine, tmp_path: Path
) -> None:
    machine([*EVERYTHING, "ninja"], COMPILERS, PATH=os.environ["PATH"], CXX=cxx, CUDA_HOME="/does/not/exist")
    lines = (tmp_path / "build" / "ninja" / "build.ninja").read_text().splitlines()
    assert any(line.strip().endswith(nvcc) or f"= {nvcc} " in line for line in lines), lines[:12]


def test_with_a_wrong_switch(machine: Machine) -> None:
    said = machine(EVERYTHING, COMPILERS, ESPKERNELS_BUILD_CUDA="yes")
    assert said == "error: ESPKERNELS_BUILD_CUDA is 'yes'; it can be 0 or 1."


# --- the import


def test_import_brings_in_nothing_but_torch_and_numpy() -> None:
    script = """
import sys, torch, numpy
before = set(sys.modules)
import espkernels
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert succeeds(sys.executable, "-c", script, cwd=ROOT).split() == ["espkernels"]
