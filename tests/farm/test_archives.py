"""Archives and wheels are unpacked within bounds, and nothing of them lands elsewhere."""

import gzip
import io
import re
import tarfile
import weakref
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import pytest

from farm import durable
from farm.errors import SourceError
from farm.inputs import archives
from tests.farm.test_container import collect
from tests.rigs.archives import Entry, compress, link, tar, wheel_of
from tests.rigs.refusals import refused


def archive_of(path: Path, *entries: Entry) -> Path:
    path.write_bytes(compress(tar(entries)))
    return path


def test_one_folder_comes_out_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with Debian 12's Python 3.11.2, whose ``tarfile`` has no filter."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = archive_of(
        tmp_path / "a.tar.gz",
        Entry("top-1.0/PKG-INFO", b"not wanted"),
        Entry("top-1.0/third/llama.cpp/run.sh", b"#!", 0o775),
        Entry("top-1.0/third/llama.cpp/src/a.c", b"int a;", 0o664),
        link("top-1.0/third/llama.cpp/src/link", "../run.sh"),
        Entry("top-1.0/third/llama.cpp-other/b.c", b"int b;"),
    )
    archives.extract_subtree(archive, "third/llama.cpp", tmp_path / "tree")
    found = {str(p.relative_to(tmp_path / "tree")): p for p in (tmp_path / "tree").rglob("*.*")}
    assert sorted(found) == ["run.sh", "src/a.c"]
    assert found["run.sh"].stat().st_mode & 0o777 == 0o755
    assert found["src/a.c"].stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "tree" / "src" / "link").read_bytes() == b"#!"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "entry",
    [
        Entry("top/sub/../../../escaped"),
        link("top/sub/link", "../../escaped"),
        link("top/sub/hard", "/etc/passwd", hard=True),
        Entry("top/sub/pipe", kind=tarfile.FIFOTYPE),
        Entry("top/sub/device", kind=tarfile.CHRTYPE),
        link("top/sub/nothing", "top/nothing", hard=True),
        Entry("top/header", bytes(9 << 20), kind=tarfile.XHDTYPE),
        link("top/sub/absolute", "/etc/passwd"),
        link("top/sub/other/../dots", "good"),
        Entry("top/sparse", kind=tarfile.GNUTYPE_SPARSE),
        Entry("top/sub/late", pax={"mtime": "1e30"}),
        Entry(f"top/sub/{'d/' * 1100}deep"),
        *(
            Entry(f"top/sparse{map_['GNU.sparse.major']}", b"1\n0\n0\n".ljust(512, b"\0"), pax=map_)
            for map_ in (
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
                {"GNU.sparse.major": "0", "GNU.sparse.size": "9", "GNU.sparse.map": "0,1"},
            )
        ),
    ],
    ids=lambda entry: entry.path.rpartition("/")[2],
)
def test_an_unsafe_archive_leaves_nothing(tmp_path: Path, entry: Entry) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", Entry("top/sub/good", b"x"), entry)
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("last", ["file", "link", "way", "products"])
def test_no_way_through_a_link_of_the_archive_is_taken(tmp_path: Path, last: str) -> None:
    """Links make a way of more than 4,096 bytes, which Python's filter takes for a safe one."""
    entries, deep = [Entry("top/sub/good", b"x")], ""
    for name in (steps := "abcdefghijklmnop"):
        entries += [Entry(f"top/sub/{deep}{'d' * 247}/x"), link(f"top/sub/{deep}{name}", "d" * 247)]
        deep += f"{'d' * 247}/"
    up = f"{'/'.join(steps)}/{'l' * 254}"
    entries += [link(f"top/sub/{up}", "../" * len(steps))] if last != "way" else []
    entries += [link("top/sub/escape", f"{up}/../../outside")] if last != "link" else []
    entries += [Entry("top/sub/escape/file", b"")] if last in ("file", "products") else []
    (outside := tmp_path / "in" / "outside").mkdir(parents=True)
    archive = archive_of(tmp_path / "a.tar.gz", *entries)
    with refused("ARCHIVE_UNSAFE", SourceError):
        if last == "products":
            collect(gzip.decompress(archive.read_bytes()), tmp_path / "in" / "tree")
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list(outside.iterdir()) == []
    assert last == "products" or list(outside.parent.iterdir()) == [outside]


BEYOND = "'top/[bc]' is a hard link or sparse, or beyond"


@pytest.mark.parametrize(
    ("bound", "names", "told"),
    [
        ("MOST_BYTES", "abc", BEYOND),
        ("MOST_FILES", "abc", BEYOND),
        ("MOST_FILES", ["sub/b/c/d/e"], "all more than 3 folders"),
    ],
)
def test_more_than_a_source_has_is_not_unpacked(
    tmp_path: Path, bound: str, names: Iterable[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of the folder, too: it would be unpacked to get past it."""
    archive = archive_of(
        tmp_path / "a.tar.gz", Entry("top/sub/a", b"12"), *(Entry(f"top/{n}", b"1") for n in names)
    )
    monkeypatch.setattr(durable, bound, 3)
    with refused("ARCHIVE_UNSAFE", SourceError, told):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list((tmp_path / "in").iterdir()) == []


def test_headers_of_an_archive_are_bounded_together_and_its_members_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, count in ((9_000, 1), (8_000, 140)):
        long = [Entry("top/sub/a", pax={"comment": "a" * size})] * count
        archive = archive_of(tmp_path / "a.tar.gz", *long)
        with refused("ARCHIVE_UNSAFE", SourceError, "long headers without end"):
            archives.extract_subtree(archive, "sub", tmp_path / "in")
    alive: weakref.WeakSet[tarfile.TarInfo] = weakref.WeakSet()
    headers: list[int] = []

    def seen(_into: Path, _content: IO[bytes], member: tarfile.TarInfo) -> None:
        alive.add(member)
        headers.append(len(member.pax_headers))

    monkeypatch.setattr(archives, "_write_file", seen)
    of_all = Entry("top/all", b"13 comment=x\n", kind=tarfile.XGLTYPE)
    many = io.BytesIO(tar([of_all, *(Entry(f"top/{n}") for n in range(20))]))
    archives.unpack(many, tmp_path, what="many", mode="r:", most=1)
    assert len(alive) < 4
    assert headers == [1, *[0] * 19]


def test_link_of_many_names_costs_no_time(tmp_path: Path) -> None:
    link = Entry("top/sub/a", kind=tarfile.SYMTYPE, target="x/" * 4_000)
    archive = archive_of(tmp_path / "a.tar.gz", link)
    with refused("ARCHIVE_UNSAFE", SourceError, "a is a link of more than 32 names"):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")


def test_an_archive_without_the_folder_or_cut_off(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", Entry("top/a", b"x" * 100_000))
    with pytest.raises(SourceError, match="no folder sub"):
        archives.extract_subtree(archive, "sub", tmp_path / "tree")
    archive.write_bytes(archive.read_bytes()[:60])
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "tree")


def test_two_at_once_make_one_folder(tmp_path: Path) -> None:
    with durable.new_folder(tmp_path / "tree") as slow:
        (slow / "from").write_text("slow", "utf-8")
        with durable.new_folder(tmp_path / "tree") as fast:
            (fast / "from").write_text("fast", "utf-8")
    assert (tmp_path / "tree" / "from").read_text("utf-8") == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\x"])
def test_no_file_of_a_wheel_lands_outside_its_folder(tmp_path: Path, name: str) -> None:
    wheel, into = tmp_path / "w.whl", tmp_path / "deep" / "in"
    wheel.write_bytes(wheel_of({name: b"x"}))
    archives.extract_wheel(wheel, into)
    assert [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*x")] == [
        ("deep", "in")
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no zip", "not a zip"),
        (wheel_of({"x": b"x"}, zipfile.ZIP_LZMA), "'x' is neither stored nor deflated"),
        (wheel_of({f"{n:060000}": b"" for n in range(70)}), "list of members has more than"),
        (wheel_of({f"{n}": b"" for n in range(3)}), "unpacks to more than 8 GiB"),
    ],
    ids=["no zip", "LZMA", "list", "size"],
)
def test_file_that_is_no_wheel_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    wheel = tmp_path / "w.whl"
    claimed = b"(?s)(PK\x01\x02.{20}).{4}", b"\\1\xff\xff\xff\xfe"  # 4 GiB of each member
    wheel.write_bytes(re.sub(*claimed, content) if "GiB" in words else content)
    with refused("ARCHIVE_UNSAFE", SourceError, words):
        archives.extract_wheel(wheel, tmp_path / "in")
