"""From nothing to tokens on a GPU: our loader, the bare server, and upstream's release list.

    PYTHONPATH=.:spaces python benchmarks/cold_start.py --release DIR --model FILE.gguf \
        [--upstream DIR] [--llama-bench FILE [--also FILE.gguf …]] [--runs 5] [--out FILE.json]

DIR is a release folder with one CUDA artifact (``invoke build-cuda --out DIR``). Every run starts
new processes; ``cold`` runs get an empty folder for the driver's JIT cache, ``warm`` ones keep it.
The sides take turns, so that whatever else the machine does hits all of them. Prints a table and
writes every single figure, with the machine's facts, as JSON. ``--plot FILE.svg --out FILE.json``
draws what was measured before.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from benchmarks import running_python
from farm.serve import ReleaseServer
from llama_loader import host, settings
from llama_loader.client import Client
from llama_loader.server import free_port

RUNNING_PYTHON: Final = Path(running_python.__file__)
RUNNING: Final = "installed, in a running Python"
PROMPT: Final = "the capital of france is"
TOKENS: Final = 64
BENCH_TOKENS: Final = 256
CONTEXT: Final = 4096
_START_SECONDS: Final = 300.0
"""Upstream's list takes 39 s to its first token on an H200: the driver compiles (docs/gpu.md)."""
_POLL: Final = 0.005
_OK: Final = 200
MILESTONES: Final = {"ready": "#2f8f5b", "first token": "#c2782b", "64 tokens": "#3b6ea8"}
"""What every run reaches, and the colour of the way there in the picture."""
_LONG: Final = 10.0
"""Seconds above which the others can only be seen on a logarithmic scale."""


@dataclass
class Side:
    """One way to start, and its runs: seconds by milestone, all counted from the start."""

    name: str
    runs: list[dict[str, float]] = field(default_factory=list)

    def median(self, milestone: str) -> float:
        """Return the median of a milestone over all runs."""
        return statistics.median(run[milestone] for run in self.runs)


@dataclass(frozen=True)
class Bench:
    """What is compared, and the folder for stores and caches."""

    release: Path
    model: Path
    scratch: Path
    manifest_url: str

    @property
    def kept(self) -> Path:
        """The store in which the release is installed before anything is measured."""
        return self.scratch / "kept"

    def command(self, name: str, store: Path, *options: str) -> list[str]:
        """Return a command line of the loader, the manifest pinned as in a Space."""
        return [sys.executable, "-m", "llama_loader", *self.arguments(name, store, *options)]

    def arguments(self, name: str, store: Path, *options: str) -> list[str]:
        """Return the same without the program."""
        pin = hashlib.sha256((self.release / "manifest.json").read_bytes()).hexdigest()
        return [
            *(name, *options),
            *("--manifest", self.manifest_url, "--manifest-sha256", pin, "--store", str(store)),
        ]

    def fetch(self, store: Path) -> dict[str, Any]:
        """Install the release; returns what ``fetch --json`` says."""
        told = subprocess.run(
            self.command("fetch", store, "--json"), stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, Any] = json.loads(told.stdout)
        return found

    def loader(self, store: Path, cache: Path, *, running: bool = False) -> dict[str, float]:
        """Start with the loader: to its ``ready`` line, and 64 tokens.

        Counted from its process's start, or, where it is ``running``, from the moment that a Python
        which has its modules is told to: as in a Space, whose process is there already.
        """
        arguments = self.arguments("serve", store, "--json", "--model", str(self.model))
        program = [str(RUNNING_PYTHON)] if running else ["-m", "llama_loader"]
        began = time.monotonic()
        with _process([sys.executable, *program, *arguments], cache) as process:
            if running:
                _line(process, running_python.READY)
                began = time.monotonic()
                print(file=process.stdin, flush=True)
            told = _line(process, "{")
            url = _line(process, "ready ").split()[1]
            first = time.monotonic() - began
            stages = {one["name"]: one["seconds"] for one in json.loads(told)["timeline"]}
            after = first + _generate(url, TOKENS, json.loads(told)["api_key"])
        ready = first - stages["first token"]
        return {
            "ready": ready,
            "first token": first,
            "64 tokens": after,
            **{f"stage: {name}": value for name, value in stages.items()},
        }

    def bare(self, runtime: Path, libraries: str, cache: Path, *options: str) -> dict[str, float]:
        """Start llama-server as a person would by hand, with further options."""
        port = free_port()
        command = [str(runtime / "llama-server"), "--model", str(self.model), "--port", str(port)]
        command += ["--n-gpu-layers", "99", "--ctx-size", str(CONTEXT), *options]
        url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        with _process(command, cache, LD_LIBRARY_PATH=libraries) as process:
            _await_health(port, process)
            ready = time.monotonic() - began
            _generate(url, 1)
            first = time.monotonic() - began
            after = first + _generate(url, TOKENS)
        return {"ready": ready, "first token": first, "64 tokens": after}


def measure(bench: Bench, upstream: Path | None, rounds: int) -> Iterator[list[Side]]:
    """Run every side once a round, in turn; yields all sides with their runs after each round."""
    installed = bench.fetch(bench.kept)
    libraries = library_path(installed)
    ours = Path(installed["folder"])
    sides: dict[str, Callable[[int], dict[str, float]]] = {
        "manifest URL": lambda n: bench.loader(bench.scratch / f"store{n}", _fresh(bench)),
        "installed": lambda _: bench.loader(bench.kept, _fresh(bench)),
        "installed, warm JIT cache": lambda _: bench.loader(
            bench.kept, bench.scratch / "warm-ours"
        ),
        RUNNING: lambda _: bench.loader(bench.kept, _fresh(bench), running=True),
        "bare server": lambda _: bench.bare(ours, libraries, _fresh(bench)),
    }
    if upstream is not None:
        # installed with the loader too: it serves any capability that it has PTX for
        uri = (upstream / "manifest.json").resolve().as_uri()
        other = Bench(upstream, bench.model, bench.scratch, uri)
        theirs = Path(other.fetch(bench.scratch / "upstream")["folder"])
        # the second finds what the cold run of the same round has left
        for name in ("upstream's list, bare", "upstream's list, warm JIT cache"):
            sides[name] = lambda number: bench.bare(
                theirs, libraries, bench.scratch / f"jit-theirs{number}"
            )
    found = [Side(name) for name in sides]
    bench.bare(ours, libraries, bench.scratch / "warm-ours")  # reads everything into memory once
    for number in range(rounds):
        for side in found:
            side.runs.append(sides[side.name](number))
            print(f"{number + 1}/{rounds} {side.name}: {side.runs[-1]['first token']:.2f} s")
        yield found


def library_path(installed: dict[str, Any]) -> str:
    """Return the folders of the CUDA libraries that ``fetch --json`` named."""
    return ":".join(dict.fromkeys(installed["libraries"].values()))


def bench_tokens(program: Path, model: Path, libraries: str, runs: int) -> list[float]:
    """Return llama-bench's tokens per second for text generation, one figure a run."""
    command = [str(program), "-m", str(model), "-p", "0", "-n", str(BENCH_TOKENS)]
    command += ["-ngl", "99", "-r", str(runs), "-o", "json"]
    environ = {**os.environ, "LD_LIBRARY_PATH": f"{program.parent}:{libraries}"}
    told = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"{program} ended with status {told.returncode}: {told.stderr[-2000:]}")
    samples: list[float] = json.loads(told.stdout)[0]["samples_ts"]
    return samples


def speeds(bench: Bench, program: Path, model: Path, runs: int) -> dict[str, Any]:
    """Compare tokens per second with llama-bench's, on one model."""
    libraries = library_path(bench.fetch(bench.kept))
    command = bench.command("serve", bench.kept, "--no-key", "--model", str(model))
    with _process(command, _fresh(bench)) as process:
        url = _line(process, "ready ").split()[1]
        client = Client(urlsplit(url).port or 0, None, timeout=_START_SECONDS)
        _speed(client)  # the GPU's clocks go up
        served = [_speed(client) for _ in range(runs)]
    alone = bench_tokens(program, model, libraries, runs)
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "served": served,
        "llama_bench": alone,
        "ratio": round(statistics.median(served) / statistics.median(alone), 3),
    }


def ratios(sides: list[Side]) -> dict[str, float]:
    """Return what is promised: how much sooner, how much later."""
    by_name = {side.name: side for side in sides}
    ours, bare = by_name["installed"], by_name["bare server"]
    found = {
        "first token, installed / bare server": ours.median("first token")
        / bare.median("first token"),
        "manifest URL to first token, seconds": by_name["manifest URL"].median("first token"),
    }
    theirs = by_name.get("upstream's list, bare")
    if theirs is not None:
        slow = theirs.median("first token")
        found["first token, upstream's list / installed"] = slow / ours.median("first token")
        found["first token, upstream's list / bare server"] = slow / bare.median("first token")
        worker = by_name[RUNNING].median("first token")
        found["first token, upstream's list / installed, in a running Python"] = slow / worker
    return {name: round(value, 3) for name, value in found.items()}


def table(sides: list[Side]) -> str:
    """Return the medians, one line a side."""
    lines = [f"{'':34}" + "".join(f"{name:>13}" for name in MILESTONES)]
    lines += [
        f"{side.name:34}" + "".join(f"{side.median(name):13.2f}" for name in MILESTONES)
        for side in sides
    ]
    return "\n".join(lines)


def draw(result: dict[str, Any], out: Path) -> None:
    """Draw one bar of medians a side, from the start to 64 tokens; the line is all runs.

    The same result gives the same bytes. Needs ``python -m pip install --group benchmarks``.
    """
    import matplotlib as mpl  # noqa: PLC0415 - where it is measured, nothing can be installed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    mpl.rcParams.update({"svg.hashsalt": "cold start", "font.family": "sans-serif"})
    sides = result["sides"][::-1]
    figure, axes = plt.subplots(figsize=(9.6, 1.4 + 0.5 * len(sides)), layout="constrained")
    for place, side in enumerate(sides):
        begun = 0.0
        for milestone, colour in MILESTONES.items():
            end = statistics.median(run[milestone] for run in side["runs"])
            label = milestone if place == 0 else None
            axes.barh(place, end - begun, left=begun, color=colour, height=0.6, label=label)
            begun = end
        last = [run["64 tokens"] for run in side["runs"]]
        axes.plot([min(last), max(last)], [place, place], color="#1d2733", linewidth=1)
        axes.text(max(last), place, f"  {begun:.2f} s", va="center", color="#48566a")
    axes.set_yticks(range(len(sides)), [side["name"] for side in sides])
    longest = max(run["64 tokens"] for side in sides for run in side["runs"])
    axes.set_xlim(0 if longest < _LONG else 0.1, longest * 1.25)
    axes.set_xscale("linear" if longest < _LONG else "log")
    axes.xaxis.set_major_formatter("{x:g}")
    gpu, model = result["machine"]["gpus"][0]["name"], result["model"]["name"]
    axes.set_xlabel(f"seconds from the start of the first process ({gpu}, {model})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(out, metadata={"Date": None})


def _generate(url: str, tokens: int, key: str = "") -> float:
    """Ask for tokens; returns the wall seconds."""
    body = {
        "prompt": PROMPT,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.post(f"{url}/completion", json=body, headers=headers, timeout=_START_SECONDS)
    answer.raise_for_status()
    return time.monotonic() - began


def _speed(client: Client) -> float:
    """Tokens per second by the server's own count, asked for as a Space does."""
    answer = client.completion(PROMPT, max_tokens=BENCH_TOKENS, ignore_eos=True, cache_prompt=False)
    return answer.tokens_per_second or 0.0


def _await_health(port: int, process: subprocess.Popen[str]) -> None:
    client, deadline = Client(port, None, timeout=5), time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with status {process.returncode}")
        if client.health(timeout=5) == _OK:
            return
        time.sleep(_POLL)
    raise SystemExit(f"llama-server was not ready within {_START_SECONDS:g} s")


@contextmanager
def _process(command: list[str], cache: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server with its own JIT cache; ended with SIGTERM on every exit."""
    environ = {**os.environ, "CUDA_CACHE_PATH": str(cache), **extra}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process
        except BaseException:
            errors.seek(0)
            sys.stderr.write(errors.read()[-2000:])
            raise
        finally:
            process.terminate()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()


def _line(process: subprocess.Popen[str], beginning: str) -> str:
    for line in process.stdout or ():
        if line.startswith(beginning):
            return line
    raise SystemExit(f"the loader printed no line that begins with {beginning!r}")


def _fresh(bench: Bench) -> Path:
    return Path(tempfile.mkdtemp(prefix="jit-", dir=bench.scratch))


def _machine() -> dict[str, Any]:
    """Say what was measured on, without the paths of that machine."""
    facts = host.detect(settings.load())
    return {
        "gpus": [asdict(gpu) | {"uuid": None} for gpu in facts.gpus],
        "driver": facts.driver,
        "cpus": facts.cpus,
        "memory": facts.memory,
        "glibc": facts.glibc,
        "libraries": {one.soname: one.version for one in facts.libraries},
    }


def _versions() -> dict[str, str]:
    nvcc = shutil.which("nvcc")
    told = (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        if nvcc
        else ""
    )
    release = re.search(r"V([0-9.]+)", told)
    return {"python": sys.version.split()[0], "nvcc": release[1] if release else "none"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--plot", type=Path, help="draw what --out has, and end")
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--llama-bench", type=Path, help="compare tokens per second with it")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="… on these models, too")
    parser.add_argument("--only-speed", action="store_true", help="no starts, tokens alone")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.out.read_text("utf-8")), options.plot)
        return
    with (
        tempfile.TemporaryDirectory(prefix="cold-start-") as scratch,
        ReleaseServer(options.release) as server,
    ):
        bench = Bench(
            options.release, options.model.resolve(), Path(scratch), f"{server.url}manifest.json"
        )
        result = facts(bench)
        if not options.only_speed:
            for sides in measure(bench, options.upstream, options.runs):
                result |= {"ratios": ratios(sides), "sides": [asdict(side) for side in sides]}
                write(options.out, result)  # a lease may end before the last round
            print(table(sides))
            print(json.dumps(result["ratios"], indent=2))
        result["tokens/s"] = []
        for model in (bench.model, *options.also) if options.llama_bench else ():
            result["tokens/s"].append(speeds(bench, options.llama_bench, model, options.runs))
            print(json.dumps(result["tokens/s"][-1]))
            write(options.out, result)


def facts(bench: Bench) -> dict[str, Any]:
    """Say what is measured, where and when."""
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "artifact": bench.fetch(bench.kept)["artifact"],
        "model": {"name": bench.model.name, "bytes": bench.model.stat().st_size},
    }


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, where a file is named."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
