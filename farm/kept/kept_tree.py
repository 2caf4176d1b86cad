"""One set's tree in ``.farm/trees`` and its tarball: kept, found again, packed.

What the journal says is believed only where the bytes still are what it says.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from farm import durable, release
from farm.errors import PackError
from farm.kept.folder_digest import folder_digest
from farm.kept.journal import Entry, Journal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from farm.plan import BuildPlan


@dataclass(frozen=True)
class KeptTree:
    """One plan's place in a checkout's state folder.

    Attributes:
        plan: what is built.
        digest: the plan's (``plan_digest.digest``).
        state: the checkout's ``.farm``.
    """

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
        """Return what the journal has of this plan."""
        return self.journal.read(self.plan.key, self.digest)

    def forget(self) -> None:
        """Begin anew; the time that the last build took stays known."""
        self.journal.write(
            self.plan.key, Entry(self.digest, seconds=self.journal.seconds(self.plan.key))
        )

    def is_whole(self) -> bool:
        """Whether the tree that the journal names is there, unchanged."""
        expected = self.entry().tree
        return (
            expected is not None and self.folder.is_dir() and folder_digest(self.folder) == expected
        )

    def progress(self) -> str | None:
        """Say how far an unfinished build had come, None where it had not begun."""
        entry = self.entry()
        if entry.running is None or entry.tree is not None:
            return None
        finished = f"{', '.join(entry.steps)} finished, " if entry.steps else ""
        at = f" had come to {entry.count[0]} of {entry.count[1]}" if entry.count else " had begun"
        return f"{finished}{entry.running}{at}"

    def keep(
        self,
        products: Path,
        build_json: bytes,
        licences: Mapping[str, bytes],
        seconds: dict[str, float],
    ) -> None:
        """Take over a build's products; the tree counts once the journal names it.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full, or this user may not write; what had
                been written is gone, so that there is room for the sets after this one.
        """
        entry = Entry(self.digest, steps=seconds, seconds=sum(seconds.values()))
        self.journal.write(self.plan.key, entry)
        try:
            with durable.writing(self.folder):
                self._fill(products, build_json, licences)
                whole = folder_digest(self.folder)
        except PackError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.journal.write(self.plan.key, msgspec.structs.replace(entry, tree=whole))

    def _fill(self, products: Path, build_json: bytes, licences: Mapping[str, bytes]) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        shutil.copytree(products, self.folder / "bin", symlinks=True)
        (self.folder / "BUILD.json").write_bytes(build_json)
        (self.folder / "licenses").mkdir()
        for name, text in licences.items():
            (self.folder / "licenses" / name).write_bytes(text)

    def packed(self, out: Path) -> Path | None:
        """Return the tarball where it lies in ``out`` with the bytes that were recorded."""
        tarball = out / self.plan.artifact_name
        expected = self.entry().tarballs.get(tarball.name)
        return tarball if expected and tarball.is_file() and _sha256(tarball) == expected else None

    def pack(self, out: Path) -> Path:
        """Pack the tree into ``out``.

        Raises:
            PackError: the disk is full, or a program is missing.
            InspectError: a binary is not what its set and line say.
        """
        tarball = release.pack_tree(self.folder, out, self.plan.arch_set.format)
        entry = self.entry()
        tarballs = entry.tarballs | {tarball.name: _sha256(tarball)}
        self.journal.write(self.plan.key, msgspec.structs.replace(entry, tarballs=tarballs))
        return tarball


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
