"""A plan and who carries it out → one digest; a folder → one digest. Reads files, changes none."""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING

import msgspec

from farm.inputs import recipe
from farm.plan import CONTAINER_LAYOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from farm.plan import BuildPlan
    from farm.source import Source


def digest(plan: BuildPlan, engine: str) -> str:
    """Return the sha256 of everything that decides the bytes of a tarball's binaries.

    Args:
        plan: what is built.
        engine: ``Engine.identity``: which compiler builds it.
    """
    line = plan.line
    decides = {
        # The commands for one fixed layout and number of jobs: with all of the plan's options.
        "steps": [step.argv for step in plan.steps(CONTAINER_LAYOUT, jobs=1)],
        "environment": plan.environment(CONTAINER_LAYOUT, ccache_dir=None),
        "key": plan.key,
        "line": [line.toolkit, line.min_driver, line.glibc],
        "source": [plan.source.origin, plan.source.commit, source_digest(plan.source)],
        "recipe": recipe.sha256(),
        "engine": engine,
    }
    return hashlib.sha256(msgspec.json.encode(decides)).hexdigest()


def source_digest(source: Source) -> str:
    """Return what names the source's content: of its archive, its commit, or its files."""
    if source.sha256 is not None:
        return source.sha256
    if source.commit is not None and source.origin.startswith("git+"):
        return source.commit
    return folder_digest(source.tree)


def folder_digest(folder: Path) -> str:
    """Return the sha256 of a folder's names, modes, links and contents, ``.git`` left out.

    Nothing is read from what is neither a file nor a link: a pipe would wait for ever.
    """
    whole = hashlib.sha256()
    for path in files(folder):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            kind, content = "link", _encodable(str(path.readlink()))
        elif not path.is_file():
            kind, content = "other", ""
        else:
            kind = "program" if path.stat().st_mode & stat.S_IXUSR else "file"
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(msgspec.json.encode([_encodable(name), kind, content]) + b"\n")
    return whole.hexdigest()


def _encodable(name: str) -> str:
    """Return a name as it is where it is UTF-8, else with its other bytes escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def files(folder: Path) -> Iterator[Path]:
    """Give what is in a folder and below it and is no folder, in order, ``.git`` left out."""
    for path in sorted(folder.iterdir()):
        if path.name == ".git":
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files(path)
        else:
            yield path
