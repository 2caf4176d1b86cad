"""Seconds from a start to the first token, for models of many gigabytes on a GPU.

    PYTHONPATH=.:spaces python benchmarks/load_time.py --release DIR --upstream DIR \
        --model FILE.gguf … [--rounds 5] [--worker] --out FILE.json

``--release`` is a folder with one CUDA artifact, ``--upstream`` one of the same source that was
built with ``--patches none``; ``noise_model.py`` writes models. The sides take turns: upstream's
ways by hand, ours by hand, through the loader, and with ``--worker`` a ZeroGPU worker that starts
cold, asked through the page's endpoint. First with the model in the page cache, then with it
dropped before each start. Prints medians, and writes every figure as JSON. ``--plot FILE.svg``
draws the first series of what ``--out`` has.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import cold_start
from benchmarks.cold_start import RUNNING, Bench, Side
from farm.serve import ReleaseServer
from llama_loader.server import free_port

AS_LOADED: Final = ("--no-warmup", "--fit", "off", "--threads", "1")
"""What the loader adds to a start on one GPU (spaces/llama_loader/server_plan.py)."""
_UPLOADED: Final = re.compile(
    r"llama_upload_tensors: (\d+) MiB to (\S+) with (\d+) threads in (\d+)"
)
_PINNED_BYTES: Final = 1 << 28
_CUDA_HOST_TO_DEVICE: Final = 1
"""``cudaMemcpyHostToDevice`` of ``cuda_runtime_api.h``."""


@dataclass(frozen=True)
class Ways:
    """What is started: the two builds' folders, and where CUDA's libraries lie."""

    bench: Bench
    ours: Path
    upstream: Path
    libraries: str

    def sides(self, *, dropped: bool) -> dict[str, Callable[[], dict[str, float]]]:
        """Return each way to start, by name; those that read the disk twice only where it is."""
        found = {
            "llama.cpp, its defaults": lambda: self._bare(self.upstream),
            "llama.cpp, --load-mode dio": lambda: self._bare(self.upstream, "--load-mode", "dio"),
            "patched, by hand": lambda: self._bare(self.ours, *AS_LOADED),
        }
        if not dropped:
            found |= {
                "llama.cpp, --load-mode none": lambda: self._bare(
                    self.upstream, "--load-mode", "none"
                ),
                "llama.cpp, the loader's flags": lambda: self._bare(self.upstream, *AS_LOADED),
                "patched, through the loader": lambda: self._loader(running=False),
                f"patched, {RUNNING}": lambda: self._loader(running=True),
            }
        return found

    def _bare(self, runtime: Path, *options: str) -> dict[str, float]:
        return self.bench.bare(runtime, self.libraries, self.bench.scratch / "jit", *options)

    def _loader(self, *, running: bool) -> dict[str, float]:
        return self.bench.loader(self.bench.kept, self.bench.scratch / "jit", running=running)


def uploads(ways: Ways) -> list[dict[str, float]]:
    """Start once, and return what the patched llama.cpp says of its upload: GB/s by device."""
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [str(ways.ours / "llama-server"), "--model", str(ways.bench.model), *AS_LOADED]
        command += ["--port", str(free_port()), "--log-file", log.name, "--log-verbosity", "4"]
        environ = {**os.environ, "LD_LIBRARY_PATH": ways.libraries}
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet) as process:
            while "listening on http" not in (said := Path(log.name).read_text("utf-8")):
                if process.poll() is not None:
                    raise SystemExit(f"llama-server ended with status {process.returncode}")
                time.sleep(0.05)
            process.terminate()
    return [
        {"device": device, "threads": int(threads), "GB/s": round(int(mib) * 1.048576 / int(ms), 1)}
        for mib, device, threads, ms in _UPLOADED.findall(said)
    ]


def pinned_rate(libraries: str) -> float:
    """Return how many GB/s CUDA copies from pinned memory to the GPU: the best of ten copies."""
    folders = [Path(folder) for folder in libraries.split(":")]
    found = next(one for folder in folders for one in folder.glob("libcudart.so.*"))
    cuda = ctypes.CDLL(str(found))
    host, device = ctypes.c_void_p(), ctypes.c_void_p()
    size = ctypes.c_size_t(_PINNED_BYTES)
    if cuda.cudaMallocHost(ctypes.byref(host), size) or cuda.cudaMalloc(ctypes.byref(device), size):
        raise SystemExit("CUDA gives no memory")
    took = []
    for _ in range(10):
        began = time.perf_counter()
        cuda.cudaMemcpy(device, host, size, _CUDA_HOST_TO_DEVICE)
        took.append(time.perf_counter() - began)
    cuda.cudaFree(device)
    cuda.cudaFreeHost(host)
    return round(_PINNED_BYTES / min(took) / 1e9, 1)


def drop(model: Path) -> None:
    """Take a file out of the page cache."""
    with model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def series(ways: Ways, rounds: int, *, dropped: bool) -> dict[str, Any]:
    """Start every side once a round, in turn; the model is dropped before each, or stays cached."""
    model = ways.bench.model
    ways_by_name = ways.sides(dropped=dropped)
    sides = [Side(name) for name in ways_by_name]
    if not dropped:
        ways_by_name["patched, by hand"]()  # reads everything into memory once
    for number in range(rounds):
        for side in sides:
            if dropped:
                drop(model)
            side.runs.append(ways_by_name[side.name]())
            print(f"{number + 1}/{rounds} {side.name}: {side.runs[-1]['first token']:.2f} s")
    print(cold_start.table(sides))
    return {
        "model": {"name": model.name, "bytes": model.stat().st_size},
        "page cache": "dropped" if dropped else "warm",
        "sides": [asdict(side) for side in sides],
    }


def workers(release: Path, model: Path, rounds: int) -> list[float]:
    """Return seconds to the first words of calls that find no worker: the page's endpoint."""
    from benchmarks import space_on_gpu  # noqa: PLC0415 - it needs gradio, the rest does not
    from tests.rigs import space  # noqa: PLC0415
    from tests.rigs.zerogpu import Emulator  # noqa: PLC0415

    measured = space_on_gpu.Measured()
    variables: dict[str, Any] = space.pinned(f"file://{(release / 'manifest.json').resolve()}") | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "allow_cpu": "0",
        "gguf_path": str(model),
        "max_new_tokens": "16",
    }
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "home"
        emulator = stack.enter_context(Emulator(uuids=space_on_gpu.uuids()))
        served = stack.enter_context(space.serving(home, **(variables | emulator.environment)))
        for number in range(rounds):
            measured.call(served.url, "cold", number)
            os.kill(emulator.workers()[-1], signal.SIGKILL)
            space_on_gpu.within(10, lambda: not space_on_gpu.servers(served.pid))
    return measured.first["cold"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", type=Path)
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.plot:
        told = json.loads(options.out.read_text("utf-8"))
        cold_start.draw(told | told["series"][0], options.plot)
        return
    result: dict[str, Any] = {"series": [], "upload": {}, "worker": {}}
    with (
        tempfile.TemporaryDirectory(prefix="load-time-") as scratch,
        ReleaseServer(options.release) as server,
    ):
        for model in options.model:
            url = f"{server.url}manifest.json"
            bench = Bench(options.release, model.resolve(), Path(scratch), url)
            installed = bench.fetch(bench.kept)
            uri = (options.upstream / "manifest.json").resolve().as_uri()
            other = Bench(options.upstream, model, bench.scratch, uri)
            theirs = Path(other.fetch(bench.scratch / "upstream")["folder"])
            libraries = cold_start.library_path(installed)
            ways = Ways(bench, Path(installed["folder"]), theirs, libraries)
            result = cold_start.facts(bench) | result
            for dropped in (False, True):
                result["series"].append(series(ways, options.rounds, dropped=dropped))
                cold_start.write(options.out, result)  # a lease may end before the last round
            result["upload"][model.name] = uploads(ways)
            if options.worker:
                result["worker"][model.name] = workers(options.release, model, options.rounds)
        result["pinned GB/s"] = pinned_rate(libraries)
    cold_start.write(options.out, result)
    print(json.dumps({name: result[name] for name in ("upload", "worker", "pinned GB/s")}))


if __name__ == "__main__":
    main()
