"""What a store needs of a disk, each by itself."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from llama_loader import disk


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mine(name: str) -> str:
    return f"{name}-{os.geteuid()}"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space"), "DISK_FULL", "no room in /store: No space;"),
        (OSError(errno.EDQUOT, "Quota"), "DISK_FULL", "no room in /store: Quota;"),
        (OSError(errno.EFBIG, "Too large"), "DISK_FULL", "no room in /store: Too large;"),
        (OSError(errno.EIO, "Failed", "/store/a"), "STORE_FAILED", "/store/a: Failed"),
        (OSError(errno.EIO, "Failed"), "STORE_FAILED", "/store: Failed"),
        (OSError("odd"), "STORE_FAILED", "/store: odd"),
    ],
)
def test_errors_of_the_operating_system(error: OSError, code: str, words: str) -> None:
    told = disk.failure(Path("/store"), error)
    assert told.code == code
    assert told.message.startswith(words)
    assert "use another store" in told.hint
    assert "--store" in told.hint


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"content")
    assert disk.read_if_there(plain) == b"content"
    assert disk.read_if_there(tmp_path / "missing") is None
    assert disk.read_if_there(plain / "below") is None
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path / "fifo", tmp_path):
        with pytest.raises(OSError, match=r"not a plain file|Is a directory"):
            disk.read_if_there(other)


def test_a_file_that_is_read_is_no_childs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    original = os.open

    def watched(path: Path, how: int, *rest: int) -> int:
        flags.append(how)
        return original(path, how, *rest)

    (tmp_path / "plain").touch()
    monkeypatch.setattr(os, "open", watched)
    disk.read_if_there(tmp_path / "plain")
    assert flags == [os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC]


def test_a_whole_file_is_synced_before_and_after_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First its bytes, then, once it stands there, the folder's names."""
    synced: list[tuple[str, bool]] = []
    place = tmp_path / "place" / "file"
    staging = tmp_path / "staging"
    place.parent.mkdir()
    staging.mkdir()

    def look(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((path.name, place.exists()))

    monkeypatch.setattr(os, "fsync", look)
    disk.write_whole(place, b"one", staging=staging)
    assert synced == [("file", False), ("place", True)]
    disk.write_whole(place, b"two", staging=staging)
    assert place.read_bytes() == b"two"
    assert list(staging.iterdir()) == []


def test_a_new_file_is_never_written_over(tmp_path: Path) -> None:
    disk.write_new(tmp_path / "file", b"one")
    with pytest.raises(FileExistsError):
        disk.write_new(tmp_path / "file", b"two")


def test_only_folders_are_synced_as_such(tmp_path: Path) -> None:
    disk.sync_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        disk.sync_folder(tmp_path / "file")


def test_a_folders_name_says_who_owns_it(tmp_path: Path) -> None:
    folder = disk.new_folder(tmp_path, "purpose")
    purpose, world, pid, started, _ = folder.name.split(".")
    assert (purpose, pid) == ("purpose", str(os.getpid()))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    assert world == f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert started == after_name[19]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_has_an_owner_stays_and_what_has_none_goes(tmp_path: Path) -> None:
    ours = disk.new_folder(tmp_path, "ours")
    _, world, pid, started, _ = ours.name.split(".")
    gone = {
        f"a.{world}.{pid}.{int(started) - 1}.x",  # the number is used again
        f"b.{world}.4194305.1.x",  # larger than any process number
        f"c.{world}.1.-.x",
    }
    kept = {f"d.elsewhere.{pid}.{started}.x", "e", "f.g", f"h.{world}.{pid}.{started}"}
    kept |= {f"i.{world}.none.{started}.x", f"j.{world}.4194305.1.x.y"}
    for name in gone | kept:
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "e")
    (tmp_path / "file").touch()
    disk.sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == kept | {ours.name, "link", "file"}


def test_what_cannot_be_told_goes_by_age(tmp_path: Path) -> None:
    names = {name: f"{name}.elsewhere.1.1.x" for name in ("old", "fresh", "fresh inside")}
    folders = {name: tmp_path / owned for name, owned in names.items()}
    for folder in folders.values():
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/file").touch()
    now = time.time()
    for path in (folders["old"], *folders["old"].rglob("*")):
        os.utime(path, (now, now - 3600 - 60))
    for path in (folders["fresh"], *folders["fresh"].rglob("*")):
        os.utime(path, (now, now - 3600 + 60))
    for path in (folders["fresh inside"], folders["fresh inside"] / "deep"):
        os.utime(path, (now, now - 7200))
    disk.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["fresh"], names["fresh inside"]}
    assert disk.STALE_SECONDS == 3600


def test_two_may_sweep_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = disk.new_folder(tmp_path, "left")

    def other_was_faster(stale: Path) -> bool:
        stale.rmdir()
        return True

    monkeypatch.setattr(disk, "is_stale", other_was_faster)
    disk.sweep(tmp_path)
    assert not folder.exists()


def test_where_proc_is_not_to_be_read_age_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path, *_: object) -> str:
        raise PermissionError(errno.EACCES, "not to be read", str(path))

    monkeypatch.setattr(Path, "read_text", unreadable)
    folder = disk.new_folder(tmp_path, "x")
    assert folder.name.split(".")[1:4] == ["nowhere", str(os.getpid()), "-"]
    other = folder.with_name(f"x.nowhere.1.-.{'y' * 8}")
    other.mkdir()
    disk.sweep(tmp_path)
    assert (folder.is_dir(), other.is_dir()) == (True, True)
    os.utime(other, (0, 0))
    disk.sweep(tmp_path)
    assert (folder.is_dir(), other.is_dir()) == (True, False)


def test_a_private_folder_is_the_same_every_time(temporary: Path) -> None:
    assert disk.private_place("ours") is None
    folder = disk.private_folder("ours")
    assert folder == temporary / mine("ours")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert disk.private_folder("ours") == folder
    assert disk.private_place("ours") == folder


@pytest.mark.parametrize("what", ["open to others", "a file", "a link", "another user's"])
def test_what_is_not_private_is_not_used(temporary: Path, what: str) -> None:
    place = temporary / mine("ours")
    if what == "a file":
        place.touch(0o600)
    elif what == "a link":
        (temporary / "elsewhere").mkdir(0o700)
        place.symlink_to(temporary / "elsewhere")
    else:
        place.mkdir(0o700)
    if what == "open to others":
        place.chmod(0o710)
    elif what == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(place, 1000, 1000)
    assert disk.private_place("ours") is None
    folder = disk.private_folder("ours")
    assert folder != place
    assert folder.name.startswith("ours-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_one_run_goes_with_it(temporary: Path) -> None:
    shared = disk.private_folder("ours")
    run = disk.new_folder(shared, "run")
    (run / "log").touch()
    disk.remove_run(run)
    assert shared.is_dir()
    assert list(shared.iterdir()) == []
    disk.remove_run(run)  # gone already

    shared.chmod(0o755)
    alone = disk.private_folder("ours")
    runs = [disk.new_folder(alone, "run") for _ in range(2)]
    disk.remove_run(runs[0])
    assert alone.is_dir()  # not empty yet
    disk.remove_run(runs[1])
    assert not alone.exists()
    assert temporary.is_dir()
