"""Archives as they are written and read: frames, chunks, headers, bounds."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd
from binaries import FATBINS, library

from farm import fatbin, pack
from farm.errors import PackError
from farm.tarball import archive
from farm.tarball.archive import TarMember
from tests.farm.test_pack import MTIME, refused, tarball


def test_zstd_frame_has_a_small_window_and_a_checksum(tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 20
    path = tmp_path / "x.tar.zst"
    member = archive.TarMember("runtime/x", len(content), 0o644, io.BytesIO(content))
    with path.open("wb") as raw:
        archive.write(raw, "tar.zst", [member], MTIME)
    magic, descriptor, window = struct.unpack_from("<IBB", path.read_bytes())
    assert magic == 0xFD2FB528
    assert descriptor & 0b100, "content checksum"
    assert not descriptor & 0b100000, "a single segment has no window"
    assert (1 << (10 + (window >> 3))) + (1 << (7 + (window >> 3))) * (window & 7) <= 8 << 20


def test_hash_file_gives_the_digest_of_each_chunk_and_of_the_whole() -> None:
    data = os.urandom(10_000)
    found = archive.hash_file(io.BytesIO(data), chunk_size=4096)
    parts = [data[:4096], data[4096:8192], data[8192:]]
    assert found.chunks == tuple(hashlib.sha256(part).hexdigest() for part in parts)
    assert (found.size, found.sha256) == (10_000, hashlib.sha256(data).hexdigest())
    assert len(archive.hash_file(io.BytesIO(data[:8192]), chunk_size=4096).chunks) == 2
    hasher = archive.ChunkHasher(4096)
    for at in range(0, len(data), 777):
        hasher.update(data[at : at + 777])
    assert hasher.digests() == found


@pytest.mark.parametrize(
    ("at", "field"),
    [
        *((257, b"ustar  \0"), (257, bytes(8)), (156, b"\0")),
        *((124, b"0o000000001"), (124, b"+0000000001")),
    ],
)
def test_header_that_other_readers_read_otherwise_is_refused(
    tmp_path: Path, at: int, field: bytes
) -> None:
    """A magic that is not ustar's, so that a prefix is none, numbers as Python writes them."""
    path = tarball(tmp_path / "x.tar.gz", ("runtime/x", {}, b"x"))
    plain = bytearray(gzip.decompress(path.read_bytes()))
    plain[at : at + len(field)] = field
    plain[148:156] = b"%06o\0 " % sum(plain[:148] + b" " * 8 + plain[156:512])
    path.write_bytes(gzip.compress(plain))
    refused(PackError, "ARCHIVE_DAMAGED", lambda: pack.read_inventory(path))


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME),
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE),
    ],
)
def test_extended_header_is_not_read_into_memory(tmp_path: Path, kind: bytes) -> None:
    path = tarball(tmp_path / "x.tar.gz", ("runtime/x", {"type": kind}, bytes(64 << 20)))
    tracemalloc.start()
    refused(PackError, "ARCHIVE_DAMAGED", lambda: pack.read_inventory(path))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_tarball_of_more_bytes_than_a_release_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 10_000)

    def written(names: str) -> None:
        content = [(f"runtime/{name}", io.BytesIO(bytes(8_000))) for name in names]
        members = (TarMember(name, 8_000, 0o644, stream) for name, stream in content)
        with (tmp_path / "w").open("wb") as raw:
            archive.write(raw, "tar.gz", members, 0)

    written("a")
    with pytest.raises(PackError, match="more than a release"):  # under another name
        written("ab")
    entries = ((f"runtime/{name}", {}, bytes(5_000)) for name in "abc")
    path = tarball(tmp_path / "x.tar.gz", *entries)
    refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(path))
    monkeypatch.setattr(archive, "MAX_BYTES", 8 << 30)
    content = library(tmp_path, "a.so").read_bytes()
    path = tarball(path, *((f"runtime/{number}", {}, content) for number in range(201)))
    refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(path))
    content = library(tmp_path, "b.so", fatbin=FATBINS / "sass-90.fatbin").read_bytes()
    path = tarball(path, *((f"runtime/{number}", {}, content) for number in range(3)))
    assert len(pack.read_inventory(path).inspections) == 3
    monkeypatch.setattr(fatbin, "MOST_READS", 5)  # of each file three or four are read
    refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(path))
    os.truncate(path, 1 << 40)  # which takes hours to hash
    refused(PackError, "TARBALL_UNREADABLE", lambda: pack.read_inventory(path))


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (bytes(1 << 20), ""),
        (bytes(4 << 20), "ARCHIVE_UNSOUND"),
        # in one record of 10,240 bytes, which tarfile reads at once
        (bytes(1024) + b"runtime/llama-server", "ARCHIVE_UNSOUND"),
        (b"G" * 512 + b"runtime/llama-server" + bytes(1024), "ARCHIVE_DAMAGED"),
        (b"", "ARCHIVE_DAMAGED"),
    ],
)
def test_only_zeros_and_no_endless_ones_follow_the_members(
    tmp_path: Path, end: bytes, code: str
) -> None:
    path = tarball(tmp_path / "x.tar.gz", ("runtime/x", {}, b"x"))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:1024] + end))
    if code:
        refused(PackError, code, lambda: pack.read_inventory(path))
    else:
        assert len(pack.read_inventory(path).files) == 1


def test_member_larger_than_a_library_can_be_is_not_written_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_LARGEST", 10)
    path = tarball(tmp_path / "x.tar.gz", ("runtime/a", {}, b"\x7fELF567890a"))
    refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(path))


def test_zstd_window_larger_than_any_of_ours_is_refused(tmp_path: Path) -> None:
    content = ("runtime/x", {}, os.urandom(1 << 12) * (1 << 12))
    unpacked = gzip.decompress(tarball(tmp_path / "x.tar.gz", content).read_bytes())
    path = tmp_path / "x.tar.zst"
    for window, fits in ((23, True), (24, False)):
        options = {zstd.CompressionParameter.window_log: window}
        with zstd.open(path, "wb", options=options) as stream:
            stream.write(unpacked)
        if fits:
            assert len(pack.read_inventory(path).files) == 1
        else:
            refused(PackError, "ARCHIVE_DAMAGED", lambda: pack.read_inventory(path))
