"""A folder: to serve as static files, to mirror, or to open as ``file://``.

``RELEASE/…`` and ``channels/NAME/manifest.json``. A release is gathered in a hidden folder beside
its place, every file synced, and appears with one rename.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from farm import durable, run_lock
from farm.errors import PublishError, UsageError
from farm.publish import publishing
from farm.publish.places import SIGNATURE, Destination, Signed
from farm.publish.publishing import Known, Plan
from farm.release import MANIFEST

_PATIENCE: Final = 60.0
"""Seconds to wait for the lock of a folder, which every user who may read the folder can hold."""
_MOST_FOLDERS: Final = 1_000
"""Maximum of releases and channels: reading a manifest may take 0.2 s, and links to it are free."""


class Directory(Destination):
    """See ``Destination``."""

    def __init__(self, root: Path) -> None:
        self.where = str(root)
        self._root = Path(os.path.normpath(root.absolute()))
        self.project = f"local/{re.sub(r'[^A-Za-z0-9._-]', '-', self._root.name) or 'root'}"

    def require_there(self) -> None:
        """See that the folder exists, and that it is not a release itself."""
        self._require_folder()
        if (self._root / MANIFEST).is_file():
            raise UsageError("DESTINATION_INVALID/release", where=self.where)

    def _require_folder(self) -> None:
        if not self._root.is_dir():
            raise UsageError("DESTINATION_MISSING", where=self.where)

    def require_writable(self) -> None:
        """Ask for this user's rights in the folder, or where it will be made."""
        place = self._root if self._root.is_dir() else self._root.absolute().parent
        if not os.access(place, os.W_OK):
            raise PublishError("DESTINATION_NOT_WRITABLE", place=place)

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the parts in the release's folder, else those gathered for it."""

        def hashed(path: Path, size: int) -> str:
            with _disk(path):  # to the size that it had, and to the end of that block
                return publishing.hashed(publishing.blocks(path), size).sha256

        place = self._root / release
        visible = place.is_dir()
        place = place if visible else self._root / _gathered(release)
        with _disk(place):
            found = map(place.joinpath, durable.names(place) if place.is_dir() else ())
            return {
                path.name: Known(size, partial(hashed, path, size), visible)
                for path in found
                if not path.name.startswith(".")
                for size in (path.stat().st_size,)
            }

    def publish(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Gather, compare, rename."""
        with _disk(self._root), self._locked() as root:
            # the lock's last holder may have published the same release, or another one
            plan = publishing.plan(plan.release, self.where, plan.parts, self.present(plan.release))
            final, gathered = root / plan.release, root / _gathered(plan.release)
            folder = final if final.is_dir() else gathered
            folder.mkdir(exist_ok=True)
            with durable.held(folder) as place:
                if folder is gathered:  # what a publication that was cut off left there
                    names = {part.name for part in plan.parts}
                    for path in place.iterdir():
                        if path.name not in names:
                            path.unlink()
                for part in plan.new:
                    tell(str(part))
                    with (
                        durable.open_regular(part.path) as source,
                        durable.replacing(place / part.name, 0o644) as out,
                    ):
                        shutil.copyfileobj(source, out, publishing.BLOCK)
                for part in plan.parts:
                    publishing.compare(part, publishing.blocks(place / part.name))
            if folder is gathered:
                gathered.rename(final)
            durable.sync(root)

    def read(self, folder: str, name: str) -> Iterator[bytes]:
        """Read a file."""
        path = self._root / folder / name
        with _disk(path):
            if not path.is_file():
                self._require_folder()
                raise self.not_published(folder, name)
            yield from publishing.blocks(path)

    def names(self, folder: str, before: int = 0) -> tuple[str, ...]:
        """List the files in a folder; ``before`` is as for ``durable.names``."""
        place = self._root / folder
        with _disk(place), suppress(PermissionError):
            return tuple(durable.names(place, before)) if place.is_dir() else ()
        return ()

    def folders(self) -> tuple[str, ...]:
        """Return the folders with a manifest; a mirror does not keep the times of files.

        The names of all folders have one bound: many links may lead to one folder.
        """
        read = 0

        def names(folder: str) -> tuple[str, ...]:
            nonlocal read
            found = self.names(folder, read)
            read += len(found)
            return found

        below = ((place, name) for place in ("", self.channel_folder) for name in names(place))
        visible = (f"{place}{name}" for place, name in below if not name.startswith("."))
        shown = (one for one in visible if any(self.shows(one, name) for name in names(one)))
        found = tuple(islice(shown, _MOST_FOLDERS + 1))  # a hidden one is gathered
        if len(found) > _MOST_FOLDERS:
            most = f"{_MOST_FOLDERS} releases and channels"
            raise UsageError("FOLDER_TOO_LARGE", folder=self.where, most=most)
        return publishing.in_order(found)

    def download_url(self, folder: str, name: str) -> str:
        """Return a ``file://`` URL; served over HTTP the path is the same."""
        return (self._root / folder / name).as_uri()

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Write the numbered pair, then the present one: the signature, then the manifest.

        Between these two renames a reader may get the new signature with the old manifest; the
        loader then reads both once more.
        """
        with (
            _disk(self._root / f"{self.channel_folder}{channel}"),
            self._locked() as root,
            _made(root / self.channel_folder) as channels,
            _made(channels / channel) as folder,
        ):
            if (folder / f"{serial}.json").exists():
                raise self.moved(channel, serial)
            for name, content in (
                (f"{serial}.json.minisig", signed.signature),
                (f"{serial}.json", signed.manifest),
                (SIGNATURE, signed.signature),
                (MANIFEST, signed.manifest),
            ):
                durable.replace(folder / name, content, 0o644)

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """Let one process at a time change the folder. The lock leaves no file in what is served.

        It ends with the process. Where a folder cannot be locked, that is an error. What is given
        leads to the folder that is locked.
        """
        self._root.mkdir(exist_ok=True)
        with durable.handle_of(self._root, os.O_DIRECTORY) as handle:
            try:
                run_lock.wait(handle, self.where, _PATIENCE, "DESTINATION_LOCKED")
            except TimeoutError as by:
                raise PublishError(
                    "DESTINATION_LOCKED", folder=self.where, by=by, patience=_PATIENCE
                ) from by
            yield durable.opened(handle)


def _gathered(release: str) -> str:
    """Return the name under which a release is gathered."""
    return f".{release}.publishing"


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """Open a folder, made if need be. A link in its place is an error: it may lead anywhere."""
    folder.mkdir(exist_ok=True)
    with durable.held(folder) as place:
        yield place


@contextmanager
def _disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PublishError(
            "DESTINATION_NOT_WRITABLE/disk", place=place, strerror=error.strerror or error
        ) from error
