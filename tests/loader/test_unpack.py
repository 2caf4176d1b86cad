"""Faults 27 to 35: archives that are not what they should be (docs/faults.md)."""

import io
import lzma
import os
import random
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from llama_loader import foreign, unpack
from llama_loader.errors import IntegrityError
from llama_loader.unpack import decompressed
from tests.rigs import refusals
from tests.rigs.archives import (
    GOOD,
    SCRIPT,
    SERVER,
    Entry,
    compress,
    contents,
    describe,
    link,
    names,
    release,
    renamed,
    tar,
)

FORMS = ("tar.gz", "tar.xz", "tar.zst")


def pieces(data: bytes, size: int = 4096) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def refused(into: Path, packed: bytes, artifact: Any, match: str) -> None:
    fresh = Path(tempfile.mkdtemp(dir=into))
    with refusals.refused("ARCHIVE_REFUSED", IntegrityError, match) as caught:
        unpack.unpack(pieces(packed), artifact, fresh)
    assert artifact.name in caught.value.message
    assert names(into.parent) == ["into"]
    assert not any(path.is_symlink() for path in into.rglob("*"))


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_listed_is_written(into: Path, form: str, style: int) -> None:
    """Folders of listed files may stand there, and extended headers that only tell times."""
    long = Entry(f"runtime/{'d' * 60}/{'e' * 60}/file", b"deep")
    folders = [folder(path) for path in ("runtime", "runtime/d/", "runtime/d//")]
    timed = replace(SERVER, pax={"mtime": "12.5", "comment": "x=y"})
    entries = (timed, *GOOD[1:], long, Entry("runtime/d/x", b"x"))
    packed = compress(tar((*folders, *entries), style), form)
    artifact = describe(packed, entries, form)
    for size in (1, 7, 4096, 100_000):
        place = into / f"{size}"
        unpack.unpack(pieces(packed, size), artifact, place)
        assert contents(place) == {entry.path: entry.data for entry in entries}
        modes = [stat.S_IMODE((place / entry.path).stat().st_mode) for entry in entries]
        assert modes == [entry.mode for entry in entries]


# 27 to 33: anything but the listed files, as plain files


def folder(path: str) -> Entry:
    return Entry(path, kind=tarfile.DIRTYPE, mode=0o755)


OTHER_KINDS = (
    link("runtime/no", "/etc/passwd"),
    link("runtime/no", "llama-server"),
    link("runtime/no", "runtime/llama-server", hard=True),
    *(Entry("runtime/no", kind=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE)),
    *(Entry("runtime/no", kind=kind) for kind in (tarfile.FIFOTYPE, tarfile.CONTTYPE, b"S", b"V")),
)
ELSEWHERE = (
    *("../x", "/etc/x", "runtime/../../x", "runtime/./x", "runtime//x", "runtime\\x"),
    *("./runtime/llama-server", "runtime/llama-server/", "runtime/llama-server/x"),
)
MODES = (0o4755, 0o2755, 0o1755, 0o777, 0o644, 0o700, 0)
OTHERS = {
    **{
        f"moved to {path}": ((replace(SERVER, pax={"path": path}), *GOOD[1:]), "not listed")
        for path in ("../x", "/x", "runtime/other")
    },
    **{
        f"more at {path}": ((*GOOD, Entry(path, b"x")), "listed|folder|content")
        for path in ELSEWHERE
    },
    **{
        f"folder {path}": ((folder(path), *GOOD), "folder, not a plain file")
        for path in ("elsewhere", "../up", "runtime/empty")
    },
    **{
        f"kind {bad.kind!r} {bad.target}": ((*GOOD[:-1], bad), "not a plain file")
        for bad in OTHER_KINDS
    },
    "through a link": ((link("runtime", "../.."), *GOOD), "symbolic link"),
    **{f"mode {mode:o}": ((replace(SERVER, mode=mode), *GOOD[1:]), "has mode") for mode in MODES},
    "twice": ((*GOOD, SERVER), "is in the archive twice"),
    "in another case": ((*GOOD, renamed(SERVER, "runtime/LLAMA-server")), "not listed"),
    "missing": (GOOD[1:], "runtime/llama-server is listed but missing"),
    "empty": ((), "listed but missing"),
    **{
        f"{len(data)} bytes": ((replace(SERVER, data=data), *GOOD[1:]), "bytes, not 21")
        for data in (SCRIPT + b"x", SCRIPT[:-1], b"")
    },
    "other content": (
        (replace(SERVER, data=b"x" * len(SCRIPT)), *GOOD[1:]),
        "not what the manifest lists",
    ),
    "bomb": ((*GOOD[:-1], Entry("runtime/no", bytes(1 << 20))), "1048576 bytes, not 0"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_member_that_is_not_as_it_is_listed(into: Path, how: str) -> None:
    entries, match = OTHERS[how]
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        packed = compress(tar(entries, style))
        if "moved" in how and style == tarfile.GNU_FORMAT:
            continue  # its path is in an extended header
        refused(into, packed, describe(packed), match)


def test_a_file_is_private_until_it_is_whole_and_then_on_the_disk(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its fsync the file has all its bytes and its mode; before, nobody else may read it."""
    synced: list[tuple[int, int]] = []

    def look(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_size, stat.S_IMODE(status.st_mode)))

    def content() -> Iterator[memoryview]:
        yield memoryview(b"one")
        assert stat.S_IMODE((into / "deep/file").stat().st_mode) == 0o600
        assert synced == []
        yield memoryview(b"two")

    monkeypatch.setattr(os, "fsync", look)
    written = unpack.write(content(), "deep/file", into, executable=True)
    assert synced == [(6, 0o755)]
    assert (written.path, written.size, written.executable) == ("deep/file", 6, True)
    with pytest.raises(FileExistsError):
        unpack.write(content(), "deep/file", into, executable=True)


def test_how_much_more_than_its_files_an_archive_may_hold(into: Path) -> None:
    """1 MiB of padding, and 8 KiB for each of the four files and the two folders."""
    plain = tar(GOOD)
    limit = sum(len(entry.data) for entry in GOOD) + (1 << 20) + 8192 * 6
    for length, fine in ((limit, True), (limit + 1, False)):
        packed = compress(plain.ljust(length, b"\0"))
        if fine:
            unpack.unpack(pieces(packed), describe(packed), into / "fine")
        else:
            refused(into, packed, describe(packed), "more than it may")


@pytest.mark.parametrize("form", FORMS)
def test_a_bomb_is_not_unpacked(into: Path, form: str) -> None:
    bomb = compress(bytes(64 << 20), form)
    for packed in (compress(tar(GOOD), form) + bomb, bomb + bomb):
        refused(into, packed, describe(packed, form=form), "more than it may|missing")


@pytest.mark.parametrize(
    ("entry", "times", "match"),
    [(folder("runtime"), 100_000, "more than it may"), (Entry("x/a"), 1_000_000, "not listed")],
)
def test_members_without_end_are_refused_and_leave_nothing(
    into: Path, entry: Entry, times: int, match: str
) -> None:
    packed = compress(tar([entry])[:512] * times)
    refused(into, packed, describe(packed), match)
    assert contents(into) == {}


def test_an_extended_header_of_a_gigabyte_is_not_read(into: Path) -> None:
    for kind in (b"x", b"g", b"L", b"K"):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 30
        packed = compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(100_000))
        refused(into, packed, describe(packed), "extended header has 1073741824 bytes")


# 34: damage


@pytest.mark.parametrize("form", FORMS)
def test_archive_cut_off_anywhere_is_refused_as_damaged(into: Path, form: str) -> None:
    packed, _ = release(form=form)
    whole = len(packed)
    for length in (0, whole // 100, whole // 2, whole * 99 // 100, whole - 8, whole - 4, whole - 1):
        short = packed[:length]
        refused(into, short, describe(short or b"x", form=form), "damaged")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tail", [b"\0", b"garbage", b"\n" * 4096, bytes(100_000)])
def test_bytes_behind_an_archive_are_refused_as_damaged(into: Path, form: str, tail: bytes) -> None:
    packed, _ = release(form=form)
    refused(into, packed + tail, describe(packed + tail, form=form), "damaged")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("far", [False, True])
def test_data_behind_the_end_of_the_tar(into: Path, form: str, far: bool) -> None:
    plain = tar(GOOD)
    packed = compress(plain + bytes(600_000 if far else 0) + b"hidden", form)
    refused(into, packed, describe(packed, form=form), "follows the end")
    two = compress(plain, form) + compress(tar([Entry("x")]), form)
    refused(into, two, describe(two, form=form), "follows the end")


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_in_several_members_is_one(into: Path, form: str) -> None:
    plain = tar(GOOD)
    packed = b"".join(compress(plain[at : at + 5000], form) for at in range(0, len(plain), 5000))
    unpack.unpack(pieces(packed), describe(packed, form=form), into)
    assert contents(into) == {entry.path: entry.data for entry in GOOD}


@pytest.mark.parametrize("form", FORMS)
def test_empty_members_of_a_large_chunk_cost_what_their_bytes_do(form: str) -> None:
    one, began = compress(b"", form), time.process_time()
    assert not [*unpack.decompressed(iter([one * ((1 << 20) // len(one))]), form, "x")]
    assert time.process_time() - began < 4


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_of_the_compressed_data(form: str) -> None:
    packed, _ = release(form=form)
    for at in range(0, len(packed), max(1, len(packed) // 40)):
        damaged = bytearray(packed)
        damaged[at] ^= 4
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr(os, "fsync", lambda _: None)
            try:
                unpack.unpack(pieces(bytes(damaged)), describe(packed, form=form), Path(folder))
            except IntegrityError:
                continue
            # Some bits say nothing: a gzip header's time, a flag that readers ignore.
            assert contents(Path(folder)) == {entry.path: entry.data for entry in GOOD}


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with such records."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (b"", "ends in the middle"),
        (bytes(188), "ends in the middle"),
        (extended(b"10 path=x\n") + bytes(1024), "after an extended header"),
    ],
)
def test_archive_that_ends_without_its_end_or_after_an_extended_header_is_refused(
    into: Path, last: bytes, words: str
) -> None:
    plain = tar(GOOD, tarfile.USTAR_FORMAT)
    packed = compress(plain[: -(-len(plain.rstrip(b"\0")) // 512) * 512] + last)
    refused(into, packed, describe(packed), words)


def crafted(checksum: bytes = b"", **fields: bytes) -> bytes:
    """The first header of a good archive with fields changed, and a right checksum if not given."""
    places = {"name": 0, "mode": 100, "size": 124, "flag": 156, "magic": 257, "prefix": 345}
    plain = bytearray(tar(GOOD, tarfile.USTAR_FORMAT))
    for name, value in fields.items():
        plain[places[name] : places[name] + len(value)] = value
    total = sum(plain[:148]) + sum(plain[156:512]) + 256
    plain[148:156] = checksum or b"%06o\0 " % total
    return bytes(plain)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"size": b"\x80\0\0\0\0\0\0\0\0\0\0\x15"}, "not a number"),
        ({"size": b"-0000000025\0"}, "not a number"),
        ({"size": b"77777777777\0"}, "bytes, not 21"),
        ({"name": b"\xff\xfe\0"}, "not UTF-8"),
        ({"flag": b"5"}, "has content"),
        ({"flag": b"1"}, "has content"),
        ({"prefix": b"..\0"}, "not listed"),
        ({"checksum": b"0000000\0"}, "checksum"),
        ({"checksum": b"9999999\0"}, "not a number"),
    ],
)
def test_header_with_impossible_fields_is_refused(
    into: Path, fields: dict[str, bytes], match: str
) -> None:
    packed = compress(crafted(**fields))
    refused(into, packed, describe(packed), match)


def test_a_header_of_before_posix_and_a_global_comment_are_read(into: Path) -> None:
    packed = compress(extended(b"15 comment=abc\n", b"g") + crafted(magic=bytes(8), flag=b"\0"))
    unpack.unpack(pieces(packed), describe(packed), into)


@pytest.mark.parametrize(
    "record",
    [
        *(b"12 size=0021", b"9999 path=x\n", b"0 path=x\n", b"xx path=x\n", b"11 path:xx\n"),
        *(b"11 path=xxx", b"13 size=0x15\n", b"12 size= 21\n", b"22 GNU.sparse.major=1\n"),
        b"11 path=\xff\xff\n",
        b"10 path=x\n",  # a file's, but not in a global header
    ],
)
def test_damaged_extended_header_is_refused(into: Path, record: bytes) -> None:
    kind = b"g" if record == b"10 path=x\n" else b"x"
    packed = compress(extended(record, kind) + tar(GOOD))
    refused(into, packed, describe(packed), "damaged|not read|UTF-8|bytes, not")


def test_a_zstd_window_of_more_than_8_mib(into: Path) -> None:
    data = random.Random(1).randbytes(1 << 20) * 20
    for log, fine in ((23, True), (24, False)):
        packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
        packed = packer.compress(data) + packer.flush()
        if fine:
            assert b"".join(decompressed(pieces(packed), "tar.zst", "a")) == data
        else:
            refused(into, packed, describe(packed, form="tar.zst"), "damaged")


def test_an_xz_dictionary_of_more_than_80_mib(into: Path) -> None:
    for megabytes, fine in ((64, True), (96, False)):
        size = megabytes << 20
        fast: dict[str, Any] = {"mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 32}
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": size, **fast}]
        packed = lzma.compress(tar(GOOD), filters=filters)
        if fine:
            assert b"".join(decompressed(pieces(packed), "tar.xz", "a")) == tar(GOOD)
        else:
            refused(into, packed, describe(packed, form="tar.xz"), "[Mm]emory")


def test_a_format_that_is_not_known_yet(into: Path) -> None:
    packed, artifact = release(format="tar.br")
    with pytest.raises(IntegrityError, match=r"cannot read 'tar\.br'") as caught:
        unpack.unpack(pieces(packed), artifact, into)
    assert "update the loader" in caught.value.hint


def test_decompressed_pieces_have_at_most_a_mebibyte() -> None:
    packed = compress(bytes(30 << 20), "tar.zst")
    assert max(len(piece) for piece in decompressed(iter([packed]), "tar.zst", "a")) == 1 << 19


def members(plain: bytes) -> list[unpack.Member]:
    return list(unpack.Reader(pieces(plain, 100), "a", 1 << 30).members())


def test_an_extended_header_has_at_most_64_kib() -> None:
    for size, fine in ((65536, True), (65537, False)):
        plain = extended((b"%d comment=" % size).ljust(size - 1, b"x") + b"\n") + tar(GOOD)
        if fine:
            assert len(members(plain)) == len(GOOD)
            continue
        with pytest.raises(IntegrityError, match="an extended header has 65537 bytes"):
            members(plain)


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("length", [1, 99, 100, 101, 256, 3000])
def test_paths_and_links_of_every_length_are_read_as_they_stand_there(
    style: int, length: int
) -> None:
    path = "p" * length
    entries = [Entry(path, b"x"), link("x", path), link("y", path, hard=True), Entry("next", b"y")]
    assert [(one.path, one.kind, one.target) for one in members(tar(entries, style))] == [
        (path, "file", ""),
        ("x", "symbolic link", path),
        ("y", "hard link", path),
        ("next", "file", ""),
    ]


def test_a_header_is_read_to_its_fields_ends() -> None:
    full = crafted(name=b"z" * 100, prefix=b"z" * 155)
    assert full[148:149] == b"1"  # a checksum of as many digits as there is room for
    for plain, path in (
        (crafted(mode=b"7654321\0", prefix=b"a\0"), "a/runtime/llama-server"),
        (crafted(mode=b"7654321\0", prefix=b"p" * 155), f"{'p' * 155}/runtime/llama-server"),
        (crafted(mode=b"7654321\0", name=b"n" * 100), "n" * 100),
        (full, f"{'z' * 155}/{'z' * 100}"),
    ):
        assert members(plain)[0].path == path
        assert members(plain)[0].mode == (0o755 if plain == full else 0o7654321)


def test_a_file_whose_name_ends_with_a_slash_is_a_folder() -> None:
    (found,) = members(tar([Entry("runtime/", kind=tarfile.REGTYPE)]))
    assert (found.kind, found.size) == ("folder", 0)


# 35: archives by others


# archives by others that ask for much work or memory


@pytest.mark.parametrize("data", [b"", b"5 a=\n" * 10_000])
def test_extended_headers_without_end_are_refused(
    into: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """Each record is a step: 8 GiB of them would take half an hour."""
    assert unpack.MAX_EXTENDED_ALL == 8 << 20
    monkeypatch.setattr(unpack, "MAX_EXTENDED_ALL", 1 << 20)
    packed = compress(extended(data) * ((1 << 20) // (512 + len(data)) + 1))
    with pytest.raises(IntegrityError, match="extended headers have more than 1048576 bytes"):
        foreign.unpack(io.BytesIO(packed), "theirs", into)
    refused(into, packed, describe(packed), "more than it may|more than 1048576")
