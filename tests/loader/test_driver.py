"""NVML as it answers, refuses and hangs: a small library in C with its calling convention.

What nvidia-smi prints, and that only the installed one is run.
"""

import ctypes
import os
from dataclasses import replace
from pathlib import Path

import pytest

from llama_loader import host, report
from llama_loader.gpus import Gpu
from llama_loader.settings import load
from tests.rigs.fake_nvml import compiled
from tests.rigs.heard import script as executable

H200 = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-a", 149_000_000_000)
LOST = "GPU 1 is left out: NVML: GPU is lost (15)"
FORBIDDEN = "GPU 0 is left out: NVML: Insufficient Permissions (4)"
OTHER = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-b", 149_000_000_000)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("driver"))


def shut(driver: Path) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(driver / "libnvidia-ml.so.1")), "shut").value


@pytest.mark.parametrize(
    ("refused", "gpus", "complaint"),
    [
        ("", (H200, OTHER), ""),
        # what a GPU does not support is unknown
        ("nvmlDeviceGetMemoryInfo 0 3", (Gpu("NVIDIA H200", "90", None, "GPU-a"), OTHER), ""),
        ("nvmlDeviceGetCudaComputeCapability 0 3", (H200, OTHER), ""),
        ("nvmlDeviceGetUUID 0 3", (replace(H200, uuid=None), OTHER), ""),
        ("nvmlDeviceGetName 0 999", (replace(H200, name="GPU 0"), OTHER), ""),
        # a lost one is left out and named, and so is one that another container has
        *(
            (f"nvmlDeviceGet{asked} 1 15", (H200,), LOST)
            for asked in ("HandleByIndex_v2", "Name", "MemoryInfo", "UUID")
        ),
        ("nvmlDeviceGetHandleByIndex_v2 0 4", (OTHER,), FORBIDDEN),
    ],
)
def test_every_gpu_is_described_as_far_as_it_answers(
    driver: Path,
    refused: str,
    gpus: tuple[Gpu, ...],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_NVML", refused)
    before = shut(driver)
    assert host.nvml((driver,)) == host.DriverReport(
        "580.159.03", gpus, (complaint,) if complaint else ()
    )
    assert shut(driver) == before + 1


@pytest.mark.parametrize(
    ("refused", "complaint", "shuts"),
    [
        ("nvmlInit_v2 0 18", "NVML: Driver/library version mismatch (18)", 0),
        ("nvmlInit_v2 0 9", "NVML: Driver Not Loaded (9)", 0),
        ("nvmlDeviceGetCount_v2 0 77", "NVML: Unknown Error (77)", 1),
    ],
)
def test_nvml_that_refuses_says_why(
    driver: Path, refused: str, complaint: str, shuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shut(driver)
    monkeypatch.setenv("FAKE_NVML", refused)
    assert host.nvml((driver,)) == host.DriverReport(complaints=(complaint,))
    assert shut(driver) == before + shuts


def test_a_library_that_is_none_or_too_old_is_passed_over(tmp_path: Path, driver: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not ELF")
    old = compiled(tmp_path / "old", "-DOLD")
    assert host.nvml((tmp_path, old, driver)).gpus == (H200, OTHER)


def test_a_driver_on_the_library_path_alone_is_found_and_kept(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of links, as NixOS has it, among those that HPC modules prepend."""
    monkeypatch.setenv("FAKE_NVML", "nvmlDeviceGetHandleByIndex_v2 1 15")
    links, stubs = tmp_path / "links", tmp_path / "cuda/lib64/stubs"
    for folder in (links, stubs, tmp_path / "dangling"):
        folder.mkdir(parents=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (links / name).symlink_to(driver / name)
    (stubs / "libcuda.so").write_bytes((driver / "libcuda.so.1").read_bytes())
    (stubs / "libcuda.so.1").symlink_to("libcuda.so")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling/libcuda.so.1").symlink_to("/nowhere/libcuda.so.1")
    entries = ("", "lib", *(f"{tmp_path}/{name}" for name in ("loop", "dangling", "none")), stubs)
    path = ":".join(map(str, (*entries, links, "")))
    facts = host.detect(load(environ={"LD_LIBRARY_PATH": path}))
    assert (facts.gpu_source, facts.driver, facts.gpus) == ("nvml", "580.159.03", (H200,))
    told = report.plain(facts)
    assert [*told["driver_folders"]] == [str(links)]
    assert [*told["complaints"]] == [LOST]
    assert host.detect(load(environ={"LD_LIBRARY_PATH": str(stubs)})).gpus == ()


def test_a_fork_asks_the_driver_alone_for_the_gpu_that_it_got(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", "nvmlDeviceGetHandleByIndex_v2 1 15")
    path = {"LD_LIBRARY_PATH": str(driver)}
    known = replace(host.detect(load(environ=path)), gpus=(), glibc="9.9", gpu_source="zerogpu")
    seen = load(environ={**path, "CUDA_VISIBLE_DEVICES": "GPU-1"})
    facts = host.begin(seen, known).result()
    assert (facts.gpu_source, facts.gpus, facts.glibc) == ("nvml", (H200,), "9.9")
    assert facts.visible_devices == "GPU-1"
    on_cpu = host.begin(load({"n_gpu_layers": "0"}, path), known).result()
    assert (on_cpu.gpus, on_cpu.glibc) == ((), "9.9")
    elsewhere = replace(known, driver_folders=())
    assert host.begin(seen, elsewhere).result().glibc != "9.9"  # no driver: all is looked for anew


def program(folder: Path, name: str, script: str) -> Path:
    return executable(folder / name, f"#!/bin/sh\nPATH={os.defpath}\n{script}\n")


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver whose NVML refuses, on a machine without nvidia-smi in the usual folders."""
    monkeypatch.setenv("FAKE_NVML", "nvmlInit_v2 0 18")
    monkeypatch.setattr(host, "_FOLDERS", ())
    return compiled(tmp_path / "driver")


def detect(refusing: Path, path: Path) -> host.HostFacts:
    return host.detect(load(environ={"LD_LIBRARY_PATH": str(refusing), "PATH": str(path)}))


@pytest.mark.parametrize(
    ("cells", "capability", "memory"),
    [
        ("9.0, 143771", "90", 143771 << 20),
        ("Unknown Error, 100", None, 100 << 20),
        ("9, 100", None, 100 << 20),
        ("9.0.1, 100", None, 100 << 20),
        ("９.０, 100", None, 100 << 20),  # noqa: RUF001
        *((f"9.0, {memory}", "90", None) for memory in ("²", "-1", "9" * 5000, "[N/A]")),
    ],
)
def test_whatever_is_no_number_is_unknown_and_other_lines_are_no_gpus(
    cells: str, capability: str | None, memory: int | None
) -> None:
    printed = (
        f"NVIDIA Mystery, {cells}, 580.159.03, GPU-a\n"
        "Tesla T4, [N/A], [N/A], ERR!, [N/A]\na warning\nNo devices were found\n"
    )
    gpus = (Gpu("NVIDIA Mystery", capability, memory, "GPU-a"), Gpu("Tesla T4", "75"))
    assert host.parse(printed) == host.DriverReport("580.159.03", gpus)


def test_absolute_entry_of_path_is_searched_after_the_usual_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program(tmp_path / "here", "llama-test-tool", "exit 1").parent)
    tool = program(tmp_path / "bin", "llama-test-tool", "exit 0")
    environ = {"PATH": os.pathsep.join([".", "", "/nowhere", str(tool.parent)])}
    assert host.find(environ, "llama-test-tool") == str(tool)
    mine = program(tmp_path / "bin", "env", "exit 0")
    assert host.find({"PATH": str(mine.parent)}, "env") in {"/usr/bin/env", "/bin/env"}


def test_it_gets_the_drivers_folder(refusing: Path, tmp_path: Path) -> None:
    script = 'echo "NVIDIA $LD_LIBRARY_PATH, 9.0, 1, 580.159, GPU-a"'
    facts = detect(refusing, program(tmp_path / "bin", "nvidia-smi", script).parent)
    assert facts.gpu_source == "nvidia-smi"
    assert facts.gpus == (Gpu(f"NVIDIA {refusing}", "90", 1 << 20, "GPU-a"),)
    assert facts.driver == "580.159"
    assert facts.complaints == ("NVML: Driver/library version mismatch (18)",)


def test_it_is_not_asked_where_nvml_hangs(
    refusing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hang as well; in a system call of the driver, even SIGKILL does not end it."""
    monkeypatch.setenv("FAKE_NVML", "sleep")
    monkeypatch.setattr(host, "_NVML_TIMEOUT", 0.1)
    smi = program(tmp_path / "bin", "nvidia-smi", f": >{tmp_path}/asked")
    assert detect(refusing, smi.parent).complaints == ("NVML did not answer within 0.1 s",)
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo 'Failed:'; echo ' a version mismatch' >&2; exit 18", "Failed: a version mismatch"),
        ("echo 'No devices were found'", "No devices were found"),
        ("exit 9", "no GPU"),
        ("exec sleep 60", "no answer within 0.1 s"),
    ],
)
def test_what_it_complains_of_is_kept(
    refusing: Path, tmp_path: Path, script: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_SMI_TIMEOUT", 0.1 if "sleep" in script else 10.0)
    smi = program(tmp_path / "bin", "nvidia-smi", script)
    assert detect(refusing, smi.parent).complaints[1:] == (f"nvidia-smi: {complaint}",)
