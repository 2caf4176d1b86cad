"""What a store needs of a disk, each by itself."""

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from needs import must_or_skip

from llama_loader import disk
from llama_loader.disk import Folder
from tests.rigs.heard import heard


def left_behind(place: Path, name: str = f"install.{'0a' * 8}.tmp") -> Path:
    """A folder that a process had begun when it was killed."""
    (place / name / "deep").mkdir(parents=True)
    (place / name / "deep/file").touch()
    return place / name


def sweep(place: Path, seconds: float = 0.0) -> None:
    with Folder.open(place) as folder:
        folder.sweep(seconds)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space"), "DISK_FULL", "no room in /store: No space;"),
        (OSError(errno.EDQUOT, "Quota"), "DISK_FULL", "no room in /store: Quota;"),
        (OSError(errno.EFBIG, "Too large"), "DISK_FULL", "no room in /store: Too large;"),
        (OSError(errno.EIO, "Failed", "/store/a"), "STORE_FAILED", "/store/a: Failed"),
        (OSError(errno.EIO, "Failed"), "STORE_FAILED", "/store: Failed"),
        (OSError("odd"), "STORE_FAILED", "/store: odd"),
        (PermissionError(1, "No", "a"), "STORE_FAILED", "/store/a: No"),
        (PermissionError(1, "No", 5), "STORE_FAILED", "/store: No"),
    ],
)
def test_errors_of_the_operating_system(error: OSError, code: str, words: str) -> None:
    told = disk.failure(Path("/store"), error)
    assert told.code == code
    assert words in told.message
    assert "use another store" in told.hint
    assert "--store" in told.hint
    needed = disk.failure(Path("/store"), error, 3_000_000).message
    assert ("(3 MB are needed)" in needed) == (code == "DISK_FULL")


def test_file_to_resume_is_a_regular_one_of_this_user_and_of_one_name(tmp_path: Path) -> None:
    place, other = tmp_path / "begun", tmp_path / "other"
    other.write_bytes(b"mine")

    def theirs() -> None:
        place.write_bytes(b"theirs")
        os.chown(place, 4321, 4321)

    os.umask(mask := os.umask(0))
    makers = [lambda: None, lambda: place.symlink_to(other), lambda: os.link(other, place)]
    makers += [lambda: os.mkfifo(place), *([] if os.geteuid() else [theirs])]
    for make in makers:
        make()
        for content in (b"ours", b"oursours"):
            with disk.open_own(place) as file:
                file.write(b"ours")
            assert place.read_bytes() == content
        assert stat.S_IMODE(place.lstat().st_mode) == 0o666 & ~mask
        place.unlink()
    assert other.read_bytes() == b"mine"


def not_small(place: Path, what: str, elsewhere: Path) -> None:
    """Put something there that must not be read as a small file; a link leads to ``elsewhere``."""
    if what == "fifo":
        os.mkfifo(place)
    elif what == "endless":
        place.symlink_to("/dev/zero")
    elif what == "link":
        elsewhere.write_bytes(b"secret")
        place.symlink_to(elsewhere)
    elif what == "device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o644, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no device can be made here")
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            short = os.path.relpath(elsewhere)  # a socket's path has at most 107 bytes
            listening.bind(short)
        elsewhere.rename(place)
    elif what == "folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)


KINDS = ("fifo", "endless", "link", "device", "socket", "folder", "sparse")


@pytest.mark.parametrize("target", ["folder", "link"])
def test_private_folder_that_another_user_makes_first_is_not_used(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the making, as in a race that the other user wins."""
    if os.geteuid():
        must_or_skip("a folder of another user needs root")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make = Path.mkdir

    def faster(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == f"kind-{os.geteuid()}" and not os.path.lexists(self):
            if target == "link":
                self.symlink_to("/var")
            else:
                make(self)
            os.chown(self, 65534, 65534, follow_symlinks=False)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", faster)
    made = disk.make_private_folder("kind")
    assert made.parent == tmp_path
    assert made.name != f"kind-{os.geteuid()}"
    assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (os.geteuid(), 0o700)


def test_files_are_their_owners_to_write_and_room_is_made_of_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    mask = os.umask(0)
    try:
        with Folder.open(tmp_path) as folder:
            folder.write("file", b"x")
            for name in (*folder.names(), "missing"):
                folder.make_room(name)
            file, aside = folder.names()
            assert (file, aside.partition("-")[0]) == ("file", "folder.aside")
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o644
            folder.renew(file, staging=folder)
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o600
            assert (folder.read(file, 1), folder.read(file, 0)) == (b"x", None)
    finally:
        os.umask(mask)


def test_no_link_is_followed_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "theirs/inner").mkdir(parents=True)
    (tmp_path / "theirs/inner/notes.txt").write_text("mine")
    (tmp_path / "ours/full/deep").mkdir(parents=True)
    os.mkfifo(tmp_path / "ours/full/fifo")
    for link in ("link", "full/deep/link"):
        (tmp_path / "ours" / link).symlink_to(tmp_path / "theirs")
    with Folder.open(tmp_path / "ours") as folder:
        for use in (
            lambda: folder.folder("link"),
            lambda: folder.folder("link", make=0o700),
            lambda: folder.open_file("link/inner/notes.txt"),
            lambda: folder.remove("link"),
        ):
            with pytest.raises(OSError, match=r"Not a directory|symbolic"):
                use()
        for name in ("full", "full"):
            folder.remove(name)
        assert folder.names() == ["link"]
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        Folder.open(tmp_path / "ours/link")
    assert (tmp_path / "theirs/inner/notes.txt").read_text() == "mine"


def test_folders_deeper_than_any_path_are_left_out_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may have made them while a store was open to others."""
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        Path("d").mkdir()
        os.chdir("d")
    with Folder.open(tmp_path) as folder:
        found = [(path, inner is None) for path, inner in folder.walk(2)]
        assert found == [("d", False), ("d/d", False), ("d/d/d", True)]
        folder.remove("d")
        assert folder.names() == []
        (tmp_path / "d/empty").mkdir(parents=True)
        with monkeypatch.context() as patch:  # one of another user cannot be moved elsewhere
            patch.delattr(Folder, "rename")
            folder.remove("d")


def test_a_path_that_others_can_change_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "open/store").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "open/../open/store")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to("new/there")
    for path in (tmp_path / name for name in ("open/store/deep/er", "link", "missing", "nowhere")):
        if path.name != "link":
            with pytest.raises(FileNotFoundError):
                disk.trusted(path)
        assert disk.trusted(path, make=0o755) == path.resolve(strict=True)
    (tmp_path / "open").chmod(0o777)
    for path in (tmp_path / "open/store/new", tmp_path / "link"):
        with pytest.raises(
            PermissionError, match=r"open can be written by other users \(mode 0777"
        ):
            disk.trusted(path)
    (tmp_path / "open").chmod(0o1777)
    assert disk.trusted(tmp_path / "link") == tmp_path / "open/store"
    with pytest.raises(OSError, match="symbolic"):
        disk.trusted(tmp_path / "circle")
    for number in range(41):
        (tmp_path / f"{number}").symlink_to(f"{number + 1}")
    (tmp_path / "41").mkdir()
    assert disk.trusted(tmp_path / "1") == tmp_path / "41"  # through 40 links
    with pytest.raises(OSError, match="symbolic"):
        disk.trusted(tmp_path / "0")


def test_folder_whose_access_control_list_lets_another_user_write_is_not_trusted(
    tmp_path: Path,
) -> None:
    place = tmp_path / "shared" / "store"
    place.mkdir(parents=True)
    place.parent.chmod(0o770)
    assert disk.trusted(place) == place.resolve()
    nobody, unused = 65534, 0xFFFFFFFF
    entries = ((1, 7, unused), (2, 7, nobody), (4, 0, unused), (16, 7, unused), (32, 0, unused))
    packed = [struct.pack("<HHI", *entry) for entry in entries]  # linux/posix_acl_xattr.h
    try:
        os.setxattr(
            place.parent, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(packed)
        )
    except OSError as error:
        pytest.skip(f"this disk has no access control lists: {error}")
    with pytest.raises(PermissionError, match="can be written by other users"):
        disk.trusted(place)


@pytest.mark.parametrize("name", ["system.nfs4_acl", "system.richacl", "user.acl"])
def test_list_of_any_kind_is_an_access_control_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Disks that have other lists than POSIX's are rare, so their names are set here."""
    tmp_path.chmod(0o770)
    monkeypatch.setattr(os, "listxattr", lambda _: [name])
    with pytest.raises(PermissionError) if "system" in name else contextlib.nullcontext():
        disk.trusted(tmp_path)


TRUSTED = """if True:
    import os, sys
    from llama_loader import disk
    place, uid, gid = sys.argv[1], *map(int, sys.argv[2:])
    os.chown(place, uid, gid)
    os.chmod(place, 0o775)
    os.seteuid(uid)
    try:
        print("trusted", disk.trusted(disk.Path(place)))
    except PermissionError as error:
        print(error.strerror)
"""


@pytest.mark.parametrize(
    ("uid", "gid", "groups", "is_trusted"),
    [
        (54321, 54321, "", True),
        (54321, 54321, "own:x:54321:", True),
        (54321, 54321, "own:x:54321:root", True),
        (54321, 54321, "own:x:54321:root,daemon", False),
        (54321, 54321, "own:x:54321:of-a-directory-service", False),
        (54321, 54321, "own:x:54321:\nlab:x:54321:daemon", False),
        (54321, 54322, "other:x:54322:", False),
        (65534, 65534, "nogroup:x:65534:", False),  # sync and _apt are in it, by /etc/passwd
        (0, 0, "root:x:0:root", True),
        (0, 0, "root:x:0:daemon", False),
        (54321, 0, "root:x:0:", False),
    ],
)
def test_folder_that_its_group_can_write_is_trusted_if_this_user_is_its_only_member(
    uid: int, gid: int, groups: str, *, is_trusted: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="group") as name:
        (Path(name) / "group").write_text(f"{groups}\n")
        Path(name).chmod(0o755)
        (Path(name) / "home").mkdir()
        mount = 'mount --bind "$0/group" /etc/group && exec "$@"'
        mounted = ["unshare", "--mount", "sh", "-c", mount]
        command = [sys.executable, "-c", TRUSTED, f"{name}/home", str(uid), str(gid)]
        environ = {**os.environ, "PYTHONPATH": str(Path(disk.__file__).parents[1])}
        done = heard([*mounted, name, *command], env=environ)
    if done.returncode and "Traceback" not in done.stderr:
        must_or_skip(f"no file can be mounted here: {done.stderr}")
    words = "trusted " if is_trusted else "can be written by other users (mode 0775)"
    assert words in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_path_through_another_users_folder_or_link_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "theirs/store").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path)
    os.chown(tmp_path / "theirs", 4321, 4321)
    os.chown(tmp_path / "link", 4321, 4321, follow_symlinks=False)
    for path in (tmp_path / "theirs/store", tmp_path / "link/store"):
        with pytest.raises(PermissionError, match=r"belongs to another user \(4321\)"):
            disk.trusted(path)


def test_only_what_a_process_left_behind_is_swept(tmp_path: Path) -> None:
    with Folder.open(tmp_path) as folder, folder.temporary("install") as made:
        name = made.path.name
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
        left_behind(made.path)
    assert list(tmp_path.iterdir()) == []  # it goes at its end
    left_behind(tmp_path, name)
    kept = {"e", f"{name}.x", name.upper(), name.replace(".tmp", ""), f"x{name}".replace(".", "-")}
    for other in kept:
        (tmp_path / other).mkdir()
    (tmp_path / name.replace("install", "file")).touch()
    (tmp_path / name.replace("install", "link")).symlink_to(tmp_path / "e")
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == kept | {name.replace("install", "file"), name.replace("install", "link")}
