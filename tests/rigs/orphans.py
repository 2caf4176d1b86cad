"""Kills processes that own a server, and looks for what they leave behind.

Each parent is a fork, as a ZeroGPU worker is, that starts ``rigs/impostor_server.py`` through the
loader's own ``Server``. Every second one is killed when its server answers, the others at any
moment before. Prints what was found as JSON; the exit status is 1 where anything was left.

    PYTHONPATH=.:spaces python tests/rigs/orphans.py 1000
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import impostor_archive
from process_table import command_lines

from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan

WITHIN = 5.0
"""Seconds after which what is left is an orphan."""
_EARLY = 0.4
"""Seconds: a kill before the server answers comes within these."""


def main() -> int:
    """Kill as many parents as the first argument says."""
    count = int(sys.argv[1])
    chance = random.Random(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        tempfile.tempdir = name
        runtime = impostor_archive.folder(Path(name) / "runtime").behave()
        lives = [
            _killed(runtime, None if number % 2 else chance.uniform(0, _EARLY))
            for number in range(count)
        ]
    orphans = sum(seconds >= WITHIN for seconds in lives)
    found = {
        "killed": count,
        "orphans": orphans,
        "longest_s": round(max(lives), 3),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(found))
    return 1 if orphans else 0


def _killed(runtime: Path, after: float | None) -> float:
    """Kill a parent after some seconds, or when its server answers; returns what outlived it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _own_a_server(runtime, writer)
    os.close(writer)
    if after is None:
        assert os.read(reader, 1) == b"!", "the server did not start"
    else:
        time.sleep(after)
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    os.waitpid(pid, 0)
    while _left_by(pid, runtime) and time.monotonic() < killed + WITHIN:
        time.sleep(0.002)
    lived = time.monotonic() - killed
    for orphan in _left_by(pid, runtime):
        os.kill(orphan, signal.SIGKILL)
    return lived


def _own_a_server(runtime: Path, writer: int) -> None:
    """Start it and stay; never returns into the parent's code."""
    try:
        Server(ServerPlan(runtime, Path("/m"), {"PATH": "/bin"})).start()
        os.write(writer, b"!")
        time.sleep(3600)
    finally:
        os._exit(1)


def _left_by(parent: int, runtime: Path) -> list[int]:
    """Processes that are still a launcher of this parent, or the server itself."""
    server = str(runtime / "llama-server")
    return [
        pid
        for pid, line in command_lines().items()
        if server in line or ("prctl" in line and line.split()[-1] == str(parent))
    ]


if __name__ == "__main__":
    sys.exit(main())
