"""Where CUDA's libraries are found, and which go together: cuBLAS and cuBLASLt of one version."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from llama_loader import cuda_libraries
from llama_loader.cuda_libraries import (
    Library,
    driver_folders,
    find_libraries,
    folders,
    split_needs,
)
from llama_loader.errors import HostError
from llama_loader.selection import require_libraries, select
from tests.loader.test_host import write
from tests.loader.test_selection import host
from tests.rigs.releases import artifact, manifest, runtime

CUBLAS, LT, CUDART = (f"{stem}.so.12" for stem in ("libcublas", "libcublasLt", "libcudart"))
NEEDS = (CUDART, CUBLAS, "libcuda.so.1")


def library(
    soname: str, folder: str, version: str | None = None, origin: str = "toolkit"
) -> Library:
    return Library(soname, Path(folder), version, origin)


WHEELS = tuple(library(name, "/wheels", "12.8.4.1") for name in (CUBLAS, LT, CUDART))


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        # only half a pair in the folder that comes first: the whole pair of the next
        ([library(CUBLAS, "/A", "12.1.3.1")], ("/wheels", "/wheels", "/wheels")),
        ([library(LT, "/A", "12.1.3.1")], ("/wheels", "/wheels", "/wheels")),
        ([library(CUBLAS, "/A")], ("/wheels", "/wheels", "/wheels")),
        # of one version: wherever they lie
        ([library(CUBLAS, "/A", "12.8.4.1")], ("/A", "/wheels", "/wheels")),
        # a whole pair
        ([library(CUBLAS, "/A"), library(LT, "/A")], ("/A", "/A", "/wheels")),
        # cudart is nobody's half, but a folder more could hide some of the others
        ([library(CUDART, "/A"), library(CUBLAS, "/A")], ("/wheels", "/wheels", "/wheels")),
        # two halves and then a pair
        ([library(CUBLAS, "/A", "12.1"), library(LT, "/B", "12.2")], ("/wheels",) * 3),
    ],
)
def test_the_pair_is_of_one_version(first: list[Library], expected: tuple[str, ...]) -> None:
    taken, missing = split_needs(NEEDS, [*first, *WHEELS])
    assert missing == ()
    where = {one.soname: str(one.folder) for one in taken}
    assert tuple(where[name] for name in (CUBLAS, LT, CUDART)) == expected
    # what the linker finds first is what was taken
    there = [(str(one.folder), one.soname) for one in (*first, *WHEELS)]
    for name, folder in where.items():
        assert folder == next(str(one) for one in folders(taken) if (str(one), name) in there)


@pytest.mark.parametrize("other", ["/usr/lib", "/opt/lib"])
def test_no_folder_hides_what_the_linker_finds_by_itself(other: str) -> None:
    system = [library(name, "/usr/lib", "12.8", "ldconfig") for name in (CUBLAS, LT)]
    system.append(library(CUDART, other, "12.8", "ldconfig"))
    half = [library(CUBLAS, "/A", "12.1"), library(CUDART, "/A", "12.1")]
    taken, missing = split_needs(NEEDS, [*half, *system])
    assert (folders(taken), missing) == ((), ())


def test_a_mismatch_is_missing_and_said() -> None:
    for only, taken, missing in (
        (CUBLAS, (), (CUBLAS, LT, CUDART)),
        (LT, (), (CUBLAS, LT, CUDART)),
        (CUDART, (CUDART,), (CUBLAS, LT)),
    ):
        found = split_needs(NEEDS, [library(only, "/A")])
        assert (tuple(one.soname for one in found[0]), found[1]) == (taken, missing)
    halves = (library(CUBLAS, "/A", "12.1.3.1"), library(LT, "/B", "12.8.4.1"), WHEELS[2])
    assert split_needs(NEEDS, halves) == ((WHEELS[2],), (CUBLAS, LT))
    asked = replace(host("90"), libraries=halves)
    chosen = select(manifest(artifact("cu128", "sm90", "90")), asked)
    assert "libcublas.so.12, libcublasLt.so.12 missing here" in chosen.verdicts[0].reason
    with pytest.raises(HostError) as caught:
        require_libraries(chosen, asked)
    assert (
        "found only libcublas.so.12 in /A (version 12.1.3.1),"
        " libcublasLt.so.12 in /B (version 12.8.4.1)" in caught.value.message
    )
    assert "cuBLAS and cuBLASLt have to be of one version" in caught.value.message
    bringing = manifest(artifact("cu128", "sm90", "90"), runtime("cu128"))
    assert select(bringing, asked).runtime_libraries


@pytest.mark.parametrize("kit", ["usr/local/cuda-12.4", "cuda-image/usr/local/cuda-12.4"])
@pytest.mark.parametrize("linked", [True, False])
def test_a_toolkit_for_another_machine_does_not_count(
    kit: str, tmp_path: Path, *, linked: bool
) -> None:
    for target in ("x86_64-linux", "sbsa-linux", "armv7-linux-gnueabihf"):
        write(tmp_path / kit / "targets" / target / "lib" / CUBLAS)
    if linked:
        (tmp_path / kit / "lib64").symlink_to("targets/x86_64-linux/lib")
    else:
        write(tmp_path / kit / "lib64" / CUBLAS)
    found = find_libraries([], [], [], tmp_path)
    assert [one.folder for one in found] == [tmp_path / kit / "lib64"]


def test_the_driver_s_folder_is_the_one_that_the_linker_does_not_know(tmp_path: Path) -> None:
    mounted, known, empty, kit = (tmp_path / name for name in ("gke", "known", "empty", "kit"))
    for folder in (mounted, known, empty, kit / "stubs"):
        folder.mkdir(parents=True)
    for folder in (mounted, known, kit / "stubs"):
        (folder / "libcuda.so.1").touch()
    (kit / "libcuda.so.1").symlink_to("stubs/libcuda.so.1")
    (empty / "libcuda.so.1").symlink_to("gone")
    entries = [tmp_path / "no", empty, kit, kit / "stubs", mounted, known, mounted]
    cache = [known / "libcuda.so.1", mounted / "libcudart.so.12"]
    assert driver_folders(entries, cache) == (mounted,)
    assert driver_folders(entries, []) == (mounted, known)


def test_both_layouts_of_the_wheels_and_the_rest(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    old = write(site / "nvidia/cublas/lib/libcublas.so.12").parent
    write(old / "libcublasLt.so.12")
    write(site / "nvidia_cublas_cu12-12.8.4.1.dist-info/METADATA")
    new = write(site / "nvidia/cu13/lib/libcublas.so.13").parent
    write(site / "nvidia_cublas-13.0.2.14.dist-info/METADATA")
    kit = write(tmp_path / "root/usr/local/cuda-12.4/lib64/libcudart.so.12.4.127").parent
    (kit / "libcudart.so.12").symlink_to("libcudart.so.12.4.127")
    (tmp_path / "root/usr/local/cuda").symlink_to("cuda-12.4")
    mounted = write(tmp_path / "root/cuda-image/usr/local/cuda-13.0/lib64/libcudart.so.13").parent
    conda = write(tmp_path / "conda/lib/libcudart.so.12.8.90").parent
    for name in ("libcudart.so.12", "libcudart.so"):
        (conda / name).symlink_to("libcudart.so.12.8.90")
    write(conda / "libstdc++.so.6")  # a compiler's, which is nobody's need
    cached = write(tmp_path / "lib/libcublas.so.12")
    found = find_libraries([conda], [cached], [site], tmp_path / "root")
    assert found == (
        Library("libcudart.so.12", conda, "12.8.90", "LD_LIBRARY_PATH"),
        Library("libcublas.so.13", new, "13.0.2.14", "site-packages"),
        Library("libcublas.so.12", old, "12.8.4.1", "site-packages"),
        Library("libcublasLt.so.12", old, "12.8.4.1", "site-packages"),
        Library("libcublas.so.12", cached.parent, None, "ldconfig"),
        Library("libcudart.so.12", kit, "12.4.127", "toolkit"),
        Library("libcudart.so.13", mounted, None, "toolkit"),
    )
    taken, missing = cuda_libraries.split_needs(
        ["libcublas.so.12", "libcudart.so.12", "libcuda.so.1", "libgomp.so.1"], found
    )
    assert [one.folder for one in taken] == [old, old, conda]
    assert missing == ()
    assert cuda_libraries.folders(taken) == (old, conda)


@pytest.mark.parametrize("target", ["gone", "x" * 300, "libcudart.so.12"])
def test_a_link_that_leads_nowhere_is_no_library(target: str, tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.12").symlink_to(target)
    assert find_libraries([tmp_path], [], [], tmp_path / "root") == ()


def test_needs_are_read_from_a_foreign_runtime(tmp_path: Path) -> None:
    write(tmp_path / "libggml-cuda.so", "\x7fELF\0libcudart.so.12\0libcublas.so.12\0libc.so.6\0")
    write(tmp_path / "libcudart.so.12", "\0")
    write(tmp_path / "empty.so")
    assert cuda_libraries.read_needs((tmp_path,)) == ("libcublas.so.12",)


def test_the_package_that_brings_a_library() -> None:
    brought = {
        "libcublas.so.12": ("nvidia-cublas-cu12",),
        "libcublasLt.so.13": ("nvidia-cublas",),
        "libcudart.so.13": ("nvidia-cuda-runtime",),
        "libcudart.so.12": ("nvidia-cuda-runtime-cu12",),
        "libcuda.so.1": (),
    }
    assert {soname: cuda_libraries.packages([soname]) for soname in brought} == brought


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_folder_of_python_that_this_user_may_not_look_at_has_no_libraries(tmp_path: Path) -> None:
    """The working folder is one of them: that of root, in a container that runs as uid 1000."""
    (tmp_path / "root" / "site").mkdir(parents=True)
    (tmp_path / "root").chmod(0)
    os.seteuid(4711)
    try:
        assert find_libraries([], [], [tmp_path / "root" / "site"], Path("/nowhere")) == ()
    finally:
        os.seteuid(0)
