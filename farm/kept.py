"""The journal and the built trees in ``.farm``, which a run keeps for the next one.

The journal has a small file for each plan's key. An entry belongs to one plan's digest; of another
plan's entry only the build's time is used. The journal's statement about a tree counts only if the
bytes are unchanged.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from farm import durable, release
from farm.durable import folder_digest
from farm.errors import PackError
from farm.pack import BUILD_RECORD, LICENCES, Packed
from farm.plan import BuildPlan, Toolchain
from farm.tarball import build_record


class JournalEntry(msgspec.Struct, frozen=True):
    """What is known of one plan.

    Attributes:
        plan: the plan's digest (``digest``).
        begun: a build has begun; without a tree it failed or was interrupted.
        tree: the kept tree's digest, None until there is one.
        tarballs: the sha256 of its tarballs, by name: one tree has the same bytes in every folder.
        seconds: how long the whole build took, this plan's or an earlier one's of the same key.
    """

    plan: str
    begun: bool = False
    tree: str | None = None
    tarballs: dict[str, str] = {}
    seconds: float | None = None
    schema_version: int = 1


@dataclass(frozen=True)
class KeptTree:
    """One plan's place in a checkout's ``.farm``, which is ``state``; ``digest`` is the plan's."""

    plan: BuildPlan
    digest: str
    state: Path

    @property
    def folder(self) -> Path:
        """Where the tree is: ``bin``, ``licenses``, ``BUILD.json``."""
        return self.state / "trees" / self.plan.key

    @property
    def _record(self) -> Path:
        return self.state / "journal" / f"{self.plan.key}.json"

    def entry(self) -> JournalEntry:
        """Return the plan's entry: of another plan the seconds alone; an empty one if damaged."""
        try:
            entry = msgspec.json.decode(self._record.read_bytes(), type=JournalEntry)
        except (FileNotFoundError, UnicodeDecodeError, msgspec.DecodeError):
            return JournalEntry(self.digest)
        same = entry.plan == self.digest
        return entry if same else JournalEntry(self.digest, seconds=entry.seconds)

    def write(self, entry: JournalEntry) -> None:
        """Replace the plan's entry; it is on the disk when this returns.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full, or this user may not write.
        """
        with durable.writing(self._record):
            self._record.parent.mkdir(parents=True, exist_ok=True)
            text = msgspec.json.format(msgspec.json.encode(entry), indent=2)
            durable.replace(self._record, text, 0o644)

    def begin(self) -> None:
        """Record that a build begins; the entry keeps the last build's time."""
        self.write(JournalEntry(self.digest, begun=True, seconds=self.entry().seconds))

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
        entry = JournalEntry(self.digest, begun=True, seconds=seconds)
        self.write(entry)
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
        self.write(msgspec.structs.replace(entry, tree=whole))

    def packed(self, out: Path) -> Packed | None:
        """Return this tree's tarball in ``out`` if it has the recorded bytes."""
        place = out / self.plan.artifact_name
        with suppress(OSError):
            found = durable.sha256(place, follow=False)
            if found == self.entry().tarballs.get(place.name):
                return Packed(place, found, place.stat().st_size)
        return None

    def pack(self, out: Path) -> Packed:
        """Pack the tree into ``out``.

        Raises:
            PackError: the disk is full, or a program is missing.
            InspectError: a binary is not what its set and line say.
        """
        made, entry = release.pack_tree(self.folder, out, self.plan.arch_set.format), self.entry()
        tarballs = {**entry.tarballs, made.path.name: made.sha256}
        self.write(msgspec.structs.replace(entry, tarballs=tarballs))
        return made


def times(plans: Iterable[BuildPlan], state: Path) -> dict[str, float | None]:
    """Return the seconds of the last finished build of each plan's key, None without one."""
    return {plan.key: KeptTree(plan, "", state).entry().seconds for plan in plans}


def digest(plan: BuildPlan, engine: str) -> str:
    """Return the sha256 of everything that decides the bytes of a tarball's binaries.

    That is what ``BUILD.json`` records, before a compiler was asked. ``engine`` is
    ``BuildEngine.identity``: which compiler builds it.
    """
    record = build_record.of(plan, Toolchain(engine, "", "", None))
    return hashlib.sha256(msgspec.json.encode([record, plan.source.digest])).hexdigest()
