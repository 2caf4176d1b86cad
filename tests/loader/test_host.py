import subprocess
import sys
from pathlib import Path

import pytest

from llama_loader import host
from llama_loader.gpus import Gpu
from llama_loader.settings import load
from tests.rigs.heard import script

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


def test_working_folder_is_no_place_of_cuda_wheels_wherever_pythons_path_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "nvidia/x/lib/libcublas.so.12", "")
    (tmp_path / "link").symlink_to(tmp_path)
    for entry in (tmp_path, tmp_path / "link"):
        monkeypatch.syspath_prepend(entry)
    for where in ("/", tmp_path):
        monkeypatch.chdir(where)
        found = [one.folder.resolve() for one in host.detect(load(environ={})).libraries]
        assert (tmp_path / "nvidia/x/lib" in found) == (where == "/")


def test_version_of_thousands_of_digits_is_none(tmp_path: Path) -> None:
    digits = "9" * 5000
    for version in (f"{digits}.1", f"580.{digits}"):
        assert host.parse(f"NVIDIA H200, 9.0, 1000, {version}, GPU-1\n").driver is None
        told = f"NVRM version: NVIDIA UNIX Kernel Module for x86_64  {version}  Release Build\n"
        write(tmp_path / "proc/driver/nvidia/version", told)
        assert host.detect(load(environ={}), root=tmp_path).driver is None


@pytest.mark.parametrize("entries", ["", ".", "tools", "./tools", "../{here}/tools", ":tools:."])
def test_a_program_of_the_working_folder_is_never_run(entries: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "tools"):
        for name in ("nvidia-smi", "ldconfig"):
            script(folder / name, f"#!/bin/sh\n: >{tmp_path}/executed\n")
    look = "from llama_loader import host, settings; host.detect(settings.load())"
    search = entries.format(here=tmp_path.name)
    environ = {"PATH": search, "PYTHONPATH": str(Path(host.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", look], env=environ, cwd=tmp_path, check=True)
    assert not (tmp_path / "executed").exists()
