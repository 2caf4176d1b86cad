from pathlib import Path, PurePosixPath

import pytest

from farm import targets
from farm.plan import CONTAINER_LAYOUT, BuildPlan, Layout
from farm.source import SourceTree

TABLE = targets.load()
SOURCE = SourceTree(
    tree=Path("/somewhere"),
    version="0.6.0",
    build=11549,
    commit="0123456789abcdef0123456789abcdef01234567",
    origin="test",
    sha256=None,
)


def plan(line: str, arch_set: str) -> BuildPlan:
    return BuildPlan(TABLE.sets[arch_set], TABLE.line(line), SOURCE)


def defines(line: str, arch_set: str, layout: Layout = CONTAINER_LAYOUT) -> dict[str, str]:
    configure = plan(line, arch_set).steps(layout, jobs=3)[0]
    pairs = (word[2:].partition("=") for word in configure.argv if word.startswith("-D"))
    return {name: value for name, _, value in pairs}


def test_names_are_the_contracts() -> None:
    assert plan("cu128", "sm90").artifact_name == (
        "llama-server-b11549-cu128-sm90-linux-x86_64.tar.zst"
    )
    assert plan("cu124", "seed").artifact_name == (
        "llama-server-b11549-cu124-seed-linux-x86_64.tar.gz"
    )
    assert plan("cpu", "cpu").artifact_name == "llama-server-b11549-cpu-cpu-linux-x86_64.tar.zst"


def test_cmake_gets_the_architectures_as_they_are_written() -> None:
    assert defines("cu128", "sm90")["CMAKE_CUDA_ARCHITECTURES"] == "90-real"
    assert defines("cu124", "seed")["CMAKE_CUDA_ARCHITECTURES"] == "80;86;89;90"
    assert "CMAKE_CUDA_ARCHITECTURES" not in defines("cpu", "cpu")


@pytest.mark.parametrize(
    ("line", "arch_set", "mode", "flag"),
    [
        ("cu128", "sm90", "none", False),
        ("cu130", "sm120", "none", False),
        ("cu124", "sm90", "none", True),
        ("cu124", "seed", "size", False),
    ],
)
def test_fatbins_stay_uncompressed_where_the_archive_compresses_them(
    line: str, arch_set: str, mode: str, flag: bool
) -> None:
    found = defines(line, arch_set)
    assert found["GGML_CUDA_COMPRESSION_MODE"] == mode
    assert ("--no-compress" in found["CMAKE_CUDA_FLAGS"].split()) is flag


def test_every_build_has_the_flags_that_make_it_portable() -> None:
    wanted = {
        **dict.fromkeys(("GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS"), "ON"),
        **dict.fromkeys(("GGML_NATIVE", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI"), "OFF"),
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "LLAMA_BUILD_NUMBER": "11549",
        "LLAMA_BUILD_COMMIT": "012345678",
    }
    for line, arch_set in (("cpu", "cpu"), ("cu130", "sm90")):
        assert wanted.items() <= defines(line, arch_set).items()


def test_only_the_layout_knows_folders() -> None:
    elsewhere = Layout(PurePosixPath("/x/s"), PurePosixPath("/x/b"), PurePosixPath("/x/r.cmake"))
    assert plan("cpu", "cpu").defines() == plan("cpu", "cpu").defines()
    assert not [value for _, value in plan("cu130", "sm90").defines() if "/" in value]
    assert defines("cpu", "cpu", elsewhere)["CMAKE_PROJECT_INCLUDE"] == "/x/r.cmake"
    assert defines("cpu", "cpu", elsewhere)["CMAKE_C_FLAGS"] == (
        "-ffile-prefix-map=/x/s=llama.cpp -ffile-prefix-map=/x/b=build "
        "-ffile-prefix-map=../s=llama.cpp"
    )


def test_a_cuda_object_is_the_same_in_another_folder_that_does_not_last() -> None:
    """ccache compares what stands behind -Xcompiler letter by letter."""
    first, second = (
        Layout(
            PurePosixPath(f"/{name}/s"),
            PurePosixPath(f"/{name}/b"),
            PurePosixPath("/r"),
            launcher="ccache",
            passing=True,
        )
        for name in ("x", "y")
    )
    flags = defines("cu130", "sm90", first)["CMAKE_CUDA_FLAGS"]
    assert flags == defines("cu130", "sm90", second)["CMAKE_CUDA_FLAGS"]
    assert flags == "-Xcompiler=-ffile-prefix-map=../s=llama.cpp"


def test_jobs_and_targets_are_given_to_the_build() -> None:
    compile_ = plan("cpu", "cpu").steps(CONTAINER_LAYOUT, jobs=3)[1]
    assert compile_.argv[-5:] == ("-j", "3", "--target", "llama-server", "llama-cli")
    assert compile_.counts


def test_the_cache_sees_paths_relative_to_what_source_and_build_share() -> None:
    cached = plan("cpu", "cpu").environment(CONTAINER_LAYOUT, ccache_dir=PurePosixPath("/c"))
    assert cached["CCACHE_BASEDIR"] == "/farm"
    uncached = plan("cpu", "cpu").environment(CONTAINER_LAYOUT, ccache_dir=None)
    assert not [name for name in uncached if name.startswith("CCACHE")]


@pytest.mark.parametrize(
    ("commit", "shown"),
    [(None, "unknown"), ("a" * 40, "a" * 9), ("a" * 40 + "-dirty", "a" * 9 + "-dirty")],
)
def test_the_commit_is_shown_as_upstream_shows_it(commit: str | None, shown: str) -> None:
    assert SourceTree(Path(), None, 1, commit, "x", None).short_commit == shown
