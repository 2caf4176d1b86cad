"""What runs on this machine."""

from contextlib import suppress
from pathlib import Path


def command_lines() -> dict[int, str]:
    """Return the command line of each process, its words with spaces between."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just gone
            line = file.read_bytes().replace(b"\0", b" ")
            found[int(file.parent.name)] = line.decode(errors="replace")
    return found
