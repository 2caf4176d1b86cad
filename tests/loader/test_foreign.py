"""Archives of others: links, zips and files that no manifest lists."""

import hashlib
import io
import os
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama_loader import foreign, receipt
from llama_loader.errors import IntegrityError
from tests.loader.test_unpack import FORMS
from tests.rigs import refusals
from tests.rigs.archives import (
    SCRIPT,
    Entry,
    compress,
    contents,
    link,
    names,
    renamed,
    tar,
    wheel_of,
)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


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
def test_links_of_an_archive_become_files_with_the_bytes_of_their_targets(
    into: Path, form: str, dot: str
) -> None:
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


def test_archive_of_others_with_too_many_members_or_bytes_is_refused(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_zip_of_others_is_unpacked_with_its_links_and_an_executable_server(into: Path) -> None:
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
def test_zip_of_others_with_an_unsound_member_is_refused(
    into: Path, path: str, data: bytes, mode: int, match: str
) -> None:
    packed = zipped(("llama-server", SCRIPT, 0o100755), (path, data, mode))
    with pytest.raises(IntegrityError, match=match):
        foreign_unpack(packed, into)


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
