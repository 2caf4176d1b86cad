"""The farm: plan → run → inspect → pack → release → publish.

The manifest's schema is owned by its reader, ``spaces/llama_loader/manifest.py``; the farm imports
it from there (docs/decisions/0001-manifest-owned-by-the-loader.md). In a checkout that is not
installed, ``spaces/`` is put at the end of the module search path here.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PROJECT_ROOT = Path(__file__).resolve().parent.parent
STATE_FOLDER = PROJECT_ROOT / ".farm"
"""Trees, logs and journal of this checkout; git ignores it."""
MACHINE: Final = "x86_64"
"""The processor of a line's binaries, unless its row in targets.toml names another."""

if find_spec("llama_loader") is None:
    sys.path.append(str(PROJECT_ROOT / "spaces"))
