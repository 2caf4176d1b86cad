"""Options that cannot be meant, and what a person adds to a build, before anything is started."""

import os
import re
from pathlib import Path

import pytest

from farm import request, targets
from farm.errors import UsageError
from farm.options import BuildRequest
from farm.plan import CONTAINER_LAYOUT, BuildPlan
from farm.request import require_buildable, resolve
from farm.source import SourceTree
from llama_loader.selection import building
from tests.rigs.refusals import refused


@pytest.mark.parametrize(
    "address",
    ["garbage", "tcp://127.0.0.1:notaport", "inproc://x", "tcp://:8786", "tcp://host", "",
     "tcp://host:99999", "tcp://host:0", "tcp://host:1/path"],
)  # fmt: skip
def test_what_is_no_schedulers_address_is_wrong_usage(address: str) -> None:
    with refused("SCHEDULER_INVALID", UsageError, status=2):
        resolve(BuildRequest(engine="dask", scheduler=address))


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:8786", "builder:8786", "tls://builder:1", "tcp://[::1]:8786"]
)
def test_a_schedulers_address_is_taken(address: str) -> None:
    resolve(BuildRequest(engine="dask", scheduler=address))


@pytest.mark.parametrize("option", [{"scheduler": "tcp://builder:8786"}, {"workers": 2}])
def test_a_cluster_without_its_engine_is_wrong_usage(option: dict[str, object]) -> None:
    with refused("CLUSTER_WITHOUT_DASK", UsageError):
        resolve(BuildRequest(**option))  # type: ignore[arg-type] - one of two options


@pytest.mark.parametrize(
    "capabilities", [("90",), ("60", "120"), ("75", "121"), ("60", "121"), ("37",), ("37", "90")]
)
def test_the_loaders_hint_names_a_possible_build_or_none(
    capabilities: tuple[str, ...],
) -> None:
    hint = building(capabilities)
    asked = re.search(r"invoke build-cuda(?: --line (\w+))? --archs '([0-9;]+)'", hint)
    table = targets.load()
    if asked:
        line = table.line(asked[1] or targets.DEFAULT_LINE)
        require_buildable(line, (targets.ArchSet("asked", asked[2]),))
        return
    assert "no line of the farm" in hint
    for name in ("cu124", "cu128", "cu130"):
        with pytest.raises(UsageError):
            require_buildable(table.line(name), (targets.ArchSet("asked", ";".join(capabilities)),))


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
