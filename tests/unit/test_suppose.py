"""What another machine would get, asked with no GPU present."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_loader import gpus, suppose
from llama_loader.errors import HostError, SettingError
from llama_loader.manifest import dump
from llama_loader.selection import Wishes, require_libraries, select
from tests.rigs.releases import artifact, manifest, runtime
from tests.unit.test_selection import GPUS, RELEASE, short

SPACES = Path(__file__).parent.parent.parent / "spaces"
QUESTION = "capability=12.0,driver=580,glibc=2.36,torch=cu128"


def test_the_question_of_a_space_on_zerogpu() -> None:
    facts = suppose.host(QUESTION)
    assert facts.capabilities == ("120",)
    chosen = select(RELEASE, facts, Wishes())
    assert short(chosen.artifact.name) == "cu128-sm120"
    assert chosen.missing == ()
    text = suppose.as_text(RELEASE, chosen)
    assert text.startswith(f"would fetch {chosen.artifact.name} of release b11549-1\n")
    assert len(text.splitlines()) == 2 + len(RELEASE.artifacts)


@pytest.mark.parametrize(("name", "capability", "with_12", "with_13"), GPUS)
def test_every_gpu_by_its_name(name: str, capability: str, with_12: str, with_13: str) -> None:
    for torch, driver, expected in (("cu128", "570", with_12), ("cu130", "580", with_13)):
        for who in (f"gpu={name}", f"capability={capability}"):
            facts = suppose.host(f"{who},driver={driver},glibc=2.36,torch={torch}")
            assert short(select(RELEASE, facts, Wishes()).artifact.name) == expected


def test_what_is_missing_there_is_said_with_its_package() -> None:
    facts = suppose.host("capability=90,driver=580,torch=none")
    chosen = select(RELEASE, facts, Wishes())
    assert (
        "libcublas.so.13, libcublasLt.so.13, libcudart.so.13 missing here"
        in (suppose.as_text(RELEASE, chosen).splitlines()[1])
    )
    with pytest.raises(HostError) as caught:
        require_libraries(chosen, facts)
    assert "pip install): nvidia-cublas" in caught.value.hint


def test_what_the_release_brings_there_is_said() -> None:
    bringing = manifest(artifact("cu130", "sm90", "90"), runtime("cu130"))
    chosen = select(bringing, suppose.host("capability=90,driver=580,torch=none"), Wishes())
    because, server, libraries = suppose.as_text(bringing, chosen).splitlines()[1:]
    assert "libcublas.so.13" in because
    assert "brought by cuda-runtime-13.0-cu130" in because
    assert server.startswith(f"  {chosen.artifact.name}: chosen")
    assert libraries.startswith("  cuda-runtime-13.0-cu130")
    assert "fetched too: libraries; 400.0 MB" in libraries


def test_an_old_system_there_is_an_error_here() -> None:
    with pytest.raises(HostError, match=r"2\.31"):
        select(RELEASE, suppose.host("capability=90,glibc=2.31,torch=cu130"), Wishes())
    with pytest.raises(HostError, match=r"driver 525\.60, this machine has 470\.999"):
        select(RELEASE, suppose.host("capability=7.5,driver=470"), Wishes())


@pytest.mark.parametrize(
    "text",
    ["12.0", "capability=hopper", "gpu=Voodoo 2", "driver=new", "torch=12.8", "cpus=4", "glibc="],
)
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(SettingError, match="--suppose") as caught:
        suppose.host(f"machine=x86_64,{text}")
    assert repr(text) in caught.value.message
    assert "capability=12.0" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("driver=580,", "''"),
        ("driver=580,,glibc=2.36", "''"),
        ("driver=580,driver=570", "'driver=570'"),
        ("capability=90,gpu=NVIDIA H200", "'gpu=NVIDIA H200'"),
    ],
)
def test_nothing_is_left_out_or_said_twice(text: str, named: str) -> None:
    with pytest.raises(SettingError, match=re.escape(named)):
        suppose.host(text)


@pytest.mark.parametrize("option", [("--arch", "90"), ("--url", "https://x/a.tar.gz")])
def test_settings_that_would_answer_another_question(
    option: tuple[str, str], tmp_path: Path
) -> None:
    told = ask(tmp_path / "manifest.json", "--suppose", QUESTION, *option)
    assert told.returncode == 2
    assert option[0] in told.stderr.splitlines()[0]


def ask(release: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "llama_loader",
        "doctor",
        "--manifest",
        release.as_uri(),
        *argv,
    ]
    return subprocess.run(
        command, cwd=SPACES, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_command(tmp_path: Path) -> None:
    release = tmp_path / "manifest.json"
    release.write_bytes(dump(RELEASE))
    store = ("--store", str(tmp_path / "store"))
    told = ask(release, *store, "--suppose", QUESTION)
    assert told.returncode == 0, told.stderr
    assert "cu128-sm120" in told.stdout.splitlines()[0]
    known = ask(release, *store, "--json", "--suppose", f"gpu={gpus.ZEROGPU.name}")
    assert known.returncode == 5  # no libraries were supposed
    assert json.loads(known.stdout)["choice"]["missing"]
    error, hint = known.stderr.splitlines()[-2:]
    assert error.startswith("error[CUDA_LIBRARY_MISSING]: ")
    assert "nvidia-cublas" in hint
    assert not list((tmp_path / "store").glob("runtimes/*"))
    assert ask(release, "--suppose", "x=1").returncode == 2
