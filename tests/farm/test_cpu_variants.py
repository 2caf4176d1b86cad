"""Which CPU variants the demo builds, and that CMake builds those and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

from farm.inputs import patches

CMAKE = """
    if (GGML_SYSTEM_ARCH STREQUAL "x86")
        ggml_add_cpu_backend_variant(x64)
        ggml_add_cpu_backend_variant(sse42              SSE42)
        ggml_add_cpu_backend_variant(haswell            SSE42 AVX F16C FMA AVX2 BMI2)
        ggml_add_cpu_backend_variant(skylakex           SSE42 AVX F16C FMA AVX2 BMI2 AVX512)
        ggml_add_cpu_backend_variant(alderlake          SSE42 AVX F16C FMA AVX2 BMI2 AVX_VNNI)
    elseif (GGML_SYSTEM_ARCH STREQUAL "ARM")
        ggml_add_cpu_backend_variant(armv8.0_1)
        ggml_add_cpu_backend_variant(armv8.2_1    DOTPROD)
    ggml_add_cpu_backend_variant(power0)
"""
AVX2 = "sse4_2 avx f16c fma avx2 bmi2"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "ggml" / "src").mkdir(parents=True)
    (tmp_path / "ggml" / "src" / "CMakeLists.txt").write_text(CMAKE)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (AVX2, "haswell"),
        (f"{AVX2} avx_vnni", "alderlake"),
        (f"{AVX2} avx512f avx512cd avx512vl avx512dq avx512bw", "skylakex"),
        (f"{AVX2} avx512f", "haswell"),
        ("sse4_2", "sse42"),
        ("sse2", "x64"),
    ],
)
def test_the_best_variant_that_runs_here_is_built(flags: str, expected: str, tree: Path) -> None:
    cpuinfo = tree / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    assert patches.cpu_variant(tree, cpuinfo) == expected


def test_where_it_cannot_be_told_all_are_built(tree: Path, tmp_path: Path) -> None:
    cpuinfo = tree / "cpuinfo"
    assert patches.cpu_variant(tree, cpuinfo) == ""
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert patches.cpu_variant(tree, cpuinfo) == ""
    assert patches.cpu_variant(tmp_path / "nowhere", cpuinfo) == ""


def test_cmake_builds_the_variants_that_are_named_and_no_others(tmp_path: Path) -> None:
    names = ("x64", "haswell", "zen4")
    (tmp_path / "empty.c").touch()
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.19)\nproject(p C)\nadd_library(ggml SHARED empty.c)\n"
        "add_library(ggml-rpc MODULE empty.c)\nadd_dependencies(ggml ggml-rpc)\n"
        + "".join(
            f"add_library(ggml-cpu-{name} MODULE empty.c)\nadd_dependencies(ggml ggml-cpu-{name})\n"
            for name in names
        )
    )
    cmake = Path(sys.executable).parent / "cmake"
    for chosen, built in (("x64;zen4", {"x64", "zen4"}), ("", set(names))):
        folder = tmp_path / ("some" if chosen else "all")
        define = f"-D{patches.CPU_VARIANTS}={chosen}"
        include = f"-DCMAKE_PROJECT_INCLUDE={patches.RECIPE}"
        for argv in (
            [cmake, "-S", tmp_path, "-B", folder, define, include],
            [cmake, "--build", folder, "--target", "ggml"],
        ):
            subprocess.run(argv, check=True, capture_output=True)
        found = {path.stem.removeprefix("libggml-cpu-") for path in folder.glob("libggml-cpu-*")}
        assert found == built
        assert (folder / "libggml-rpc.so").is_file()
