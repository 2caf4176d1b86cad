"""What differs between two builds is found and named: file, place, cause."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
from binaries import compile_c
from hypothesis import given
from hypothesis import strategies as st

from farm.binaries.elf_file import ElfFile
from farm.errors import PackError
from farm.reproduce import diffoscope
from farm.reproduce.differing_bytes import compare
from farm.reproduce.reproducibility import (
    Difference,
    compare_files,
    compare_tarballs,
    compare_trees,
)
from farm.tarball import archive
from farm.tarball.archive import Member

SOURCE = """
const char *const motto = "built the same way each time";
__attribute__((section(".note.test"), used)) static const char note[] = "a note of ours";
int twice(int n) { return 2 * n; }
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elf")
    return compile_c(folder / "libsame.so", SOURCE, "-shared", "-fPIC", "-Wl,--build-id")


@pytest.fixture
def trees(library: Path, tmp_path: Path) -> tuple[Path, Path]:
    first = tmp_path / "first"
    (first / "bin").mkdir(parents=True)
    shutil.copy2(library, first / "bin" / "libsame.so.0")
    (first / "bin" / "libsame.so").symlink_to("libsame.so.0")
    (first / "BUILD.json").write_text(json.dumps({"line": {"glibc": "2.35"}, "archs": ["90"]}))
    return first, Path(shutil.copytree(first, tmp_path / "second", symlinks=True))


def section(path: Path, name: str) -> tuple[int, int]:
    with path.open("rb") as stream:
        found = ElfFile.open(stream, path.name)
        return next((s.offset, s.size) for s in found.sections if s.name == name)


def change(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)


def test_copies_are_the_same(trees: tuple[Path, Path]) -> None:
    assert compare_trees(*trees) == ()


@pytest.mark.parametrize("name", [".text", ".rodata", ".note.test", ".note.gnu.build-id"])
def test_one_changed_byte_is_named_by_section_and_offset(
    trees: tuple[Path, Path], name: str
) -> None:
    changed = trees[1] / "bin" / "libsame.so.0"
    offset, size = section(changed, name)
    change(changed, offset + size - 2)
    (found,) = compare_trees(*trees)
    assert found.path == "bin/libsame.so.0"
    assert found.what.startswith(f"section {name}, 1 of {size} bytes, the first at {size - 2:#x}")
    assert bool(found.cause) == (name == ".note.gnu.build-id")


def test_a_changed_byte_outside_of_all_sections_is_found(trees: tuple[Path, Path]) -> None:
    changed = trees[1] / "bin" / "libsame.so.0"
    change(changed, 0x24 + 12)  # e_flags and what follows: of the header, of no section
    (found,) = compare_trees(*trees)
    assert "outside of all sections" in found.what


def test_a_section_that_only_one_has_is_named(library: Path, tmp_path: Path) -> None:
    other = compile_c(tmp_path / "other.so", SOURCE, "-shared", "-fPIC", "-Wl,--build-id=none")
    found = compare_files("libsame.so", library, other)
    assert "only the first has section .note.gnu.build-id" in [one.what for one in found]


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        (("/home/one/source.c", "/home/two/source.c"), "a folder of the build"),
        (("Nov 23 2026", "Nov 24 2026"), "a date of the build"),
        (("at 12:30:01 sharp", "at 12:30:02 sharp"), "a time of day"),
        (
            ("_ZN41_INTERNAL_bc76a5bc_10_argsort_cu", "_ZN41_INTERNAL_d9998459_10_argsort_cu"),
            "nvcc's own name for a source file",
        ),
        (("tmpxft_00001_norm", "tmpxft_00002_norm"), "a temporary file of nvcc's"),
        (("some words", "other words"), ""),
    ],
)
def test_what_the_text_looks_like_tells_the_cause(
    tmp_path: Path, texts: tuple[str, str], cause: str
) -> None:
    made = [
        compile_c(tmp_path / f"{n}.so", f'const char *t = "{text}";\n', "-shared", "-fPIC")
        for n, text in enumerate(texts)
    ]
    found = {one.what.partition(",")[0]: one for one in compare_files("x.so", *made)}
    difference = found["section .rodata"]
    assert all(repr(text) in difference.what for text in texts)
    assert difference.cause.startswith(cause)
    assert bool(difference.cause) == bool(cause)


def test_a_missing_file_is_named_with_its_side(trees: tuple[Path, Path]) -> None:
    (trees[0] / "BUILD.json").unlink()
    (trees[1] / "bin" / "libsame.so").unlink()
    assert [one.render() for one in compare_trees(*trees)] == [
        "BUILD.json: only the second has it",
        "bin/libsame.so: only the first has it",
    ]


def test_mode_and_link_are_compared(trees: tuple[Path, Path]) -> None:
    (trees[1] / "BUILD.json").chmod(0o755)
    (trees[1] / "bin" / "libsame.so").unlink()
    (trees[1] / "bin" / "libsame.so").symlink_to("nowhere")
    (trees[0] / "BUILD.json").chmod(0o644)
    mode, link = compare_trees(*trees)
    assert mode == Difference("BUILD.json", "mode 0644 / 0755")
    assert "link to libsame.so.0 / link to nowhere" in link.what


def test_a_record_is_compared_field_by_field(trees: tuple[Path, Path]) -> None:
    other = {"line": {"glibc": "2.36"}, "archs": ["90", "120"]}
    (trees[1] / "BUILD.json").write_text(json.dumps(other))
    assert [one.what for one in compare_trees(*trees)] == [
        "$.line.glibc is '2.35' / '2.36'",
        "$.archs[1] is not there / '120'",
    ]


def tarball(folder: Path, members: list[tuple[str, bytes, int]], mtime: int = 0) -> Path:
    folder.mkdir()
    path = folder / "x.tar.zst"
    with path.open("wb") as raw, archive.write(raw, "tar.zst", mtime) as writer:
        for name, content, mode in members:
            writer.add(Member(f"runtime/{name}", len(content), mode, io.BytesIO(content)))
    return path


MEMBERS = [("a", b"alpha", 0o644), ("b", b"beta", 0o644)]


@pytest.mark.parametrize(
    ("members", "mtime", "found"),
    [
        (MEMBERS, 0, []),
        (MEMBERS[::-1], 0, ["members in another order: number 1 is runtime/a / runtime/b"]),
        (MEMBERS, 7, ["time 0 / 7 in the archive"] * 2),
        ([MEMBERS[0], ("b", b"beta", 0o755)], 0, ["mode 0644 / 0755"]),
        ([MEMBERS[0], ("b", b"bete", 0o644)], 0, ["1 of 4 bytes, the first at 0x3"]),
        ([MEMBERS[0], ("b", b"bet", 0o644)], 0, ["4 / 3 bytes, the first other one at 0x3"]),
        (MEMBERS[:1], 0, ["only the first has it"]),
    ],
)
def test_tarballs_are_compared_member_by_member(
    tmp_path: Path, members: list[tuple[str, bytes, int]], mtime: int, found: list[str]
) -> None:
    first = tarball(tmp_path / "first", MEMBERS)
    second = tarball(tmp_path / "second", members, mtime)
    assert [one.what for one in compare_tarballs(first, second)] == found


def test_the_same_members_compressed_otherwise_are_told_as_that(tmp_path: Path) -> None:
    first = tarball(tmp_path / "first", MEMBERS)
    second = tmp_path / "x.tar.zst"
    with second.open("wb") as raw, archive.write(raw, "tar.zst", 0, level=1) as writer:
        for name, content, mode in MEMBERS:
            writer.add(Member(f"runtime/{name}", len(content), mode, io.BytesIO(content)))
    (found,) = compare_tarballs(first, second)
    assert "the compressor" in found.cause


def test_a_damaged_tarball_is_one_error(tmp_path: Path) -> None:
    first = tarball(tmp_path / "first", MEMBERS)
    second = tarball(tmp_path / "second", MEMBERS)
    second.write_bytes(second.read_bytes()[:-9])
    with pytest.raises(PackError) as failed:
        compare_tarballs(first, second)
    assert failed.value.code == "ARCHIVE_DAMAGED"


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_bytes_are_compared_as_python_compares_them(first: bytes, second: bytes) -> None:
    found = compare(
        (io.BytesIO(b"before" + first), 6, len(first)),
        (io.BytesIO(second + b"after"), 0, len(second)),
    )
    if first == second:
        assert found is None
        return
    assert found is not None
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    assert found.first == len(list(same))
    same_size = len(first) == len(second)
    expected = sum(a != b for a, b in zip(first, second, strict=True)) if same_size else None
    assert found.count == expected


def test_without_diffoscope_it_is_said_and_both_sides_are_kept(
    trees: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    change(trees[1] / "BUILD.json", 3)
    said: list[str] = []
    kept = tmp_path / "kept"
    diffoscope.keep(*trees, compare_trees(*trees), kept, said.append)
    assert said[0].startswith("note[NO_DIFFOSCOPE]: ")
    for side, tree in zip(("first", "second"), trees, strict=True):
        assert (kept / side / "BUILD.json").read_bytes() == (tree / "BUILD.json").read_bytes()
    assert not (kept / "first" / "bin").exists()
