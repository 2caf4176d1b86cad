"""NVML as it answers, refuses and hangs: a small library in C with its calling convention."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_loader import host, nvml
from llama_loader.gpus import Gpu
from llama_loader.settings import load
from tests.rigs.fake_nvml import compiled

H200 = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-a", 149_000_000_000)
OTHER = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-b", 149_000_000_000)


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
        ("nvmlDeviceGetCount_v2 0 77", "NVML: Unknown Error (77)", 1),
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


def test_a_library_that_is_none_or_too_old_is_passed_over(tmp_path: Path, driver: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not ELF")
    old = compiled(tmp_path / "old", "-DOLD")
    assert query(tmp_path, old, driver).gpus == (H200, OTHER)


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


def test_a_driver_that_hangs_is_said_with_the_facts(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", "sleep")
    monkeypatch.setattr(host, "_NVML_TIMEOUT", 0.05)
    facts = host.detect(load(environ={"LD_LIBRARY_PATH": str(driver)}))
    assert facts.complaints == ("NVML did not answer within 0.05 s",)


def test_the_facts_of_a_driver_that_refuses_are_plain_data(driver: Path) -> None:
    facts = detect_elsewhere(driver, FAKE_NVML="nvmlInit_v2 0 18")
    assert facts["driver_folders"] == [str(driver)]
    assert facts["complaints"] == ["NVML: Driver/library version mismatch (18)"]
