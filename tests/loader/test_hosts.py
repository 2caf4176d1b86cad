"""Hosts that people have (docs/hosts.md): what works there, and what is said."""

import io
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from llama_loader import (
    cuda_libraries,
    devices,
    host,
    processes,
    report,
    selection,
    self_test,
    server_log,
)
from llama_loader.errors import HostError
from llama_loader.server import Server
from llama_loader.settings import load
from tests.loader import test_loader
from tests.loader.test_devices import ENVIRON
from tests.loader.test_doctor import H200
from tests.loader.test_model import from_hub, path_from_hub
from tests.loader.test_selection import RELEASE
from tests.loader.test_selection import host as host_with
from tests.loader.test_server import plan
from tests.rigs.fake_nvml import compiled
from tests.rigs.hub import Hub, serving
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused
from tests.rigs.small_disk import mounted

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


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (
            (
                "llama-server: relocation error: /l/libcublas.so.12: symbol x version"
                " libcublasLt.so.12 not defined in file libcublasLt.so.12 with link time reference"
            ),
            "LIBRARY_MISMATCH",
        ),
        ("Error relocating /r/llama-server: __fprintf_chk: symbol not found", "LIBRARY_MISMATCH"),
        (
            "Error loading shared library libstdc++.so.6: No such file or directory (needed by x)",
            "LIBRARY_MISMATCH",
        ),
        ("0.00.1.0 E CUDA error: PTX JIT compiler library not found", "LIBRARY_MISSING"),
        ("0.00.1.0 E CUDA error: no CUDA-capable device is detected", "NO_DEVICE"),
        ("0.00.1.0 E CUDA error: system not yet initialized", "NO_DEVICE"),
    ],
)
def test_end_that_no_restart_cures_is_the_hosts_and_quotes_its_line(line: str, code: str) -> None:
    error = server_log.explain(-6, [line], loading=True)
    assert isinstance(error, HostError)
    assert (error.code, error.exit_status) == (code, 5)
    assert line.removeprefix("0.00.1.0 E ") in error.message


def test_other_errors_of_cuda_are_tried_again() -> None:
    error = server_log.explain(-6, ["CUDA error: unspecified launch failure"], loading=False)
    assert error.code == "CUDA_ERROR"


def test_first_error_counts_whatever_the_server_prints_after_it() -> None:
    log = server_log.ServerLog()
    first = "0.00.1.0 E CUDA error: the provided PTX was compiled with an unsupported toolchain."
    log._read(io.BytesIO("\n".join([first, *["0.00.2.0 I more"] * 300, ""]).encode()))
    error = server_log.explain(-6, log.tail(), loading=True)
    assert error.code == "DRIVER_TOO_OLD"
    assert "unsupported toolchain" in error.message


LOST = "GPU 1 is left out: NVML: GPU is lost (15)"


def test_lost_gpu_is_on_the_doctors_page_although_another_one_answers() -> None:
    lines = report.host_lines(replace(H200, complaints=(LOST,)))
    assert f"  complaint: {LOST}" in lines


def test_lost_gpu_is_told_before_the_server_starts_on_another_one(tmp_path: Path) -> None:
    host = replace(test_loader.H200, gpus=(test_loader.BLACKWELL,), gpu_source="nvml")
    (note,) = test_loader.unused(tmp_path, replace(host, complaints=(LOST,)))
    assert (note.code, note.message) == ("DRIVER_COMPLAINT", LOST)


WHOLE = f"the line that matters {'.' * 250} ends here"


def test_lines_of_a_device_list_that_failed_are_quoted_whole(impostor: Impostor) -> None:
    runtime = impostor.behave(list={"text": f"{WHOLE}\n{'x' * 200}\n", "status": 3})
    with refused("DEVICE_LIST_FAILED", HostError) as caught:
        devices.list_devices(runtime, ENVIRON)
    assert WHOLE in caught.value.message


def test_program_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    with pytest.raises(HostError) as caught, Server(plan(tmp_path)):
        pass
    assert f"{tmp_path}/llama-server: Permission denied" in caught.value.message
