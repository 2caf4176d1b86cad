"""What the farm asks of real binaries, what is refused, and the command that prints it."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from binaries import FATBINS, compile_c, container, entry, library_of_objects

from farm import elf, targets
from farm.errors import InspectError
from tests.rigs import refusals
from tests.rigs.heard import heard

TABLE = targets.load()
CPU, CU130 = TABLE.line("cpu"), TABLE.line("cu130")


def asked(*sass: str, ptx: tuple[str, ...] = (), line: targets.Line = CU130) -> elf.Asked:
    return elf.Asked(frozenset(sass), frozenset(ptx), line)


def refused(code: str, files: list[elf.Inspection], wanted: elf.Asked) -> str:
    with refusals.refused(code, InspectError) as caught:
        elf.check(files, wanted)
    return caught.value.message


# Reading


def test_merge_leaves_out_what_the_package_holds(made: Path) -> None:
    names = ("prog", "libbase.so.0", "libcuda90.so", "libcuda120a.so")
    merged = elf.merge([elf.inspect(made / name) for name in names])
    assert (merged.sass, merged.ptx, merged.needs) == (("90", "120a"), ("120a",), ())
    assert elf.merge([elf.inspect(made / "prog")]).needs == ("libbase.so.0",)


# Checking


def test_specific_code_answers_the_plain_request(made: Path) -> None:
    files = [elf.inspect(made / "libcuda120a.so")]
    elf.check(files, asked("120", ptx=("120",)))
    elf.check(files, asked("120a", ptx=("120a",)))
    assert "120f" in refused("ARCH_MISSING", files, asked("120f", ptx=("120a",)))


def _holding(folder: Path, *archs: tuple[int, int]) -> list[elf.Inspection]:
    """Inspect a library with machine code for these numbers and flags."""
    code = container(*(entry(2, number, flags=flags) for number, flags in archs))
    return [elf.inspect(library_of_objects(folder, "libx.so", [code]))]


PLAIN, SPECIFIC, FAMILY = 0x11, 0x100011, 0x200011


@pytest.mark.parametrize("flags", [SPECIFIC, FAMILY])
@pytest.mark.parametrize("arch", [90, 100, 103])
def test_specific_code_is_no_answer_that_ggml_did_not_choose(
    tmp_path: Path, arch: int, flags: int
) -> None:
    wanted = asked(str(arch))
    refused("ARCH_MISSING", _holding(tmp_path, (arch, flags)), wanted)
    refused("CODE_NOT_ASKED", _holding(tmp_path, (arch, PLAIN), (arch, flags)), wanted)


def test_120_is_answered_by_120_or_120a_but_not_by_both(tmp_path: Path) -> None:
    wanted = asked("120")
    elf.check(_holding(tmp_path, (120, PLAIN)), wanted)
    elf.check(_holding(tmp_path, (120, SPECIFIC)), wanted)
    elf.check(_holding(tmp_path, (120, SPECIFIC)), asked("120", "120a"))
    refused("CODE_NOT_ASKED", _holding(tmp_path, (120, PLAIN), (120, SPECIFIC)), wanted)
    refused("ARCH_MISSING", _holding(tmp_path, (120, FAMILY)), wanted)


@pytest.mark.parametrize(
    ("names", "sass", "ptx", "line", "code", "shown"),
    [
        ("libbase.so.0 libcuda90.so", "86 90", "", CU130, "ARCH_MISSING", "86"),
        ("libbase.so.0", "90", "", CU130, "ARCH_MISSING", "hold none"),
        ("libcudaboth.so", "90", "", CU130, "CODE_NOT_ASKED", "PTX for 90"),
        ("libcudaboth.so", "", "90", CU130, "CODE_NOT_ASKED", "machine code (SASS) for 90"),
        ("libcuda90.so libbase.so.0", "", "", CPU, "CODE_NOT_ASKED", "for 90"),
        ("liblto.so", "90", "", CU130, "CODE_NOT_ASKED", "kind 8 for 90"),
    ],
)
def test_other_code_than_was_asked_for_is_refused_by_name(
    made: Path, names: str, sass: str, ptx: str, line: targets.Line, code: str, shown: str
) -> None:
    files = [elf.inspect(made / name) for name in names.split()]
    assert shown in refused(code, files, asked(*sass.split(), ptx=tuple(ptx.split()), line=line))


@pytest.mark.parametrize(
    ("objects", "links", "problem"),
    [
        ("both-90-size sass-90 both-90-size", "", "of its 3 CUDA objects, ptx 90 is missing in 1"),
        ("both-90-size ptx-90", "", "of its 2 CUDA objects, sass 90 is missing in 1"),
        (
            *("sass-90 ptx-90", ""),
            "of its 2 CUDA objects, sass 90 is missing in 1, ptx 90 is missing in 1",
        ),
        # a device link needs no PTX, but excuses one container only
        ("both-90-size both-90-size", "sass-90", ""),
        ("both-90-size sass-90", "sass-90", "of its 3 CUDA objects, ptx 90 is missing in 1"),
    ],
)
def test_code_that_only_some_objects_hold_is_refused_with_the_gap(
    tmp_path: Path, objects: str, links: str, problem: str
) -> None:
    read = [[(FATBINS / f"{n}.fatbin").read_bytes() for n in x.split()] for x in (objects, links)]
    files = [elf.inspect(library_of_objects(tmp_path, "libmixed.so", read[0], links=read[1]))]
    wanted = asked("90", ptx=("90",))
    if problem:
        assert refused("ARCH_PARTIAL", files, wanted) == f"libmixed.so: {problem}"
    else:
        elf.check(files, wanted)


@pytest.mark.parametrize(
    ("changes", "code", "shown"),
    [
        ({"glibc": "2.35"}, "", ""),
        ({"glibc": "2.4"}, "", ""),  # older: versions are numbers, not text
        ({"glibc": "2.36"}, "GLIBC_TOO_NEW", "needs glibc 2.36"),
        ({"marks": ("GLIBC_PRIVATE",)}, "GLIBC_TOO_NEW", "GLIBC_PRIVATE"),
        ({"file": "libcuda.so.1"}, "DRIVER_SHIPPED", "libcuda.so.1"),
        ({"machine": "m68k"}, "MACHINE_DIFFERS", "m68k"),
    ],
)
def test_file_that_does_not_fit_the_others_of_its_package_is_refused(
    made: Path, changes: dict[str, Any], code: str, shown: str
) -> None:
    base = elf.inspect(made / "libbase.so.0")
    files = [base, dataclasses.replace(base, **changes)]
    if code:
        assert shown in refused(code, files, asked(line=CPU))
    else:
        elf.check(files, asked(line=CPU))


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("-Wl,-rpath,/usr/local/cuda/lib64", "RUNPATH is '/usr/local/cuda/lib64'"),
        ("-Wl,-rpath,$ORIGIN:/build/bin", "RUNPATH is '$ORIGIN:/build/bin'"),
        ("-Wl,--disable-new-dtags,-rpath,$ORIGIN", "RPATH is '$ORIGIN'"),
    ],
)
def test_runpath_other_than_origin_is_refused(tmp_path: Path, flags: str, shown: str) -> None:
    found = elf.inspect(compile_c(tmp_path / "l.so", "", "-shared", flags))
    assert None in {found.rpath, found.runpath}
    assert shown in refused("RUNPATH_NOT_ORIGIN", [found], asked(line=CPU))


@pytest.mark.parametrize(
    ("needs", "line", "refusal"),
    [
        ("libm.so.6 libstdc++.so.6 libgcc_s.so.1 libgomp.so.1 ld-linux-x86-64.so.2", CPU, None),
        ("libcuda.so.1 libcudart.so.13 libcublas.so.13 libcublasLt.so.13", CU130, None),
        ("libcudart.so.13", CPU, "libcudart.so.13"),
        ("libcuda.so.1", CPU, "libcuda.so.1"),
        ("libcublas.so.12", CU130, "libcublas.so.12"),
        ("libssl.so.3", CPU, "libssl.so.3"),
        ("libcudart.so.130", CU130, "libcudart.so.130"),
        ("libmount.so.1", CPU, "libmount.so.1"),
    ],
)
def test_library_that_no_host_of_its_line_has_is_refused_as_a_need(
    made: Path, needs: str, line: targets.Line, refusal: str | None
) -> None:
    cuda = line is CU130
    base = elf.inspect(made / ("libcuda90.so" if cuda else "libbase.so.0"))
    files = [dataclasses.replace(base, needs=tuple(needs.split()))]
    wanted = asked(*(("90",) if cuda else ()), line=line)
    if refusal is None:
        elf.check(files, wanted)
    else:
        assert f"{base.file}: needs {refusal}," in refused("LIBRARY_NOT_ALLOWED", files, wanted)


# The command


def test_command_prints_one_object_for_one_file(made: Path) -> None:
    argv: list[str | Path] = [sys.executable, "-m", "farm.elf", made / "libcuda90.so"]
    assert heard(["sh", "-c", '"$@" | true', "sh", *argv], check=True).stderr == ""
    done = heard(argv, check=True)
    shown = json.loads(done.stdout)
    names = {"file", "sass", "ptx", "glibc", "glibcxx", "needs", "runpath", "soname", "rpath"}
    assert names <= shown.keys()
    assert (shown["file"], shown["sass"], shown["ptx"]) == ("libcuda90.so", ["90"], [])


def test_command_prints_a_list_for_several_whatever_their_names(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/lib\xff.so")
    shutil.copy(made / "libbase.so.0", odd)
    assert elf.main([str(made / "prog"), odd]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["file"] for item in shown] == ["prog", "lib\ufffd.so"]


@pytest.mark.parametrize(
    ("content", "code", "status"),
    [
        (None, "FILE_MISSING", 2),
        (b"", "NOT_ELF", 1),
        (b"#!/bin/sh\n", "NOT_ELF", 1),
        (b"\x7fELF", "ELF_CORRUPT", 1),
        (b"\x7fELF\x01\x01" + bytes(80), "ELF_UNSUPPORTED", 1),
        (b"\x7fELF\x02\x01" + bytes(58), "ELF_NO_SECTIONS", 1),
    ],
)
def test_command_says_what_is_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    code: str,
    status: int,
) -> None:
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    assert elf.main([str(path)]) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error[{code}]: ")


def test_command_without_files_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert elf.main([]) == elf.main(["--help"]) == 2
    assert capsys.readouterr().err.count("usage: python -m farm.elf FILE") == 2
