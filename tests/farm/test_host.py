"""What a host sends back: archives made by hand, refused before anything is written."""

import hashlib
import io
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

from farm.cluster import host
from farm.cluster.host import Outcome
from farm.errors import BuildError, PackError
from farm.tarball import archive


def packed(*members: tuple[str, bytes, str]) -> bytes:
    """Return an archive of names, types and link targets; files hold ten bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind, target in members:
            entry = tarfile.TarInfo(name if name.startswith("/") else f"runtime/{name}")
            entry.type, entry.linkname = kind, target
            entry.size = 10 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"0123456789"))
    return archive.zstd.compress(made.getvalue())


def outcome(content: bytes, sha256: str | None = None) -> Outcome:
    told = sha256 or hashlib.sha256(content).hexdigest()
    return Outcome("far", b"", products=content, sha256=told)


FILE = ("libllama.so.0", tarfile.REGTYPE, "")
GOOD = packed(FILE, ("llama-server", tarfile.REGTYPE, ""))


def refused(content: bytes, sha256: str | None = None) -> str:
    with pytest.raises(BuildError) as raised:
        for _ in host.products(outcome(content, sha256)):
            pass
    assert "far" in raised.value.message
    return raised.value.code


def test_a_folder_as_a_build_makes_it_is_unpacked(tmp_path: Path) -> None:
    host.unpack(outcome(GOOD), tmp_path)
    assert (tmp_path / "llama-server").read_bytes() == b"0123456789"


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
def test_what_no_build_makes_is_refused(member: tuple[str, bytes, str]) -> None:
    plain = member[1] == tarfile.REGTYPE
    assert refused(packed(FILE, member)) == ("PRODUCTS_UNSAFE" if plain else "PRODUCTS_DAMAGED")


@pytest.mark.parametrize("content", [b"", b"no tar" * 500, packed(), GOOD[:-1], GOOD[:40]])
def test_what_is_no_whole_archive_is_damaged(content: bytes) -> None:
    assert refused(content) == "PRODUCTS_DAMAGED"


def test_what_arrives_with_another_sha256_is_refused() -> None:
    assert refused(GOOD, "0" * 64) == "PRODUCTS_DAMAGED"


def test_more_than_any_build_makes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 9)
    assert refused(GOOD) == "PRODUCTS_UNSAFE"
    monkeypatch.setattr(archive, "MAX_BYTES", 100)
    monkeypatch.setattr(archive, "MAX_FILES", 1)
    assert refused(GOOD) == "PRODUCTS_UNSAFE"


def test_no_host_sends_more_than_another_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("/bin/true", tmp_path / "llama-server")
    packs = (host.pack_folder, partial(host.pack_products, programs=("llama-server",)))
    assert all(pack(tmp_path) for pack in packs)
    monkeypatch.setattr(host, "_MOST_SENT", 1000)
    for pack in packs:
        with pytest.raises(PackError, match="packed for another host"):
            pack(tmp_path)
