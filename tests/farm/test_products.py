"""What a host sends back: archives made by hand, refused before anything is written."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from farm.cluster import host
from farm.cluster.host import Outcome
from farm.errors import BuildError


def packed(*members: tuple[str, bytes, str]) -> bytes:
    """Return a tar of names, types and link targets; files hold ten bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind, target in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            entry.size = 10 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"0123456789"))
    return made.getvalue()


def outcome(content: bytes, sha256: str | None = None) -> Outcome:
    told = sha256 or hashlib.sha256(content).hexdigest()
    return Outcome("far", b"", products=content, sha256=told)


FILE = ("libllama.so.0", tarfile.REGTYPE, "")
GOOD = packed(
    FILE,
    ("libllama.so", tarfile.SYMTYPE, "libllama.so.0"),
    ("sub", tarfile.DIRTYPE, ""),
    ("sub/copy", tarfile.LNKTYPE, "libllama.so.0"),
)


def refused(content: bytes, into: Path, sha256: str | None = None) -> str:
    with pytest.raises(BuildError) as raised:
        host.unpack(outcome(content, sha256), into / "here")
    assert "far" in raised.value.message
    assert list(into.iterdir()) == []
    return raised.value.code


def test_a_folder_as_a_build_makes_it_is_unpacked(tmp_path: Path) -> None:
    host.unpack(outcome(GOOD), tmp_path)
    assert (tmp_path / "libllama.so").readlink().name == "libllama.so.0"
    assert (tmp_path / "sub" / "copy").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    "member",
    [
        ("../out", tarfile.REGTYPE, ""),
        ("/etc/out", tarfile.REGTYPE, ""),
        ("a/../../out", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc"),
        ("link", tarfile.SYMTYPE, ".."),
        ("link", tarfile.SYMTYPE, "../x"),
        ("link", tarfile.LNKTYPE, "/etc/passwd"),
        ("link", tarfile.LNKTYPE, "not-there"),
        ("device", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
        FILE,
    ],
)
def test_what_no_build_makes_is_refused(member: tuple[str, bytes, str], tmp_path: Path) -> None:
    assert refused(packed(FILE, member), tmp_path) == "PRODUCTS_UNSAFE"


@pytest.mark.parametrize(
    "content", [b"", b"no tar" * 500, packed(), GOOD[:1500], packed(FILE)[:515]]
)
def test_what_is_no_whole_archive_is_damaged(content: bytes, tmp_path: Path) -> None:
    assert refused(content, tmp_path) == "PRODUCTS_DAMAGED"


def test_what_arrives_with_another_sha256_is_refused(tmp_path: Path) -> None:
    assert refused(GOOD, tmp_path, "0" * 64) == "PRODUCTS_DAMAGED"


def test_more_than_any_build_makes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "MOST_BYTES", 9)
    assert refused(GOOD, tmp_path) == "PRODUCTS_UNSAFE"
    monkeypatch.setattr(host, "MOST_BYTES", 100)
    monkeypatch.setattr(host, "MOST_MEMBERS", 3)
    assert refused(GOOD, tmp_path) == "PRODUCTS_UNSAFE"
