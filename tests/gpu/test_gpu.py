"""What only a real GPU can show. `nox -s gpu` builds the release that these tests need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from farm import elf
from tests.rigs.heard import heard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Loader

    from llama_loader.host import HostFacts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def complete(url: str, tokens: int = 8) -> str:
    body = {"prompt": "The capital of France is", "n_predict": tokens, "temperature": 0}
    answer: dict[str, Any] = requests.post(f"{url}/completion", json=body, timeout=60).json()
    return str(answer["content"])


def smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.strip() for line in told.stdout.splitlines()]


HOG = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
assert cuda.cuInit(0) == cuda.cuDeviceGet(ctypes.byref(device), int(sys.argv[2])) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
size = ctypes.c_size_t(free.value - int(sys.argv[1]))
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), size) == 0
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def hog(*, leaving: int, gpu: int = 0) -> Iterator[None]:
    """Another program that takes a GPU's memory, but for some bytes."""
    command = [sys.executable, "-c", HOG, str(leaving), str(gpu)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        yield
        process.communicate()


def test_nvml_says_what_nvidia_smi_says(machine: HostFacts) -> None:
    assert machine.gpu_source == "nvml"
    assert [gpu.name for gpu in machine.gpus] == smi("name")
    assert [gpu.uuid for gpu in machine.gpus] == smi("uuid")
    assert {machine.driver} == set(smi("driver_version"))
    capabilities = [text.replace(".", "") for text in smi("compute_cap")]
    assert [gpu.capability for gpu in machine.gpus] == capabilities


@pytest.mark.usefixtures("machine")
def test_looking_at_the_host_makes_no_context() -> None:
    """ZeroGPU's main process must never touch CUDA. A context needs /dev/nvidia-uvm opened."""
    script = (
        "import os\n"
        "from llama_loader import host, settings\n"
        "print(host.detect(settings.load()).gpu_source)\n"
        "opened = [os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')]\n"
        "print(any('nvidia-uvm' in one for one in opened))\n"
    )
    environ = {**os.environ, "PYTHONPATH": "spaces:" + os.environ.get("PYTHONPATH", "")}
    told = heard([sys.executable, "-c", script], env=environ, check=True)
    assert told.stdout.split() == ["nvml", "False"]


def test_doctor_finds_nothing_wrong(loader: Loader, model: Path) -> None:
    told = loader.json("doctor", YAKULINGO_SPACES_GGUF_PATH=str(model))
    assert told["exit_status"] == 0, told["checks"]
    assert told["choice"]["native"]


def test_every_layer_is_on_the_gpu(loader: Loader, model: Path) -> None:
    with loader.serving(model) as told:
        assert told["devices"] == ["CUDA0"]
        assert told["layers_on_gpu"] == told["layers"] > 0
        assert told["buffers"]["CUDA0"] > 0
        assert complete(told["url"]).startswith(" Paris")


def test_two_models_at_once(loader: Loader, model: Path) -> None:
    with loader.serving(model) as one, loader.serving(model) as two:
        assert one["url"] != two["url"]
        assert complete(one["url"]) == complete(two["url"])


def test_out_of_memory_is_told_with_sizes(loader: Loader, model: Path) -> None:
    done = loader.run("serve", "--model", str(model), YAKULINGO_SPACES_N_CTX="16777216")
    assert done.returncode == 7, done.stderr
    assert "error[OUT_OF_MEMORY]: " in done.stderr
    assert re.search(r"\d+(\.\d+)? (GB|GiB|MB|MiB)", done.stderr)
    assert "Traceback" not in done.stderr


def test_what_does_not_fit_is_left_to_the_cpu(loader: Loader, model: Path) -> None:
    """4 GiB free, a context of 6: some layers go, the loader says which, and it answers."""
    with (
        hog(leaving=4 * 1024**3),
        loader.serving(model, CUDA_VISIBLE_DEVICES="0", YAKULINGO_SPACES_N_CTX="262144") as told,
    ):
        assert 0 < told["layers_on_gpu"] < told["layers"]
        assert complete(told["url"]).startswith(" Paris")
        assert "warning[LAYERS_LEFT_OVER]: " in loader.warnings()


def test_a_hidden_gpu(loader: Loader, model: Path) -> None:
    done = loader.run("serve", "--model", str(model), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 5, done.stderr
    assert "error[NO_GPU]: " in done.stderr
    assert "CUDA_VISIBLE_DEVICES" in done.stderr
    with loader.serving(model, "--allow-cpu", CUDA_VISIBLE_DEVICES="") as told:
        assert told["devices"] == []
        assert complete(told["url"], tokens=1) == " Paris"


def test_a_device_that_is_not_there(loader: Loader, model: Path) -> None:
    done = loader.run("serve", "--model", str(model), "--device", "CUDA9")
    assert done.returncode == 5
    assert "error[INVALID_DEVICE]: " in done.stderr


def listed(library: str) -> Counter[str]:
    """Count what cuobjdump lists, as ``sass 90``: it prints a line for each entry."""
    command = ["cuobjdump", "--list-elf", "--list-ptx", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"\.sm_(\d+[af]?)\.(cubin|ptx)$", lines, re.MULTILINE)
    return Counter(f"{'ptx' if kind == 'ptx' else 'sass'} {arch}" for arch, kind in found)


def test_the_reader_says_what_cuobjdump_says(loader: Loader) -> None:
    if shutil.which("cuobjdump") is None:
        pytest.skip("no cuobjdump on PATH")
    library = f"{loader.json('fetch')['folder']}/libggml-cuda.so"
    theirs = listed(library)
    assert theirs
    assert dict(elf.inspect(Path(library)).code.entries) == theirs


class TestSeveral:
    """Two GPUs and more."""

    @pytest.fixture(autouse=True)
    def _several(self, machine: HostFacts) -> None:
        if len(machine.gpus) < 2:
            pytest.skip("one GPU here: needs two")

    def test_one_is_enough_for_a_small_model(self, loader: Loader, model: Path) -> None:
        with loader.serving(model) as told:
            assert len(told["devices"]) == 1

    def test_the_roomier_one_is_taken(self, loader: Loader, model: Path) -> None:
        with (
            loader.serving(model, "--device", "CUDA0", YAKULINGO_SPACES_N_CTX="262144"),
            loader.serving(model) as told,
        ):
            assert told["devices"] == ["CUDA1"]

    def test_two_are_taken_where_one_does_not_hold_it(self, loader: Loader, model: Path) -> None:
        """5 GiB free on each, a context of 6: neither holds it alone, both together do."""
        room = 5 * 1024**3
        with (
            hog(leaving=room, gpu=0),
            hog(leaving=room, gpu=1),
            loader.serving(
                model, CUDA_VISIBLE_DEVICES="0,1", YAKULINGO_SPACES_N_CTX="262144"
            ) as told,
        ):
            assert sorted(told["devices"]) == ["CUDA0", "CUDA1"]
            assert told["layers_on_gpu"] == told["layers"]
            assert complete(told["url"]).startswith(" Paris")

    def test_both_are_taken_where_both_are_named(self, loader: Loader, model: Path) -> None:
        with loader.serving(model, "--device", "CUDA0,CUDA1") as told:
            assert told["devices"] == ["CUDA0", "CUDA1"]
            assert {"CUDA0", "CUDA1"} <= set(told["buffers"])
            assert complete(told["url"]).startswith(" Paris")
