"""Packing real ELF trees, reading tarballs again, and everything that must be refused."""

import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_disk
from backports import zstd
from binaries import FATBINS, library, program

from farm import elf, pack, targets
from farm.errors import FarmError, InspectError, PackError
from llama_loader import manifest

TABLE = targets.load()
CPU, CU130 = TABLE.line("cpu"), TABLE.line("cu130")
HOPPER = elf.Asked(frozenset({"90"}), frozenset(), CU130)
MTIME = 1_577_836_800
FORMATS = ("tar.zst", "tar.gz")


def versioned(folder: Path, stem: str, *needs: str) -> None:
    """Make a library as CMake does: libx.so → libx.so.0 → libx.so.0.6.0."""
    library(folder, f"{stem}.so.0.6.0", *needs, soname=f"{stem}.so.0")
    (folder / f"{stem}.so.0").symlink_to(f"{stem}.so.0.6.0")
    (folder / f"{stem}.so").symlink_to(f"{stem}.so.0")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPU build's ``bin`` folder, with things in it that are not for shipping."""
    folder = tmp_path_factory.mktemp("built") / "bin"
    folder.mkdir()
    versioned(folder, "libggml-base")
    versioned(folder, "libggml", "libggml-base.so")
    versioned(folder, "libllama", "libggml.so")
    versioned(folder, "libllava-shared")
    library(folder, "libllama-server-impl.so", "libllama.so")
    library(folder, "libggml-cpu-x64.so", "libggml-base.so", soname=None)
    library(folder, "libggml-cpu-haswell.so", "libggml-base.so", soname=None)
    source = "extern int made_for_a_test; int main(void) { return 0; }\n"
    program(folder, "llama-server", "libllama-server-impl.so", source=source)
    program(folder, "llama-cli", "libllama.so", source=source)
    program(folder, "test-something", "libllava-shared.so")
    (folder / "default.metallib").write_text("not for Linux", "utf-8")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def tree(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bin", symlinks=True))


@pytest.fixture
def cuda_tree(tree: Path) -> Path:
    library(
        tree, "libggml-cuda.so", "libggml-base.so", soname=None, fatbin=FATBINS / "sass-90.fatbin"
    )
    return tree


def request(tree: Path, archive_format: str = "tar.gz", **changes: object) -> SimpleNamespace:
    asked = dict[str, object](
        tree=tree,
        out=tree.parent / f"runtime.{archive_format}",
        asked=elf.Asked(frozenset(), frozenset(), CPU),
        licences={"LICENSE": b"MIT\n", "LICENSE.yyjson": b"MIT too\n"},
        build_json=b'{"schema_version": 1}\n',
    )
    return SimpleNamespace(**asked | changes)


def refused(kind: type[FarmError], code: str, action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.code == code
    return caught.value.message


def opened(path: Path) -> tarfile.TarFile:
    raw = path.read_bytes()
    unpacked = gzip.decompress(raw) if path.name.endswith("gz") else zstd.decompress(raw)
    return tarfile.open(fileobj=io.BytesIO(unpacked))


# What is shipped


def test_programs_plugins_and_what_they_need(built: Path) -> None:
    assert list(pack.select(built)) == [
        "libggml-base.so.0",
        "libggml-cpu-haswell.so",
        "libggml-cpu-x64.so",
        "libggml.so.0",
        "libllama-server-impl.so",
        "libllama.so.0",
        "llama-cli",
        "llama-server",
    ]


def test_library_is_found_by_its_soname_where_links_are_lost(tree: Path) -> None:
    for path in tree.iterdir():
        if path.is_symlink():
            path.unlink()
    assert pack.select(tree)["libllama.so.0"].name == "libllama.so.0.6.0"


def test_plugin_that_the_server_links_against_is_shipped_once(tree: Path) -> None:
    (tree / "libggml-cpu-x64.so").unlink()
    versioned(tree, "libggml-cpu")
    library(tree, "libllama-server-impl.so", "libllama.so", "libggml-cpu.so")
    chosen = pack.select(tree)
    assert "libggml-cpu.so.0" in chosen
    assert "libggml-cpu.so" not in chosen


@pytest.mark.parametrize("archive_format", FORMATS)
def test_shipped_program_starts_where_nothing_else_is(tree: Path, archive_format: str) -> None:
    asked = request(tree, archive_format)
    pack.pack(**vars(asked))
    place = tree.parent / "elsewhere"
    with opened(asked.out) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(place)  # noqa: S202
    shutil.rmtree(tree)
    for name in pack.PROGRAMS:
        assert subprocess.run([place / "runtime" / name], check=False, env={}).returncode == 0


# The tarball


@pytest.mark.parametrize("archive_format", FORMATS)
def test_packed_members_are_sorted_regular_and_have_no_owner_or_time_of_this_machine(
    tree: Path, archive_format: str
) -> None:
    asked = request(tree, archive_format)
    pack.pack(**vars(asked))
    with opened(asked.out) as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {"runtime/BUILD.json", "runtime/licenses/LICENSE.yyjson"} < set(names)
    for member in members:
        assert member.isreg()
        is_program = member.name.rsplit("/", 1)[1] in pack.PROGRAMS
        assert member.mode == (0o755 if is_program else 0o644)
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert (member.mtime, member.pax_headers) == (MTIME, {})


@pytest.mark.parametrize("archive_format", FORMATS)
def test_packing_twice_gives_the_same_bytes(
    tree: Path, tmp_path: Path, archive_format: str
) -> None:
    first = request(tree, archive_format)
    pack.pack(**vars(first))
    other = Path(shutil.copytree(tree, tmp_path / "other" / "bin", symlinks=True))
    for path in other.iterdir():
        os.utime(path, (1, 1), follow_symlinks=False)
        if not path.is_symlink() and path.is_file():
            path.chmod(0o700)
    licences = dict(reversed(first.licences.items()))
    out = tmp_path / f"renamed.{archive_format}"
    second = request(other, archive_format, out=out, licences=licences)
    pack.pack(**vars(second))
    assert first.out.read_bytes() == second.out.read_bytes()


def test_gzip_header_has_no_time_and_no_name(tree: Path) -> None:
    asked = request(tree)
    pack.pack(**vars(asked))
    magic, method, flags, mtime = struct.unpack_from("<HBBI", asked.out.read_bytes())
    assert (magic, method, flags, mtime) == (0x8B1F, 8, 0, 0)


# The manifest's entry


@pytest.mark.parametrize("archive_format", FORMATS)
def test_entry_says_what_the_bytes_are(tree: Path, archive_format: str) -> None:
    asked = request(tree, archive_format)
    pack.pack(**vars(asked))
    entry = pack.read_inventory(asked.out).artifact(CPU)
    data = asked.out.read_bytes()
    assert (entry.name, entry.urls) == (asked.out.name, (asked.out.name,))
    assert (entry.format, entry.size) == (archive_format, len(data))
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.chunks == (entry.sha256,)
    assert (entry.backend, entry.cuda, entry.needs) == ("cpu", None, ())
    assert (entry.platform.system, entry.platform.machine) == ("linux", os.uname().machine)
    with opened(asked.out) as tar:
        for listed, member in zip(entry.files, tar.getmembers(), strict=True):
            stream = tar.extractfile(member)
            assert stream is not None
            content = stream.read()
            assert (listed.path, listed.size) == (member.name, len(content))
            assert listed.sha256 == hashlib.sha256(content).hexdigest()
            assert listed.executable == (member.mode == 0o755)
    assert entry.unpacked_size == sum(file.size for file in entry.files)
    # It stands up to the reader's own rules.
    tree_of_json = json.loads(manifest.dump(entry))
    assert manifest.convert(tree_of_json, manifest.Artifact, what="entry", code="X") == entry


def test_entry_of_a_cuda_build(cuda_tree: Path) -> None:
    needs = ("libcublas.so.13", "libcuda.so.1", "libcudart.so.13")
    for name in needs:
        library(cuda_tree.parent, name)
    code = FATBINS / "sass-90.fatbin"
    plugin = library(cuda_tree.parent, "libggml-cuda.so", *needs, fatbin=code)
    plugin.replace(cuda_tree / plugin.name)
    packed = pack.pack(**vars(request(cuda_tree, asked=HOPPER)))
    entry = pack.read_inventory(packed.path).artifact(HOPPER.line)
    assert entry.backend == "cuda"
    assert entry.cuda == manifest.Cuda(toolkit="13.0", min_driver="580.65", sass=("90",), ptx=())
    assert entry.needs == needs


# What is refused


def test_tree_without_the_server_is_refused_by_the_programs_name(tree: Path) -> None:
    (tree / "llama-server").unlink()
    message = refused(PackError, "PROGRAM_MISSING", lambda: pack.pack(**vars(request(tree))))
    assert message.endswith("has no llama-server")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "gone", "libx.so", "link40"])
def test_link_out_of_the_built_tree_is_refused_by_name(tree: Path, target: str) -> None:
    (tree.parent / "outside").write_text("x", "utf-8")
    (tree / "libx.so").symlink_to(target)
    for number in range(41) if target == "link40" else ():
        (tree / f"link{number}").symlink_to(f"link{number - 1}" if number else "llama-server")
    message = refused(PackError, "LINK_OUTSIDE", lambda: pack.pack(**vars(request(tree))))
    assert "libx.so" in message


def test_library_that_the_built_tree_lacks_is_refused_with_its_soname(tree: Path) -> None:
    for path in tree.glob("libllama.so*"):
        path.unlink()
    message = refused(InspectError, "LIBRARY_NOT_ALLOWED", lambda: pack.pack(**vars(request(tree))))
    assert "needs libllama.so.0" in message


def test_name_that_no_tarball_can_hold(tree: Path) -> None:
    asked = request(tree, licences={"x" * 200: b""})
    refused(PackError, "NAME_TOO_LONG", lambda: pack.pack(**vars(asked)))
    assert not asked.out.exists()


# A disk that is full


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("archive_format", FORMATS)
@pytest.mark.parametrize("limit", [1, 4096, 99_000])
def test_packing_beyond_a_file_size_limit_keeps_the_old_tarball(
    tree: Path, archive_format: str, limit: int
) -> None:
    asked = request(tree, archive_format, licences={"L": os.urandom(100_000)})
    asked.out.write_bytes(b"?")
    with files_up_to(limit), pytest.raises(PackError) as caught:
        pack.pack(**vars(asked))
    lines = caught.value.render().splitlines()
    assert lines[0].startswith(f"error[WRITE_FAILED]: {asked.out} cannot be written: ")
    assert lines[1].startswith("hint: name folders with more space")
    assert len(lines) == 2
    # The one that was there is still there, and nothing else is.
    assert asked.out.read_bytes() == b"?"
    assert sorted(path.name for path in tree.parent.iterdir()) == ["bin", asked.out.name]


@pytest.mark.parametrize("archive_format", FORMATS)
def test_packing_onto_a_full_disk_is_one_error_and_leaves_nothing(
    tree: Path, tmp_path: Path, archive_format: str
) -> None:
    out = tmp_path / "disk" / f"x.{archive_format}"
    asked = request(tree, archive_format, out=out, licences={"L": os.urandom(100_000)})
    with small_disk.mounted(out.parent, "8k"):
        message = refused(PackError, "WRITE_FAILED", lambda: pack.pack(**vars(asked)))
        assert list(out.parent.iterdir()) == []
    assert "No space left on device" in message


def test_packing_into_a_folder_that_cannot_be_made_is_one_error(tree: Path) -> None:
    asked = request(tree, out=tree / "llama-server" / "x.tar.gz")
    refused(PackError, "WRITE_FAILED", lambda: pack.pack(**vars(asked)))


# Tarballs that are not ours, or damaged


@pytest.mark.parametrize(
    ("archive_format", "behind"),
    [
        ("tar.gz", gzip.compress(bytes(20_000) + b"hidden", mtime=0)),
        ("tar.zst", zstd.compress(bytes(20_000) + b"hidden")),
        # millions of empty ones take hours
        ("tar.gz", gzip.compress(b"", mtime=0) * 2),
        ("tar.zst", zstd.compress(b"") * 2),
        ("tar.zst", b"\x50\x2a\x4d\x18\0\0\0\0"),
        ("tar.zst", b"\0"),
    ],
)
def test_bytes_behind_the_end_of_a_tarball_are_refused(
    tree: Path, archive_format: str, behind: bytes
) -> None:
    asked = request(tree, archive_format)
    pack.pack(**vars(asked))
    with asked.out.open("ab") as stream:
        stream.write(behind)
    refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(asked.out))


def tarball(path: Path, *members: tuple[str, dict[str, object], bytes]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name, fields, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("problem", "members"),
    [
        ("is not a file below runtime/", [("x", {}, b"")]),
        ("is not a file below runtime/", [("runtime/../x", {}, b"")]),
        ("is not a file below runtime/", [("/runtime/x", {}, b"")]),
        ("has mode 4755", [("runtime/x", {"mode": 0o4755}, b"")]),
        ("has mode 0666", [("runtime/x", {"mode": 0o666}, b"")]),
        ("is not owned by 0:0", [("runtime/x", {"uid": 1000}, b"")]),
        ("is no program", [("runtime/x", {"mode": 0o755}, b"#!/bin/sh")]),
        ("stands in it twice", [("runtime/x", {}, b""), ("runtime/X", {}, b"")]),
        ("not printable", [("runtime/x\nok  all is verified\x1b[8m", {"mode": 0o755}, b"x")]),
        ("not printable", [("runtime/x\x9b8m", {"mode": 0o755}, b"x")]),
        ("BUILD.json has", [("runtime/BUILD.json", {}, bytes((1 << 20) + 1))]),
    ],
)
def test_unsound_members_of_a_tarball_are_refused_in_printable_words(
    tmp_path: Path, problem: str, members: list[tuple[str, dict[str, object], bytes]]
) -> None:
    path = tarball(tmp_path / "x.tar.gz", *members)
    message = refused(PackError, "ARCHIVE_UNSOUND", lambda: pack.read_inventory(path))
    assert problem in message
    assert message.isprintable()


def test_only_programs_are_copied_to_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_IN_MEMORY", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    plain = tarball(tmp_path / "x.tar.gz", ("runtime/a", {}, bytes(1000)))
    assert [entry.size for entry in pack.read_inventory(plain).files] == [1000]
    program = tarball(tmp_path / "y.tar.gz", ("runtime/a", {}, b"\x7fELF" + bytes(1000)))
    refused(PackError, "TARBALL_UNREADABLE", lambda: pack.read_inventory(program))


def test_error_of_the_farm_shows_no_terminal_codes() -> None:
    shown = PackError("X", "runpath \x1b[2J\x9b\u202e\nthe log's own line", hint="\x1b[H").render()
    assert shown == "error[X]: runpath \\x1b[2J\\x9b\\u202e\n    the log's own line\nhint: \\x1b[H"


@pytest.mark.parametrize("archive_format", FORMATS)
def test_tarball_that_is_cut_or_changed_is_refused(tree: Path, archive_format: str) -> None:
    asked = request(tree, archive_format)
    pack.pack(**vars(asked))
    whole = asked.out.read_bytes()
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        asked.out.write_bytes(whole[:cut])
        refused(PackError, "ARCHIVE_DAMAGED", lambda: pack.read_inventory(asked.out))
    for at in range(len(whole) // 3, len(whole), len(whole) // 40):
        asked.out.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises((PackError, InspectError)):
            pack.read_inventory(asked.out)


def test_tarball_without_programs_is_read_but_describes_no_artifact(tmp_path: Path) -> None:
    inventory = pack.read_inventory(tarball(tmp_path / "x.tar.gz", ("runtime/x", {}, b"x")))
    assert inventory.build_json == b""
    refused(InspectError, "NO_BINARIES", lambda: inventory.artifact(CPU))


def test_tarball_that_does_not_exist_or_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    refused(PackError, "TARBALL_UNREADABLE", lambda: pack.read_inventory(path))
    refused(PackError, "FORMAT_UNKNOWN", lambda: pack.read_inventory(tmp_path / "x.zip"))
