"""A real release: what a container makes of the pinned llama.cpp, and a host of the same."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from docker import DockerClient
from verbs import Release, succeed

from farm.engines.docker.inventory import CACHE_VOLUME
from farm.inputs import patches, pins
from farm.plan import CACHE_FOLDER
from tests.rigs.heard import heard

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

PINNED = pins.load().source
"""What the weekly run proposes changes this file alone: no test has the number."""


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return manifest


@pytest.mark.builds
def test_the_release_says_what_its_binaries_hold(cpu_release: Release) -> None:
    manifest = manifest_of(cpu_release.folder)
    (artifact,) = manifest["artifacts"]
    assert artifact["name"] == f"llama-server-b{PINNED.build}-cpu-cpu-linux-x86_64.tar.zst"
    assert artifact["cuda"] is None
    assert artifact["needs"] == []
    major, minor = map(int, artifact["platform"]["glibc"].split("."))
    assert (major, minor) <= (2, 35)
    assert artifact["size"] == (cpu_release.folder / artifact["name"]).stat().st_size
    names = {entry["path"] for entry in artifact["files"]}
    assert {"runtime/llama-server", "runtime/llama-cli", "runtime/BUILD.json"} <= names
    assert len([name for name in names if "libggml-cpu-" in name]) >= 10
    told = manifest["source"]
    assert (told["build"], told["version"]) == (PINNED.build, PINNED.llama_version)
    own = [msgspec.to_builtins(one.patch) for one in patches.load()]
    left_out = PINNED.without_patches
    assert told.get("patches", []) == [one for one in own if one["name"] not in left_out]


def test_the_local_engine_makes_the_same_binaries(
    client: DockerClient,
    cpu_release: Release,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same compiler (Debian 12's), other folders: only BUILD.json may tell the engines apart."""
    compiler = heard(["g++", "-dumpfullversion"], check=True)
    record = json.loads((cpu_release.tree / "BUILD.json").read_bytes())
    if not record["toolchain"]["compiler"].endswith(compiler.stdout.strip()):
        pytest.skip(f"this host's g++ {compiler.stdout.strip()} is not the container's")
    monkeypatch.setenv("CCACHE_DIR", str(_cache_of_the_engine(client, tmp_path)))
    # The distribution's CMake, as in the container: another one has other flags, and other keys.
    monkeypatch.setenv("PATH", os.defpath)
    succeed("build-cpu", "--engine", "local", "--out", str(tmp_path / "local"))
    ours, theirs = (
        {entry["path"]: entry["sha256"] for entry in manifest_of(folder)["artifacts"][0]["files"]}
        for folder in (cpu_release.folder, tmp_path / "local")
    )
    assert {path for path in ours if ours[path] != theirs.get(path)} == {"runtime/BUILD.json"}
    assert ours.keys() == theirs.keys()


def _cache_of_the_engine(client: DockerClient, tmp_path: Path) -> Path:
    """Copy the container's compiler cache out: the local build then compiles next to nothing."""
    container = client.containers.create(
        "llama-farm-base:bookworm", ["true"], volumes={CACHE_VOLUME: {"bind": str(CACHE_FOLDER)}}
    )
    try:
        stream, _ = container.get_archive(str(CACHE_FOLDER))
        archive = tmp_path / "ccache.tar"
        archive.write_bytes(b"".join(stream))
    finally:
        container.remove()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path], check=True)
    return tmp_path / CACHE_FOLDER.name
