"""What differs between two tarballs is found, named, kept and explained."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from farm import durable, reproduce
from farm.errors import BuildError, PackError, UsageError
from farm.options import BuildRequest
from farm.reproduce import compare
from farm.tarball import archive
from farm.tarball.archive import TarMember
from farm.terminal.progress import BuildReport
from tests.farm.test_toolkit import make_toolkit
from tests.rigs.heard import script
from tests.rigs.refusals import refused
from tests.rigs.tiny_release import TINY
from tests.rigs.waiting import comes

MEMBERS = [("a", b"alpha", 0o644), ("b", b"beta", 0o644)]
ELF = b"\x7fELF"


@pytest.fixture(autouse=True)
def no_diffoscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing in it but what a test puts there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def tarball(
    folder: Path, members: list[tuple[str, bytes, int]], mtime: int = 0, level: int = 19
) -> Path:
    folder.mkdir()
    path = folder / "x.tar.zst"
    made = (
        TarMember(f"runtime/{name}", len(content), mode, io.BytesIO(content))
        for name, content, mode in members
    )
    with path.open("wb") as raw:
        archive.write(raw, "tar.zst", made, mtime, level=level)
    return path


@pytest.mark.parametrize(
    ("members", "mtime", "level", "found"),
    [
        (MEMBERS, 0, 19, []),
        (MEMBERS[::-1], 0, 19, ["x.tar.zst: members in another order, in other compressed bytes"]),
        (MEMBERS, 0, 1, ["x.tar.zst: the same members, in other compressed bytes"]),
        (MEMBERS, 7, 19, [f"runtime/{name}: time in the archive 0 / 7" for name in "ab"]),
        ([MEMBERS[0], ("b", b"beta", 0o755)], 0, 19, ["runtime/b: mode 0644 / 0755"]),
        ([MEMBERS[0], ("b", b"bete", 0o644)], 0, 19, ["runtime/b: other bytes, sha256 f44e64e7"]),
        (MEMBERS[:1], 0, 19, ["runtime/b: only the first has it"]),
        ([*MEMBERS, ("c", b"", 0o644)], 0, 19, ["runtime/c: only the second has it"]),
    ],
)
def test_tarballs_are_compared_member_by_member(
    tmp_path: Path, members: list[tuple[str, bytes, int]], mtime: int, level: int, found: list[str]
) -> None:
    first = tarball(tmp_path / "first", MEMBERS)
    second = tarball(tmp_path / "second", members, mtime, level)
    told = compare(first, second, tmp_path / "kept", lambda _: None)
    assert [line[: len(part)] for line, part in zip(told, found, strict=True)] == found


def test_only_what_differs_is_kept_and_a_missing_diffoscope_is_noted(tmp_path: Path) -> None:
    said: list[str] = []
    kept = tmp_path / "kept"
    first = tarball(tmp_path / "one", MEMBERS)
    for content in (b"stale", b"bete"):
        second = tarball(tmp_path / content.decode(), [MEMBERS[0], ("b", content, 0o644)])
        compare(first, second, kept, said.append)
    assert said[-1].startswith("note[NO_DIFFOSCOPE]: ")
    left = {path.relative_to(kept).as_posix(): path for path in kept.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in left.items()} == {
        "first/runtime/b": b"beta",
        "second/runtime/b": b"bete",
    }


def test_diffoscope_gets_small_files_limits_and_no_secret_and_fails_with_its_last_line(
    tmp_path: Path, no_diffoscope: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, said = tmp_path / "seen", list[str]()
    failing = f"""#!/bin/sh
{{ set; ulimit -v; ulimit -f; echo */runtime/*; echo $TMPDIR; }} > {seen}
echo first >&2; echo 'no room' >&2; exit 2
"""
    script(no_diffoscope / "diffoscope", failing)
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setattr(reproduce, "_EXPLAINED", 2048)
    head = tarfile.TarInfo(f"{ELF.decode()}{'x' * 60}").tobuf()  # a program to who looks at 4 bytes
    aside = {"large": ELF * 600, "text": b"other", "tar": head + bytes(1024)}
    header = tarfile.TarInfo(f"{ELF.decode()}{'x' * 60}")
    header.type, header.size = tarfile.XHDTYPE, 1024  # ``tarfile`` looks at it from each digit on
    aside["digits"] = header.tobuf() + b"1" * 1024
    given = [(name, ELF, 0o644) for name in ("d", *aside)]
    first = tarball(tmp_path / "one", [*MEMBERS, *given])
    given = [(name, content, 0o644) for name, content in {"d": ELF + b"d", **aside}.items()]
    second = tarball(tmp_path / "two", [*MEMBERS, *given])
    with refused("DIFFOSCOPE_FAILED", BuildError, match="diffoscope: no room"):
        compare(first, second, tmp_path / "kept", said.append)
    left = tmp_path / "kept" / "unexplained" / "second" / "runtime"
    assert {path.name: path.read_bytes() for path in left.iterdir()} == aside
    assert said[-1].startswith("note[NO_DIFFOSCOPE]: ")
    assert "s3cret" not in seen.read_text()
    names = " ".join(f"first/runtime/{name}" for name in ("d", *sorted(aside)))
    limits = ["1048576", "131072", f"{names} second/runtime/d"]
    *_, temporary = seen.read_text().splitlines()
    assert seen.read_text().splitlines()[-4:] == [*limits, temporary]
    assert not Path(temporary).is_relative_to(tmp_path / "kept")
    assert not Path(temporary).exists()


def test_what_diffoscope_started_ends_with_it_at_its_deadline(
    tmp_path: Path, no_diffoscope: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"#!/bin/sh\n/bin/sleep 600 & echo $! > {tmp_path}/child; wait\n"
    script(no_diffoscope / "diffoscope", text)
    monkeypatch.setattr(reproduce, "_DIFFOSCOPE_SECONDS", 1)
    first, second = (tarball(tmp_path / side, [(side, ELF, 0o644)]) for side in ("one", "two"))
    with refused("DIFFOSCOPE_SLOW", BuildError):
        compare(first, second, tmp_path / "kept", lambda _: None)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert comes(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_a_damaged_tarball_or_a_fifo_in_its_place_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tarball(tmp_path / "first", MEMBERS)
    second = tarball(tmp_path / "second", MEMBERS)
    second.write_bytes(second.read_bytes()[:-9])
    with refused("ARCHIVE_DAMAGED", PackError):
        compare(first, second, tmp_path / "kept", lambda _: None)
    monkeypatch.setattr(
        durable, "sha256", lambda path, **_: str(path)
    )  # they were hashed, and then replaced
    for put, why in (
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(second), "a link"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 42)), "larger than"),
    ):
        first.unlink()
        put(first)
        with pytest.raises(OSError, match=why):
            compare(first, second, tmp_path / "kept", lambda _: None)


def test_toolkit_that_cannot_build_the_last_set_is_refused_before_the_first_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    cuda = make_toolkit(tmp_path / "cuda", "12.9")
    nvcc = cuda / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("sm_100", "sm_120"))
    asked = BuildRequest(
        engine="local", toolkit=str(cuda), arch_set="zerogpu", source=TINY, patches="none"
    )
    told = io.StringIO()
    with refused("ARCH_NOT_IN_LINE", UsageError, "90"):
        reproduce.prove(asked, BuildReport(Console(file=told, width=200)))
    assert "build, -j" not in told.getvalue()
