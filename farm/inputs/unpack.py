"""Out of an archive into a folder: nothing outside it, no links, all or nothing."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from farm import durable
from farm.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK: Final = 1 << 20
_EXECUTABLE: Final = 0o100


def extract_subtree(archive: Path, subdir: str, into: Path) -> None:
    """Unpack one folder of a source archive (``NAME-VERSION/<subdir>/…``) as the new ``into``.

    Modes become 0644 or 0755; file times are kept, owners are not.

    Raises:
        SourceError: the archive has no such folder, or holds in it something that is not a plain
            file or folder, or lies outside.
    """
    try:
        with new_folder(into) as staging, tarfile.open(archive) as tar:
            for member in tar:
                inside = _below(member.name, subdir)
                if inside is not None and not member.isdir():
                    _extract_file(tar, member, inside, staging)
            if not any(staging.iterdir()):
                raise SourceError("SUBDIR_MISSING", f"{archive.name} has no folder {subdir}")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise SourceError("ARCHIVE_UNSAFE", f"{archive.name}: {error}") from error


def extract_wheel(wheel: Path, into: Path) -> None:
    """Unpack a wheel's files into the folder ``into``, beside what is there.

    Raises:
        SourceError: a member lies outside, or it is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                target = into / _checked(entry.filename)
                if entry.is_dir():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as member, target.open("wb") as stream:
                    shutil.copyfileobj(member, stream, _BLOCK)
                # The upper half of a zip entry's attributes is the file's Unix mode.
                target.chmod(_mode(entry.external_attr >> 16))
    except zipfile.BadZipFile as error:
        raise SourceError("ARCHIVE_UNSAFE", f"{wheel.name}: {error}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under another name; of two processes the faster one wins.

    All of it is on the disk before it has its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent)) / folder.name
    staging.mkdir()
    try:
        yield staging
        durable.sync_tree(staging)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging.parent, ignore_errors=True)


def _extract_file(
    tar: tarfile.TarFile, member: tarfile.TarInfo, inside: PurePosixPath, folder: Path
) -> None:
    # By our own rule first: tarfile's filter has let links escape before (CVE-2026-11940).
    if not member.isfile():
        raise SourceError("ARCHIVE_UNSAFE", f"{member.name} is neither a plain file nor a folder")
    member.name = str(inside)
    member.mode = _mode(member.mode)
    tar.extract(member, folder, filter="data")


def _below(name: str, subdir: str) -> PurePosixPath | None:
    """Return a member's path below ``<top folder>/<subdir>``, None where it is elsewhere."""
    path = PurePosixPath(*_checked(name).parts[1:])
    return path.relative_to(subdir) if path.is_relative_to(subdir) else None


def _checked(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise SourceError("ARCHIVE_UNSAFE", f"a member of the archive is called {name!r}")
    return path


def _mode(mode: int) -> int:
    return 0o755 if mode & _EXECUTABLE else 0o644
