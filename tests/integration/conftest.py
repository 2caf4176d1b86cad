"""What tests of sets on many hosts, and those of devel images, share."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docker import DockerClient
from spread_run import TINY, Held

from farm import pipeline
from farm.engines.docker.inventory import DockerImages
from farm.options import BuildRequest
from llama_space import Engine
from tests.rigs.archives import Entry, tar

NVCC = """#!/bin/sh
[ "$1" = --list-gpu-code ] && { printf '%s\\n' CODES; exit; }
[ "$1" = --version ] || exit 1
echo "nvcc: NVIDIA (R) Cuda compiler driver"
echo "Cuda compilation tools, release VERSION, VVERSION.20"
"""


@pytest.fixture
def cuda_image(client: DockerClient, base_image: str) -> Iterator[Callable[..., str]]:
    """Make an image with an nvcc of a version, at a place, and what else is to be in it."""
    made: list[str] = []

    def make(version: str, place: str = "/usr/local/cuda", codes: str = "", more: str = "") -> str:
        text = NVCC.replace("VERSION", version).replace("CODES", codes)
        lines = ["ARG BASE", "FROM ${BASE}", f"COPY nvcc {place}/bin/nvcc", more]
        made_of = {"Dockerfile": "\n".join(lines), "nvcc": text}
        packed = io.BytesIO(tar(Entry(name, one.encode(), 0o755) for name, one in made_of.items()))
        tag = f"llama-farm-test-cuda:{version}"
        args = {"BASE": base_image}
        DockerImages(client).build(packed, tag, buildargs=args, labels={}, log=lambda _: None)
        made.append(tag)
        return tag

    yield make
    for tag in made:
        client.images.remove(tag, force=True)


@pytest.fixture(scope="module")
def engine(
    real_manifest: str, real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine with the real release and model; long texts do not fit its context."""
    made = Engine(
        llama_cpp_manifest_url=real_manifest,
        gguf_path=real_model,
        allow_cpu=True,
        n_ctx=512,
        max_new_tokens=64,
        store=tmp_path_factory.mktemp("store") / "store",
    )
    yield made
    made.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path / "held")
    made.folder.mkdir()
    shutil.copytree(TINY, made.tree)
    wait = made.folder / "wait"
    wait.write_text(
        f"#!/bin/sh\necho begun >> {made.folder}/begun\n"
        f"while [ ! -e {made.folder}/go ]; do sleep 0.1; done\n"
    )
    wait.chmod(0o755)
    with (made.tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(held ALL COMMAND "{wait}")\n')
        file.write("add_dependencies(llama-cli held)\n")
    yield made
    made.let_go()


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.setattr(pipeline, "STATE", tmp_path / "state")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    return BuildRequest(engine="dask", worker_engine="local", out=tmp_path / "out")
