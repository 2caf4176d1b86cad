"""build/patches/parallel-upload: weights arrive on a device as they are in the file.

The device is memory of the process: a real llama-server takes a plugin for a GPU
(rigs/loopback_device.cpp). tests/gpu does the same on a real one.
"""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import requests
from gguf import GGMLQuantizationType as Kind

from farm import source
from farm.inputs import patches, pins
from llama_loader.server import free_port
from tests.rigs import quantised_model
from tests.rigs.heard import heard

pytestmark = [pytest.mark.docker]

RIGS: Final = Path(__file__).parent.parent / "rigs"
UPLOADED: Final = "llama_upload_tensors:"
OFF: Final = "0"
_READY_SECONDS: Final = 120


@pytest.fixture(scope="module")
def tree() -> Path:
    """The source of the release, with its patches."""
    return source.patched(source.from_archive(pins.load().source), patches.load()).tree


@dataclass(frozen=True)
class Loopback:
    """A llama-server, and the plugin that gives it devices."""

    runtime: Path
    plugin: Path

    def start(
        self, model: Path, threads: str, *options: str, devices: int = 1, **variables: str
    ) -> tuple[str, str]:
        """Start the server; returns what it says to a prompt, token by token, and its log.

        The first is empty where the server ended before it was ready.
        """
        port = free_port()
        log = model.with_name(f"{port}.log")
        command = [str(self.runtime / "llama-server"), "--model", str(model), "--port", str(port)]
        command += ["--ctx-size", "256", "--no-warmup", "--fit", "off", "--parallel", "1"]
        environ = os.environ | variables
        environ |= {"GGML_BACKEND_PATH": str(self.plugin), "LOOPBACK_DEVICES": str(devices)}
        environ |= {"LLAMA_UPLOAD_THREADS": threads}
        command += ["--threads", "1", "--log-verbosity", "4", *options]
        with (
            log.open("wb") as out,
            subprocess.Popen(command, env=environ, stdout=out, stderr=out) as process,
        ):
            try:
                said = _probabilities(port) if _is_ready(port, process) else ""
            finally:
                process.kill()
        return said, log.read_text("utf-8", "replace")


def _is_ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                return True
        except requests.ConnectionError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return False


def _probabilities(port: int) -> str:
    body: dict[str, Any] = {"prompt": "the capital of france is", "n_predict": 8, "n_probs": 8}
    body |= {"temperature": 0, "ignore_eos": True}
    answer = requests.post(f"http://127.0.0.1:{port}/completion", json=body, timeout=120).json()
    found = json.dumps([answer["content"], answer["completion_probabilities"]])
    assert len({one["logprob"] for one in json.loads(found)[1][0]["top_logprobs"]}) > 1
    return found


@pytest.fixture(scope="module")
def loopback(real_runtime: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Loopback:
    plugin = tmp_path_factory.mktemp("plugin") / "libloopback.so"
    _compile(tree, RIGS / "loopback_device.cpp", "-fPIC", "-shared", "-o", str(plugin))
    return Loopback(real_runtime, plugin)


def _compile(tree: Path, *arguments: str | Path) -> None:
    folders = (tree / "ggml/include", tree / "ggml/src", tree / "include", tree / "src")
    includes = [f"-I{folder}" for folder in folders]
    command = ["g++", "-std=c++17", "-g", "-O1", "-DGGML_BACKEND_DL", *includes, *arguments]
    subprocess.run(command, check=True)


def _is_same(
    loopback: Loopback, folder: Path, case: tuple[Kind, int, int, Sequence[str]]
) -> tuple[bool, bool, bool]:
    """Whether the answers are the same, and whether each start uploaded in the patch's way.

    A case writes a file of its own: a server beside it has mapped the other one.
    """
    kind, files, devices, options = case
    own = "-".join([kind.name, str(files), str(devices), *options])
    model = quantised_model.write(folder / f"{own}.gguf", kind, files=files)
    (one, plain), (other, patched) = (
        loopback.start(model, threads, *options, devices=devices) for threads in (OFF, "4")
    )
    return bool(one) and one == other, UPLOADED in plain, UPLOADED in patched


def test_the_answers_are_those_of_upstreams_way(loopback: Loopback, tmp_path: Path) -> None:
    """Every kind of weights; one to three files; one and two devices; half of it on the CPU."""
    cases = [
        *((kind, 1, 1, ()) for kind in quantised_model.KINDS),
        *((kind, files, 1, ()) for kind in (Kind.F32, Kind.Q4_K) for files in (2, 3)),
        *((Kind.F32, files, 2, ("--tensor-split", "1,1")) for files in (1, 3)),
        (Kind.F32, 1, 1, ("--n-gpu-layers", "1")),
        (Kind.F32, 1, 1, ("--load-mode", "none")),
    ]
    with ThreadPoolExecutor(2) as pool:
        found = dict(
            zip(cases, pool.map(partial(_is_same, loopback, tmp_path), cases), strict=True)
        )
    assert found == dict.fromkeys(cases, (True, False, True))


def test_a_backend_without_events_is_loaded_in_upstreams_way(
    loopback: Loopback, tmp_path: Path
) -> None:
    model = quantised_model.write(tmp_path / "model.gguf", Kind.Q4_K)
    said, log = loopback.start(model, "4", LOOPBACK_NO_EVENTS="1")
    assert said
    assert UPLOADED not in log


def test_a_file_that_shrinks_while_it_is_read_is_named_with_the_byte(
    loopback: Loopback, tmp_path: Path
) -> None:
    model = quantised_model.write(tmp_path / "model.gguf", Kind.F32)
    size = model.stat().st_size // 2
    said, log = loopback.start(model, "4", LOOPBACK_SHRINKS=f"{size}:{model}")
    assert not said
    assert "cannot be read at byte" in log
    assert "of its file: the file ends there" in log


@pytest.fixture(scope="module")
def harness(real_runtime: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The upload alone, watched by ThreadSanitizer."""
    program = tmp_path_factory.mktemp("harness") / "upload_harness"
    sources = [tree / "src" / f"llama-{name}.cpp" for name in ("upload", "mmap", "impl")]
    sources += [RIGS / "upload_harness.cpp", RIGS / "loopback_device.cpp"]
    libraries = [real_runtime / f"lib{name}.so.0" for name in ("ggml-base", "ggml")]
    path = f"-Wl,-rpath,{real_runtime}"
    _compile(tree, "-fsanitize=thread", *sources, *libraries, path, "-o", str(program))
    return program


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("whole", "same"),
        ("beside", "same"),
        ("cancelled", "cancelled"),
        ("failed", "beside failed"),
        ("truncated", "tensor 'tensor 5' cannot be read at byte"),
    ],
)
def test_its_threads_have_no_race(harness: Path, tmp_path: Path, how: str, said: str) -> None:
    """``setarch -R``: gcc 12's sanitizer cannot place its memory where the kernel moves much."""
    done = heard(
        ["setarch", "-R", str(harness), str(tmp_path / "weights"), how],
        env=os.environ | {"LLAMA_UPLOAD_THREADS": "4"},
        timeout=300,
    )
    assert (done.returncode, done.stdout.splitlines()[-1][: len(said)]) == (0, said)
    assert "ThreadSanitizer" not in done.stderr
