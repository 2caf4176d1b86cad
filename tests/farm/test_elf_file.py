"""What real binaries hold and need, as their bytes say it, and damaged files."""

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from binaries import FATBINS, compile_c, container, entry, library, library_of_objects
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from farm import elf
from farm.errors import FarmError, InspectError, UsageError
from tests.rigs import refusals


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "prog",
            {
                "needs": ("libbase.so.0", "libc.so.6"),
                "machine": os.uname().machine,
                "soname": None,
                "runpath": "$ORIGIN",
                "rpath": None,
                "glibcxx": None,
                "sass": (),
                "ptx": (),
            },
        ),
        ("libcuda90.so", {"sass": ("90",), "ptx": (), "soname": "libcuda90.so"}),
        ("object.o", {"needs": (), "glibc": None, "soname": None}),
    ],
)
def test_program_library_and_object_file(made: Path, name: str, told: dict[str, object]) -> None:
    found = elf.inspect(made / name)
    assert {field: getattr(found, field) for field in told} == told
    assert name != "prog" or found.glibc
    assert found.code.other == ()


def test_relocatable_device_code_has_a_section_of_its_own(tmp_path: Path) -> None:
    fatbin = FATBINS / "both-90-relocatable.fatbin"
    text = f'__asm__(".section __nv_relfatbin,\\"a\\"\\n.incbin \\"{fatbin}\\"\\n.text");'
    found = elf.inspect(compile_c(tmp_path / "rdc.o", text, "-c"))
    assert (found.sass, found.ptx) == (("90",), ("90",))


def test_cxx_program_needs_glibcxx(tmp_path: Path) -> None:
    text = "#include <iostream>\nint main() { std::cout << 1; }\n"
    found = elf.inspect(compile_c(tmp_path / "x", text, language="c++"))
    assert found.glibcxx is not None
    assert elf.version_key(found.glibcxx) >= (3, 4)


@pytest.mark.parametrize("tag", [14, 15, 29], ids=["SONAME", "RPATH", "RUNPATH"])
def test_two_of_what_there_may_be_one(tmp_path: Path, tag: int) -> None:
    library(tmp_path, "libbase.so.0")
    path = library(tmp_path, "libtwo.so", "libbase.so.0")
    data = bytearray(path.read_bytes())
    with path.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(".dynamic")
        at, size = section["sh_offset"], section["sh_size"]
    tags = {struct.unpack_from("<q", data, at + row)[0]: at + row for row in range(0, size, 16)}
    other = 29 if tag == 14 else 14
    struct.pack_into("<q", data, tags[1], tag)
    struct.pack_into("<q", data, tags[other], tag)
    path.write_bytes(data)
    with refusals.refused("ELF_CORRUPT", InspectError, f"dynamic entries with tag {tag}: "):
        elf.inspect(path)


def test_relative_relocations_need_glibc_2_36(tmp_path: Path) -> None:
    flags = ("-pie", "-fPIE", "-Wl,-z,pack-relative-relocs")
    try:
        path = compile_c(tmp_path / "x", "int y; int *x = &y; int main() { return *x; }", *flags)
    except subprocess.CalledProcessError:
        pytest.skip("this linker knows no pack-relative-relocs")
    found = elf.inspect(path)
    if "GLIBC_ABI_DT_RELR" not in found.marks:
        pytest.skip("this linker ignores pack-relative-relocs")
    assert found.glibc is not None
    assert elf.version_key(found.glibc) >= (2, 36)


def _through_pyelftools(path: Path) -> dict[str, object]:
    with path.open("rb") as stream:
        file = ELFFile(stream)
        tags = [
            tag
            for section in file.iter_sections()
            if isinstance(section, DynamicSection)
            for tag in section.iter_tags()
        ]
        versions = {
            auxiliary.name
            for section in file.iter_sections()
            if isinstance(section, GNUVerNeedSection)
            for _, auxiliaries in section.iter_versions()
            for auxiliary in auxiliaries
        }
        return {
            "needs": tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
            "soname": next((t.soname for t in tags if t.entry.d_tag == "DT_SONAME"), None),
            "glibc": _highest(versions, "GLIBC_"),
            "glibcxx": _highest(versions, "GLIBCXX_"),
        }


def _highest(versions: set[str], prefix: str) -> str | None:
    numbers = [v.removeprefix(prefix) for v in versions if v.startswith(f"{prefix}2.")]
    numbers += [v.removeprefix(prefix) for v in versions if v.startswith(f"{prefix}3.")]
    return max(numbers, key=elf.version_key, default=None)


def _programs_of_this_machine() -> list[Path]:
    names = ("gcc", "git", "python3", "ld", "tar", "bash")
    found = {Path(shutil.which(name) or "/bin/sh").resolve() for name in names}
    found.add(Path(sys.executable).resolve())
    folders = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))
    found |= {
        path.resolve() for folder in folders for path in sorted(folder.glob("lib*.so.*"))[:20]
    }
    return sorted(path for path in found if path.read_bytes()[:4] == b"\x7fELF")


def test_this_machines_programs_read_as_pyelftools_reads_them() -> None:
    paths = _programs_of_this_machine()
    assert len(paths) > 5
    for path in paths:
        found = elf.inspect(path)
        theirs = _through_pyelftools(path)
        if "GLIBC_ABI_DT_RELR" in found.marks:
            theirs["glibc"] = found.glibc
        assert {name: getattr(found, name) for name in theirs} == theirs, path


def test_truncated_library_or_damaged_cuda_section_is_refused(made: Path) -> None:
    whole = (made / "libcuda90.so").read_bytes()
    for data, code in (
        (whole[:-5000], "ELF_CORRUPT"),
        (whole.replace(struct.pack("<I", 0xBA55ED50), b"oops"), "FATBIN_CORRUPT"),
    ):
        with refusals.refused(code, InspectError, r"bad\.so: "):
            elf.inspect_stream(io.BytesIO(data), "bad.so")


def test_registered_code_that_is_gone_or_zeros_from_the_second_container_on(
    tmp_path: Path,
) -> None:
    text = '__asm__(".section .nvFatBinSegment,\\"aw\\"\\n.fill {}\\n.text");'
    path = compile_c(tmp_path / "gone.so", text.format(24), "-shared")
    with pytest.raises(InspectError, match="registers 1 CUDA objects; 0 are there"):
        elf.inspect(path)
    path = compile_c(tmp_path / "endless.so", text.format(9 << 20), "-shared")
    with pytest.raises(InspectError, match="nvFatBinSegment has 9437184 bytes, more than any has"):
        elf.inspect(path)
    code = (FATBINS / "sass-90.fatbin").read_bytes()
    path = library_of_objects(tmp_path, "libtwo.so", [code, code])
    assert elf.inspect(path).code.containers == 2
    data = path.read_bytes()
    at = data.find(code, data.find(code) + 1)
    path.write_bytes(data[:at] + bytes(len(code)) + data[at + len(code) :])
    with pytest.raises(InspectError, match="registers 2 CUDA objects; 1 are there"):
        elf.inspect(path)


def test_empty_container_of_a_device_link_counts_as_registered(tmp_path: Path) -> None:
    code = (FATBINS / "ptx-90.fatbin").read_bytes()
    path = library_of_objects(tmp_path, "liblinked.so", [code], links=[container()])
    found = elf.inspect(path).code
    assert (found.containers, found.empty) == (1, 1)


def test_code_cut_out_into_a_debug_file(made: Path, tmp_path: Path) -> None:
    debug = tmp_path / "x.debug"
    command = ["objcopy", "--only-keep-debug", str(made / "libcuda90.so"), str(debug)]
    subprocess.run(command, check=True)
    with refusals.refused("CODE_STRIPPED", InspectError):
        elf.inspect(debug)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        elf.inspect(tmp_path / "none")
    with pytest.raises(UsageError, match="is not a regular file"):
        elf.inspect(tmp_path)


def test_1500_mutations_end_in_facts_or_an_error_of_ours(made: Path) -> None:
    chance = random.Random(2)
    base = (made / "libcuda90.so").read_bytes()
    table = struct.unpack_from("<Q", base, 40)[0]
    hot = [*range(64), *range(table, len(base))]
    hot += _sections_that_are_walked(base)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(base)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice(hot)
            data[at] = chance.choice((0, 0xFF, chance.randrange(256)))
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        try:
            elf.inspect_stream(io.BytesIO(data), "x")
            outcomes["read"] += 1
        except FarmError as error:
            assert isinstance(error, InspectError)  # noqa: PT017 - either outcome is right
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 150


def _sections_that_are_walked(data: bytes) -> list[int]:
    file = ELFFile(io.BytesIO(data))
    names = (".dynamic", ".gnu.version_r", ".nv_fatbin", ".dynstr")
    found = [file.get_section_by_name(name) for name in names]
    return [
        at for s in found for at in range(s["sh_offset"], s["sh_offset"] + min(s["sh_size"], 512))
    ]


def _section_row(kind: int, offset: int, size: int, *, name: int = 0, link: int = 0) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, link, 0, 0, 0)


def _elf_of(body: bytes, *rows: bytes) -> bytes:
    """Return an ELF file: header, ``body`` at 64, then the section table; names at 64."""
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0,
        64, len(rows), 0,
    )  # fmt: skip
    return head + body + b"".join(rows)


def _shared_version_needs() -> bytes:
    """20,000 rows that each point at the rest of them: 200 million steps if each were followed."""
    needs = b"".join(struct.pack("<HHIII", 1, 1, 0, 16, 16) for _ in range(20_000))
    needs += struct.pack("<HHIII", 1, 1, 0, 16, 0)
    rows = (_section_row(3, 64, 32), _section_row(0x6FFFFFFE, 96, len(needs)))
    return _elf_of(bytes(32) + needs, *rows)


def _sections_over_one_piece_of_code() -> bytes:
    names = b"\0.nv_fatbin\0".ljust(16, b"\0")
    code = container(*[entry(2, 90, payload=b"")] * 10_000)
    rows = [_section_row(1, 80, len(code), name=1)] * 1000
    return _elf_of(names + code, _section_row(3, 64, 16), *rows)


def _many_dynamic_sections() -> bytes:
    return _elf_of(bytes(16), _section_row(3, 64, 16), *[_section_row(6, 64, 16)] * 1000)


def _many_entries_of_one_name(kind: int, entry: bytes) -> bytes:
    """Return 5,000 entries that would take 20 MB of memory."""
    names = (b"\0" * 16 + b"A" * 4000).ljust(4080, b"\0")
    rows = (_section_row(3, 64, len(names)), _section_row(kind, 64 + len(names), 5000 * len(entry)))
    return _elf_of(names + entry * 5000, *rows)


def _many_sections_of_one_name() -> bytes:
    return _elf_of(
        b"A" * 4000 + b"\0" * 96, _section_row(3, 64, 4096), *[_section_row(1, 0, 0)] * 5000
    )


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: _many_entries_of_one_name(6, struct.pack("<qQ", 1, 16)), "more names"),
        (lambda: _many_entries_of_one_name(6, struct.pack("<qQ", 1, 0)), "more names"),
        (_many_sections_of_one_name, "more names"),
        (_shared_version_needs, "used twice|more names"),
        (_sections_over_one_piece_of_code, "overlap"),
        (_many_dynamic_sections, "1000 sections of type 0x6"),
    ],
)
def test_small_file_that_would_be_walked_for_hours_is_refused_quickly(
    make: Callable[[], bytes], problem: str
) -> None:
    data, started = make(), time.process_time()
    with pytest.raises(InspectError, match=problem):
        elf.inspect_stream(io.BytesIO(data), "x")
    assert time.process_time() - started < 2
