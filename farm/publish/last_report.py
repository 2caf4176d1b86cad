"""The gate's report of the release before the one in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm import gate, release
from farm.publish.parts import GATE

if TYPE_CHECKING:
    from pathlib import Path

    from farm.gate import Report
    from farm.publish.destination import Destination


def of(destination: Destination, folder: Path) -> Report | None:
    """Return the newest published report that is not of the release in the folder itself.

    Raises:
        PublishError: the place cannot be read, or the report is none.
        UsageError: the folder is no release.
    """
    own = release.load(folder).release
    for name in reversed(destination.releases()):
        if name != own and GATE in destination.present(name):
            return gate.decode(b"".join(destination.read(name, GATE)), what=f"{GATE} of {name}")
    return None
