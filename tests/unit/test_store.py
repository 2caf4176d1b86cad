"""Installing for real: crafted archives, a loopback server, damage, races, a full disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from backports import zstd
from fault_server import Fault, FaultServer

from llama_loader.errors import IntegrityError, LoaderError, SettingError, StoreError
from llama_loader.events import Event, Note
from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact, FileEntry, Platform
from llama_loader.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

SPACE = Path(__file__).resolve().parents[2] / "spaces"
CHUNK = 4096
CONTENT = {
    "runtime/BUILD.json": b"{}",
    "runtime/libx.so.0": os.urandom(20_000),
    "runtime/llama-server": b"#!/bin/sh\necho served\n",
}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Member:
    """One member of a crafted archive."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    link: str = ""


def compress(data: bytes, kind: str) -> bytes:
    if kind == "tar.gz":
        return gzip.compress(data, mtime=0)
    return lzma.compress(data) if kind == "tar.xz" else zstd.compress(data)


def tar_of(members: list[Member]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.mode, info.linkname = member.kind, member.mode, member.link
            info.size = len(member.data) if member.kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(member.data) if info.size else None)
    return packed.getvalue()


def good_members() -> list[Member]:
    return [
        Member(name, data, mode=0o755 if name.endswith("server") else 0o644)
        for name, data in CONTENT.items()
    ]


def artifact_of(packed: bytes, kind: str = "tar.zst", **changes: Any) -> Artifact:
    files = tuple(
        FileEntry(path=n, size=len(d), sha256=sha(d), executable=n.endswith("server"))
        for n, d in CONTENT.items()
    )
    values: dict[str, Any] = {
        "name": f"a.{kind}",
        "urls": (f"a.{kind}",),
        "format": kind,
        "size": len(packed),
        "sha256": sha(packed),
        "chunk_size": CHUNK,
        "chunks": tuple(sha(packed[i : i + CHUNK]) for i in range(0, len(packed), CHUNK)),
        "unpacked_size": sum(len(data) for data in CONTENT.values()),
        "backend": "cpu",
        "cuda": None,
        "platform": Platform(system="linux", machine="x86_64", glibc="2.34", glibcxx=None),
        "needs": (),
        "files": files,
    }
    return Artifact(**{**values, **changes})


@dataclass
class Rig:
    """A store, a file:// release, and everything that was said."""

    root: Path
    folder: Path
    events: list[Event] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return Store(self.root, sink=self.events.append)

    def notes(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Note)]

    def put(self, packed: bytes, name: str = "a.tar.zst") -> str:
        (self.folder / name).write_bytes(packed)
        return (self.folder / name).as_uri()

    def install(self, packed: bytes, kind: str = "tar.zst", **changes: Any) -> Path:
        artifact = artifact_of(packed, kind, **changes)
        url = self.put(packed, artifact.name)
        return self.store.install(artifact, [url], Fetcher(), release="b1-1").folder

    def assert_nothing_installed(self) -> None:
        assert not list(self.root.glob("runtimes/*"))
        assert not [path for path in self.root.glob("staging/*") if path.is_dir()]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    (tmp_path / "release").mkdir()
    return Rig(tmp_path / "store", tmp_path / "release")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.zst"])
def test_every_format_is_installed_with_its_modes(rig: Rig, kind: str) -> None:
    folder = rig.install(compress(tar_of(good_members()), kind), kind)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        Path(name).name: data for name, data in CONTENT.items()
    }
    assert (folder / "llama-server").stat().st_mode & 0o7777 == 0o755
    assert (folder / "libx.so.0").stat().st_mode & 0o7777 == 0o644
    assert subprocess.check_output([folder / "llama-server"]) == b"served\n"
    assert rig.store.verify(folder).folder == folder


def test_a_second_install_fetches_nothing(rig: Rig) -> None:
    packed = compress(tar_of(good_members()), "tar.zst")
    first = rig.install(packed)
    gone = artifact_of(packed)
    again = rig.store.install(gone, ["file:///nowhere"], Fetcher(offline=True), release="b1-1")
    assert again.folder == first


HOSTILE: dict[str, Callable[[], list[Member]]] = {
    "parent": lambda: [Member("../evil", b"x"), *good_members()],
    "absolute": lambda: [Member("/tmp/evil-llama", b"x"), *good_members()],  # noqa: S108
    "symlink": lambda: [Member("runtime/l", kind=tarfile.SYMTYPE, link="/"), *good_members()],
    "symlink in place": lambda: [
        Member("runtime/libx.so.0", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        *good_members()[::2],
    ],
    "hardlink": lambda: [
        Member("runtime/l", kind=tarfile.LNKTYPE, link="runtime/BUILD.json"),
        *good_members(),
    ],
    "device": lambda: [Member("runtime/d", kind=tarfile.CHRTYPE), *good_members()],
    "fifo": lambda: [Member("runtime/f", kind=tarfile.FIFOTYPE), *good_members()],
    "set-id": lambda: [
        *good_members()[:2],
        Member("runtime/llama-server", CONTENT["runtime/llama-server"], mode=0o4755),
    ],
    "wrong mode": lambda: [
        *good_members()[:2],
        Member("runtime/llama-server", CONTENT["runtime/llama-server"], mode=0o644),
    ],
    "twice": lambda: [*good_members(), good_members()[0]],
    "case": lambda: [*good_members(), Member("runtime/LIBX.so.0", b"x")],
    "not listed": lambda: [*good_members(), Member("runtime/extra", b"x")],
    "missing": lambda: good_members()[:2],
    "other content": lambda: [
        Member("runtime/BUILD.json", b"[]"),
        *good_members()[1:],
    ],
    "bomb": lambda: [Member("runtime/BUILD.json", b"\0" * 50_000_000), *good_members()[1:]],
    "too short": lambda: [Member("runtime/BUILD.json", b"{"), *good_members()[1:]],
    "empty": list,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    rig: Rig, name: str, tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError) as refused:
        rig.install(compress(tar_of(HOSTILE[name]()), "tar.zst"))
    assert refused.value.exit_status == 4
    assert refused.value.message.startswith("a.tar.zst: ")
    rig.assert_nothing_installed()
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage after", "second stream"])
def test_a_damaged_archive_is_refused(rig: Rig, kind: str, damage: str) -> None:
    packed = compress(tar_of(good_members()), kind)
    changed = {
        "truncated": packed[: len(packed) * 2 // 3],
        "garbage after": packed + b"garbage",
        "second stream": packed + compress(b"more", kind),
    }[damage]
    with pytest.raises(IntegrityError):
        rig.install(changed, kind)
    rig.assert_nothing_installed()


def test_zstd_with_a_large_window_is_refused(rig: Rig) -> None:
    level = zstd.CompressionParameter
    options = {level.window_log: 27, level.enable_long_distance_matching: 1}
    big = [*good_members()[:1], Member("runtime/libx.so.0", os.urandom(20_000_000))]
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(tar_of(big)) + compressor.flush()
    with pytest.raises(IntegrityError, match=r"window|memory|Frame"):
        rig.install(packed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "libx.so.0").write_bytes(b"changed"),
        lambda folder: (folder / "libx.so.0").unlink(),
        lambda folder: (folder / "libevil.so").write_bytes(b"x"),
        lambda folder: (folder / "llama-server").chmod(0o644),
        lambda folder: (
            (folder / "libx.so.0").rename(folder.parent.parent / "away"),
            (folder / "libx.so.0").symlink_to(folder.parent.parent / "away"),
        ),
    ],
)
def test_what_changed_since_is_found_and_repaired(
    rig: Rig, damage: Callable[[Path], object]
) -> None:
    packed = compress(tar_of(good_members()), "tar.zst")
    folder = rig.install(packed)
    damage(folder)
    with pytest.raises(IntegrityError) as refused:
        rig.store.verify(folder)
    assert refused.value.code == "RUNTIME_DAMAGED"
    assert rig.install(packed) == folder
    assert "RUNTIME_DAMAGED" in rig.notes()
    assert rig.store.verify(folder)


@pytest.mark.parametrize("receipt", [b"", b"{}", b"not json", None])
def test_a_broken_receipt_is_repaired(rig: Rig, receipt: bytes | None) -> None:
    packed = compress(tar_of(good_members()), "tar.zst")
    place = rig.install(packed).parent.parent / "receipt.json"
    place.unlink() if receipt is None else place.write_bytes(receipt)
    assert rig.store.verify(rig.install(packed))


def test_verify_wants_an_installed_runtime(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(SettingError):
        rig.store.verify(tmp_path)


def test_a_store_of_a_newer_loader_is_left_alone(rig: Rig) -> None:
    rig.root.mkdir()
    (rig.root / "FORMAT").write_text("2\n", "ascii")
    with pytest.raises(StoreError) as refused:
        rig.install(compress(tar_of(good_members()), "tar.zst"))
    assert refused.value.code == "STORE_NEWER"
    assert [path.name for path in rig.root.rglob("*") if path.is_file()] == ["FORMAT"]


def test_a_store_that_cannot_be_written_falls_back_and_says_so(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rig.root = tmp_path / "file" / "store"
    (tmp_path / "file").write_bytes(b"a file where a folder must be")
    folder = rig.install(compress(tar_of(good_members()), "tar.zst"))
    assert (folder / "llama-server").is_file()
    assert rig.notes() == ["STORE_TEMPORARY"]
    assert folder.parents[3].stat().st_mode & 0o777 == 0o700


def in_another_process(script: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        env={
            **os.environ,
            "PYTHONPATH": f"{SPACE}:{Path(__file__).parent}:{SPACE.parent}/tests/rigs",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


INSTALL = """
import resource, sys
from pathlib import Path
from llama_loader.errors import LoaderError
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
import test_store
folder, url, limit, locks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
if locks == "broken":
    import filelock
    def refuse(self, *a, **k): raise NotImplementedError("no locks here")
    filelock.FileLock.acquire = refuse
packed = Path(url.removeprefix("file://")).read_bytes()
artifact = test_store.artifact_of(packed)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(Store(folder).install(artifact, [url], Fetcher(), release="b1-1").folder)
except LoaderError as error:
    print(error.render())
    sys.exit(error.exit_status)
"""


@pytest.fixture
def packed_on_disk(rig: Rig) -> str:
    # The content is random for each process: read it from the archive, not from the module.
    packed = compress(tar_of(good_members()), "tar.zst")
    return rig.put(packed)


def patched_install() -> str:
    names = ", ".join(repr(name) for name in CONTENT)
    reread = (
        "import io, tarfile\nfrom backports import zstd\n"
        "tar = tarfile.open(fileobj=io.BytesIO(zstd.decompress(packed)))\n"
        f"test_store.CONTENT = {{n: tar.extractfile(n).read() for n in ({names},)}}\n"
    )
    return INSTALL.replace("artifact = test", reread + "artifact = test")


@pytest.mark.parametrize("locks", ["working", "broken"])
def test_eight_installers_at_once_all_succeed(rig: Rig, packed_on_disk: str, locks: str) -> None:
    processes = [
        in_another_process(patched_install(), str(rig.root), packed_on_disk, "0", locks)
        for _ in range(8)
    ]
    told = [(process.communicate(timeout=120)[0], process.returncode) for process in processes]
    assert [status for _, status in told] == [0] * 8, told
    assert len({text for text, _ in told}) == 1
    assert len(list(rig.root.glob("runtimes/*"))) == 1
    assert not [path for path in rig.root.glob("staging/*") if path.is_dir()]


@pytest.mark.parametrize("limit", [1, 1000, 15_000])
def test_no_room_is_one_line_and_nothing_half_installed(
    rig: Rig, packed_on_disk: str, limit: int
) -> None:
    """A file size limit fails writes with EFBIG, as a full disk fails them with ENOSPC."""
    process = in_another_process(
        patched_install(), str(rig.root), packed_on_disk, str(limit), "working"
    )
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 6, told
    assert told.startswith("error[DISK_FULL]: ")
    assert len(told.splitlines()) == 2
    rig.assert_nothing_installed()
    again = in_another_process(patched_install(), str(rig.root), packed_on_disk, "0", "working")
    assert again.communicate(timeout=60)[0].strip().endswith("runtime")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
def test_a_full_tmpfs(rig: Rig) -> None:
    rig.root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(rig.root)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no mounts")
    try:
        with pytest.raises(StoreError) as full:
            rig.install(compress(tar_of(good_members()), "tar.zst"))
        assert full.value.code == "DISK_FULL"
        rig.assert_nothing_installed()
    finally:
        subprocess.run(["umount", str(rig.root)], check=True)


def test_a_killed_installer_leaves_nothing_visible_and_the_next_succeeds(rig: Rig) -> None:
    packed = compress(tar_of(good_members()), "tar.zst")
    artifact = artifact_of(packed)
    path = rig.put(packed)
    with FaultServer({"/a": packed}) as server:
        server.script["/a"] = [Fault(drip=0.05)]
        child = os.fork()
        if child == 0:  # the child is killed in the middle: it never returns to pytest
            Store(rig.root).install(artifact, [server.url + "/a"], Fetcher(), release="b1-1")
            os._exit(0)
        deadline = time.monotonic() + 20
        while server.sent < 6000 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not list(rig.root.glob("runtimes/*"))
    assert rig.store.find(artifact.sha256) is None
    assert rig.store.install(artifact, [path], Fetcher(), release="b1-1")


def test_what_a_killed_installer_left_is_swept_after_an_hour(rig: Rig) -> None:
    left = rig.root / "staging" / "abc.xyz"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    hour_ago = time.time() - 4000
    for path in (left / "half", left):
        os.utime(path, (hour_ago, hour_ago))
    fresh = rig.root / "staging" / "def.uvw"
    fresh.mkdir()
    rig.install(compress(tar_of(good_members()), "tar.zst"))
    assert not left.exists()
    assert fresh.exists()


FOREIGN = [
    Member("llama-b1/bin/llama-server", b"#!/bin/sh\n", mode=0o755),
    Member("llama-b1/lib/libx.so.0.1", b"library"),
    Member("llama-b1/lib/libx.so.0", kind=tarfile.SYMTYPE, link="libx.so.0.1"),
    Member("llama-b1/lib/libx.so", kind=tarfile.SYMTYPE, link="libx.so.0"),
    Member("llama-b1/bin/libx.so", kind=tarfile.SYMTYPE, link="../lib/libx.so"),
    Member("llama-b1/bin/hard", kind=tarfile.LNKTYPE, link="llama-b1/lib/libx.so.0.1"),
]


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.zst"])
def test_a_foreign_archive_works_and_its_links_become_files(rig: Rig, kind: str) -> None:
    packed = compress(tar_of(FOREIGN), kind)
    url = rig.put(packed, f"llama.{kind}")
    installed = rig.store.install_archive(url, sha(packed), Fetcher())
    assert installed.verified
    assert installed.folder.name == "bin"
    for name in ("libx.so", "hard"):
        assert (installed.folder / name).read_bytes() == b"library"
        assert not (installed.folder / name).is_symlink()
    assert rig.store.verify(installed.folder)
    assert rig.notes() == []


def test_an_unpinned_archive_says_loudly_which_digest_to_pin(rig: Rig) -> None:
    packed = compress(tar_of(FOREIGN), "tar.gz")
    installed = rig.store.install_archive(rig.put(packed), None, Fetcher())
    assert not installed.verified
    (note,) = [event for event in rig.events if isinstance(event, Note)]
    assert note.code == "UNVERIFIED"
    assert sha(packed) in note.hint
    pinned = rig.store.install_archive("file:///gone", sha(packed), Fetcher())
    assert pinned.verified


@pytest.mark.parametrize(
    "members",
    [
        [Member("llama-server", b"x"), Member("l", kind=tarfile.SYMTYPE, link="../../etc/passwd")],
        [Member("llama-server", b"x"), Member("l", kind=tarfile.SYMTYPE, link="/etc/passwd")],
        [Member("llama-server", b"x"), Member("l", kind=tarfile.SYMTYPE, link="l")],
        [Member("llama-server", b"x"), Member("l", kind=tarfile.SYMTYPE, link="nothing")],
        [Member("llama-server", b"x"), Member("l", kind=tarfile.LNKTYPE, link="../x")],
        [Member("d", kind=tarfile.SYMTYPE, link="/tmp"), Member("d/evil", b"x")],  # noqa: S108
        [Member("llama-server", b"x"), Member("../evil", b"x")],
        [Member("llama-server", b"x"), Member("d", kind=tarfile.CHRTYPE)],
        [Member("llama-server", b"x", mode=0o4755)],
        [Member("llama-server", b"x"), Member("LLAMA-server", b"x")],
        [Member("a/llama-server", b"x"), Member("b/llama-server", b"x")],
        [Member("readme", b"x")],
    ],
)
def test_an_unsafe_foreign_archive_is_refused(
    rig: Rig, members: list[Member], tmp_path: Path
) -> None:
    packed = compress(tar_of(members), "tar.gz")
    with pytest.raises(IntegrityError):
        rig.store.install_archive(rig.put(packed), sha(packed), Fetcher())
    rig.assert_nothing_installed()
    assert not list(tmp_path.rglob("evil"))


def test_a_login_page_instead_of_an_archive(rig: Rig) -> None:
    with pytest.raises(IntegrityError, match="neither gzip, xz nor zstd") as refused:
        rig.store.install_archive(rig.put(b"<html>please log in</html>"), None, Fetcher())
    assert "login" in refused.value.hint


def test_a_pin_that_does_not_match(rig: Rig) -> None:
    with pytest.raises(IntegrityError) as refused:
        rig.store.install_archive(rig.put(b"x"), "0" * 64, Fetcher())
    assert refused.value.code == "SHA256_MISMATCH"
    rig.assert_nothing_installed()


def test_threads_may_install_too(rig: Rig) -> None:
    packed = compress(tar_of(good_members()), "tar.zst")
    artifact, url = artifact_of(packed), rig.put(packed)
    found: list[Path | LoaderError] = []

    def install() -> None:
        try:
            found.append(rig.store.install(artifact, [url], Fetcher(), release="b1-1").folder)
        except LoaderError as error:
            found.append(error)

    threads = [threading.Thread(target=install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
