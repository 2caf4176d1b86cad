"""A disk that is full soon: a tmpfs whose size can be changed while it is used."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from needs import must_or_skip


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount one; gives what changes its size (``16m``)."""
    place.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        must_or_skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")

    def resize(new: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={new}", str(place)], check=True)

    try:
        yield resize
    finally:
        # lazily: what ends with its parent may be a moment behind it
        subprocess.run(["umount", "--lazy", str(place)], check=True)
