"""Which files this process changes: Python's audit events say so before each one is changed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# event: where its paths stand, each with the folder's descriptor that it may be relative to
_EVENTS: Final[dict[str, tuple[tuple[int, int | None], ...]]] = {
    "open": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
_seen: list[Path] | None = None
_hooked = False


@contextmanager
def watched() -> Iterator[list[Path]]:
    """Give a list that fills with the real path of all that is made, changed or removed."""
    global _hooked, _seen  # noqa: PLW0603  a hook is never taken out again
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    found: list[Path] = []
    _seen = found
    original = os.open

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        # the audit event of a path that is relative to a descriptor does not tell which
        if dir_fd is not None and flags & _WRITING:
            found.append(_real(os.fsdecode(path), dir_fd))
        return original(path, flags, mode, dir_fd=dir_fd)

    os.open = opened
    try:
        yield found
    finally:
        _seen, os.open = None, original


def outside(root: Path, changed: list[Path]) -> list[Path]:
    """Those that are neither ``root`` nor below it."""
    real = Path(os.path.realpath(root))
    return [path for path in changed if path != real and real not in path.parents]


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or event not in _EVENTS:
        return
    if event == "open" and (not arguments[2] & _WRITING or _is_relative_of_os_open(arguments)):
        return
    for place, relative_to in _EVENTS[event]:
        path = arguments[place]
        folder = arguments[relative_to] if relative_to is not None else -1
        if isinstance(path, str | bytes | os.PathLike) and os.fspath(path) != os.devnull:
            _seen.append(_real(os.fsdecode(path), folder))


def _is_relative_of_os_open(arguments: tuple[Any, ...]) -> bool:
    """Whether it is a call of ``os.open``, which has no mode in words, with a relative path."""
    path, mode, _ = arguments
    return mode is None and isinstance(path, str) and not os.path.isabs(path)  # noqa: PTH117


def _real(path: str, folder: int | None) -> Path:
    """The place itself: links on the way are followed, a link at the end is not."""
    base = "" if folder in (None, -1) else Path(f"/proc/self/fd/{folder}").readlink()
    head, tail = os.path.split(os.path.join(base, path))  # noqa: PTH118  a Path drops dots
    return (
        Path(os.path.realpath(head), tail)
        if tail not in ("", ".", "..")
        else Path(os.path.realpath(path))
    )
