"""Builds the CPU set of a source with ``--engine dask``, as a verb does, in a folder of its own.

    python tests/rigs/dask_client.py SOURCE FOLDER [NAME=VALUE of a BuildRequest …]

State, cache and tarballs go below FOLDER.
"""

import os
import sys
from pathlib import Path

from invoke.exceptions import Exit

from farm import pipeline, preflight
from farm.options import BuildRequest
from farm.terminal.cli import guarded
from farm.terminal.progress import BuildReport


@guarded
def main(tree: str, folder: str, *options: str) -> None:
    """Build."""
    place = Path(folder)
    os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), "CCACHE_DIR": str(place / "ccache")}
    pipeline.STATE = place / "state"  # type: ignore[misc] - a checkout of its own
    named = BuildRequest(
        arch_set="cpu",
        line="cpu",
        engine="dask",
        source=Path(tree),
        out=place / "out",
        patches="none",
    )
    for option in options:
        name, _, value = option.partition("=")
        named = type(named)(**(vars(named) | {name: value}))
    with BuildReport() as report:
        preflight.build(named, report)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exit as ended:
        sys.exit(ended.code)
