"""What a person adds to a build: definitions that are refused, and programs that are shipped."""

import os
from pathlib import Path

import pytest

from farm import request, targets
from farm.errors import UsageError
from farm.options import BuildRequest
from farm.plan import CONTAINER_LAYOUT, BuildPlan
from farm.source import SourceTree
from tests.rigs.refusals import refused


def _plan(tree: Path, set_name: str = "cpu", line: str = "cpu") -> BuildPlan:
    table = targets.load()
    source = SourceTree(tree, "1", 1, None, "test", sha256="0" * 64)
    return BuildPlan(table.sets[set_name], table.line(line), source)


@pytest.mark.parametrize(("set_name", "line"), [("cpu", "cpu"), ("sm90", "cu128")])
def test_definitions_refuse_another_value_for_each_of_the_farms_own(
    tmp_path: Path, set_name: str, line: str
) -> None:
    plan = _plan(tmp_path, set_name, line)
    configure = plan.steps(CONTAINER_LAYOUT, jobs=1)[0].argv
    own = [word[2:].partition("=")[0] for word in configure if word.startswith("-D")]
    assert len(own) > 25
    for name in own:
        with pytest.raises(UsageError) as caught:
            request.definitions([f"{name}=another"])
        assert caught.value.code == "DEFINE_CONTRADICTS", name


@pytest.mark.parametrize(
    "text",
    [
        "CMAKE_CUDA_ARCHITECTURES=80",
        "GGML_NATIVE=ON",
        "GGML_CUDA=OFF",
        "CMAKE_INSTALL_RPATH=/opt/lib",
        "CMAKE_SKIP_RPATH=ON",
        "CMAKE_BUILD_RPATH=/tmp",
        "CMAKE_CXX_FLAGS_RELEASE=-O3 -march=native",
        "CMAKE_CXX_COMPILER=clang++",
        "CMAKE_C_LINKER_LAUNCHER=/bin/sh",
        "CMAKE_AR=/bin/sh",
        "GIT_EXECUTABLE=/bin/sh",
        "GGML_VULKAN=ON",
        "GGML_BLAS_VENDOR=OpenBLAS",
        "LLAMA_CURL=ON",
        "GGML_BACKEND_DIR=/usr/lib",
        "GGML_STATIC=ON",
    ],
)
def test_definitions_refuse_what_would_make_the_manifest_untrue(text: str) -> None:
    with refused("DEFINE_CONTRADICTS", UsageError) as caught:
        request.definitions([text])
    assert text in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "FOO", "=1", "A-B=1", "A:BOOL=ON", "A=1\nB=2", "A=\x1b[2J", "A=\udcff"]
)
def test_definitions_refuse_what_is_none(text: str) -> None:
    with refused("DEFINE_INVALID", UsageError) as caught:
        request.definitions([text])
    assert "\x1b" not in caught.value.message


def test_definitions_refuse_two_values_for_one_name() -> None:
    with pytest.raises(UsageError, match="two values"):
        request.definitions(["GGML_CUDA_FA=ON", "GGML_CUDA_FA=OFF"])


def test_definitions_leave_out_what_the_farm_says_in_the_same_words() -> None:
    given = ["GGML_NATIVE=OFF", "GGML_SCHED_MAX_COPIES=1", "GGML_SCHED_MAX_COPIES=1"]
    assert request.definitions(given) == (("GGML_SCHED_MAX_COPIES", "1"),)


def test_programs_are_named_as_the_source_names_them(tmp_path: Path) -> None:
    also = request.programs(["rpc-server,llama-bench", "ggml-rpc-server"])
    assert sorted(also) == ["llama-bench", "rpc-server"]
    assert set(request.program_targets(also, tmp_path)) == {"llama-bench", "rpc-server"}
    cmake = tmp_path / "tools" / "rpc" / "CMakeLists.txt"
    cmake.parent.mkdir(parents=True)
    cmake.write_text("set(TARGET ggml-rpc-server)\n")
    os.truncate(cmake, 1 << 40)
    assert set(request.program_targets(also, tmp_path)) == {"llama-bench", "ggml-rpc-server"}
    built, defined = request.options(BuildRequest(also=also), tmp_path)
    assert set(built) == {"llama-server", "llama-cli", "llama-bench", "ggml-rpc-server"}
    assert dict(defined) == {"GGML_RPC": "ON", "GGML_RPC_RDMA": "OFF"}
    assert request.options(BuildRequest(also=("llama-bench",)), tmp_path)[1] == ()
