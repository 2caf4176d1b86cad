"""Nothing is fetched twice, by this process or the next one, from this mirror or another."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from threading import Barrier, Thread
from typing import TYPE_CHECKING

import pytest

from llama_loader.disk import STALE_SECONDS, Folder
from llama_loader.errors import IntegrityError, NetworkError
from llama_loader.events import Event, Note
from llama_loader.fetch import Fetcher
from llama_loader.partial import Partial
from llama_loader.store import Store
from llama_loader.transport import Patience
from tests.rigs import archives, installer
from tests.rigs import fault_server as faults
from tests.rigs.archives import GOOD, Entry, compress, tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.rigs.fault_server import FaultServer

CHUNK = 65_536
BIG = Entry("runtime/libggml-cuda.so", random.Random(5).randbytes(1_000_000))
PACKED, ARTIFACT = archives.release((*GOOD, BIG))
COUNT = len(ARTIFACT.chunks)
LAST = COUNT - 1
PATIENCE = Patience(connect=2, silence=2, window=1, deadline=60)


def install(root: Path, *urls: str, events: list[Event] | None = None) -> None:
    told = [] if events is None else events
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE, sink=told.append)
    installed = Store(root, sink=told.append).install(ARTIFACT, urls, fetcher, release="b1")
    assert (installed.folder / "libggml-cuda.so").read_bytes() == BIG.data


@contextmanager
def partial_of(root: Path) -> Iterator[Partial]:
    with Folder.open(root / "partial") as folder, closing(Partial(folder, ARTIFACT)) as found:
        yield found


def kept(root: Path) -> list[int]:
    if not (root / "partial").exists():
        return []
    with partial_of(root) as found:
        return [at for at in range(COUNT) if found.get(at) is not None]


def ranges(server: FaultServer, path: str) -> list[str | None]:
    return [request.headers.get("range") for request in server.asked(path)]


@pytest.mark.parametrize("share", [10, 50, 90])
def test_killed_and_gone_on_with_from_another_mirror(
    server: FaultServer, tmp_path: Path, share: int
) -> None:
    """SIGKILL in the middle; the next process asks the other mirror for the rest alone."""
    after = len(PACKED) * share // 100
    whole, root = after // CHUNK, tmp_path / "store"
    first = server.put(f"/{ARTIFACT.urls[0]}", PACKED)
    server.fail(f"/{ARTIFACT.urls[0]}", faults.stalls(after), always=True)
    manifest = archives.manifest(ARTIFACT)
    url = server.put("/manifest.json", manifest)
    process = subprocess.Popen(
        installer.command(root, url, hashlib.sha256(manifest).hexdigest()),
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while kept(root) != list(range(whole)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list((root / "runtimes").iterdir()) == []
    second = server.put("/mirror", PACKED, etag='"other"')
    install(root, second, first)
    assert ranges(server, "/mirror") == [f"bytes={whole * CHUNK}-"]
    again = server.sent("/mirror") - (len(PACKED) - after)
    assert again == after % CHUNK
    assert list((root / "partial").iterdir()) == []


def test_a_network_error_leaves_what_was_verified(server: FaultServer, tmp_path: Path) -> None:
    url = server.put("/a", PACKED)
    server.fail("/a", faults.cut(4 * CHUNK + 7), always=True)
    with pytest.raises(NetworkError):
        install(tmp_path, url)
    assert kept(tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "partial").stat().st_mode & 0o777 == 0o700
    (left,) = (tmp_path / "partial").iterdir()
    assert (left.name, left.stat().st_mode & 0o777) == (ARTIFACT.sha256, 0o600)
    assert [place for place in (tmp_path / "staging").iterdir() if place.is_dir()] == []
    server.put("/b", PACKED)
    install(tmp_path, server.url + "/b")
    assert ranges(server, "/b") == [f"bytes={4 * CHUNK}-"]


def test_a_server_that_ignores_the_range_is_read_over(server: FaultServer, tmp_path: Path) -> None:
    url = server.put("/a", PACKED)
    server.fail("/a", *[faults.cut(4 * CHUNK)] * 4)
    with pytest.raises(NetworkError):
        install(tmp_path, url)
    server.fail("/a", faults.ignores_range, always=True)
    install(tmp_path, url)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[CHUNK + 5] ^= 1
        path.write_bytes(data)
    elif how == "short":
        path.write_bytes(data[: 3 * CHUNK - 1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(bytes(len(data) + 1))
    else:
        path.unlink()
        if how == "link":
            path.symlink_to("/etc/passwd")
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ("bit", [f"bytes={CHUNK}-"]),
        ("short", [f"bytes={2 * CHUNK}-"]),
        ("empty", [None]),
        ("noise", [None]),
        ("link", [None]),
        ("pipe", [None]),
        ("folder", [None]),
    ],
)
def test_only_what_is_right_is_gone_on_with(
    server: FaultServer, tmp_path: Path, how: str, asked: list[str | None]
) -> None:
    url = server.put("/a", PACKED)
    server.fail("/a", *[faults.cut(4 * CHUNK)] * 5)
    with pytest.raises(NetworkError):
        install(tmp_path, url)
    server.requests.clear()
    damage(tmp_path / "partial" / ARTIFACT.sha256, how)
    server.put("/a", PACKED)
    events: list[Event] = []
    install(tmp_path, url, events=events)
    assert ranges(server, "/a") == asked
    notes = [event.code for event in events if isinstance(event, Note)]
    assert notes == (["PARTIAL_NOT_KEPT"] if how == "folder" else [])


def test_an_archive_that_lies_is_not_kept(server: FaultServer, tmp_path: Path) -> None:
    packed = compress(tar((*GOOD, BIG, Entry("runtime/extra", b"x"))))
    lying = archives.describe(packed, (*GOOD, BIG))
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE)
    with pytest.raises(IntegrityError):
        Store(tmp_path).install(lying, [server.put("/a", packed)], fetcher, release="b1")
    assert list((tmp_path / "partial").iterdir()) == []


def test_what_nobody_went_on_with_is_swept(server: FaultServer, tmp_path: Path) -> None:
    url = server.put("/a", PACKED)
    install(tmp_path, url)
    folder = tmp_path / "partial"
    folder.mkdir(exist_ok=True)
    old, new = folder / ("0" * 64), folder / ("1" * 64)
    for path in (old, new):
        path.write_bytes(b"x")
    then = time.time() - STALE_SECONDS - 60
    os.utime(old, (then, then))
    shutil.rmtree(tmp_path / "runtimes" / ARTIFACT.sha256)
    install(tmp_path, url)
    assert list(folder.iterdir()) == [new]


def fetched(tmp_path: Path, *urls: str, here: int = 0) -> list[int]:
    """Fetch behind the first ``here`` chunks; return the chunks that were kept at the end."""
    (tmp_path / "partial").mkdir(exist_ok=True)
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE)
    with partial_of(tmp_path) as found:
        for at in range(here):
            found.keep(at, PACKED[at * CHUNK : (at + 1) * CHUNK])
        with closing(fetcher.chunks(ARTIFACT, urls, found)) as chunks:
            assert b"".join(chunks) == PACKED
    return kept(tmp_path)


@pytest.mark.parametrize(
    ("here", "asked"),
    [
        (0, [None]),
        (1, [f"bytes={CHUNK}-"]),
        (LAST, [f"bytes={LAST * CHUNK}-"]),
        (COUNT, []),
    ],
)
def test_only_what_is_not_here_is_asked_for(
    server: FaultServer, tmp_path: Path, here: int, asked: list[str | None]
) -> None:
    url = server.put("/a", PACKED)
    assert fetched(tmp_path, url, here=here) == list(range(COUNT))
    assert ranges(server, "/a") == asked
    assert server.sent("/a") == max(0, len(PACKED) - here * CHUNK)


def test_what_lies_on_this_machine_is_not_kept_once_more(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(PACKED)
    assert fetched(tmp_path, (tmp_path / "a").as_uri()) == []


@pytest.mark.parametrize("says", [True, False])
def test_of_a_file_that_is_longer_only_right_chunks_are_kept(
    server: FaultServer, tmp_path: Path, says: bool
) -> None:
    url = server.put("/a", PACKED)
    server.fail("/a", faults.body(PACKED + b"x", chunked=not says), always=True)
    with pytest.raises(IntegrityError) as caught:
        fetched(tmp_path, url)
    assert caught.value.code == "FILE_TOO_LARGE"
    assert kept(tmp_path) == list(range(LAST))


def test_wrong_bytes_in_the_middle_cost_one_chunk(server: FaultServer, tmp_path: Path) -> None:
    bad, good = server.put("/bad", PACKED), server.put("/good", PACKED)
    server.fail("/bad", faults.flipped(5 * CHUNK), always=True)
    assert fetched(tmp_path, bad, good) == list(range(COUNT))
    assert ranges(server, "/bad") == [None]
    assert ranges(server, "/good") == [f"bytes={5 * CHUNK}-"]
    with partial_of(tmp_path) as found:
        found.discard()
    with pytest.raises(IntegrityError) as caught:
        fetched(tmp_path, bad)
    assert caught.value.code == "CHUNK_MISMATCH"
    assert kept(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sha256", [None, hashlib.sha256(PACKED).hexdigest()])
def test_two_who_fetch_one_archive_do_not_meet(
    server: FaultServer, tmp_path: Path, sha256: str | None
) -> None:
    """Each starts its own file over after its own cut, and no file has a name meanwhile."""
    url = server.put("/a", PACKED, etag='"one"')
    cuts = [faults.cut(5 * CHUNK), faults.cut(7 * CHUNK)]
    server.fail("/a", *cuts)
    both, found = Barrier(2), []

    def one() -> None:
        fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE)
        both.wait()
        found.append(Store(tmp_path).install_archive(url, sha256, fetcher).sha256)

    threads = [Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(PACKED).hexdigest()] * 2
    assert ranges(server, "/a") == [None] * 4
    assert not any((tmp_path / "partial").glob("*"))


def test_a_reader_who_leaves_leaves_no_worker_behind(server: FaultServer, tmp_path: Path) -> None:
    """The interpreter ends at once, although another thread fetches from a slow server."""
    (tmp_path / "partial").mkdir()
    url = server.put("/a", PACKED)
    server.fail("/a", faults.shaped(50_000), always=True)
    program = f"""
import sys
sys.path[:0] = [{str(installer.SPACES)!r}, {str(installer.SPACES.parent)!r}]
from contextlib import closing
from pathlib import Path
from tests.loader import test_resume as here
from llama_loader.fetch import Fetcher
with here.partial_of(Path({str(tmp_path)!r})) as kept:
    with closing(Fetcher().chunks(here.ARTIFACT, [{url!r}], kept)) as chunks:
        next(chunks), next(chunks)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
