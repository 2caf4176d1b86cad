"""Faults 27 to 35: archives that are not what they should be (docs/faults.md)."""

import hashlib
import io
import lzma
import os
import random
import stat
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from llama_loader import foreign, receipt, unpack
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
    wheel_of,
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
def test_members_without_end(into: Path, entry: Entry, times: int, match: str) -> None:
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
def test_a_truncated_archive(into: Path, form: str) -> None:
    packed, _ = release(form=form)
    whole = len(packed)
    for length in (0, whole // 100, whole // 2, whole * 99 // 100, whole - 8, whole - 4, whole - 1):
        short = packed[:length]
        refused(into, short, describe(short or b"x", form=form), "damaged")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tail", [b"\0", b"garbage", b"\n" * 4096, bytes(100_000)])
def test_garbage_behind_the_archive(into: Path, form: str, tail: bytes) -> None:
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


def test_no_end_and_half_a_header(into: Path) -> None:
    plain = tar(GOOD, tarfile.USTAR_FORMAT)
    end = -(-len(plain.rstrip(b"\0")) // 512) * 512
    for length in (end, end + 188):
        packed = compress(plain[:length])
        refused(into, packed, describe(packed), "ends in the middle")


def crafted(checksum: bytes = b"", **fields: bytes) -> bytes:
    """The first header of a good archive with fields changed, and a right checksum if not given."""
    places = {"name": 0, "mode": 100, "size": 124, "flag": 156, "magic": 257, "prefix": 345}
    plain = bytearray(tar(GOOD, tarfile.USTAR_FORMAT))
    for name, value in fields.items():
        plain[places[name] : places[name] + len(value)] = value
    total = sum(plain[:148]) + sum(plain[156:512]) + 256
    plain[148:156] = checksum or b"%06o\0 " % total
    return bytes(plain)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with such records."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


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
def test_a_hostile_header(into: Path, fields: dict[str, bytes], match: str) -> None:
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
def test_a_damaged_extended_header(into: Path, record: bytes) -> None:
    kind = b"g" if record == b"10 path=x\n" else b"x"
    packed = compress(extended(record, kind) + tar(GOOD))
    refused(into, packed, describe(packed), "damaged|not read|UTF-8|bytes, not")


def test_an_extended_header_at_the_end(into: Path) -> None:
    plain = tar(GOOD, tarfile.USTAR_FORMAT)
    end = -(-len(plain.rstrip(b"\0")) // 512) * 512
    packed = compress(plain[:end] + extended(b"10 path=x\n") + bytes(1024))
    refused(into, packed, describe(packed), "after an extended header")


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


def test_pieces_stay_small() -> None:
    packed = compress(bytes(30 << 20), "tar.zst")
    assert max(len(piece) for piece in decompressed(iter([packed]), "tar.zst", "a")) <= 1 << 20


def members(plain: bytes) -> list[unpack.Member]:
    return list(unpack.Reader(pieces(plain, 100), "a", 1 << 30).members())


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


def foreign_unpack(packed: bytes, into: Path) -> dict[str, bytes]:
    entries = foreign.unpack(io.BytesIO(packed), "theirs", into)
    found = contents(into)
    assert [entry.path for entry in entries] == sorted(found)
    for entry in entries:
        assert entry.sha256 == hashlib.sha256(found[entry.path]).hexdigest()
        assert entry.size == len(found[entry.path])
        assert not (into / entry.path).is_symlink()
        assert bool((into / entry.path).stat().st_mode & 0o100) == entry.executable
    return found


LIB = Entry("build/bin/libllama.so.0.0.7", b"library")
PROGRAM = Entry("build/bin/llama-server", SCRIPT, 0o755)
OFFICIAL = (
    Entry("build", kind=tarfile.DIRTYPE, mode=0o755),
    Entry("build/bin/", kind=tarfile.DIRTYPE, mode=0o755),
    link("build/bin/libllama.so", "libllama.so.0"),
    link("build/bin/libllama.so.0", "libllama.so.0.0.7"),
    LIB,
    PROGRAM,
    link("build/bin/llama-cli", "build/bin/llama-server", hard=True),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dot", ["", "./"])
def test_links_become_files(into: Path, form: str, dot: str) -> None:
    entries = [replace(entry, path=dot + entry.path) for entry in OFFICIAL]
    found = foreign_unpack(compress(tar(entries), form), into)
    assert found["build/bin/libllama.so"] == b"library"
    assert found["build/bin/libllama.so.0"] == b"library"
    assert found["build/bin/llama-cli"] == SCRIPT
    assert os.access(into / "build/bin/llama-cli", os.X_OK)
    assert receipt.find_program(found, "theirs") == "build/bin"


def test_links_to_folders_and_through_them(into: Path) -> None:
    entries = (
        PROGRAM,
        Entry("build/lib/libx.so.1", b"x"),
        link("build/lib64", "lib"),
        link("build/bin/libx.so", "../lib64/libx.so.1"),
        link("a", "build/bin/llama-server"),
        link("b", "a", hard=True),
    )
    found = foreign_unpack(compress(tar(entries)), into)
    assert found["b"] == SCRIPT
    assert found["build/lib64/libx.so.1"] == found["build/bin/libx.so"] == b"x"


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        *(
            ([Entry(path, b"x")], "a member is called")
            for path in (
                "../x",
                "/x",
                "a/../x",
                "a\\x",
                "a\nx",
                "x" * 256,
                "x/" * 600 + "x",
                "d/" * 32 + "x",
            )
        ),
        ([Entry(".", b"x")], "'.' is a file"),
        ([link(".", "build")], "'.' is a symbolic link"),
        ([link("x", "/etc/passwd")], "link to '/etc/passwd'"),
        ([link("x", "../x")], "leads out"),
        ([link("build/x", "../../x")], "leads out"),
        ([link("x", "../x", hard=True)], "leads out"),
        ([link("x", "nothing")], "link to nothing"),
        ([link("x", ".")], "link to '.'"),
        ([link("x", "x")], "circle"),
        ([link("x", "y"), link("y", "x")], "circle"),
        ([link("x", "x/y")], "circle"),
        ([link("out", "/var"), Entry("out/x", b"x")], "link to '/var'"),
        ([link("in", "build"), Entry("in/x", b"x")], "stands where 'in' is already"),
        ([Entry("in/x", b"x"), link("in", "build")], "one, or differ"),
        ([Entry("build/bin/llama-server/x", b"x")], "stands where"),
        ([link("out", "/etc"), link("x", "out", hard=True)], "link to '/etc'"),
        ([PROGRAM], "one, or differ in case"),
        ([renamed(PROGRAM, "build/bin/LLAMA-server")], "one, or differ in case"),
        ([Entry("BUILD/bin/x", b"x")], "stands where 'build/bin' is already"),
        ([Entry("x", kind=tarfile.FIFOTYPE)], "is a FIFO"),
        ([Entry("x", kind=tarfile.CHRTYPE)], "is a character device"),
        ([Entry("x", b"x", 0o4755)], "mode 4755"),
        ([Entry("x", b"x", 0o2755)], "mode 2755"),
        ([Entry("é" * 120 + "/" + "é" * 125 + "/" + "é" * 125 + "/" + "é" * 150)], "is called"),
        ([link("x", "d/" * 32 + "x")], "is a link to"),
    ],
)
def test_their_archive_may_not_lead_out(into: Path, bad: list[Entry], match: str) -> None:
    with refusals.refused("ARCHIVE_REFUSED", IntegrityError, match):
        foreign_unpack(compress(tar((PROGRAM, *bad))), into)
    assert set(names(into.parent)) == {"into"}


def test_their_bombs(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = tar([Entry("x", kind=tarfile.DIRTYPE)], tarfile.USTAR_FORMAT)[:512]
    with pytest.raises(IntegrityError, match="more than 20000 members"):
        foreign.unpack(io.BytesIO(compress(folders * 20_001)), "theirs", into)
    monkeypatch.setattr(foreign, "MAX_BYTES", 1 << 20)
    big = Entry("build/big", bytes(800_000))
    copies = tar((PROGRAM, big, link("one", "build/big"), link("two", "build")))
    with pytest.raises(IntegrityError, match="more than"):
        foreign.unpack(io.BytesIO(compress(copies)), "theirs", into)


def test_folders_that_paths_only_name_are_counted_too(into: Path) -> None:
    """5,000 members with 127 folders each took gigabytes of memory, and as many folders on disk."""
    deep = [Entry(f"{number}/{'d/' * 8}", kind=tarfile.DIRTYPE) for number in range(5000)]
    with pytest.raises(IntegrityError, match="more than 20000 files and folders"):
        foreign.unpack(io.BytesIO(compress(tar(deep))), "theirs", into)


def zipped(*members: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data, mode in members:
            info = zipfile.ZipInfo(path)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def test_a_zip(into: Path) -> None:
    packed = zipped(
        ("build/bin/", b"", 0o40755),
        ("build/bin/llama-server", SCRIPT, 0),
        ("build/bin/libx.so.1", b"x", 0o100644),
        ("build/bin/libx.so", b"libx.so.1", 0o120777),
    )
    found = foreign_unpack(packed, into)
    assert found["build/bin/libx.so"] == b"x"
    assert os.access(into / "build/bin/llama-server", os.X_OK)


@pytest.mark.parametrize(
    ("path", "data", "mode", "match"),
    [
        ("../x", b"", 0o100644, "a member is called"),
        ("x", b"/etc/passwd", 0o120777, "link to"),
        ("x", b"", 0o010644, "special file"),
        ("x", b"", 0o104755, "mode 4755"),
    ],
)
def test_a_bad_zip(into: Path, path: str, data: bytes, mode: int, match: str) -> None:
    packed = zipped(("llama-server", SCRIPT, 0o100755), (path, data, mode))
    with pytest.raises(IntegrityError, match=match):
        foreign_unpack(packed, into)


# archives by others that ask for much work or memory


def foreign_refused(packed: bytes, into: Path, match: str) -> None:
    """Refused with little memory and in little time, nothing but the archive's fault."""
    tracemalloc.start()
    try:
        started = time.process_time()
        with pytest.raises(IntegrityError, match=match) as caught:
            foreign.unpack(io.BytesIO(packed), "theirs", into)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.code, caught.value.exit_status) == ("ARCHIVE_REFUSED", 4)
    assert peak < 64 << 20
    # tracemalloc takes most of it: 8 MiB in records of 5 bytes are 1.7 million steps
    assert time.process_time() - started < 30


def one_zip(method: int, data: bytes = SCRIPT * 100, name: str = "llama-server") -> bytes:
    return wheel_of({name: data}, method)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damaged", [False, True])
def test_zip_of_another_method_is_refused_before_it_is_decompressed(
    into: Path, method: int, *, damaged: bool
) -> None:
    """Damaged bzip2 is an OSError of zipfile's, and LZMA takes whatever memory it asks for."""
    packed = bytearray(one_zip(method))
    if damaged:
        place = packed.index(b"llama-server") + 20
        packed[place : place + 8] = b"\xff" * 8
    foreign_refused(bytes(packed), into, f"'llama-server' is compressed by method {method}")


def test_zip_with_a_million_entries_is_refused_without_their_objects(into: Path) -> None:
    packed = one_zip(zipfile.ZIP_STORED, b"", "x")
    start = packed.index(b"PK\x01\x02")
    entry, end = packed[start : packed.index(b"PK\x05\x06")], packed[-22:]
    directory = entry * 1_500_000
    sizes = len(directory).to_bytes(4, "little") + end[16:20]
    bomb = packed[:start] + directory + end[:12] + sizes + end[20:]
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="list of members has more than"):
        foreign.unpack(io.BytesIO(bomb), "theirs", into)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    few = entry * 20_001
    sizes = len(few).to_bytes(4, "little") + end[16:20]
    many = packed[:start] + few + end[:12] + sizes + end[20:]
    foreign_refused(many, into, "more than 20000 members")
    assert names(into) == []


def cut(packed: bytes) -> bytes:
    return packed[:-30]


def flipped(packed: bytes) -> bytes:
    middle = packed.index(b"llama-server") + 30
    return packed[:middle] + b"\xff\xff" + packed[middle + 2 :]


def member_at(place: bytes) -> Callable[[bytes], bytes]:
    def change(packed: bytes) -> bytes:
        at = packed.index(b"PK\x01\x02") + 42
        return packed[:at] + place + packed[at + 4 :]

    return change


def named_oddly(_: bytes) -> bytes:
    """A name that is no UTF-8, which the flags say it is."""
    return one_zip(zipfile.ZIP_DEFLATED, name="libé.so").replace("libé".encode(), b"lib\xff\xfe")


def list_moved(far: int) -> Callable[[bytes], bytes]:
    def change(packed: bytes) -> bytes:
        place = int.from_bytes(packed[-6:-2], "little") + far
        return packed[:-6] + place.to_bytes(4, "little") + packed[-2:]

    return change


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        *(cut, flipped, member_at(b"\xff\xff\xff\x7f"), member_at(b"\xff\xff\xff\xff")),
        *(list_moved(-50), list_moved(50), named_oddly),
    ],
)
def test_zip_that_is_damaged_or_whose_members_lie_elsewhere_is_refused(
    into: Path, tmp_path: Path, damage: Callable[[bytes], bytes], *, real: bool
) -> None:
    """In a real file a place before its beginning is an OSError of the system's."""
    packed = damage(one_zip(zipfile.ZIP_DEFLATED))
    (tmp_path / "theirs").write_bytes(packed)
    archive = (tmp_path / "theirs").open("rb") if real else io.BytesIO(packed)
    with archive, pytest.raises(IntegrityError) as caught:
        foreign.unpack(archive, "theirs", into)
    assert (caught.value.code, caught.value.exit_status) == ("ARCHIVE_REFUSED", 4)


def test_links_lead_on_as_far_as_linux_follows_them(into: Path) -> None:
    for hops, fine in ((40, True), (41, False), (15_000, False)):
        chain = [link(f"l{count}", f"l{count + 1}") for count in range(hops + 1)]
        packed = compress(tar([*chain, renamed(PROGRAM, f"l{hops + 1}")]))
        place = into / f"{hops}"
        place.mkdir()
        if fine:
            assert foreign_unpack(packed, place)["l0"] == SCRIPT
        else:
            foreign_refused(packed, place, "circle, or too far|1000 links")


def test_links_that_stand_for_too_many_files_are_refused_before_they_are_copied(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(foreign, "MAX_MEMBERS", 100)
    files = [Entry(f"d/{count}") for count in range(30)]
    links = [link(f"l{count}", "d") for count in range(30)]
    foreign_refused(compress(tar([*files, *links])), into, "links stand for more than 100 files")
    assert len(contents(into)) == 90


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
