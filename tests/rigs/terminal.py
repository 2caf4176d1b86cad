"""A program on a terminal of a given width (pty(7)), and what it wrote there."""

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Mapping

ROWS = 40
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MOVES = re.compile(r"[\r\n]+|\x1b\[\d*[A-HJK]")
"""Where another line of the screen begins, or the cursor goes back to one."""
_COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|4[0-7]|9[0-7])(?:;\d+)*m")


def run(
    argv: list[str],
    columns: int,
    environment: Mapping[str, str],
    limit: float = 200,
    *,
    kind: str = "xterm-256color",
) -> tuple[int, str]:
    """Run a program; returns its exit status and everything that it wrote, control codes too."""
    near, far = os.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {**environment, "TERM": kind}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    pieces = []
    with subprocess.Popen(
        argv, stdin=far, stdout=far, stderr=far, env=environment, start_new_session=True
    ) as process:
        os.close(far)
        try:
            while piece := os.read(near, 1 << 16):
                pieces.append(piece)
        except OSError:
            pass  # EIO: the program has ended
        os.close(near)
        return process.wait(limit), b"".join(pieces).decode("utf-8")


def lines(written: str) -> list[str]:
    """Return every line that was ever on the terminal, without control codes."""
    return [_CONTROL.sub("", line).rstrip() for line in _MOVES.split(written)]


def has_colour(written: str) -> bool:
    """Whether anything was coloured."""
    return _COLOUR.search(written) is not None


def has_control(written: str) -> bool:
    """Whether there is any control code but the end of a line."""
    return re.search(r"[\x00-\x09\x0b-\x1f\x7f]", written) is not None
