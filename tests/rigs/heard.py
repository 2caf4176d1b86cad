"""Programs that are run to their end, and what they printed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def heard(
    argv: Sequence[str | Path], *, check: bool = False, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program; the rest is as for ``subprocess.run``."""
    return subprocess.run(argv, capture_output=True, text=True, check=check, **more)
