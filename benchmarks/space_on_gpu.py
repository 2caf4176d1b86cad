"""The Space on a real GPU, as ZeroGPU runs it: app, worker, llama-server, with an imitated API.

    PYTHONPATH=.:spaces python benchmarks/space_on_gpu.py RELEASE_FOLDER MODEL [--out F]

Starts ``spaces/app.py`` with the real ``spaces`` package under ``tests/rigs/zerogpu.py``, which
hands out this machine's own GPU, and calls the page's endpoint: first with no worker, then with
one that has its server, after the worker was killed, and after a caller went away in the middle.
Prints JSON. The exit status is 1 unless every answer came from a server on the GPU, and nothing
was left there by a worker that is gone. The CPU is not allowed to stand in.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import requests

from llama_loader import host, settings
from tests.rigs import space
from tests.rigs.zerogpu import Emulator

TEXT: Final = "Parcel {} left the harbour at noon and arrives on the third day."
GONE_WITHIN: Final = 10.0
"""Seconds until nothing may be left on the GPU of a worker that was killed."""


@dataclass
class Measured:
    """Seconds of each kind of call: to its first words, and to its end."""

    first: dict[str, list[float]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)

    def call(self, url: str, kind: str, number: int) -> str:
        """Translate a text of its own; return the translation."""
        began = time.perf_counter()
        shown, first = "", 0.0
        with ask(url, number) as answer:
            for so_far in words(answer):
                shown, first = so_far, first or time.perf_counter() - began
        self.first.setdefault(kind, []).append(round(first, 4))
        self.whole.setdefault(kind, []).append(round(time.perf_counter() - began, 4))
        return shown


@contextmanager
def ask(url: str, number: int) -> Iterator[requests.Response]:
    """Ask the page's endpoint; gradio_client's own iterator holds its events up for seconds."""
    endpoint = f"{url}/gradio_api/call/translate"
    data = {"data": [TEXT.format(number), "ja", "en"]}
    event = requests.post(endpoint, json=data, timeout=60).json()["event_id"]
    with requests.get(f"{endpoint}/{event}", stream=True, timeout=60) as answer:
        yield answer


def words(answer: requests.Response) -> Iterator[str]:
    """Read what has been translated so far, again and again until the end."""
    kind = ""
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and kind in {"generating", "complete"}:
            yield str(json.loads(value)[0])
            if kind == "complete":
                return
        elif name == "data" and kind == "error":
            raise SystemExit(f"error[REFUSED]: the page answers {value}")


def on_the_gpu() -> dict[int, int]:
    """Return the processes that compute on the GPUs, and their memory in MiB."""
    rows = (line.split(",") for line in _told("--query-compute-apps=pid,used_memory"))
    return {int(pid): int(memory) for pid, memory in rows}


def uuids() -> list[str]:
    """Return the GPUs of this machine as the device API names them."""
    return _told("--query-gpu=uuid")


def _told(query: str) -> list[str]:
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


def servers(app: int) -> list[int]:
    """Return the llama-servers of this app, by the program that they run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program = (entry / "exe").readlink().name
            environ = (entry / "environ").read_bytes()
        except OSError:  # gone, or the kernel's own
            continue
        if program == "llama-server" and f"HOME={_home(app)}".encode() in environ.split(b"\0"):
            found.append(int(entry.name))
    return found


def _home(app: int) -> str:
    variables = Path(f"/proc/{app}/environ").read_bytes().split(b"\0")
    return next(one[5:].decode() for one in variables if one.startswith(b"HOME="))


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until something is so; False where it does not become so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def measure(release: Path, model: Path, calls: int, home: Path) -> dict[str, Any]:
    """Start the app, call it, kill its worker, leave in the middle; return what was seen."""
    facts = host.detect(settings.load(environ={}))
    manifest = f"file://{(release / 'manifest.json').resolve()}"
    variables: dict[str, Any] = {
        **space.pinned(manifest),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "allow_cpu": "0",
        "gguf_path": str(model),
        "max_new_tokens": "64",
    }
    measured, checks = Measured(), {}
    with (
        Emulator(uuids=uuids()) as emulator,
        space.serving(home, **(variables | emulator.environment)) as served,
    ):
        before = on_the_gpu()
        checks["nothing on the GPU before the first call"] = not servers(served.pid)
        said = measured.call(served.url, "first call: a new worker, a new server", 0)
        (server,) = servers(served.pid)
        memory = on_the_gpu().get(server, 0)
        checks["the server computes on the GPU"] = memory > 0
        for number in range(1, calls + 1):
            measured.call(served.url, "next calls", number)
        checks["the next calls have the same server"] = servers(served.pid) == [server]
        for name, number in (("SIGTERM", signal.SIGTERM), ("SIGKILL", signal.SIGKILL)):
            os.kill(emulator.workers()[-1], number)
            gone = within(GONE_WITHIN, lambda: not servers(served.pid) and on_the_gpu() == before)
            checks[f"{name} of the worker leaves nothing on the GPU"] = gone
            measured.call(served.url, f"after {name} of the worker", 100 + number)
        with ask(served.url, 200) as answer:
            next(words(answer))  # and away
        measured.call(served.url, "after a caller who left", 201)
        checks["one server in the end"] = len(servers(served.pid)) == 1
        log = served.said()
    checks["no traceback"] = "Traceback" not in log
    checks["nothing is left when the app is gone"] = within(
        GONE_WITHIN, lambda: on_the_gpu() == before
    )
    return {
        "gpu": facts.gpus[0].name,
        "driver": facts.driver,
        "model": {"name": model.name, "bytes": model.stat().st_size},
        "server_memory_mib": memory,
        "translation": said,
        "first_words_seconds": measured.first,
        "whole_seconds": measured.whole,
        "next_calls_median": round(statistics.median(measured.first["next calls"]), 4),
        "checks": checks,
    }


def main() -> int:
    """Measure; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="space-") as home:
        found = measure(options.release, options.model, options.calls, Path(home) / "home")
    shown = json.dumps(found, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(f"{shown}\n")
    print(shown)
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
