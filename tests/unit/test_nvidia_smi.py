"""What nvidia-smi prints, and that only the installed one is run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from llama_loader import host, nvidia_smi, nvml
from llama_loader.gpus import Gpu
from llama_loader.settings import load
from tests.rigs import fake_nvml

if TYPE_CHECKING:
    from pathlib import Path


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    made = folder / name
    made.write_text(f"#!/bin/sh\nPATH={os.defpath}\n{script}\n")
    made.chmod(0o755)
    return made


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver whose NVML refuses, on a machine without nvidia-smi in the usual folders."""
    monkeypatch.setenv("FAKE_NVML", "nvmlInit_v2 0 18")
    monkeypatch.setattr(nvidia_smi, "FOLDERS", ())
    return fake_nvml.compiled(tmp_path / "driver")


def detect(driver: Path, path: Path) -> host.HostFacts:
    return host.detect(load(environ={"LD_LIBRARY_PATH": str(driver), "PATH": str(path)}))


def test_rows_are_gpus_and_other_lines_are_not() -> None:
    told = nvidia_smi.parse(
        "NVIDIA H200, 9.0, 143771, 580.159.03, GPU-a\n"
        "Tesla T4, [N/A], [N/A], 580.159.03, [N/A]\n"
        "a warning on stderr\n"
    )
    assert told.driver == "580.159.03"
    assert told.gpus == (
        Gpu("NVIDIA H200", "90", 143771 * 1024**2, "GPU-a"),
        Gpu("Tesla T4", "75", None, None),
    )
    assert nvidia_smi.parse("No devices were found\n") == nvml.Answer()


@pytest.mark.parametrize(
    ("row", "version", "gpu"),
    [
        ("NVIDIA H200, Unknown Error, 100, 580.1, GPU-1", "580.1", ("90", 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, Unknown Error, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, 9, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, 9.0.1, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, ９.０, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),  # noqa: RUF001
        ("NVIDIA Mystery, 9.0, ², 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        ("NVIDIA Mystery, 9.0, -1, 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        (f"NVIDIA Mystery, 9.0, {'9' * 5000}, 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        ("NVIDIA Mystery, 9.0, 100, ERR!, ERR!", None, ("90", 100 << 20, None)),
    ],
)
def test_whatever_is_no_number_is_unknown(
    row: str, version: str | None, gpu: tuple[str | None, int | None, str | None]
) -> None:
    capability, memory, uuid = gpu
    expected = Gpu(row.split(",", maxsplit=1)[0], capability, memory, uuid)
    assert nvidia_smi.parse(f"{row}\n") == nvml.Answer(version, (expected,))


@pytest.mark.parametrize("entries", ["", ".", ":", "bin", "./bin::."])
def test_program_of_the_working_folder_is_never_run(
    entries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "bin"):
        program(folder, "llama-test-tool", f": >{tmp_path}/ran")
    monkeypatch.chdir(tmp_path)
    assert nvidia_smi.find({"PATH": entries}, "llama-test-tool") is None


def test_absolute_entry_of_path_is_searched_after_the_usual_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program(tmp_path / "here", "llama-test-tool", "exit 1").parent)
    tool = program(tmp_path / "bin", "llama-test-tool", "exit 0")
    environ = {"PATH": os.pathsep.join([".", "", "/nowhere", str(tool.parent)])}
    assert nvidia_smi.find(environ, "llama-test-tool") == str(tool)
    mine = program(tmp_path / "bin", "env", "exit 0")
    assert nvidia_smi.find({"PATH": str(mine.parent)}, "env") in {"/usr/bin/env", "/bin/env"}


def test_it_gets_the_drivers_folder(driver: Path, tmp_path: Path) -> None:
    script = 'echo "NVIDIA $LD_LIBRARY_PATH, 9.0, 1, 580.159, GPU-a"'
    facts = detect(driver, program(tmp_path / "bin", "nvidia-smi", script).parent)
    assert facts.gpu_source == "nvidia-smi"
    assert facts.gpus == (Gpu(f"NVIDIA {driver}", "90", 1 << 20, "GPU-a"),)
    assert facts.driver == "580.159"
    assert facts.complaints == ("NVML: Driver/library version mismatch (18)",)


def test_it_is_not_asked_where_nvml_hangs(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hang as well; in a system call of the driver, even SIGKILL does not end it."""
    monkeypatch.setenv("FAKE_NVML", "sleep")
    monkeypatch.setattr(host, "_NVML_TIMEOUT", 0.1)
    smi = program(tmp_path / "bin", "nvidia-smi", f": >{tmp_path}/asked")
    assert detect(driver, smi.parent).complaints == ("NVML did not answer within 0.1 s",)
    assert not (tmp_path / "asked").exists()


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
def test_what_it_complains_of_is_kept(
    driver: Path, tmp_path: Path, script: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_smi, "_TIMEOUT", 0.1 if "sleep" in script else 10.0)
    smi = program(tmp_path / "bin", "nvidia-smi", script)
    assert detect(driver, smi.parent).complaints[1:] == (complaint,)
