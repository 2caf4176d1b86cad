"""NVML as it answers, refuses and hangs: a small library in C with its calling convention."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_loader import host, nvml, report
from llama_loader.gpus import Gpu
from llama_loader.settings import load

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int shut = 0;

/* FAKE_NVML: "FUNCTION GPU CODE", what is refused; "sleep" hangs in nvmlInit_v2. */
static int answer(const char *function, int gpu) {
    const char *told = getenv("FAKE_NVML");
    char name[64];
    int which, code;
    if (told && sscanf(told, "%63s %d %d", name, &which, &code) == 3)
        if (!strcmp(name, function) && which == gpu) return code;
    return 0;
}
static int text(const char *function, int gpu, const char *words, char *buffer, unsigned length) {
    snprintf(buffer, length, "%s", words);
    return answer(function, gpu);
}
static int number(void *handle) { return (int)(long)handle - 1; }

int nvmlInit_v2(void) {
    const char *told = getenv("FAKE_NVML");
    if (told && !strcmp(told, "sleep")) sleep(60);
    return answer("nvmlInit_v2", 0);
}
int nvmlShutdown(void) { shut++; return 0; }
int nvmlSystemGetDriverVersion(char *buffer, unsigned length) {
    return text("nvmlSystemGetDriverVersion", 0, "580.159.03", buffer, length);
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 2;
    return answer("nvmlDeviceGetCount_v2", 0);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return answer("nvmlDeviceGetHandleByIndex_v2", index);
}
int nvmlDeviceGetName(void *handle, char *buffer, unsigned length) {
    return text("nvmlDeviceGetName", number(handle), "NVIDIA H200", buffer, length);
}
int nvmlDeviceGetUUID(void *handle, char *buffer, unsigned length) {
    const char *uuid = number(handle) ? "GPU-b" : "GPU-a";
    return text("nvmlDeviceGetUUID", number(handle), uuid, buffer, length);
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 150000000000; memory[1] = 149000000000; memory[2] = 1000000000;
    return answer("nvmlDeviceGetMemoryInfo", number(handle));
}
#ifndef OLD
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = 9; *minor = 0;
    return answer("nvmlDeviceGetCudaComputeCapability", number(handle));
}
#endif
"""
H200 = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-a", 149_000_000_000)
OTHER = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-b", 149_000_000_000)


def compiled(folder: Path, *options: str) -> Path:
    """Return a folder with a driver: libnvidia-ml.so.1, and a libcuda.so.1 that does nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "nvml.c").write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", *options, "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    shutil.copy(library, folder / "libcuda.so.1")
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("driver"))


def query(*folders: Path) -> nvml.Answer:
    return nvml.query(folders, timeout=30)


def shut(driver: Path) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(driver / "libnvidia-ml.so.1")), "shut").value


def test_every_gpu_is_described(driver: Path) -> None:
    before = shut(driver)
    assert query(driver) == nvml.Answer("580.159.03", (H200, OTHER))
    assert shut(driver) == before + 1


@pytest.mark.parametrize(
    ("refused", "first"),
    [
        ("nvmlDeviceGetMemoryInfo 0 3", Gpu("NVIDIA H200", "90", None, "GPU-a")),
        ("nvmlDeviceGetCudaComputeCapability 0 3", H200),
        ("nvmlDeviceGetUUID 0 3", Gpu("NVIDIA H200", "90", H200.memory, None, H200.free)),
        ("nvmlDeviceGetName 0 999", Gpu("GPU 0", "90", H200.memory, "GPU-a", H200.free)),
    ],
)
def test_what_a_gpu_does_not_support_is_unknown(
    driver: Path, refused: str, first: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", refused)
    assert query(driver) == nvml.Answer("580.159.03", (first, OTHER))


@pytest.mark.parametrize("function", ["HandleByIndex_v2", "Name", "MemoryInfo", "UUID"])
def test_a_lost_gpu_is_left_out_and_named(
    driver: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", f"nvmlDeviceGet{function} 1 15")
    answer = query(driver)
    assert (answer.driver, answer.gpus) == ("580.159.03", (H200,))
    assert answer.complaints == ("GPU 1 is left out: NVML: GPU is lost (15)",)


def test_a_gpu_that_this_process_may_not_use_is_left_out(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its container has the other one alone: NVML counts both."""
    monkeypatch.setenv("FAKE_NVML", "nvmlDeviceGetHandleByIndex_v2 0 4")
    answer = query(driver)
    assert answer.gpus == (OTHER,)
    assert answer.complaints == ("GPU 0 is left out: NVML: Insufficient Permissions (4)",)


@pytest.mark.parametrize(
    ("refused", "complaint", "shuts"),
    [
        ("nvmlInit_v2 0 18", "NVML: Driver/library version mismatch (18)", 0),
        ("nvmlInit_v2 0 9", "NVML: Driver Not Loaded (9)", 0),
        ("nvmlDeviceGetCount_v2 0 77", "NVML: error (77)", 1),
    ],
)
def test_nvml_that_refuses_says_why(
    driver: Path, refused: str, complaint: str, shuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shut(driver)
    monkeypatch.setenv("FAKE_NVML", refused)
    assert query(driver) == nvml.Answer(complaints=(complaint,))
    assert shut(driver) == before + shuts


def test_nvml_that_hangs_is_given_up(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "sleep")
    answer = nvml.query([driver], timeout=0.05)
    assert answer == nvml.Answer(complaints=("NVML did not answer within 0.05 s",), hangs=True)


def test_an_old_library_without_a_function_is_enough(tmp_path: Path) -> None:
    assert query(compiled(tmp_path / "old", "-DOLD")).gpus == (H200, OTHER)


def test_a_library_that_is_none_is_passed_over(tmp_path: Path, driver: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not ELF")
    assert query(tmp_path, driver).gpus == (H200, OTHER)


def detect_elsewhere(folder: Path, **variables: str) -> dict[str, object]:
    """Return the facts of a process whose LD_LIBRARY_PATH has one folder."""
    script = (
        "import json\n"
        "from llama_loader import host, report, settings\n"
        "print(json.dumps(report.host(host.detect(settings.load()))))\n"
    )
    environ = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(folder), **variables}
    environ["PYTHONPATH"] = str(Path(host.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script], env=environ, stdout=-1, check=True)
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


def test_a_driver_on_the_library_path_alone_is_found_and_kept(driver: Path) -> None:
    facts = detect_elsewhere(driver)
    assert (facts["gpu_source"], facts["driver"]) == ("nvml", "580.159.03")
    assert facts["driver_folders"] == [str(driver)]
    assert facts["complaints"] == []


def test_the_host_names_a_lost_gpu_and_serves_with_the_other(driver: Path) -> None:
    facts = detect_elsewhere(driver, FAKE_NVML="nvmlDeviceGetHandleByIndex_v2 1 15")
    gpus = facts["gpus"]
    assert isinstance(gpus, list)
    assert [gpu["uuid"] for gpu in gpus] == ["GPU-a"]
    assert facts["complaints"] == ["GPU 1 is left out: NVML: GPU is lost (15)"]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A nvidia-smi to be written, on a machine whose NVML refuses."""
    monkeypatch.setenv("FAKE_NVML", "nvmlInit_v2 0 18")
    monkeypatch.setattr(host, "_PROGRAM_FOLDERS", ())
    program = tmp_path / "nvidia-smi"
    program.touch(0o755)
    return program


def facts_with(driver: Path, smi: Path) -> host.HostFacts:
    return host.detect(load(environ={"LD_LIBRARY_PATH": str(driver), "PATH": str(smi.parent)}))


def test_nvidia_smi_gets_the_drivers_folder(driver: Path, smi: Path) -> None:
    smi.write_text('#!/bin/sh\necho "NVIDIA $LD_LIBRARY_PATH, 9.0, 1, 580.159, GPU-a"\n')
    facts = facts_with(driver, smi)
    assert facts.gpu_source == "nvidia-smi"
    assert facts.gpus == (Gpu(f"NVIDIA {driver}", "90", 1 << 20, "GPU-a"),)
    assert facts.complaints == ("NVML: Driver/library version mismatch (18)",)


def test_nvidia_smi_is_not_asked_where_nvml_hangs(
    driver: Path, smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hang as well; in a system call of the driver, even SIGKILL does not end it."""
    monkeypatch.setenv("FAKE_NVML", "sleep")
    monkeypatch.setattr(host, "_NVML_TIMEOUT", 0.05)
    smi.write_text(f"#!/bin/sh\n: >{smi.parent}/asked\n")
    facts = facts_with(driver, smi)
    assert facts.complaints == ("NVML did not answer within 0.05 s",)
    assert not (smi.parent / "asked").exists()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (
            "echo 'Failed to initialize NVML:'; echo ' a version mismatch' >&2; exit 18",
            "nvidia-smi: Failed to initialize NVML: a version mismatch",
        ),
        ("echo 'No devices were found'", "nvidia-smi: No devices were found"),
        ("exit 9", "nvidia-smi: no GPU"),
        ("exec sleep 60", "nvidia-smi: no answer within 0.1 s"),
    ],
)
def test_what_nvidia_smi_complains_of_is_kept(
    driver: Path, smi: Path, script: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_SMI_TIMEOUT", 0.1 if "sleep" in script else 10.0)
    monkeypatch.setenv("PATH", os.defpath)
    smi.write_text(f"#!/bin/sh\nPATH={os.defpath}\n{script}\n")
    assert facts_with(driver, smi).complaints[1:] == (complaint,)


def test_the_facts_of_a_driver_are_plain_data(driver: Path, smi: Path) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n")
    told = json.loads(json.dumps(report.host(facts_with(driver, smi))))
    assert told["driver_folders"] == [str(driver)]
    assert len(told["complaints"]) == 2
