"""Nothing is fetched twice, by this process or the next one, from this mirror or another."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest

from llama_loader.disk import STALE_SECONDS
from llama_loader.errors import IntegrityError, NetworkError
from llama_loader.fetch import Fetcher
from llama_loader.locations import Patience
from llama_loader.store import Store
from tests.rigs import archives, installer
from tests.rigs import fault_server as faults
from tests.rigs.archives import GOOD, Entry
from tests.rigs.downloads import ranges
from tests.rigs.fault_server import FaultServer
from tests.rigs.refusals import refused

CHUNK = 65_536
BIG = Entry("runtime/libggml-cuda.so", random.Random(5).randbytes(1_000_000))
PACKED, ARTIFACT = archives.release((*GOOD, BIG))
COUNT = len(ARTIFACT.chunks)
LAST = COUNT - 1
PATIENCE = Patience(connect=2, silence=2, window=1, deadline=60)


def install(root: Path, *urls: str) -> None:
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE)
    installed = Store(root).install(ARTIFACT, urls, fetcher)
    assert (installed.folder / "libggml-cuda.so").read_bytes() == BIG.data


def begin(server: FaultServer, root: Path, count: int = 4) -> str:
    """Have an installation given up with so many chunks kept; its URL is well afterwards."""
    url = server.put("/a", PACKED)
    server.fail("/a", *[faults.cut(count * CHUNK + 7)] * (PATIENCE.attempts + 1))
    with pytest.raises(NetworkError):
        install(root, url)
    server.requests.clear()
    return server.put("/a", PACKED)


def the_file(root: Path) -> Path:
    return root / "partial" / ARTIFACT.sha256


def kept(root: Path) -> bytes:
    return the_file(root).read_bytes() if the_file(root).exists() else b""


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
        while kept(root) != PACKED[: whole * CHUNK]:
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
    begin(server, tmp_path)
    assert kept(tmp_path) == PACKED[: 4 * CHUNK]
    assert (tmp_path / "partial").stat().st_mode & 0o777 == 0o700
    assert the_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert [place for place in (tmp_path / "staging").iterdir() if place.is_dir()] == []
    server.put("/b", PACKED)
    install(tmp_path, server.url + "/b")
    assert ranges(server, "/b") == [f"bytes={4 * CHUNK}-"]


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ("bit", f"bytes={CHUNK}-"),
        ("short", f"bytes={2 * CHUNK}-"),
        ("empty", None),
        ("noise", None),
        ("link", None),
        ("hard link", None),
        ("pipe", None),
        ("folder", None),
    ],
)
def test_only_what_is_right_is_gone_on_with(
    server: FaultServer, tmp_path: Path, how: str, asked: str | None
) -> None:
    """What stands in the file's place is never written through, and a folder never removed."""
    url, path, theirs = begin(server, tmp_path), the_file(tmp_path), tmp_path / "theirs"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[CHUNK + 5] ^= 1
    contents = {"bit": flipped, "short": whole[: 3 * CHUNK - 1], "empty": b"", "noise": bytes(9)}
    theirs.write_bytes(b"precious")
    path.unlink()
    if how in contents:
        path.write_bytes(contents[how])
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
        (path / "notes.txt").write_bytes(b"precious")
    else:
        path.symlink_to(theirs) if how == "link" else path.hardlink_to(theirs)
    install(tmp_path, url)
    assert ranges(server, "/a") == [asked]
    assert theirs.read_bytes() == b"precious"
    (left,) = [*(tmp_path / "partial").iterdir()] or [None]
    assert (left is not None) == (how == "folder")
    assert left is None or (left / "notes.txt").read_bytes() == b"precious"


def test_what_nobody_went_on_with_is_swept(server: FaultServer, tmp_path: Path) -> None:
    """Files and links that are named and old as a download's are; nothing else, no link's end."""
    folder, theirs = tmp_path / "partial", tmp_path / "theirs"
    url = begin(server, tmp_path)
    theirs.mkdir()
    (folder / ("2" * 64)).symlink_to(theirs)
    (folder / ("3" * 64)).mkdir()
    for name in ("0" * 64, "1" * 64, "thesis.odt", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "~"):
        (folder / name).write_bytes(b"x")
    now = time.time()
    for path in folder.iterdir():
        age = STALE_SECONDS * (0.99 if path.name[0] == "1" else 1.01)
        os.utime(path, (now, now - age), follow_symlinks=False)
    left = {path.name for path in folder.iterdir()} - {"0" * 64, "2" * 64, ARTIFACT.sha256}
    install(tmp_path, url)
    assert {path.name for path in folder.iterdir()} == left
    assert theirs.is_dir()
    assert ranges(server, "/a") == [None]


@pytest.mark.parametrize("here", [1, LAST, COUNT])
def test_only_what_is_not_here_is_asked_for(server: FaultServer, tmp_path: Path, here: int) -> None:
    url, file = begin(server, tmp_path, 1), the_file(tmp_path)
    file.write_bytes(PACKED[: here * CHUNK] + b"x" * (here == COUNT))
    install(tmp_path, url)
    assert ranges(server, "/a") == ([] if here == COUNT else [f"bytes={here * CHUNK}-"])
    assert server.sent("/a") == max(0, len(PACKED) - here * CHUNK)


def fetched(tmp_path: Path, *urls: str) -> bytes:
    """Fetch; return what was kept at the end."""
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE)
    (tmp_path / "partial").mkdir(exist_ok=True)
    with the_file(tmp_path).open("w+b") as file:
        assert b"".join(fetcher.chunks(ARTIFACT, urls, file)) == PACKED
    return kept(tmp_path)


def test_what_lies_on_this_machine_is_not_kept_once_more(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(PACKED)
    assert fetched(tmp_path, (tmp_path / "a").as_uri()) == b""


@pytest.mark.parametrize(
    ("fault", "code", "right"),
    [
        (faults.body(PACKED + b"x"), "FILE_TOO_LARGE", LAST),
        (faults.body(PACKED + b"x", chunked=True), "FILE_TOO_LARGE", LAST),
        (faults.flipped(5 * CHUNK), "CHUNK_MISMATCH", 5),
    ],
)
def test_of_what_is_wrong_only_right_chunks_are_kept(
    server: FaultServer, tmp_path: Path, fault: faults.Fault, code: str, right: int
) -> None:
    url = server.put("/a", PACKED)
    server.fail("/a", fault, always=True)
    with refused(code, IntegrityError):
        fetched(tmp_path, url)
    assert kept(tmp_path) == PACKED[: right * CHUNK]


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
    url = server.put("/a", PACKED)
    server.fail("/a", faults.shaped(50_000), always=True)
    program = f"""
import sys
sys.path[:0] = [{str(installer.SPACES)!r}, {str(installer.SPACES.parent)!r}]
from contextlib import closing
from pathlib import Path
from tests.loader import test_resume as here
from llama_loader.fetch import Fetcher
with Path({str(tmp_path / "kept")!r}).open("w+b") as kept:
    with closing(Fetcher().chunks(here.ARTIFACT, [{url!r}], kept)) as chunks:
        next(chunks), next(chunks)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
