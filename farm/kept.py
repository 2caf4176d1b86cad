"""The journal and the built trees in ``.farm``, which a run keeps for the next one.

The journal has a small file for each plan's key. An entry belongs to one plan's digest; of another
plan's entry only the build's time is used. The journal's statement about a tree counts only if the
bytes are unchanged. ``tarballs`` has a small file for each tarball that this checkout packed: every
later run, and every verb that lists, publishes or starts it, compares the bytes with that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from farm import STATE_FOLDER, durable, release, run_lock
from farm.durable import folder_digest
from farm.errors import PackError
from farm.inputs import patches
from farm.pack import BUILD_RECORD, LICENCES, Packed
from farm.plan import CONTAINER_LAYOUT, BuildPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from llama_loader.manifest import Manifest

_TURN: Final = "manifest"
"""The lock of a folder whose tarballs and manifest are written or compared."""


class Entry(msgspec.Struct, frozen=True):
    """What is known of one plan.

    Attributes:
        plan: the plan's digest (``digest``).
        begun: a build has begun; without a tree it failed or was interrupted.
        tree: the kept tree's digest, None until there is one.
        seconds: how long the whole build took, this plan's or an earlier one's of the same key.
    """

    plan: str
    begun: bool = False
    tree: str | None = None
    seconds: float | None = None
    schema_version: int = 1


@dataclass(frozen=True)
class Journal:
    """The entries of one checkout. ``folder`` is made when something is written."""

    folder: Path

    def read(self, key: str, plan: str = "") -> Entry:
        """Return a plan's entry; of another plan's, the time alone. Unreadable is missing."""
        try:
            entry = msgspec.json.decode(self._file(key).read_bytes(), type=Entry)
        except (FileNotFoundError, UnicodeDecodeError, msgspec.DecodeError):
            return Entry(plan)
        return entry if entry.plan == plan else Entry(plan, seconds=entry.seconds)

    def times(self, plans: Iterable[BuildPlan]) -> dict[str, float | None]:
        """Return the seconds of the last finished build of each plan's key, None without one."""
        return {plan.key: self.read(plan.key).seconds for plan in plans}

    def write(self, key: str, entry: Entry) -> None:
        """Replace an entry; it is on the disk when this returns.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full, or this user may not write.
        """
        _write(self._file(key), entry)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


@dataclass(frozen=True)
class KeptTree:
    """One plan's place in a checkout's ``.farm``, which is ``state``; ``digest`` is the plan's."""

    plan: BuildPlan
    digest: str
    state: Path

    @property
    def journal(self) -> Journal:
        """The checkout's journal."""
        return Journal(self.state / "journal")

    @property
    def folder(self) -> Path:
        """Where the tree is: ``bin``, ``licenses``, ``BUILD.json``."""
        return self.state / "trees" / self.plan.key

    def entry(self) -> Entry:
        """Return the journal's entry of this plan."""
        return self.journal.read(self.plan.key, self.digest)

    def begin(self) -> None:
        """Record that a build begins; the entry keeps the last build's time."""
        entry = Entry(self.digest, begun=True, seconds=self.entry().seconds)
        self.journal.write(self.plan.key, entry)

    def is_whole(self) -> bool:
        """Whether the tree that the journal names exists, unchanged."""
        expected = self.entry().tree
        return (
            expected is not None and self.folder.is_dir() and folder_digest(self.folder) == expected
        )

    def keep(
        self,
        products: Path,
        build_json: bytes,
        licences: Mapping[str, bytes],
        seconds: float,
    ) -> None:
        """Keep a build's products; the tree counts once the journal names it.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full, or this user may not write. The part
                that was written is removed, so that the next sets have room.
        """
        entry = Entry(self.digest, begun=True, seconds=seconds)
        self.journal.write(self.plan.key, entry)
        try:
            with durable.writing(self.folder):
                durable.remove(self.folder)
                shutil.copytree(products, self.folder / "bin", symlinks=True)
                (self.folder / BUILD_RECORD).write_bytes(build_json)
                (self.folder / LICENCES).mkdir()
                for name, text in licences.items():
                    (self.folder / LICENCES / name).write_bytes(text)
                whole = folder_digest(self.folder)
        except PackError:
            durable.remove(self.folder)
            raise
        self.journal.write(self.plan.key, msgspec.structs.replace(entry, tree=whole))

    def packed(self, out: Path) -> Packed | None:
        """Return this tree's tarball in ``out`` if it has the recorded bytes."""
        place = out / self.plan.artifact_name
        records, tree = _read(place, self.state), self.entry().tree
        of_tree = (Packed(place, one.sha256, one.size) for one in records if one.tree == tree)
        return next((one for one in of_tree if one.is_there()), None)

    def pack(self, out: Path) -> Packed:
        """Pack the tree into ``out``.

        Raises:
            PackError: the disk is full, or a program is missing.
            InspectError: a binary is not what its set and line say.
        """
        keep = partial(recorded, state=self.state, tree=self.entry().tree)
        return release.pack_tree(self.folder, out, self.plan.arch_set.format, keep)


class _Record(msgspec.Struct, frozen=True):
    """A tarball that this checkout packed; ``tree`` is the digest of the kept tree in it, if any.

    ``path`` leads there from the state folder, so that both may be moved together. ``before`` has
    the sha256 of what this one replaces, until it has its name.
    """

    path: str
    sha256: str
    size: int
    tree: str | None = None
    before: tuple[str, ...] = ()


@contextmanager
def recorded(
    tarball: Packed, state: Path = STATE_FOLDER, tree: str | None = None
) -> Iterator[None]:
    """Keep what a tarball is, on the disk, while the block gives it its name.

    At every moment the record fits the file, or there is none of a file that nobody packed.

    Raises:
        BuildError: ``FOLDER_LOCKED``: another process compares the folder's tarballs for too long.
        PackError: ``WRITE_FAILED``.
    """
    ways = _places(tarball.path, state)
    record = partial(_Record, sha256=tarball.sha256, size=tarball.size, tree=tree)
    with run_lock.turn(tarball.path.parent, _TURN):
        if before := _known(tarball.path, state):
            for place, way in ways.items():
                _write(place, record(way, before=before))
        yield
        for place, way in ways.items():
            _write(place, record(way))


def packed(folder: Path, found: Iterable[str], state: Path = STATE_FOLDER) -> release.Known:
    """Return the sha256 of the tarballs in a folder that this checkout packed, by name.

    Those that a person copied into the folder are not among them. The names that were ``found``
    count, too, whatever lies there now: another user can move a tarball away for a moment.
    """
    present = filter(release.is_tarball, durable.names(folder))
    known = {name: _known(folder / name, state) for name in sorted({*found, *present})}
    return {name: digests for name, digests in known.items() if digests}


def write_manifest(
    out: Path,
    state: Path = STATE_FOLDER,
    made: Iterable[Packed] = (),
    *,
    named: str | None = None,
    serial: int | None = None,
) -> Manifest:
    """Write a folder's manifest if its tarballs are those that were packed (``release.write``).

    ``made`` are the tarballs of this run, ``named`` and ``serial`` the release's name and serial.

    Raises:
        FarmError: as ``release.write``; ``FOLDER_LOCKED``.
    """
    release.tarballs(out)  # without one there is nothing to wait for
    of_this_run = {one.path.name: (one.sha256,) for one in made}
    with run_lock.turn(out, _TURN):
        return release.write(
            out,
            lambda found: {**packed(out, found, state), **of_this_run},
            release=named,
            serial=serial,
        )


def _write(place: Path, content: Entry | _Record) -> None:
    with durable.writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(place, msgspec.json.format(msgspec.json.encode(content), indent=2), 0o644)


def _places(tarball: Path, state: Path) -> dict[Path, str]:
    """Return the files of a tarball's records, each with the tarball's way from the state folder.

    One is by the folder's name, one by what links to it lead to: a person may use both, and another
    user can put a link in the folder's place.
    """
    named = (tarball.absolute(), tarball.parent.resolve() / tarball.name)
    ways = (os.path.relpath(one, state.resolve()) for one in named)
    digests = {hashlib.sha256(os.fsencode(way)).hexdigest()[:32]: way for way in ways}
    return {state / "tarballs" / f"{digest}.json": way for digest, way in digests.items()}


def _known(tarball: Path, state: Path) -> tuple[str, ...]:
    """Return each sha256 that a tarball may have; none if this checkout did not pack it.

    A run may have been killed before it replaced another one.
    """
    found = ((one.sha256, *one.before) for one in _read(tarball, state))
    return tuple(dict.fromkeys(digest for known in found for digest in known))


def _read(tarball: Path, state: Path) -> list[_Record]:
    """Return what a tarball was when this checkout packed it; nothing if it did not.

    Raises:
        PackError: ``TARBALL_UNREADABLE``: a record is damaged, or may not be read.
    """
    found = []
    for place in _places(tarball, state):
        try:
            found.append(msgspec.json.decode(place.read_bytes(), type=_Record))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise PackError(
                "TARBALL_UNREADABLE", path=place, strerror=error, hint="remove that file"
            ) from error
    return found


def digest(plan: BuildPlan, engine: str) -> str:
    """Return the sha256 of everything that decides the bytes of a tarball's binaries.

    ``engine`` is ``Engine.identity``: which compiler builds it.
    """
    line, source = plan.line, plan.source
    decides = {
        # The commands for one fixed layout and number of jobs: with all of the plan's options.
        "steps": [step.argv for step in plan.steps(CONTAINER_LAYOUT, jobs=1)],
        "environment": plan.environment(CONTAINER_LAYOUT, ccache_dir=None),
        "key": plan.key,
        "line": [line.toolkit, line.min_driver, line.glibc],
        "source": [source.origin, source.commit, source.digest, source.patches],
        "recipe": patches.recipe_sha256(),
        "engine": engine,
    }
    return hashlib.sha256(msgspec.json.encode(decides)).hexdigest()
