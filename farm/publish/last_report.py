"""What earlier releases were measured at, to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm.publish import gate, parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.publish.destination import Destination
    from farm.publish.figures import Figures


def figures(destination: Destination, own: str) -> Iterator[Figures]:
    """Return the figures of the releases before one, the newest first, read as they are asked for.

    Reports in which a check failed do not count: a release that was too slow would otherwise be
    the measure of the next one.

    Args:
        destination: where they are published.
        own: the release that is being checked; its own reports are left out.

    Raises:
        PublishError: the place cannot be read, or a report is none.
    """
    earlier = [name for name in reversed(destination.releases()) if name != own]
    return _read(destination, earlier)


def _read(destination: Destination, releases: list[str]) -> Iterator[Figures]:
    for name in releases:
        for file in parts.reports(destination.present(name)):
            report = gate.decode(b"".join(destination.read(name, file)), what=f"{file} of {name}")
            if report.figures is not None and not report.failed:
                yield report.figures
