"""The whole line for real: container → tarball → HTTP → loader → llama-server → an answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from docker import DockerClient
from verbs import PROJECT, Release, succeed

from farm import elf, source, targets
from farm.engines.docker import CACHE_FOLDER, CACHE_VOLUME, LABEL, DockerEngine
from farm.inputs import patches, pins
from farm.plan import CONTAINER_LAYOUT, BuildPlan
from tests.rigs.heard import heard

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

PINNED = pins.load().source
"""What the weekly run proposes changes this file alone: no test has the number."""
PROMPT = "The capital of France is"


@contextmanager
def running(*argv: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process of ours, ended with SIGINT as a person would, then waited for."""
    process = subprocess.Popen(
        argv,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The release folder behind `invoke serve-release`; gives the manifest's URL."""
    command = (sys.executable, "-m", "invoke", "serve-release", "--folder", str(folder))
    with running(*command) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        yield f"{line.split()[-1].rstrip('/')}/manifest.json"


def loader(*argv: str, store: Path) -> subprocess.CompletedProcess[str]:
    """The loader as a user runs it: another process, from the Space's root."""
    return heard(
        [sys.executable, "-m", "llama_loader", *argv, "--store", str(store)],
        cwd=PROJECT / "spaces",
        timeout=300,
    )


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


def test_progress_without_a_terminal_is_plain_lines(cpu_release: Release) -> None:
    assert "\x1b" not in cpu_release.log
    assert "cpu-cpu compile [" in cpu_release.log


def test_nothing_of_the_build_is_left_in_the_engine(
    client: DockerClient, cpu_release: Release
) -> None:
    del cpu_release
    assert client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True) == []


def test_a_user_gets_an_answer_from_an_empty_store(
    cpu_release: Release, real_model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with served(cpu_release.folder) as url:
        fetched = loader("fetch", "--manifest", url, "--allow-cpu", store=store)
    assert fetched.returncode == 0, fetched.stderr
    runtime = Path(fetched.stdout.splitlines()[-1])
    assert (runtime / "llama-server").is_file()
    told = heard([runtime / "llama-server", "--version"], check=True)
    assert str(PINNED.build) in told.stdout + told.stderr
    assert loader("verify", str(runtime), store=store).returncode == 0
    assert answer(cpu_release, real_model, store) == " Paris"


def answer(release: Release, model: Path, store: Path) -> str:
    """Serve the model through the loader and complete the prompt at temperature 0."""
    with (
        served(release.folder) as url,
        running(
            *(sys.executable, "-m", "llama_loader", "serve", "--model", str(model)),
            *("--manifest", url, "--allow-cpu", "--store", str(store), "--json"),
            PYTHONPATH=str(PROJECT / "spaces"),
        ) as server,
    ):
        assert server.stdout is not None
        key = json.loads(server.stdout.readline())["api_key"]
        ready = server.stdout.readline().split()
        assert ready[0] == "ready", ready
        body = json.dumps({"prompt": PROMPT, "n_predict": 1, "temperature": 0}).encode()
        request = urllib.request.Request(f"{ready[1]}/completion", data=body, method="POST")
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=60) as response:
            content: str = json.load(response)["content"]
            return content


def test_a_changed_byte_is_found_before_anything_runs(cpu_release: Release, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cpu_release.folder, tmp_path / "release"))
    tarball = next(folder.glob("*.tar.zst"))
    content = bytearray(tarball.read_bytes())
    content[len(content) // 2] ^= 1
    tarball.write_bytes(content)
    with served(folder) as url:
        refused = loader("fetch", "--manifest", url, "--allow-cpu", store=tmp_path / "store")
    assert refused.returncode == 4
    assert "\nerror[CHUNK_MISMATCH]: " in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "store").rglob("llama-server"))


def test_packing_one_tree_twice_gives_the_same_bytes(cpu_release: Release, tmp_path: Path) -> None:
    succeed("pack", "--tree", str(cpu_release.tree), "--out", str(tmp_path))
    again = next(tmp_path.glob("*.tar.zst"))
    assert again.read_bytes() == (cpu_release.folder / again.name).read_bytes()


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
    shutil.unpack_archive(archive, tmp_path, filter="data")
    return tmp_path / CACHE_FOLDER.name


def test_one_real_cuda_object_holds_sass_90_and_no_ptx(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    del base_image
    tag = "llama-farm-base:bookworm-cu130"
    succeed("base-image", "--line", "cu130", "--tag", tag)
    table = targets.load()
    object_name = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/norm.cu.o"
    plan = BuildPlan(
        table.sets["sm90"],
        table.line("cu130"),
        source.from_archive(pins.load().source),
        targets=(object_name,),
    )
    lines: list[str] = []
    with DockerEngine(client, reference=tag).open(plan, lines.append) as workspace:
        environment = plan.environment(CONTAINER_LAYOUT, ccache_dir=workspace.ccache_dir)
        for step in plan.steps(CONTAINER_LAYOUT, jobs=workspace.jobs):
            status = workspace.run(step.argv, environment, lines.append)
            assert status == 0, "\n".join(lines[-30:])
        folder = CONTAINER_LAYOUT.build / Path(object_name).parent
        workspace.collect(folder, tmp_path)
    found = elf.inspect(tmp_path / "norm.cu.o")
    assert (list(found.sass), list(found.ptx)) == (["90"], [])
