"""What a running llama-server says: a file that cannot grow, the last lines, the load report."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES: Final = 2 * 1024 * 1024
"""Most that the log file and its predecessor (``.1``) take together."""
_KEPT_LINES: Final = 200
_LINE: Final = 2000
"""Characters kept of one line."""
_BLOCK: Final = 64 * 1024

_OFFLOADED: Final = re.compile(r"offloaded ([0-9]+)/([0-9]+) layers to GPU")
_BUFFER_MARK: Final = " model buffer size = "
_BUFFER: Final = re.compile(r"(\S+) model buffer size = +([0-9.]+) MiB")


@dataclass(frozen=True)
class LoadReport:
    """Where the model's weights went, by the server's own words.

    Attributes:
        offloaded, layers: layers on GPUs, and all; None where the server did not say.
        buffers: bytes by buffer (``CUDA0``, ``CPU_Mapped``).
    """

    offloaded: int | None
    layers: int | None
    buffers: dict[str, int]

    @property
    def told(self) -> bool:
        """Whether the server said anything at all of where its weights are."""
        return bool(self.buffers) or self.offloaded is not None

    def owners(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of these devices that weights lie on, as far as the server said so."""
        return tuple(name for name in names if any(_is_of(name, one) for one in self.buffers))

    def on_devices(self, names: tuple[str, ...]) -> bool | None:
        """Whether weights lie on one of these devices; None where the server did not say."""
        if self.owners(names):
            return True
        if self.buffers:
            return False
        return None if self.offloaded is None else self.offloaded > 0


def _is_of(device: str, buffer: str) -> bool:
    """Whether a buffer is a device's, by its name.

    ``CUDA1`` has ``CUDA1``, not ``CUDA10``; Metal also ``MTL0_Mapped``, RPC ``RPC0[host:port]``.
    ``CUDA_Split`` (``--split-mode row``) is on all of CUDA's, ``CUDA_Host`` is main memory.
    """
    if buffer == f"{device.rstrip('0123456789')}_Split":
        return True
    return buffer.startswith(device) and buffer[len(device) : len(device) + 1] in {"", "_", "["}


class ServerLog:
    """Reads a program's output to its end, so that it never blocks on a full pipe."""

    def __init__(self, stream: BinaryIO, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._stream = stream
        self._limit = max_bytes // 2
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()
        self._offloaded: tuple[int, int] | None = None
        self._buffers: dict[str, int] = {}
        self._thread = threading.Thread(target=self._pump, name="llama-server-log", daemon=True)
        self._thread.start()

    def tail(self, count: int = 40) -> list[str]:
        """Return the last lines, oldest first."""
        with self._lock:
            return list(self._lines)[-count:]

    def report(self) -> LoadReport:
        """Return what has been said so far about where the weights went."""
        with self._lock:
            done, layers = self._offloaded or (None, None)
            return LoadReport(done, layers, dict(self._buffers))

    def finish(self, timeout: float = 2.0) -> None:
        """Wait for the output's end, at most ``timeout`` seconds."""
        self._thread.join(timeout)

    def _pump(self) -> None:
        rest = b""
        with contextlib.ExitStack() as stack:
            stack.callback(self._stream.close)
            file = _BoundedFile(self.path, self._limit)
            stack.callback(file.close)
            while block := self._read():
                file.write(block)
                *lines, rest = (rest + block).split(b"\n")
                self._keep(lines)
                rest = rest[-_BLOCK:]
            self._keep([rest] if rest else [])

    def _read(self) -> bytes:
        try:
            return self._stream.read1(_BLOCK)  # type: ignore[attr-defined,no-any-return]
        except (OSError, ValueError):
            return b""

    def _keep(self, lines: list[bytes]) -> None:
        texts = [line[:_LINE].decode("utf-8", "replace").rstrip() for line in lines]
        with self._lock:
            for text in texts:
                self._lines.append(text)
                self._learn(text)

    def _learn(self, line: str) -> None:
        offloaded = _OFFLOADED.search(line)
        if offloaded:
            self._offloaded = int(offloaded[1]), int(offloaded[2])
        # the plain look first: searching for \S+ in a long line takes quadratic time
        buffer = _BUFFER.search(line) if _BUFFER_MARK in line else None
        if buffer:
            size = int(float(buffer[2]) * 1024**2)
            self._buffers[buffer[1]] = self._buffers.get(buffer[1], 0) + size


class _BoundedFile:
    """Two halves: when one is full it becomes ``.1``. A full disk costs the log, nothing else."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit, self._written = path, limit, 0
        self._file: BinaryIO | None = None
        with contextlib.suppress(OSError):
            self._file = path.open("wb")

    def write(self, block: bytes) -> None:
        if self._file is None:
            return
        try:
            if self._written + len(block) > self._limit:
                self._file.close()
                self._path.replace(f"{self._path}.1")
                self._file, self._written = self._path.open("wb"), 0
            self._file.write(block[-self._limit :])
            self._file.flush()
            self._written += len(block)
        except OSError:
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
