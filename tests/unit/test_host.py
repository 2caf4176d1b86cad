from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_loader import host
from llama_loader.gpus import Gpu
from llama_loader.settings import load

NAME = "NVIDIA RTX PRO 6000 Blackwell Server Edition"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_facts_of_this_machine() -> None:
    facts = host.detect(load(environ={}))
    assert facts.system == "linux"
    assert facts.machine
    assert facts.cpus > 0
    assert facts.memory > 1 << 28
    assert facts.glibc is None or float(facts.glibc) >= 2.28
    assert facts.glibcxx is None or facts.glibcxx.startswith("3.4.")


def test_proc_names_the_gpu_before_any_is_attached(tmp_path: Path) -> None:
    write(
        tmp_path / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 13.3.0\n",
    )
    write(
        tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information",
        f"Model: \t\t {NAME}\nIRQ:   \t\t 133\nGPU UUID: \t GPU-1234\nVideo BIOS: \t ??\n",
    )
    facts = host.detect(load(environ={"SPACES_ZERO_GPU": "1"}), root=tmp_path)
    assert facts.gpu_source == "/proc/driver/nvidia"
    assert facts.driver == "580.95.05"
    assert facts.gpus == (Gpu(NAME, "120", None, "GPU-1234"),)
    assert facts.zerogpu


def test_zerogpu_without_any_trace_is_what_it_documents(tmp_path: Path) -> None:
    facts = host.detect(load(environ={"SPACES_ZERO_GPU": "true"}), root=tmp_path)
    assert (facts.gpu_source, facts.capabilities, facts.driver) == ("zerogpu", ("120",), None)
    plain = host.detect(load(environ={}), root=tmp_path)
    assert (plain.gpu_source, plain.gpus) == ("none", ())


def test_nvidia_smi_is_read() -> None:
    driver, found = host.parse_smi(
        "NVIDIA H200, 9.0, 143771, 580.159.03, GPU-a\n"
        "Tesla T4, [N/A], [N/A], 580.159.03, [N/A]\n"
        "a warning on stderr\n"
    )
    assert driver == "580.159.03"
    assert found == (
        Gpu("NVIDIA H200", "90", 143771 * 1024**2, "GPU-a"),
        Gpu("Tesla T4", "75", None, None),
    )
    assert host.parse_smi("No devices were found\n") == (None, ())


@pytest.mark.parametrize(
    ("row", "driver", "gpu"),
    [
        ("NVIDIA H200, Unknown Error, 100, 580.1, GPU-1", "580.1", ("90", 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, Unknown Error, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, 9, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, 9.0.1, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, ９.０, 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),  # noqa: RUF001
        ("NVIDIA Mystery, .., 100, 580.1, GPU-1", "580.1", (None, 100 << 20, "GPU-1")),
        ("NVIDIA Mystery, 9.0, ², 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        ("NVIDIA Mystery, 9.0, ٣, 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        ("NVIDIA Mystery, 9.0, -1, 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        (f"NVIDIA Mystery, 9.0, {'9' * 5000}, 580.1, GPU-1", "580.1", ("90", None, "GPU-1")),
        ("NVIDIA Mystery, 9.0, 100, Unknown Error, Unknown Error", None, ("90", 100 << 20, None)),
        ("NVIDIA Mystery, 9.0, 100, ERR!, ERR!", None, ("90", 100 << 20, None)),
    ],
)
def test_whatever_nvidia_smi_says_that_is_no_number_is_unknown(
    row: str, driver: str | None, gpu: tuple[str | None, int | None, str | None]
) -> None:
    capability, memory, uuid = gpu
    expected = Gpu(row.split(",", maxsplit=1)[0], capability, memory, uuid)
    assert host.parse_smi(f"{row}\n") == (driver, (expected,))


def program(folder: Path, name: str, script: str) -> Path:
    path = write(folder / name, f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("entries", ["", ".", "tools", "./tools", "../{here}/tools", ":tools:."])
def test_a_program_of_the_working_folder_is_never_run(
    entries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "tools"):
        for name in ("nvidia-smi", "ldconfig"):
            program(folder, name, f": >{tmp_path}/executed")
    script = (
        "from llama_loader import host, settings\nprint(host.detect(settings.load()).gpu_source)\n"
    )
    search = entries.format(here=tmp_path.name)
    environ = {"PATH": search, "PYTHONPATH": str(Path(host.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=environ, cwd=tmp_path, check=True)
    assert not (tmp_path / "executed").exists()
    monkeypatch.chdir(tmp_path)
    assert host.find_program("llama-test-tool", {"PATH": search}) is None


def test_a_program_is_found_in_an_absolute_entry_of_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program(tmp_path / "here", "llama-test-tool", "exit 1").parent)
    tool = program(tmp_path / "bin", "llama-test-tool", "exit 0")
    environ = {"PATH": os.pathsep.join([".", "", "/nowhere", str(tool.parent)])}
    assert host.find_program("llama-test-tool", environ) == str(tool)
    assert host.find_program("llama-test-tool", {}) is None


def test_a_known_folder_comes_before_path(tmp_path: Path) -> None:
    mine = program(tmp_path, "env", "exit 0")
    assert host.find_program("env", {"PATH": str(mine.parent)}) in {"/usr/bin/env", "/bin/env"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"proc/meminfo": "MemTotal:   2048 kB\n"}, 2 << 20),
        ({"proc/meminfo": "MemTotal:   2048 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 2 << 20),
        ({"proc/meminfo": "MemTotal:   2048 kB\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n"}, 8192),
        ({"sys/fs/cgroup/memory.max": "²\n"}, 0),
    ],
)
def test_a_container_may_use_less_memory_than_there_is(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host.detect(load(environ={}), root=tmp_path).memory == expected
