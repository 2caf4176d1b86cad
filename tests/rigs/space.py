"""The Space as the Hub runs it: ``python app.py`` in its own folder, with variables set."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_loader.server import free_port

PROJECT = Path(__file__).resolve().parents[2]
READY = "Running on local URL"
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Space:
    """A page that is served. ``log`` is a file with both of its streams."""

    url: str
    pid: int
    log: Path

    def said(self) -> str:
        """Everything that it has printed so far."""
        return self.log.read_text("utf-8", "replace")


def pinned(manifest: str) -> dict[str, str]:
    """Variables that pin a manifest (a ``file://`` URL) and allow the CPU."""
    content = Path(manifest.removeprefix("file://")).read_bytes()
    return {
        "llama_cpp_manifest_url": manifest,
        "llama_cpp_manifest_sha256": hashlib.sha256(content).hexdigest(),
        "allow_cpu": "1",
    }


@contextmanager
def serving(
    home: Path, *, python: str = sys.executable, root: Path = PROJECT / "spaces", **variables: str
) -> Iterator[Space]:
    """Run it until the block ends, then interrupt it; a ``home`` kept between two runs is warm."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = home / "app.log"
    log.write_text("")
    process = subprocess.Popen(
        [python, "app.py"],
        cwd=root,
        env=_environment(home, port, variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    up = threading.Event()
    reader = threading.Thread(target=_keep, args=(process, log, up))
    reader.start()
    try:
        assert up.wait(240), log.read_text()
        assert process.poll() is None, log.read_text()
        yield Space(f"http://127.0.0.1:{port}", process.pid, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            reader.join()


def _keep(process: subprocess.Popen[bytes], log: Path, up: threading.Event) -> None:
    assert process.stdout is not None
    with process.stdout as stream, log.open("ab", buffering=0) as kept:
        for line in stream:
            kept.write(line)
            if READY.encode() in line:
                up.set()
    up.set()  # it has ended: nobody need wait


def _environment(home: Path, port: int, variables: dict[str, str]) -> dict[str, str]:
    named = {
        name if name.isupper() else f"YAKULINGO_SPACES_{name.upper()}": value
        for name, value in variables.items()
    }
    return {
        **{name: os.environ[name] for name in _KEPT if name in os.environ},
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "GRADIO_SERVER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        **named,
    }
