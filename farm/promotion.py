"""No release comes into a channel unchecked: its report is there and passed, or is made now."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from farm import gate
from farm.errors import PublishError
from farm.publish import last_report, parts
from farm.publish.parts import GATE
from farm.release import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.gate import Check
    from farm.publish.destination import Destination


def require_gate(destination: Destination, release: str, tell: Callable[[Check], None]) -> None:
    """Let a published release through only where nothing failed.

    A release without a report is fetched and checked here, and the report published beside it.

    Raises:
        PublishError: it is not published, or a check failed.
    """
    present = destination.present(release)
    manifest = b"".join(destination.read(release, MANIFEST))
    what = f"{release} of {destination.where}"
    if GATE in present:
        gate.require_passed(b"".join(destination.read(release, GATE)), manifest, what=what)
        return
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as name:
        folder = Path(name)
        for part in present:
            with (folder / part).open("wb") as out:
                out.writelines(destination.read(release, part))
        report = gate.run(folder, last_report.of(destination, folder), tell)
        if report.failed:
            raise PublishError("GATE_FAILED", f"{what} did not pass: {'; '.join(report.failed)}")
        _, found = parts.of_folder(folder)
        plan = parts.plan(release, destination.where, found, present)
        destination.publish(plan, parts.compare, lambda _: None)
