"""Faults 36 to 41: disks, other processes, and what was installed before (docs/faults.md)."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from needs import must_or_skip

from llama_loader import disk, errors
from llama_loader import store as store_module
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError, StoreError
from llama_loader.events import Event, Note, Stage
from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact
from llama_loader.store import Installed, Store
from tests.loader.test_disk import KINDS, left_behind, not_small
from tests.rigs import archives, installer, small_disk
from tests.rigs import fault_server as faults
from tests.rigs.archives import GOOD, SCRIPT, SERVER, Entry, compress, contents, link, names, tar
from tests.rigs.fault_server import FaultServer
from tests.rigs.refusals import refused
from tests.rigs.releases import prepared

BIG = Entry("runtime/libggml-cuda.so", random.Random(3).randbytes(600_000))
ENTRIES = (*GOOD, BIG)


class Release:
    """A release behind a server, and a store for it.

    Attributes:
        events: what store and fetcher told.
    """

    def __init__(self, server: FaultServer, root: Path) -> None:
        self.server = server
        self.root = root
        self.packed, self.artifact = archives.release(ENTRIES)
        self.path = f"/{self.artifact.urls[0]}"
        self.url = server.put(self.path, self.packed)
        self.manifest = archives.manifest(self.artifact)
        self.manifest_url = server.put("/manifest.json", self.manifest)
        self.manifest_sha256 = hashlib.sha256(self.manifest).hexdigest()
        self.events: list[Event] = []

    @property
    def place(self) -> Path:
        return self.root / "runtimes" / self.artifact.sha256

    def store(self) -> Store:
        return Store(self.root, sink=self.events.append)

    def fetcher(self, **options: Any) -> Fetcher:
        return Fetcher(sink=self.events.append, sleep=lambda _: None, **options)

    def install(
        self, artifact: Artifact | None = None, note: Note | None = None, **options: Any
    ) -> Installed:
        return self.store().install(
            artifact or self.artifact,
            [self.url],
            self.fetcher(**options),
            note=note,
        )

    def put_other(self, name: str) -> tuple[str, Artifact]:
        """Serve another release; return its URL and artifact."""
        packed, artifact = archives.release((*GOOD, Entry("runtime/version", name.encode())))
        return self.server.put(f"/{name}", packed), artifact

    def install_other(self, name: str, seconds: float = 0.0) -> Path:
        """Install another release, unused for so long; return its place."""
        url, artifact = self.put_other(name)
        place = self.store().install(artifact, [url], Fetcher()).root
        return age(place, seconds)

    def stages(self) -> list[str]:
        return [event.name for event in self.events if isinstance(event, Stage)]

    def notes(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Note)]

    def left(self) -> list[str]:
        """What lies in the staging folder."""
        return [path.name for path in (self.root / "staging").iterdir()]


@pytest.fixture
def release(server: FaultServer, tmp_path: Path) -> Release:
    return Release(server, tmp_path / "保管\u3000場所 ä\u00a0ö it's")  # a path in any language


# the plain way


def test_a_runtime_is_installed_once(release: Release) -> None:
    assert release.store().find(release.artifact.sha256) is None
    assert not release.root.exists()
    note = Note("FETCHING", "much")
    installed = release.install(note=note)
    assert installed.folder == release.place / "files" / "runtime"
    assert installed.folder.is_absolute()
    assert (installed.root, installed.sha256) == (release.place, release.artifact.sha256)
    assert installed.artifact == release.artifact
    assert contents(release.place / "files") == {entry.path: entry.data for entry in ENTRIES}
    assert subprocess.run([installed.folder / "llama-server"], check=True).returncode == 0
    assert release.stages() == ["fetch", "unpack"]
    installed.verify()  # every byte was verified on its way; now where it lies
    assert release.stages() == ["fetch", "unpack", "verify"]
    assert release.left() == []
    assert release.install(note=note) == installed
    assert release.notes() == ["FETCHING"]  # once: there was no second download
    assert release.store().find(release.artifact.sha256) == installed
    assert release.store().verify(installed.folder) == installed
    assert release.store().verify(installed.root) == installed
    assert len(release.server.requests) == 1


def test_a_pinned_manifest_is_kept(release: Release) -> None:
    pin = (release.manifest_url, release.manifest_sha256)
    first = release.store().manifest(*pin, release.fetcher())
    assert first.artifacts == (release.artifact,)
    assert release.store().manifest(*pin, release.fetcher(offline=True)) == first
    assert len(release.server.requests) == 1
    kept = release.root / "manifests" / f"{release.manifest_sha256}.json"
    kept.write_bytes(b"{}")
    assert release.store().manifest(*pin, release.fetcher()) == first
    assert kept.read_bytes() == release.manifest
    assert release.left() == []


def test_a_manifest_without_a_pin_is_fetched_every_time_and_said(release: Release) -> None:
    for _ in range(2):
        release.store().manifest(release.manifest_url, None, release.fetcher())
    assert release.notes() == ["MANIFEST_NOT_PINNED"] * 2
    note = release.events[-1]
    assert isinstance(note, Note)
    assert release.manifest_sha256 in note.hint
    assert len(release.server.requests) == 2
    expiring = {**json.loads(release.manifest), "expires": "2999-01-01T00:00:00Z"}
    channel = release.server.put("/channel", json.dumps(expiring).encode())
    release.store().manifest(channel, None, release.fetcher())
    note = release.events[-1]
    assert isinstance(note, Note)
    assert "pin-space --channel" in note.hint
    offline = release.fetcher(offline=True)
    with refused("OFFLINE", NetworkError, hint=f"_SHA256={release.manifest_sha256} (--manifest"):
        release.store().manifest(release.manifest_url, None, offline)
    with refused("OFFLINE", NetworkError, hint="unset"):
        release.store().manifest(f"{release.manifest_url}?", None, offline)
    pinned = release.store().manifest(release.manifest_url, release.manifest_sha256, offline)
    assert pinned.artifacts == (release.artifact,)


def test_a_manifest_that_is_not_the_pinned_one_or_none_is_not_kept(release: Release) -> None:
    bad, digest = release.server.put("/bad", b"[]"), hashlib.sha256(b"[]").hexdigest()
    for url, pin, code in (
        (release.manifest_url, "0" * 64, "MANIFEST_PIN_MISMATCH"),
        (bad, digest, "MANIFEST_INVALID"),
    ):
        with refused(code, IntegrityError):
            release.store().manifest(url, pin, release.fetcher())
    assert not release.root.exists()


# whatever goes wrong, the old state or the new one


OTHER, _ = archives.release((*ENTRIES, Entry("runtime/x")))


def lying(entries: tuple[Entry, ...], listed: tuple[Entry, ...]) -> tuple[Any, Artifact]:
    """Another archive, and a manifest's entry that is right in all but its files."""
    packed = compress(tar(entries))
    return faults.body(packed), archives.describe(packed, listed)


@pytest.mark.parametrize(
    ("fault", "artifact", "kind"),
    [
        (faults.cut(300_000), None, NetworkError),
        (faults.flipped(300_000), None, IntegrityError),
        (faults.body(OTHER), None, IntegrityError),  # one artifact under the address of another
        (*lying((*ENTRIES, Entry("runtime/extra", b"x")), ENTRIES), IntegrityError),
        (*lying(ENTRIES[1:], ENTRIES[1:]), IntegrityError),  # no server
    ],
    ids=["cut", "flipped", "another's", "a file more", "no server"],
)
def test_a_download_that_fails_leaves_nothing(
    release: Release, fault: Any, artifact: Artifact | None, kind: type[LoaderError]
) -> None:
    release.server.fail(release.path, fault, always=True)
    with pytest.raises(kind):
        release.install(artifact)
    assert names(release.root / "runtimes") == []
    assert release.left() == []
    release.server.put(release.path, release.packed)
    assert release.install().folder.is_dir()


def test_nothing_is_visible_before_it_is_verified_and_synced(release: Release) -> None:
    """Ctrl-C once the last byte was written: nothing is there, and nothing is left."""

    def interrupt(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "unpack":
            raise KeyboardInterrupt

    store = Store(release.root, sink=interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.install(release.artifact, [release.url], release.fetcher())
    assert names(release.root / "runtimes") == []
    assert release.left() == []


# 36: a full disk


@pytest.mark.parametrize("by_url", [False, True])
@pytest.mark.parametrize("size", ["12k", "64k", "300k", "450k", "800k"])
def test_a_full_disk_is_one_clear_line(
    release: Release, tmp_path: Path, size: str, *, by_url: bool
) -> None:
    def install() -> Installed:
        if by_url:
            return release.store().install_archive(release.url, None, release.fetcher())
        return release.install()

    with small_disk.mounted(tmp_path / "disk", size) as resize:
        release.root = tmp_path / "disk" / "store"
        with refused("DISK_FULL", StoreError):
            install()
        assert not release.place.exists()
        assert not (release.root / "staging").exists() or release.left() == []
        resize("20m")
        assert install().root == release.place


def test_a_limit_on_the_size_of_files(release: Release) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
    try:
        with pytest.raises(StoreError) as caught:
            release.install()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.code == "DISK_FULL"
    assert " MB are needed): File too large; nothing was half-installed" in caught.value.message
    assert release.left() == names(release.root / "partial") == []
    assert release.install().folder.is_dir()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_nobody_else_may_write_in_a_store_whatever_the_umask(release: Release, umask: int) -> None:
    """What was verified could be changed before it is executed; it may be read."""
    before = os.umask(umask)
    try:
        release.install()
        pin = (release.manifest_url, release.manifest_sha256)
        release.store().manifest(*pin, release.fetcher())
        release.store().write("channels", "one", "file", data=b"1")
    finally:
        os.umask(before)
    places = [release.root, *release.root.rglob("*")]
    assert len(places) > 12
    assert [place for place in places if place.lstat().st_mode & 0o022] == []
    for path in (release.place, *(release.place / "files").rglob("*")):
        program = path.is_dir() or path.name == "llama-server"
        assert path.stat().st_mode & 0o7777 == (0o755 if program else 0o644), path
    assert (release.root / "staging").stat().st_mode & 0o777 == 0o700


def of_the_system(monkeypatch: pytest.MonkeyPatch, call: str, function: Any) -> None:
    """Replace a function of ``os``; pathlib of Python 3.10 has taken most of them at its import."""
    monkeypatch.setattr(os, call, function)
    taken = getattr(pathlib, "_normal_accessor", None)
    if taken is not None and call in {"rename", "mkdir"}:
        monkeypatch.setattr(taken, call, function)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "fchmod", "open", "listdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call(
    release: Release, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The system's own functions fail at their first, second, third … use by the store."""
    outcomes = set()
    for nth in range(1, 9):
        original = getattr(os, call)
        left = [nth]

        def failing(*args: Any, _original: Any = original, _left: Any = left, **kw: Any) -> Any:
            relative = {"dir_fd", "src_dir_fd"} & kw.keys()
            if relative or str(release.root) in str(args[0]) or isinstance(args[0], int):
                _left[0] -= 1
                if _left[0] == 0:
                    raise OSError(number, os.strerror(number), str(args[0]))
            return _original(*args, **kw)

        of_the_system(monkeypatch, call, failing)
        try:
            outcomes.add(type(release.install()).__name__)
        except StoreError as error:
            outcomes.add(error.code)
        finally:
            of_the_system(monkeypatch, call, original)
        assert release.install().folder.is_dir()
        # Where removing what was half done failed itself, a later process does it.
        assert len(release.left()) <= (call in {"open", "listdir"})
        shutil.rmtree(release.root)
    expected = "STORE_FAILED" if number == errno.EIO else "DISK_FULL"
    assert {expected} <= outcomes <= {expected, "Installed"}


# 37: a store that cannot be written


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    for options in ("bind", "remount,bind,ro"):
        argv = ["mount", "-o", options, folder, folder]
        if subprocess.run(argv, capture_output=True, check=False).returncode:
            pytest.skip("root writes everywhere, and cannot mount read-only here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(disk.tempfile, "tempdir", str(folder))
    return folder


def test_a_read_only_store_is_replaced_by_a_private_one(release: Release, temporary: Path) -> None:
    with read_only(release.root):
        installed = release.install()
        assert installed.folder.is_relative_to(temporary)
        private = temporary / f"llama-loader-{os.geteuid()}"
        assert private.stat().st_mode & 0o777 == 0o700
        assert release.notes() == ["STORE_TEMPORARY"]
        again = release.install()
        assert again == installed
        assert len(release.server.requests) == 1
        assert names(temporary) == [private.name]


def test_a_read_only_store_that_has_it_is_used(release: Release, temporary: Path) -> None:
    installed = release.install()
    pin = (release.manifest_url, release.manifest_sha256)
    release.store().manifest(*pin, release.fetcher())
    with read_only(release.root):
        assert release.install(offline=True) == installed
        release.store().manifest(*pin, release.fetcher(offline=True))
    assert names(temporary) == []


@pytest.mark.parametrize("what", ["open", "readable", "link", "file", "theirs"])
def test_a_temporary_folder_prepared_by_somebody_else(
    release: Release, temporary: Path, tmp_path: Path, what: str
) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    trap = temporary / f"llama-loader-{os.geteuid()}"
    if what == "link":
        trap.symlink_to(tmp_path / "theirs")
    elif what == "file":
        trap.touch(0o600)
    else:
        trap.mkdir()
        trap.chmod({"open": 0o777, "readable": 0o710, "theirs": 0o700}[what])
    if what == "theirs":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(trap, 1000, 1000)
    with read_only(release.root):
        folder = release.install().folder
    assert not folder.is_relative_to(trap)
    assert names(tmp_path / "theirs") == []
    assert folder.relative_to(temporary).parts[0].startswith("llama-loader-")


def test_private_store_is_not_made_where_others_can_put_another_in_its_place(
    release: Release, temporary: Path
) -> None:
    temporary.chmod(0o777)
    with read_only(release.root), refused("STORE_FAILED", StoreError, "written by other"):
        release.install()
    temporary.chmod(0o1777)
    with read_only(release.root):
        assert release.install().folder.is_relative_to(temporary)


def with_chunks(
    artifact: Artifact, change: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> Artifact:
    """The same artifact, where the digests of its large files' pieces are others."""
    files = tuple(msgspec.structs.replace(e, chunks=change(e.chunks)) for e in artifact.files)
    return msgspec.structs.replace(artifact, files=files)


def test_a_runtime_stays_when_its_manifest_gains_digests_of_pieces(release: Release) -> None:
    plain = with_chunks(release.artifact, lambda _: ())
    assert plain != release.artifact
    release.install(plain)
    asked = len(release.server.requests)
    folder = release.install().folder
    assert len(release.server.requests) == asked
    assert release.notes() == []
    (folder / "libggml-cuda.so").write_bytes(BIG.data[::-1])
    release.install()
    assert release.notes() == ["RUNTIME_DAMAGED"]


def test_pieces_that_contradict_the_whole_are_the_manifests_fault(release: Release) -> None:
    """Found before anything is executed; the manifest that is right finds nothing to fetch."""
    wrong = with_chunks(release.artifact, lambda chunks: chunks and (*chunks[:-1], "0" * 64))
    installed = release.install(wrong)
    for look in (installed.verify, lambda: release.install(wrong)):
        with refused(
            "MANIFEST_CONTRADICTS_ITSELF", IntegrityError, r"has the .* not its pieces'"
        ) as caught:
            look()
        assert "ask who published it" in caught.value.hint
    asked = len(release.server.requests)
    release.install().verify()
    assert len(release.server.requests) == asked
    # nor does what it left behind refuse the same archive, pinned by URL and digest
    sha256 = release.artifact.sha256
    found = release.store().install_archive(release.url, sha256, release.fetcher())
    found.verify()
    assert found.artifact is None


@pytest.mark.parametrize("bit", [0o020, 0o002, 0o4000, 0o2000, 0o1000, 0o111])
def test_right_content_with_wrong_modes_gets_its_modes(release: Release, bit: int) -> None:
    """A disk was copied by a program that keeps no modes: the bytes are right."""
    place = release.install().folder
    paths = (place / "llama-server", place / "libllama.so.0", place, release.place)
    for path in paths:
        path.chmod(path.stat().st_mode ^ bit)
    release.install().verify()
    assert release.notes() == []
    assert [path.stat().st_mode & 0o7777 for path in paths[:2]] == [0o755, 0o644]
    assert not any(path.stat().st_mode & 0o7022 for path in paths)
    assert len(release.server.requests) == 1


# 38: several installers


def child(release: Release, locks: str = "locks", wait: float = 60) -> list[str]:
    pin = (release.manifest_url, release.manifest_sha256)
    return installer.command(release.root, *pin, locks, wait)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("locks", ["locks", "no-locks", "failing-locks"])
def test_eight_installers_at_once(release: Release, locks: str, *, damaged: bool) -> None:
    """Also where all of them find a damaged runtime: none throws out what another repaired."""

    def slowly(answer: faults.Answer) -> None:
        time.sleep(0.3)
        faults.healthy(answer)

    if damaged:
        release.install()
        damage("bit", release.place)
    release.server.fail(release.path, slowly, always=True)
    running = [
        subprocess.Popen(
            child(release, locks), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    done = [(*process.communicate(), process.returncode) for process in running]
    assert [status for _, _, status in done] == [0] * 8, done
    folders = {out.splitlines()[0] for out, _, _ in done}
    assert folders == {str(release.place / "files" / "runtime")}
    assert names(release.root / "runtimes") == [release.artifact.sha256]
    assert release.left() == []
    if locks == "locks":
        assert len(release.server.asked(release.path)) == 1 + damaged
    assert release.store().verify(release.place)


@contextlib.contextmanager
def locked_by_another(release: Release) -> Iterator[None]:
    release.store().write("channels", "file", data=b"1")
    with Folder.open(release.root / "staging") as staging:
        assert staging.lock()
        yield


def test_fork_made_during_an_installation_does_not_keep_the_store_locked(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroGPU forks the app for each worker, also while the app installs in another thread."""
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    children: list[int] = []
    read, write = os.pipe()

    def fork(event: Event) -> None:
        if isinstance(event, Stage) and not children:
            child = os.fork()
            if child == 0:
                os.close(write)
                os.read(read, 1)  # until the parent has closed its end
                os._exit(0)
            children.append(child)

    store = Store(release.root, sink=fork)
    store.install(release.artifact, [release.url], release.fetcher())
    release.store().write("channels", "file", data=b"1")
    os.close(write)
    assert os.waitpid(children[0], 0)[1] == 0
    os.close(read)
    assert release.notes() == []


def test_a_lock_that_nobody_lets_go(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    with locked_by_another(release):
        assert release.install().folder.is_dir()
    assert release.notes() == ["STORE_BUSY"]


# 39: killed


def test_killed_in_the_middle_and_swept(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    release.server.fail(release.path, faults.drip(20_000, every=0.05), always=True)
    process = subprocess.Popen(child(release))
    try:
        deadline = time.monotonic() + 20
        while not list(release.root.glob("staging/*/files/runtime/llama-server")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(release.left()) == 1
        monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
        release.store().write("channels", "file", data=b"1")
        assert len(release.left()) == 1  # its owner lives
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert release.store().find(release.artifact.sha256) is None
    assert release.install().folder.is_dir()
    assert release.left() == []


def no_locks(*_: int) -> None:
    """Locks that do nothing."""


def failing_locks(*_: int) -> None:
    raise OSError(errno.ENOLCK, "no locks here")


@pytest.mark.parametrize("locks", [no_locks, failing_locks])
@pytest.mark.parametrize("early", [60, -60])
def test_where_locks_do_not_work_what_was_left_behind_goes_by_its_age(
    release: Release, monkeypatch: pytest.MonkeyPatch, locks: Any, early: int
) -> None:
    release.store().write("channels", "file", data=b"1")
    folder = left_behind(release.root / "staging")
    age(folder, disk.STALE_SECONDS - early)
    monkeypatch.setattr(disk.fcntl, "flock", locks)
    release.store().write("channels", "file", data=b"1")
    assert folder.exists() == (early > 0)
    monkeypatch.undo()
    release.store().write("channels", "file", data=b"1")
    assert release.left() == []


# 40: damage


SERVER_PATH = "files/runtime/llama-server"
LIBRARY_PATH = "files/runtime/libllama.so.0"


def flip_a_bit(place: Path) -> None:
    data = bytearray((place / LIBRARY_PATH).read_bytes())
    data[1000] ^= 1
    (place / LIBRARY_PATH).write_bytes(bytes(data))


def keep_size_and_time(place: Path) -> None:
    times = (place / SERVER_PATH).stat()
    (place / SERVER_PATH).write_bytes(b"x" * len(SCRIPT))
    os.utime(place / SERVER_PATH, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_a_link(place: Path) -> None:
    (place / SERVER_PATH).rename(place.parent.parent / "elsewhere")
    (place / SERVER_PATH).symlink_to(place.parent.parent / "elsewhere")


def replace_by_a_fifo(place: Path) -> None:
    (place / LIBRARY_PATH).unlink()
    os.mkfifo(place / LIBRARY_PATH)


def change_receipt(place: Path, **fields: Any) -> None:
    written = json.loads((place / "receipt.json").read_bytes()) | fields
    (place / "receipt.json").write_text(json.dumps(written))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_a_bit, "runtime/libllama.so.0 changed"),
    "same size and time": (keep_size_and_time, "llama-server changed"),
    "missing": (lambda place: (place / LIBRARY_PATH).unlink(), "runtime/libllama.so.0 missing"),
    "extra": (
        lambda place: (place / "files/runtime/libevil.so").write_bytes(b"x"),
        "runtime/libevil.so not listed",
    ),
    "extra link": (
        lambda place: (place / "files/runtime/lib").symlink_to("/"),
        "runtime/lib not listed",
    ),
    "link": (replace_by_a_link, "llama-server changed"),
    "fifo": (replace_by_a_fifo, "libllama.so.0 changed"),
    "no files": (
        lambda place: shutil.rmtree(place / "files"),
        "llama-server, files/runtime/no missing",
    ),
    "no receipt": (lambda place: (place / "receipt.json").unlink(), "has no receipt"),
    "receipt cut": (
        lambda place: (place / "receipt.json").write_bytes(b'{"format": 1,'),
        "its receipt cannot be read",
    ),
    "other receipt": (lambda place: change_receipt(place, sha256="0" * 64), "of another runtime"),
    "receipt of no files": (
        lambda place: change_receipt(place, artifact={}),
        r"its receipt cannot be read: .*\$\.artifact",
    ),
    "extra folder": (
        lambda place: (place / "files/runtime/empty").mkdir(),
        "files/runtime/empty not listed",
    ),
    "beside": (lambda place: (place / "notes.txt").write_text("x"), "notes.txt not listed"),
}


def damage(how: str, place: Path) -> None:
    DAMAGES[how][0](place)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_runtime_is_taken_out_of_use_and_repaired(release: Release, how: str) -> None:
    installed = release.install()
    damage(how, release.place)
    with refused("RUNTIME_DAMAGED", IntegrityError, DAMAGES[how][1], hint="repairs it"):
        release.store().verify(installed.folder)
    assert release.store().find(release.artifact.sha256) is None
    with refused("OFFLINE", NetworkError):
        release.install(offline=True)
    release.events.clear()
    assert release.install() == installed
    assert len(release.notes()) == 1
    assert contents(release.place / "files") == {entry.path: entry.data for entry in ENTRIES}
    assert len(release.server.requests) == 2
    assert release.left() == []


def forge(place: Path) -> None:
    """Change the server, and the receipt with it."""
    evil = b"#!/bin/sh\necho evil\n"
    (place / SERVER_PATH).write_bytes(evil)
    written = json.loads((place / "receipt.json").read_bytes())
    files = written["artifact"]["files"]
    files[0] |= {"sha256": hashlib.sha256(evil).hexdigest(), "size": len(evil)}
    written["artifact"]["unpacked_size"] += len(evil) - len(SCRIPT)
    (place / "receipt.json").write_text(json.dumps(written))


@pytest.mark.parametrize("what", ["", "runtimes", "staging"])
def test_verify_of_what_is_no_runtime(release: Release, tmp_path: Path, what: str) -> None:
    release.install()
    (tmp_path / "receipt.json").write_text("{}")
    with refused("NOT_A_RUNTIME", SettingError, "not in an installed runtime"):
        release.store().verify(release.root / what)


def test_a_receipt_that_was_changed_with_its_files_is_not_believed(release: Release) -> None:
    """Whoever can write to the store can write a receipt; the manifest's own list decides."""
    release.install()
    forge(release.place)
    installed = release.install()
    assert (installed.folder / "llama-server").read_bytes() == SCRIPT
    assert release.notes() == ["RUNTIME_DAMAGED"]


@pytest.mark.parametrize("damaged", [False, True])
def test_another_installers_runtime_stays_where_it_is_sound(
    release: Release, monkeypatch: pytest.MonkeyPatch, *, damaged: bool
) -> None:
    """Without working locks another one may have been faster, and a disk may fail."""
    release.install()
    if damaged:
        damage("bit", release.place)
    inode = release.place.stat().st_ino
    theirs = [release.place.with_name("elsewhere")]
    release.place.rename(theirs[0])
    original = os.rename

    def theirs_first(source: Any, target: Any, **kwargs: Any) -> None:
        if theirs and target == release.artifact.sha256:
            original(theirs.pop(), release.place)
        original(source, target, **kwargs)

    of_the_system(monkeypatch, "rename", theirs_first)
    release.install().verify()
    assert (release.place.stat().st_ino == inode) == (not damaged)
    assert release.left() == []


# 41: a newer store


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *((text, "STORE_NEWER") for text in ("3\n", "999", "llama-loader-store 3\n")),
        *((text, "STORE_NOT_OURS") for text in ("", "one", "1\n", "1.5", "2 stores\n")),
    ],
)
def test_a_store_of_another_format_is_left_alone(release: Release, text: str, code: str) -> None:
    release.install()
    (release.root / "FORMAT").write_text(text)
    for use in (
        release.install,
        lambda: release.store().find("0" * 64),
        lambda: release.store().install_archive(release.url, None, release.fetcher()),
    ):
        with refused(code, StoreError) as caught:
            use()
        assert ("update the loader" in caught.value.hint) == (code == "STORE_NEWER")
    assert release.place.exists()


# archives by URL


def test_an_archive_by_url(release: Release) -> None:
    archive = tar(
        (SERVER, link("runtime/llama-cli", "llama-server"), Entry("runtime/lib.so", b"x"))
    )
    packed = compress(archive, "tar.xz")
    digest = hashlib.sha256(packed).hexdigest()
    url = release.server.put("/theirs", packed)
    installed = release.store().install_archive(url, None, release.fetcher())
    assert installed.folder == release.root / "runtimes" / digest / "files" / "runtime"
    assert installed.artifact is None
    assert release.notes() == ["UNVERIFIED"]
    note = next(event for event in release.events if isinstance(event, Note))
    assert digest in note.message
    assert note.hint == f"set YAKULINGO_SPACES_LLAMA_CPP_SHA256={digest} (--sha256)"
    assert (installed.folder / "llama-cli").read_bytes() == SCRIPT
    assert release.left() == []
    fetched, unpacked = (event for event in release.events if isinstance(event, Stage))
    assert (fetched.name, fetched.size) == ("fetch", len(packed))
    assert (unpacked.name, unpacked.size) == ("unpack", 2 * len(SCRIPT) + 1)
    pinned = release.store().install_archive(url, digest, release.fetcher())
    assert pinned == installed
    assert len(release.server.asked("/theirs")) == 1
    again = release.store().install_archive(url, None, release.fetcher())
    assert again == installed
    assert len(release.server.asked("/theirs")) == 2
    assert release.store().verify(installed.folder).sha256 == digest


@pytest.mark.parametrize(
    ("data", "pin", "code"),
    [
        (b"<html>log in</html>", None, "ARCHIVE_UNKNOWN"),
        (b"", None, "ARCHIVE_UNKNOWN"),
        (compress(tar([Entry("x", b"x")])), None, "NO_SERVER_IN_ARCHIVE"),
        (OTHER, "0" * 64, "SHA256_MISMATCH"),
    ],
)
def test_an_archive_that_is_none_or_not_the_pinned_one(
    release: Release, data: bytes, pin: str | None, code: str
) -> None:
    url = release.server.put("/bad", data)
    with refused(code, IntegrityError):
        release.store().install_archive(url, pin, release.fetcher())
    assert names(release.root / "runtimes") == []
    assert release.left() == []


# on the disk, and in words


def test_all_names_are_on_the_disk_before_and_after_it_is_seen(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename is worth nothing after a power cut where a folder's own names are not synced.

    The marker of the store is written first: nothing is done in a folder that has none.
    """
    synced: list[tuple[Path, bool]] = []
    seen: list[list[str]] = []
    original = os.fsync
    kept = release.root / "manifests" / f"{release.manifest_sha256}.json"

    def watched(handle: int) -> None:
        seen.append(names(release.root))
        there = release.place.exists() or kept.exists()
        synced.append((Path(f"/proc/self/fd/{handle}").readlink(), there))
        original(handle)

    monkeypatch.setattr(os, "fsync", watched)
    release.install()
    assert seen[0] == ["FORMAT"]
    assert (release.root / "FORMAT").read_text() == "llama-loader-store 2\n"
    before = {path.name for path, there in synced if not there}
    assert before >= {"files", "runtime"}
    assert any(path.parent.name == "staging" for path, there in synced if not there)
    assert (release.place.parent, True) in synced
    shutil.rmtree(release.place)
    synced.clear()
    release.store().manifest(release.manifest_url, release.manifest_sha256, release.fetcher())
    assert [(path.name, there) for path, there in synced] == [
        (kept.name, False),
        ("manifests", True),
    ]


def test_disk_that_says_always_that_another_runtime_is_there(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.rename

    def failing(source: Any, target: Any, **kwargs: Any) -> None:
        if source != target == release.artifact.sha256:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        original(source, target, **kwargs)

    of_the_system(monkeypatch, "rename", failing)
    with refused("STORE_FAILED", StoreError):
        release.install()
    assert release.left() == []


def test_manifest_that_lists_other_files_throws_out_nothing_sound(release: Release) -> None:
    """Right by its own receipt and archive, and not what is trusted now."""
    release.install()
    other = with_chunks(release.artifact, lambda chunks: chunks)
    entry = msgspec.structs.replace(other.files[0], sha256="0" * 64)
    trusted = msgspec.structs.replace(other, files=(entry, *other.files[1:]))
    with pytest.raises(IntegrityError, match="not what the manifest lists"):
        release.install(trusted)
    note = next(event for event in release.events if isinstance(event, Note))
    assert note.code == "RUNTIME_DAMAGED"
    assert release.install().folder.is_dir()
    assert len(release.server.requests) == 2  # the sound one was not thrown out


# whose folder it is


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Names, modes and content of all below a folder."""
    found = {}
    for path in sorted((folder, *folder.rglob("*"))):
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (path.lstat().st_mode, data)
    return found


def a_persons(root: Path, name: str) -> None:
    """A folder of somebody's work with a name that a store uses, too."""
    (root / name).mkdir(parents=True, mode=0o775)
    (root / name / "notes.txt").write_text("years of work")
    (root / name / "project").mkdir()
    (root / name / "project" / "thesis.tex").write_text("more of it")
    for path in (*(root / name).rglob("*"), root / name):
        os.utime(path, (0, 0))


STORES_NAMES = ("staging", "partial", "runtimes", "manifests", "channels", "holiday")


@pytest.mark.parametrize("name", STORES_NAMES)
@pytest.mark.parametrize("how", ["install", "archive", "manifest", "find"])
def test_store_is_not_made_in_a_persons_folder(release: Release, name: str, how: str) -> None:
    a_persons(release.root, name)
    before = everything(release.root)
    uses: dict[str, Callable[[], object]] = {
        "install": release.install,
        "archive": lambda: release.store().install_archive(release.url, None, release.fetcher()),
        "manifest": lambda: release.store().manifest(
            release.manifest_url, release.manifest_sha256, release.fetcher()
        ),
        "find": lambda: release.store().find("0" * 64),
    }
    with refused("STORE_NOT_OURS", StoreError) as caught:
        uses[how]()
    assert errors.safe(str(release.root)) in caught.value.message
    assert everything(release.root) == before


@pytest.mark.parametrize("name", STORES_NAMES[:-1])
@pytest.mark.parametrize("marked", [False, True])
def test_store_follows_no_link_that_was_put_there_first(
    release: Release, tmp_path: Path, name: str, *, marked: bool
) -> None:
    a_persons(tmp_path / "documents", name)
    if marked:
        release.install()
        (release.root / name).exists() and (release.root / name).rename(tmp_path / "moved")
    else:
        release.root.mkdir()
    (release.root / name).symlink_to(tmp_path / "documents" / name)
    before = everything(tmp_path / "documents")
    with refused("STORE_NOT_OURS", StoreError):
        release.store().write("channels", "one", "file", data=b"1")
    assert everything(tmp_path / "documents") == before


def test_store_leaves_a_persons_files_in_it_alone(release: Release) -> None:
    release.install()
    places = [
        *("staging/notes.txt", "staging/old/notes.txt", "notes.txt", "thesis/chapter.tex"),
        *("runtimes/.DS_Store", "runtimes/.nfs0001", "runtimes/notes/notes.txt"),
    ]
    for place in places:
        (release.root / place).parent.mkdir(exist_ok=True)
        (release.root / place).write_text("mine")
        for path in (release.root / place, (release.root / place).parent):
            os.utime(path, (0, 0))
    damage("bit", release.place)
    release.install().verify()
    assert [(release.root / place).read_text() for place in places] == ["mine"] * len(places)


@pytest.mark.parametrize("begun", ["", "llama-loa", "llama-loader-store 2"])
def test_marker_that_was_cut_off_is_completed(release: Release, begun: str) -> None:
    release.root.mkdir()
    (release.root / "FORMAT").write_text(begun)
    assert release.install().folder.is_dir()
    assert (release.root / "FORMAT").read_text() == "llama-loader-store 2\n"


# who else could change it


def as_user(uid: int, work: Callable[[], object]) -> None:
    """Do something in a child process as another user; its errors are this one's."""
    importlib.import_module("llama_loader.http_transport")  # a Python in /root is out of reach
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - shown, and told by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("where", ["store", "above", "above, meanwhile", "through a link"])
def test_store_that_others_can_change_is_replaced_by_a_private_one(
    release: Release,
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    release.root, make = tmp_path / "above" / "store", Path.mkdir

    def faster(self: Path, *args: Any, **kwargs: Any) -> None:
        if self == tmp_path / "above" and not self.exists():
            make(self)
            self.chmod(0o777)
        make(self, *args, **kwargs)

    if where == "above, meanwhile":
        monkeypatch.setattr(Path, "mkdir", faster)
    else:
        release.install()
        (release.root if where == "store" else release.root.parent).chmod(0o777)
    if where == "through a link":
        (tmp_path / "link").symlink_to(release.root)
        release.root = tmp_path / "link"
    before = release.root.exists() and everything(release.root)
    installed = release.install()
    assert installed.folder.is_relative_to(temporary)
    note = next(event for event in release.events if isinstance(event, Note))
    assert note.code == "STORE_TEMPORARY"
    assert "can be written by other users (mode 0777)" in note.message
    assert "chmod +t" in note.hint
    assert (release.root.exists() and everything(release.root)) == before
    assert release.install() == installed
    assert len(release.server.requests) == 1 + (where != "above, meanwhile")
    if where != "store":  # what the hint says: only its owner renames what is in such a folder
        (tmp_path / "above").chmod(0o1777)
        assert release.install().root.samefile(release.place)


@contextlib.contextmanager
def all_files_as(mode: str, place: Path) -> Iterator[None]:
    """A disk that shows its files with one mode, as CIFS, bucket mounts and Windows' disks do."""
    place.mkdir()
    if shutil.which("bindfs") is None:
        must_or_skip("bindfs is not installed")
    argv = ["bindfs", "--chmod-ignore", "-p", mode, str(place), str(place)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        must_or_skip("bindfs cannot mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("mode", ["fa=rwx", "fa=r:fu+w"])
@pytest.mark.parametrize("copied", [False, True])
def test_disk_that_keeps_no_modes_is_replaced_by_a_private_store(
    release: Release, temporary: Path, tmp_path: Path, mode: str, *, copied: bool
) -> None:
    """Nothing is "changed" there, and a second start fetches nothing."""
    if copied:
        release.install()
        shutil.copytree(release.root, tmp_path / "copy")
    with all_files_as(mode, tmp_path / "disk"):
        release.root = tmp_path / "disk" / "store"
        if copied:
            shutil.copytree(tmp_path / "copy", release.root)
        installed = release.install()
        assert installed.folder.is_relative_to(temporary)
        assert subprocess.run([installed.folder / "llama-server"], check=True).returncode == 0
        note = next(event for event in release.events if isinstance(event, Note))
        assert note.code == "STORE_TEMPORARY"
        assert "keeps no modes" in note.message
        assert release.install() == unhashed(release, release.url) == installed
    assert release.notes() == ["STORE_TEMPORARY"] * 3
    assert len(release.server.requests) == 1 + copied


def test_disk_that_shows_all_files_as_programs_is_used(
    release: Release, temporary: Path, tmp_path: Path
) -> None:
    """Nobody else can write there, and the server can be executed."""
    with all_files_as("fa=rx:fu+w", tmp_path / "disk"):
        release.root = tmp_path / "disk" / "store"
        assert release.install() == release.install()
        assert release.store().verify(release.place).folder.is_dir()
    assert names(temporary) == []
    assert release.notes() == ["COMPARED_WITH_RECEIPT"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("what", ["store", "runtime", "server"])
def test_nothing_of_another_user_is_used(release: Release, temporary: Path, what: str) -> None:
    installed = release.install()
    place = {"store": release.root, "runtime": installed.root, "server": installed.folder}[what]
    for path in (place, *place.rglob("*")):
        os.chown(path, 4321, 4321)
    again = release.install()
    again.verify()
    assert again.folder.is_relative_to(temporary) == (what == "store")
    assert again.root.stat().st_uid == (again.folder / "llama-server").stat().st_uid == 0
    assert release.notes() == ["STORE_TEMPORARY" if what == "store" else "RUNTIME_DAMAGED"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_store_that_this_user_may_not_look_at(
    release: Release, temporary: Path, tmp_path: Path
) -> None:
    """HOME=/root in a container that runs as uid 1000."""
    release.root = tmp_path / "root" / ".cache" / "llama-loader"
    (tmp_path / "root").mkdir(mode=0o700)
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(path.stat().st_mode | 0o011)
    temporary.chmod(0o1777)

    def use() -> None:
        assert release.store().find(release.artifact.sha256) is None
        assert release.install().folder.is_relative_to(temporary)
        assert set(release.notes()) == {"STORE_TEMPORARY"}

    as_user(4321, use)


ODD_NAMES = ("a:b", "a;b", "$ORIGIN", "a\nb", "a\x1b[2J", "a\x85", "a\u2028b", os.fsdecode(b"\xff"))


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("linked", [False, True])
def test_store_path_that_a_linker_or_a_reader_of_lines_would_take_apart(
    release: Release, tmp_path: Path, name: str, *, linked: bool
) -> None:
    release.root = tmp_path / name / "store"
    if linked:
        release.root.parent.mkdir()
        (tmp_path / "link").symlink_to(release.root.parent)
        release.root = tmp_path / "link" / "store"
    for use in (
        release.install,
        lambda: release.store().manifest(release.manifest_url, None, release.fetcher()),
        lambda: release.store().install_archive(release.url, None, release.fetcher()),
    ):
        with refused("STORE_PATH_UNUSABLE", StoreError) as caught:
            use()
        assert caught.value.message.isprintable()
    assert not release.root.exists()
    assert release.server.requests == []


# what stands in a small file's place


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("where", ["runtime", "receipt.json", "manifest", "FORMAT"])
def test_only_small_regular_files_are_read_and_the_next_write_heals(
    release: Release, tmp_path: Path, what: str, where: str
) -> None:
    """What a link leads to is not touched, and a folder is put aside, not removed."""
    pin = (release.manifest_url, release.manifest_sha256)
    release.store().manifest(*pin, release.fetcher())
    release.install()
    place = {
        "runtime": release.place,
        "receipt.json": release.place / "receipt.json",
        "manifest": release.root / "manifests" / f"{release.manifest_sha256}.json",
        "FORMAT": release.root / "FORMAT",
    }[where]
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    not_small(place, what, tmp_path / "e")
    release.store().manifest(*pin, release.fetcher())
    release.install().verify()
    release.store().write("channels", "file", data=b"1")
    release.events.clear()
    assert release.store().find(release.artifact.sha256) is not None
    assert release.notes() == []
    assert what != "link" or (tmp_path / "e").read_bytes() == b"secret"
    assert names(release.root / "runtimes") == [release.place.name]
    if what == "folder" and where in {"manifest", "FORMAT"}:  # a damaged runtime goes whole
        (aside,) = place.parent.glob(f"{place.name}.aside-*/notes.txt")
        assert aside.read_text() == "mine"


# verify


def test_verify_looks_at_the_folder_itself_in_whichever_store(
    release: Release, tmp_path: Path
) -> None:
    release.install()
    there = release.root
    release.root = tmp_path / "other"
    sound = release.install()
    damage("bit", there / "runtimes" / release.artifact.sha256)
    with pytest.raises(IntegrityError, match=r"libllama\.so\.0 changed"):
        release.store().verify(there / "runtimes" / release.artifact.sha256)
    damage("missing", sound.root)
    with pytest.raises(IntegrityError, match=r"libllama\.so\.0 missing"):
        Store(there).verify(sound.root)


def unhashed(release: Release, *urls: str) -> Installed:
    return release.store().install(release.artifact, urls, release.fetcher(), hashed=False)


@pytest.mark.parametrize("how", ["same size and time", "missing", "no files", "gone"])
def test_runtime_that_is_not_hashed_is_what_its_receipt_says(release: Release, how: str) -> None:
    """The caller verifies it before it executes it, and repairs it then."""
    installed = release.install()
    if how != "gone":
        damage(how, release.place)
    found = unhashed(release)
    assert found == installed
    assert release.notes() == []
    if how == "gone":
        shutil.rmtree(found.root)
    with refused("RUNTIME_DAMAGED", IntegrityError, r"llama-server|libllama|No such file"):
        found.verify()
    release.install()
    found.verify()


def test_store_that_went_is_not_executed_through_a_link_of_another_user(
    release: Release, tmp_path: Path
) -> None:
    """They make the folder above it while it is installed again, and later swap the link."""
    release.root = tmp_path / "gone" / "store"
    installed = release.install()

    def repair() -> None:
        release.root.parent.mkdir()
        release.root.parent.chmod(0o777)
        release.root.symlink_to(sound)

    ready = replace(prepared(installed.folder), installed=installed, repair=repair)
    ready.require_sound()
    sound = release.root.rename(tmp_path / "private")
    release.root.parent.rmdir()
    with refused("STORE_FAILED", StoreError, "can be written by other users"):
        ready.require_sound()


@pytest.mark.parametrize("hashed", [False, True])
def test_runtime_of_a_read_only_store_is_hashed_at_once(
    release: Release, temporary: Path, *, hashed: bool
) -> None:
    """What is repaired would be in another folder than the one that was found."""
    installed = release.install()
    look = release.install if hashed else lambda: unhashed(release, release.url)
    with read_only(release.root):
        assert look() == installed
    damage("same size and time", release.place)
    with read_only(release.root):
        repaired = look()
        assert repaired.folder.is_relative_to(temporary)
        repaired.verify()


@pytest.mark.parametrize("pinned", [False, True])
def test_damaged_archive_by_url_is_repaired(release: Release, *, pinned: bool) -> None:
    digest = release.artifact.sha256 if pinned else None
    release.store().install_archive(release.url, digest, release.fetcher())
    damage("bit", release.place)
    release.store().install_archive(release.url, digest, release.fetcher()).verify()
    assert len(release.server.requests) == 2


# what is collected


def age(place: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(place, (then, then))
    return place


OLD = store_module.MAX_AGE_SECONDS + 60
IDLE = store_module.MAX_AGE_SECONDS - 60


def test_what_nobody_used_for_long_goes_with_the_next_installation(release: Release) -> None:
    old, idle = release.install_other("b1", OLD), release.install_other("b2", IDLE)
    new = release.install_other("b3")
    assert names(release.root / "runtimes") == sorted([idle.name, new.name])
    assert not old.exists()
    assert release.left() == []


def test_a_start_is_a_use(release: Release) -> None:
    """Each start and restart verifies, and what is verified is used."""
    place = release.install_other("b1", OLD)
    found = release.store().find(place.name, hashed=False)
    assert found is not None
    assert time.time() - place.stat().st_mtime > IDLE
    found.verify()
    assert time.time() - place.stat().st_mtime < 60
    release.install_other("b2")
    assert place.exists()


def test_six_switch_to_a_new_release_while_old_ones_are_collected(release: Release) -> None:
    old = [release.install_other(f"b{n}", OLD) for n in range(4)]
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from llama_loader.fetch import Fetcher\n"
        "from llama_loader.store import Store\n"
        "Store(Path(sys.argv[2])).install_archive(sys.argv[3], None, Fetcher()).verify()\n"
    )
    urls = [release.put_other(name)[0] for name in ("new1", "new2")]
    argv = [sys.executable, "-c", script, str(installer.SPACES), str(release.root)]
    running = [subprocess.Popen([*argv, urls[n % 2]], stderr=subprocess.PIPE) for n in range(6)]
    done = [(process.communicate()[1], process.returncode) for process in running]
    assert [status for _, status in done] == [0] * 6, done
    assert len(names(release.root / "runtimes")) == 2
    assert not any(place.exists() for place in old)
