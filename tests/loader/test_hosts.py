"""Hosts unlike ZeroGPU: NixOS, HPC modules, musl, volumes. docs/hosts.md has the table."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from verbs import PROJECT

from llama_loader import cuda_libraries, host, processes, selection, self_test
from llama_loader.errors import HostError
from llama_loader.settings import load
from tests.loader.test_model import from_hub, path_from_hub
from tests.loader.test_selection import RELEASE
from tests.loader.test_selection import host as host_with
from tests.rigs.fake_nvml import compiled
from tests.rigs.hub import Hub, serving
from tests.rigs.small_disk import mounted

if TYPE_CHECKING:
    from pathlib import Path

TINY = self_test.MODEL.read_bytes()
AT_HAND = "from llama_loader import model, settings;print(model.at_hand(settings.load()))"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("driver"))


def facts(*folders: Path | str) -> host.HostFacts:
    """Return the facts of a machine with these folders on LD_LIBRARY_PATH."""
    environ = {"PATH": os.defpath, "LD_LIBRARY_PATH": ":".join(map(str, folders))}
    return host.detect(load(environ=environ))


def test_driver_in_a_folder_of_links_is_found_and_kept(driver: Path, tmp_path: Path) -> None:
    """As NixOS has it in /run/opengl-driver/lib; the links lead into /nix/store."""
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).symlink_to(driver / name)
    found = facts(tmp_path)
    assert (found.gpu_source, found.driver) == ("nvml", "580.159.03")
    assert found.driver_folders == (tmp_path,)


def test_driver_among_the_folders_of_hpc_modules_is_found_and_kept(
    driver: Path, tmp_path: Path
) -> None:
    """Modules prepend folders, also empty entries, folders that are not there, and stubs."""
    stubs = tmp_path / "cuda" / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    (stubs / "libcuda.so").write_bytes((driver / "libcuda.so.1").read_bytes())
    (stubs / "libcuda.so.1").symlink_to("libcuda.so")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "libcuda.so.1").symlink_to("/nowhere/libcuda.so.1")
    names = ("loop", "dangling", "none", "cuda/lib64/stubs")
    found = facts("", "lib", *(tmp_path / name for name in names), driver, "")
    assert len(found.gpus) == 2
    assert found.driver_folders == (driver,)
    assert facts(stubs).gpus == ()


def test_libraries_of_a_conda_environment_are_taken_from_its_folder(tmp_path: Path) -> None:
    """There are a file with its whole version and links to it, and the compiler's libraries."""
    for name in ("libcublas.so.12.8.4.1", "libcublasLt.so.12.8.4.1", "libcudart.so.12.8.90"):
        (tmp_path / name).write_bytes(b"")
        major = ".".join(name.split(".")[:3])
        (tmp_path / major).symlink_to(name)
        (tmp_path / major.removesuffix(".12")).symlink_to(name)
    (tmp_path / "libstdc++.so.6").write_bytes(b"")
    here = cuda_libraries.find_libraries([tmp_path], (), (), tmp_path / "root")
    taken, missing = cuda_libraries.split_needs(["libcublas.so.12", "libcudart.so.12"], here)
    assert missing == ()
    assert {(one.soname, one.version, one.origin) for one in taken} == {
        ("libcublas.so.12", "12.8.4.1", "LD_LIBRARY_PATH"),
        ("libcublasLt.so.12", "12.8.4.1", "LD_LIBRARY_PATH"),
        ("libcudart.so.12", "12.8.90", "LD_LIBRARY_PATH"),
    }
    assert cuda_libraries.folders(taken) == (tmp_path,)


def test_machine_without_glibc_gets_nothing_and_is_told_so() -> None:
    musl = replace(host_with("90"), glibc=None, glibcxx=None)
    with pytest.raises(HostError, match=r"needs glibc 2\.34, this machine has none") as caught:
        selection.select(RELEASE, musl)
    assert caught.value.exit_status == 5


def test_program_for_another_dynamic_loader_is_told_at_once(tmp_path: Path) -> None:
    """As on musl, and as a program for musl here: the file is there, and the system says it is not.

    The kernel's ENOENT means the program's interpreter.
    """
    (tmp_path / "main.c").write_text("int main(void) { return 0; }")
    program = tmp_path / "llama-server"
    interpreter = "-Wl,--dynamic-linker=/lib/ld-nowhere-x86_64.so.1"
    argv = ["gcc", "-o", str(program), interpreter, str(tmp_path / "main.c")]
    subprocess.run(argv, check=True)
    done = processes.run([str(program)], processes.environment({}), timeout=10)
    assert done.status is None
    assert "No such file or directory (it, or the dynamic loader that it needs" in done.failure


def test_model_on_a_read_only_volume_is_used_without_writing_to_it(tmp_path: Path) -> None:
    """The volume is a cache of the Hub that another machine filled."""
    with mounted(tmp_path / "volume", "8m"), serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        path = path_from_hub(hub, tmp_path / "volume")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "volume")], check=True)
        assert from_hub(hub, tmp_path / "volume", AT_HAND) == str(path)
        assert path_from_hub(hub, tmp_path / "volume") == path
        assert path_from_hub(hub, tmp_path / "volume", OFFLINE="1") == path
        assert path_from_hub(hub, tmp_path / "volume", GGUF_PATH=str(path)) == path
        assert len([one for one in hub.bodies if one.endswith("m.gguf")]) == 1


def test_every_test_of_the_table_of_hosts_exists() -> None:
    table = (PROJECT / "docs" / "hosts.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", table))
    sources = [path.read_text("utf-8") for path in (PROJECT / "tests").rglob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 20
    assert named - there == set()
