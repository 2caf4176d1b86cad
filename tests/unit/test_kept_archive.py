"""Archives by URL outlive the process that fetched them (docs/store.md)."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from email.utils import formatdate
from pathlib import Path
from threading import Barrier, Thread
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import disk, kept_archive, partial
from llama_loader.errors import IntegrityError, NetworkError, StoreError
from llama_loader.events import Event, Note
from llama_loader.fetch import Fetcher
from llama_loader.patience import Patience
from llama_loader.store import Store
from tests.rigs import fault_server as faults
from tests.rigs import installer
from tests.rigs.archives import SCRIPT, Entry, compress, tar
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.store import Installed

CHUNK = 65_536
SERVER = Entry("llama/llama-server", SCRIPT, 0o755)
PATIENCE = Patience(connect=2, silence=2, window=1, deadline=60, attempts=2)
LONG_AGO = formatdate(1_700_000_000, usegmt=True)
NAMED: dict[str, dict[str, str]] = {"etag": {"etag": '"one"'}, "date": {"modified": LONG_AGO}}


def archive(seed: int, size: int = 1_000_000) -> bytes:
    noise = Entry("llama/libggml.so", random.Random(seed).randbytes(size))
    return compress(tar((SERVER, noise)))


PACKED = archive(1)
OTHER = archive(2)
DIGEST = hashlib.sha256(PACKED).hexdigest()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_archive, "CHUNK", CHUNK)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def install(
    root: Path, url: str, sha256: str | None = None, events: list[Event] | None = None
) -> Installed:
    told = [] if events is None else events
    fetcher = Fetcher(sleep=lambda _: None, patience=PATIENCE, sink=told.append)
    return Store(root, sink=told.append).install_archive(url, sha256, fetcher)


def ranges(server: FaultServer, path: str = "/a") -> list[str | None]:
    return [request.headers.get("range") for request in server.asked(path)]


def cut_off(server: FaultServer, root: Path, after: int, **named: str) -> Path:
    """Have a download end after so many bytes; returns the folder that was left."""
    url = server.put("/a", PACKED, **named)
    server.fail("/a", *[faults.cut(after)] * PATIENCE.attempts)
    with pytest.raises(NetworkError):
        install(root, url)
    server.requests.clear()
    return root / "partial" / hashlib.sha256(url.encode()).hexdigest()


def chunks_in(root: Path) -> int:
    """How many chunks the journals below ``partial`` name."""
    journals = list((root / "partial").glob(f"*/{kept_archive.JOURNAL}"))
    return sum(max(len(place.read_text().splitlines()) - 1, 0) for place in journals)


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("share", [10, 50, 90])
def test_an_archive_by_url_is_gone_on_with_after_a_kill(
    server: FaultServer, tmp_path: Path, share: int, named: str
) -> None:
    """SIGKILL in the middle; the next process asks for the rest alone."""
    after = len(PACKED) * share // 100
    whole, root = after // CHUNK, tmp_path / "store"
    url = server.put("/a", PACKED, **NAMED[named])
    server.fail("/a", faults.stalls(after))
    with subprocess.Popen(installer.archive_command(root, url, CHUNK)) as process:
        deadline = time.monotonic() + 30
        while chunks_in(root) != whole:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert list((root / "runtimes").iterdir()) == []
    events: list[Event] = []
    installed = install(root, url, events=events)
    assert installed.sha256 == DIGEST
    assert not installed.verified
    assert [event.code for event in events if isinstance(event, Note)] == ["UNVERIFIED"]
    second = server.asked("/a")[1]
    assert second.headers["range"] == f"bytes={whole * CHUNK}-"
    assert second.headers["if-range"] == next(iter(NAMED[named].values()))
    assert second.sent == len(PACKED) - whole * CHUNK
    assert list((root / "partial").iterdir()) == []
    assert disk.read_if_there(installed.folder / "libggml.so") is not None


def test_an_archive_with_a_pin_is_gone_on_with_and_checked_whole(
    server: FaultServer, tmp_path: Path
) -> None:
    cut_off(server, tmp_path, 5 * CHUNK + 9, etag='"one"')
    url = f"{server.url}/a"
    with pytest.raises(IntegrityError) as caught:
        install(tmp_path, url, "0" * 64)
    assert caught.value.code == "SHA256_MISMATCH"
    assert list((tmp_path / "partial").iterdir()) == []  # the next one begins anew
    cut_off(server, tmp_path, 5 * CHUNK + 9, etag='"one"')
    assert install(tmp_path, url, DIGEST).verified
    assert ranges(server) == [f"bytes={5 * CHUNK}-"]


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"etag": 'W/"weak"'},
        {"modified": "yesterday"},
        {"modified": formatdate(time.time() + 3600, usegmt=True)},
    ],
    ids=["nothing", "weak", "no date", "changing"],
)
def test_an_archive_that_its_server_does_not_name_begins_anew(
    server: FaultServer, tmp_path: Path, named: dict[str, str]
) -> None:
    cut_off(server, tmp_path, 5 * CHUNK, **named)
    assert list((tmp_path / "partial").iterdir()) == []
    assert install(tmp_path, f"{server.url}/a").sha256 == DIGEST
    assert ranges(server) == [None]


@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("named", NAMED)
def test_an_archive_that_changed_meanwhile_begins_anew(
    server: FaultServer, tmp_path: Path, named: str, careless: bool
) -> None:
    """Also where a server sends a part of the new one, whatever If-Range says."""
    cut_off(server, tmp_path, 5 * CHUNK, **NAMED[named])
    later = (
        {"etag": '"two"'} if named == "etag" else {"modified": formatdate(1.7e9 + 1, usegmt=True)}
    )
    url = server.put("/a", OTHER, **later)

    def ignores_the_condition(answer: faults.Answer) -> None:
        answer.request.headers.pop("if-range", None)
        faults.healthy(answer)

    if careless:
        server.fail("/a", ignores_the_condition, always=True)
    assert install(tmp_path, url).sha256 == hashlib.sha256(OTHER).hexdigest()


def test_a_part_of_a_file_of_another_size_is_not_taken(server: FaultServer, tmp_path: Path) -> None:
    cut_off(server, tmp_path, 5 * CHUNK, etag='"one"')
    url = server.put("/a", archive(3, 1_100_000), etag='"one"')  # a name that lies
    assert install(tmp_path, url).sha256 == hashlib.sha256(archive(3, 1_100_000)).hexdigest()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def first_line(path: Path, text: bytes) -> None:
    path.write_bytes(b"\n".join([text, *path.read_bytes().splitlines()[1:]]) + b"\n")


DAMAGES: dict[str, tuple[Any, str | None]] = {
    "bit": (lambda left: flip(left / "bytes", 2 * CHUNK + 5), f"bytes={2 * CHUNK}-"),
    "digest": (lambda left: flip(left / "journal", -3), f"bytes={4 * CHUNK}-"),
    "short": (lambda left: os.truncate(left / "bytes", 3 * CHUNK - 1), f"bytes={2 * CHUNK}-"),
    "long": (lambda left: os.truncate(left / "bytes", 9 * CHUNK), f"bytes={5 * CHUNK}-"),
    "no bytes": (lambda left: (left / "bytes").unlink(), None),
    "no journal": (lambda left: (left / "journal").unlink(), None),
    "journal cut": (lambda left: os.truncate(left / "journal", 20), None),
    "noise": (lambda left: (left / "journal").write_bytes(bytes(range(256))), None),
    "deep": (lambda left: first_line(left / "journal", b"[" * 100_000), None),
    "other format": (
        lambda left: first_line(
            left / "journal", b'{"validator":"\\"one\\"","total":null,"format":2}'
        ),
        None,
    ),
    "a header": (
        lambda left: first_line(left / "journal", b'{"validator":"x\\r\\nCookie: y","total":1}'),
        None,
    ),
    "a pipe": (lambda left: (left / "bytes").unlink() or os.mkfifo(left / "bytes"), None),
    "a link": (
        lambda left: (left / "bytes").unlink() or (left / "bytes").symlink_to("/etc/passwd"),
        None,
    ),
    "a file": (lambda left: shutil.rmtree(left) or left.write_text("x"), None),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_of_an_archive_only_what_is_right_is_gone_on_with(
    server: FaultServer, tmp_path: Path, how: str
) -> None:
    left = cut_off(server, tmp_path, 5 * CHUNK + 9, etag='"one"')
    damage, asked = DAMAGES[how]
    damage(left)
    passwords = Path("/etc/passwd").read_bytes()
    assert install(tmp_path, f"{server.url}/a").sha256 == DIGEST
    assert ranges(server) == [asked]
    assert Path("/etc/passwd").read_bytes() == passwords


def test_what_is_here_whole_is_not_fetched_again(server: FaultServer, tmp_path: Path) -> None:
    """Killed while it was unpacked: the last chunk comes again, to learn that it is still so."""
    size = 7 * CHUNK
    whole = PACKED[:size]
    left = cut_off(server, tmp_path, 5 * CHUNK, etag='"one"')
    url = server.put("/a", whole, etag='"one"')
    with kept_archive.kept(
        tmp_path / "partial", url, staging=tmp_path / "staging", sink=lambda _: None
    ) as copy:
        copy.begin('"one"', size)
        copy.append(whole)
        copy.target.flush()
        (mine,) = (place for place in left.parent.iterdir() if place.name.startswith(left.name))
        shutil.copytree(mine, tmp_path / "copy")
    shutil.move(tmp_path / "copy", left)
    with pytest.raises(IntegrityError):  # cut in the middle, it is no archive
        install(tmp_path, url)
    assert ranges(server) == [f"bytes={6 * CHUNK}-"]


def test_two_who_fetch_one_archive_do_not_meet(server: FaultServer, tmp_path: Path) -> None:
    """One goes on with what is here, the other begins anew; neither unpacks the other's bytes."""
    cut_off(server, tmp_path, 5 * CHUNK, etag='"one"')
    server.fail("/a", faults.drip(30_000, every=0.01), always=True)
    found: list[str] = []
    both = Barrier(2)

    def one() -> None:
        both.wait()
        found.append(install(tmp_path, f"{server.url}/a").sha256)

    threads = [Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DIGEST, DIGEST]
    assert sorted(map(str, ranges(server))) == ["None", f"bytes={5 * CHUNK}-"]
    assert list((tmp_path / "partial").iterdir()) == []


def test_what_a_living_process_works_on_is_left_to_it(server: FaultServer, tmp_path: Path) -> None:
    left = cut_off(server, tmp_path, 5 * CHUNK, etag='"one"')
    theirs = disk.new_folder(left.parent, left.name)  # of this process, which lives
    left.rename(theirs)
    install(tmp_path, f"{server.url}/a")
    assert ranges(server) == [None]
    assert list(left.parent.iterdir()) == [theirs]


def test_an_archive_is_not_kept_where_others_may_write(server: FaultServer, tmp_path: Path) -> None:
    """Its bytes are hashed as they come and unpacked afterwards: nobody may change them between."""
    (tmp_path / "partial").mkdir(mode=0o700)
    (tmp_path / "partial").chmod(0o777)
    url = server.put("/a", PACKED, etag='"one"')
    events: list[Event] = []
    assert install(tmp_path, url, DIGEST, events).verified
    assert [event.code for event in events if isinstance(event, Note)] == ["PARTIAL_NOT_KEPT"]
    assert list((tmp_path / "partial").iterdir()) == []


def test_an_archive_that_is_refused_is_not_kept(server: FaultServer, tmp_path: Path) -> None:
    url = server.put(
        "/a", compress(tar([Entry("../x", b"x" * CHUNK)])) + bytes(4 << 20), etag='"x"'
    )
    with pytest.raises(IntegrityError):
        install(tmp_path, url)
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_disk_that_is_full_keeps_nothing_of_an_archive(
    server: FaultServer, tmp_path: Path
) -> None:
    import resource

    url = server.put("/a", PACKED, etag='"one"')
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * CHUNK, old[1]))
    try:
        with pytest.raises(StoreError) as caught:
            install(tmp_path, url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.code == "DISK_FULL"
    assert list((tmp_path / "partial").iterdir()) == []
    assert install(tmp_path, url).sha256 == DIGEST


def test_archives_that_nobody_went_on_with_are_swept(server: FaultServer, tmp_path: Path) -> None:
    left = cut_off(server, tmp_path, 5 * CHUNK, etag='"one"')
    (left.parent / "link").symlink_to(tmp_path)
    then = time.time() - partial.STALE_SECONDS - 60
    for place in (*left.iterdir(), left, left.parent / "link"):
        os.utime(place, (then, then), follow_symlinks=False)
    install(tmp_path, server.put("/b", PACKED))
    assert list(left.parent.iterdir()) == []
    assert (tmp_path / "runtimes").is_dir()
