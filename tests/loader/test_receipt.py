"""What stands beside an installed runtime, and how its files are looked at."""

import errno
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import releases
from archives import GOOD, Entry, file_entry

from llama_loader import manifest as schema
from llama_loader import receipt
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError
from llama_loader.events import Stage, ignore
from llama_loader.receipt import Receipt
from llama_loader.receipt import check_files as check
from tests.loader.test_disk import KINDS, not_small
from tests.rigs.refusals import refused

SHA = "ab" * 32
BIG = Entry("runtime/libbig.so", bytes(range(256)) * 40)
PIECE = 1000


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A runtime of small files and one of several pieces, with its receipt."""
    place = tmp_path / "runtimes" / SHA
    for entry in (*GOOD, BIG):
        path = place / receipt.FILES / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.data)
        path.chmod(entry.mode)
    write(place, sha256=SHA)
    return place


def entries() -> tuple[schema.FileEntry, ...]:
    return tuple(file_entry(entry, PIECE) for entry in (*GOOD, BIG))


def write(place: Path, **fields: Any) -> None:
    whole = {"sha256": SHA, "files": msgspec.to_builtins(entries())}
    (place / receipt.RECEIPT).write_text(json.dumps(whole | fields))


def read(place: Path) -> Receipt:
    with Folder.open(place) as opened:
        return Receipt.read(opened)


def test_receipt_of_any_bytes_is_damaged(place: Path) -> None:
    """Nested deep, cut, not text, not a receipt: one error, and no other."""
    random_bytes = [random.Random(seed).randbytes(90) for seed in range(200)]
    for data in (
        *(b"", b"\0", b"null", b"[" * 100_000, b'{"x":' * 100_000, b'{"sha256":"\xff"}'),
        *(b'"\\ud800"', b'{"sha256":' + b"9" * 5000 + b"}"),
        *random_bytes,
        *(b'{"release":"' + data for data in random_bytes),
    ):
        (place / receipt.RECEIPT).write_bytes(data)
        with pytest.raises(IntegrityError, match="its receipt cannot be read"):
            read(place)


def test_a_receipt_is_read_as_it_was_written(place: Path) -> None:
    """The files are those of the archive by URL, else of the manifest's entry."""
    found = read(place)
    assert found == Receipt(sha256=SHA, files=entries())
    assert found.installed(place, None, ignore).folder == place / "files" / "runtime"
    artifact = releases.artifact("cpu", "cpu")
    own = msgspec.to_builtins(msgspec.structs.replace(artifact, sha256=SHA))
    write(place, artifact=own, files=[])
    assert read(place).installed(place, None, ignore).files == artifact.files
    other = "cd" * 32
    for fields in ({"artifact": own | {"sha256": other}}, {"sha256": other}):
        write(place, **fields)
        with pytest.raises(IntegrityError, match="is of another runtime"):
            read(place)
    libraries = Receipt(sha256=SHA, artifact=releases.runtime("cu130"))
    libraries = msgspec.json.decode(msgspec.json.encode(libraries), type=Receipt)
    assert libraries.installed(place, None, ignore).folder == place / "files" / "cuda-runtime"


def test_installed_runtime_is_hashed_and_names_its_folders_of_libraries(place: Path) -> None:
    told: list[Stage] = []
    runtime = read(place).installed(place, None, told.append)
    runtime.verify()
    assert [(one.name, one.size) for one in told] == [("verify", sum(e.size for e in entries()))]
    assert 0 < told[0].seconds < 60
    assert runtime == replace(runtime, files=(), sink=ignore)
    assert "sink" not in repr(runtime)
    assert "FileEntry" not in repr(runtime)
    with pytest.raises(AttributeError):
        runtime.sha256 = ""
    files = [
        file_entry(Entry(path, b""))
        for path in ("a/bin/llama-server", "a/lib/libx.so.1", "a/doc/so.txt", "a/0/liby.so")
    ]
    found = Receipt(sha256=SHA, files=tuple(files)).installed(place, None, ignore)
    inside = place / "files/a"
    assert found.library_folders == (inside / "bin", inside / "0", inside / "lib")


def test_files_are_opened_so_that_nothing_can_hang_or_be_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the runtime's own folder relative to an open folder, and never through a link."""
    opened: set[tuple[int, bool]] = set()
    original = os.open

    def watched(path: str, how: int, *rest: int, dir_fd: int | None = None) -> int:
        opened.add((how, dir_fd is not None or path == place.parent))
        return original(path, how, *rest, dir_fd=dir_fd)

    asked, read_at = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: asked.append(args[1]) or read_at(*args))
    monkeypatch.setattr(os, "open", watched)
    check(place, entries(), PIECE)
    assert (sum(asked), max(asked)) == (sum(entry.size for entry in entries()), PIECE)
    always = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    assert opened == {(always | os.O_NONBLOCK, True), (always | os.O_DIRECTORY, True)}


@pytest.mark.parametrize("at", [0, 999, 1000, len(BIG.data) - 1])
@pytest.mark.parametrize("piece_size", [PIECE, 0])
def test_every_byte_is_looked_at(
    place: Path, monkeypatch: pytest.MonkeyPatch, at: int, piece_size: int
) -> None:
    monkeypatch.setattr(receipt, "_BLOCK", 300)
    check(place, entries(), piece_size)
    path = place / receipt.FILES / BIG.path
    data = bytearray(BIG.data)
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"runtime/libbig\.so changed"):
        check(place, entries(), piece_size)


def test_list_whose_pieces_are_not_those_of_its_file_and_a_runtime_that_is_gone(
    place: Path,
) -> None:
    *small, big = entries()
    wrong = msgspec.structs.replace(big, chunks=big.chunks[::-1])
    with refused(receipt.CONTRADICTION, IntegrityError):
        check(place, (*small, wrong), PIECE)
    with refused("RUNTIME_DAMAGED", IntegrityError, "No such file"):
        check(place.with_name("cd" * 32), entries(), PIECE)


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
@pytest.mark.parametrize("entry", [BIG, GOOD[0]])
def test_file_that_others_could_write_is_replaced_by_a_copy(
    place: Path, entry: Entry, mode: int
) -> None:
    """Another user may have opened it for writing, and keeps that right whatever its mode is."""
    path = place / receipt.FILES / entry.path
    path.chmod(mode)
    with path.open("r+b") as theirs:
        check(place, entries(), PIECE)
        theirs.write(b"evil")
    assert path.read_bytes() == entry.data
    assert path.stat().st_mode & 0o7777 == entry.mode
    assert list((place.parents[1] / "staging").iterdir()) == []


@pytest.mark.parametrize(("times", "why"), [(1, "changed"), (9, "changed while it was hashed")])
def test_file_that_is_changed_after_it_was_hashed_is_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, times: int, why: str
) -> None:
    path = place / receipt.FILES / BIG.path
    hash_them, contents = receipt._problems, [BIG.data, BIG.data[::-1]] * times

    def changed_at_once(*args: Any) -> dict[str, str]:
        if times > 1:
            path.write_bytes(BIG.data)
        found = hash_them(*args)
        time.sleep(0.02)  # a kernel's clock for files has ticks of up to 10 ms
        if contents:
            path.write_bytes(contents.pop())
        return found

    monkeypatch.setattr(receipt, "_problems", changed_at_once)
    with pytest.raises(IntegrityError, match=rf"libbig\.so {why}; `python3 -m llama_loader fetch`"):
        check(place, entries(), PIECE)
    assert len(contents) == max(0, 2 * times - 3)  # hashed three times at most


def test_file_that_is_changed_while_another_is_hashed_again_is_found(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_them, big = receipt._problems, place / receipt.FILES / BIG.path
    other, hashed = big.with_name("libllama.so.0"), []

    def changed_at_once(*args: Any) -> dict[str, str]:
        found = hash_them(*args)
        hashed.append(len(args[1]))
        time.sleep(0.02)  # a kernel's clock for files has ticks of up to 10 ms
        if len(hashed) == 1:
            big.touch()
        elif len(hashed) == 2:
            other.write_bytes(other.read_bytes()[::-1])
        return found

    monkeypatch.setattr(receipt, "_problems", changed_at_once)
    with pytest.raises(
        IntegrityError, match=r"libllama\.so\.0 changed; `python3 -m llama_loader fetch`"
    ):
        check(place, entries(), PIECE)
    assert hashed == [len(entries()), 1, 1]


def test_modes_are_set_and_those_that_cannot_be_and_let_others_write_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / receipt.FILES / BIG.path
    path.chmod(0o755)
    check(place, entries(), PIECE)
    assert path.stat().st_mode & 0o7777 == 0o644
    error = OSError(errno.EROFS, "Read-only")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(Folder, "renew", refuse)
    path.chmod(0o755)  # runs nothing, and nobody else can change it
    check(place, entries(), PIECE)
    path.chmod(0o666)
    told = (
        r"libbig\.so can be written by other users \(mode 0666\); `python3 -m llama_loader fetch`"
    )
    with pytest.raises(IntegrityError, match=told):
        check(place, entries(), PIECE)
    path.chmod(0o644)
    (place / receipt.FILES / "runtime/llama-server").chmod(0o644)
    with pytest.raises(
        IntegrityError,
        match=r"llama-server cannot be executed; `python3 -m llama_loader fetch` repairs",
    ):
        check(place, entries(), PIECE)
    error.errno = errno.EIO
    for mode in (0o644, 0o666):
        path.chmod(mode)
        with pytest.raises(OSError, match="Read-only"):
            check(place, entries(), PIECE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_place_of_an_empty_file_is_not_followed_or_waited_for(
    place: Path, tmp_path: Path, kind: str
) -> None:
    path = place / receipt.FILES / GOOD[-1].path
    path.unlink()
    not_small(path, kind, tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"runtime/no changed"):
        check(place, entries(), PIECE)


def test_what_is_missing_and_what_is_too_many_is_named(place: Path) -> None:
    """Up to ten of a kind, then how many more there are."""
    (place / receipt.FILES / BIG.path).unlink()
    for number in range(10):
        (place / receipt.FILES / f"x{number}").touch()
    with pytest.raises(IntegrityError) as caught:
        check(place, entries(), PIECE)
    extra = ", ".join(f"files/x{number}" for number in range(10))
    told = f": {place}: files/runtime/libbig.so missing; {extra} not listed"
    assert caught.value.message.endswith(told)
    (place / receipt.FILES / "y").touch()
    with pytest.raises(IntegrityError, match="x9 and 1 more not listed"):
        check(place, entries(), PIECE)


def test_an_archive_has_one_server() -> None:
    assert receipt.find_program(["a/llama-server", "a/b"], "it") == "a"
    assert receipt.find_program(["llama-server"], "it") == "."
    for paths, words in (
        (["a/b"], "it holds no llama-server"),
        (["b/llama-server", "a/llama-server"], "it holds a/llama-server and b/llama-server"),
    ):
        with refused("NO_SERVER_IN_ARCHIVE", IntegrityError, words):
            receipt.find_program(paths, "it")
