"""A plan and who carries it out → one digest. Reads files, changes none."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from farm.inputs import recipe
from farm.kept.folder_digest import folder_digest
from farm.plan import CONTAINER_LAYOUT

if TYPE_CHECKING:
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
