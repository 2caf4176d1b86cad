"""Kill an installation with SIGKILL at every system call of every thread, one call at a time.

After each: the new runtime is whole or not there, what was there before is still whole, and the
next installation succeeds with no clean-up.

    PYTHONPATH=.:spaces python benchmarks/kill_everywhere.py [--step N]

Three beginnings: an empty store, a store with an older release, a store whose runtime is damaged
(the installation takes it out of use and fetches it again). ``--step`` kills at every Nth call
only. What Python imports is imported before: that reads, and changes nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llama_loader.errors import LoaderError
from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact
from llama_loader.store import Store
from tests.rigs import archives, tracer
from tests.rigs.fault_server import FaultServer

BEGINNINGS: Final = ("empty", "older release", "damaged")
_COUNTED: Final = ("killed", "absent", "whole", "as before", "partial", "lost", "not repaired")


@dataclass(frozen=True)
class Release:
    """A release on the server: what one installation needs to know."""

    url: str
    sha256: str
    artifact: Artifact

    def install(self, root: Path) -> None:
        """Fetch and install it: what the loader does before a server starts."""
        store, fetcher = Store(root), Fetcher()
        manifest = store.manifest(self.url, self.sha256, fetcher)
        urls = manifest.artifacts[0].resolved_urls(self.url)
        store.install(manifest.artifacts[0], urls, fetcher)

    def state(self, root: Path) -> str:
        """Say ``absent``, ``whole`` or ``partial``."""
        place = root / "runtimes" / self.artifact.sha256
        if not place.exists():
            return "absent"
        try:
            Store(root).verify(place)
        except LoaderError:
            return "partial"
        return "whole"


def main() -> int:
    """Print one JSON object; 1 where something was left that should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        releases = serve()
        found: dict[str, Any] = {
            beginning: run(beginning, releases, Path(folder), options.step)
            for beginning in BEGINNINGS
        }
    bad = sum(one[word] for one in found.values() for word in ("partial", "lost", "not repaired"))
    found["killed"] = sum(one["killed"] for one in found.values())
    found |= {"step": options.step, "bad": bad, "seconds": round(time.monotonic() - started)}
    print(json.dumps(found, indent=2))
    return int(bad > 0)


def serve() -> tuple[Release, Release]:
    """Serve an older and a newer release from a process of their own, for this one to fork freely.

    The process ends with this one: it waits for the end of a pipe.
    """
    read, write = os.pipe()
    alive, kept = os.pipe()

    def work() -> None:
        os.close(kept)
        with FaultServer() as server:
            told = []
            for name, packed, artifact in _packed():
                data = archives.manifest(artifact)
                server.put(f"/{name}/{artifact.urls[0]}", packed)
                url = server.put(f"/{name}/manifest.json", data)
                told.append([url, hashlib.sha256(data).hexdigest()])
            os.write(write, json.dumps(told).encode() + b"\n")
            os.read(alive, 1)

    tracer.fork(work)
    os.close(alive)
    with os.fdopen(read) as stream:
        told = json.loads(stream.readline())
    older, newer = (
        Release(url, sha256, artifact)
        for (url, sha256), (_, _, artifact) in zip(told, _packed(), strict=True)
    )
    return older, newer


def _packed() -> Iterator[tuple[str, bytes, Artifact]]:
    yield "older", *archives.release(archives.GOOD[:-1])
    yield "newer", *archives.release()


def run(
    beginning: str, releases: tuple[Release, Release], folder: Path, step: int
) -> dict[str, Any]:
    """Kill at every ``step``-th call from one beginning; return the counts."""
    older, newer = releases
    root, pristine = folder / "store", folder / f"pristine {beginning}"
    begin(beginning, older, newer, pristine)
    counts = dict.fromkeys(_COUNTED, 0)
    calls, threads, nth = Counter[str](), Counter[int](), 1
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root, symlinks=True)
        stop = tracer.kill_at(nth, lambda: newer.install(root))
        if stop is None:
            break
        counts["killed"] += 1
        calls[stop.call or "others"] += 1
        threads[stop.thread] += 1
        state = newer.state(root)
        untouched = _files(root / "runtimes") == _files(pristine / "runtimes")
        if beginning == "damaged" and state == "partial" and untouched:
            state = "as before"  # not this installation's doing, and the next one finds it
        counts[state] += 1
        counts["lost"] += beginning == "older release" and older.state(root) != "whole"
        counts["not repaired"] += not _is_repaired(newer, root)
        nth += step
    names = {str(thread): threads[thread] for thread in sorted(threads)}
    return {**counts, "by call": dict(calls.most_common()), "by thread": names}


def begin(beginning: str, older: Release, newer: Release, root: Path) -> None:
    """Make the store that an installation begins with."""
    root.mkdir()
    if beginning == "older release":
        older.install(root)
    if beginning == "damaged":
        newer.install(root)
        place = root / "runtimes" / newer.artifact.sha256 / "files" / "runtime" / "llama-server"
        place.write_bytes(b"x" * place.stat().st_size)
    newer_too = root.with_name(f"{root.name} warm")
    newer.install(newer_too)  # imports what an installation imports
    shutil.rmtree(newer_too)


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _is_repaired(newer: Release, root: Path) -> bool:
    """Install again, in another process; whether all is as if nothing had happened."""
    _, status = os.waitpid(tracer.fork(lambda: newer.install(root)), 0)
    left = [path for path in (root / "staging").iterdir() if path.is_dir()]
    return status == 0 and not left and newer.state(root) == "whole"


if __name__ == "__main__":
    sys.exit(main())
