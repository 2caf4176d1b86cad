"""Reads what a llama-server prints: where the weights are, and why it ended."""

import json
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from llama_loader import errors
from llama_loader.errors import HostError, LoaderError

KEPT_LINES: Final = 200
_FIRST_ERRORS: Final = 20
"""Lines stamped as errors that are kept however many follow: the first one is the cause."""
_LINE: Final = 2000
"""Bytes kept of one line."""
_MAX_BUFFERS: Final = 100
"""Maximum buffers of a report: a model's text could name one in each of a million lines."""

_STAMP: Final = re.compile(r"^(?P<when>[0-9]+(?:\.[0-9]+){3}) (?P<level>[IWED]) ")
"""What llama-server puts before a message (common/log.cpp): minutes to microseconds, the level."""
_OFFLOADED: Final = re.compile(
    r"(?:llm_)?load_tensors: offloaded ([0-9]{1,6})/([0-9]{1,6}) layers to GPU"
)
_BUFFER: Final = re.compile(
    r"(?:llm_)?load_tensors: +(\S+) model buffer size = +([0-9]{1,9}(?:\.[0-9]{1,6})?) MiB"
)
_OF_THE_MODEL: Final = re.compile(r"llama_model_loader: - kv|(?:llm_load_)?print_(?:info|meta): ")
"""Lines that repeat the model file's own texts."""
_OF_A_REQUEST: Final = re.compile(r"srv +operator\(\)|.*\(CORS\)")
"""Lines that repeat a request's headers, before its key is checked."""


@dataclass(frozen=True)
class LoadReport:
    """Where the model's weights are, as the server's log reports."""

    # layers on GPUs, and all; None where the server did not say
    offloaded: int | None
    layers: int | None
    buffers: dict[str, int]  # bytes by buffer (``CUDA0``, ``CPU_Mapped``)

    def owners(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of these devices that weights lie on, as far as the server reported it."""
        return tuple(name for name in names if any(map(_of(name).fullmatch, self.buffers)))

    def on_devices(self, names: tuple[str, ...]) -> bool | None:
        """Whether weights lie on one of these devices; None where the server did not say."""
        if self.buffers:
            return bool(self.owners(names))
        return None if self.offloaded is None else self.offloaded > 0


def _of(device: str) -> re.Pattern[str]:
    """Match the names of a device's buffers.

    ``CUDA1`` has ``CUDA1``, not ``CUDA10``; Metal also ``MTL0_Mapped``, RPC ``RPC0[host:port]``.
    ``CUDA_Split`` (``--split-mode row``) is on all of CUDA's, ``CUDA_Host`` is main memory.
    """
    kind = device.rstrip("0123456789")
    return re.compile(rf"{re.escape(device)}(?:[_\[].*)?|{re.escape(kind)}_Split")


class ServerLog:
    """Reads a server's output to its end, so that it never blocks on a full pipe."""

    def __init__(self) -> None:
        self.report = LoadReport(None, None, {})
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._errors: list[str] = []
        self._stamped = self._forged = False
        self._last: list[int] = []
        self._ended = threading.Event()
        self._ended.set()  # nothing is read yet

    def tail(self) -> list[str]:
        """Return the last lines, oldest first, and before them the first errors."""
        lines = list(self._lines.copy())
        return [*(line for line in self._errors if line not in lines), *lines]

    def read(self, output: IO[bytes]) -> None:
        """Read in a thread of its own, until the output ends."""
        name = "llama-server-log"
        self._ended.clear()
        threading.Thread(target=self._read, args=(output,), name=name, daemon=True).start()

    def finish(self, timeout: float = 2.0) -> None:
        """Wait for the output's end, at most ``timeout`` seconds."""
        self._ended.wait(timeout)

    def _read(self, output: IO[bytes]) -> None:
        begins = True  # a line's beginning shows who wrote it
        with output:
            while piece := output.readline(_LINE):
                if begins:
                    line = piece.decode("utf-8", "replace").rstrip()
                    self._lines.append(line)
                    if _level(line) == "E" and len(self._errors) < _FIRST_ERRORS:
                        self._errors.append(line)
                    self._learn(line)
                begins = piece.endswith(b"\n")
        self._ended.set()

    def _learn(self, line: str) -> None:
        """Take the server's report of where the weights are, and ignore all text of the model.

        llama-server prints texts of the model's file, line breaks included. Its own messages have
        a stamp in all builds that stamp any, and none is older than the one before. A text with
        stamps of its own has to guess the time of its printing: then nothing counts.
        """
        stamp = _STAMP.match(line)
        if stamp:
            before, self._last = self._last, [*map(int, stamp["when"].split("."))]
            self._forged |= self._last < before
        if self._forged:
            self.report = LoadReport(None, None, {})
            return
        self._stamped = self._stamped or stamp is not None
        message = line[stamp.end() :] if stamp else line
        if self._stamped and not stamp:
            return
        if found := _OFFLOADED.fullmatch(message):
            self.report = replace(self.report, offloaded=int(found[1]), layers=int(found[2]))
        if (found := _BUFFER.fullmatch(message)) and len(self.report.buffers) < _MAX_BUFFERS:
            more = self.report.buffers.get(found[1], 0) + int(float(found[2]) * 1024**2)
            self.report = replace(self.report, buffers={**self.report.buffers, found[1]: more})


_QUOTED_LINES: Final = 6
_QUOTED_CHARACTERS: Final = 700
_CAUSES: Final = tuple(
    (getattr(errors, kind), name, shown_by)
    for kind, name, shown_by in json.loads(
        Path(__file__).with_name("causes.json").read_text("utf-8")
    )
)
"""Causes of an end: the kind of error, the name of its sentence, and the pattern of a line that
shows it, or of how it ended (``SIGILL while …``). The first one that is shown counts."""


def explain(status: int, lines: Sequence[str], *, loading: bool) -> LoaderError:
    """Turn an end with a ``status`` (negative for a signal) and its last lines into an error."""
    when = "while loading" if loading else "while it served"
    how = next((one.name for one in signal.Signals if one == -status), f"status {status}")
    end = f"{how} {when}"
    # a server that was ready is killed by another program, whatever it printed before
    was_killed = status == -signal.SIGKILL and not loading
    kind, name, line = next(_shown([end, *([] if was_killed else map(_message, _own(lines)))]))
    return kind(name, end=end, when=when, lines=quote(lines, line if line != end else ""))


def trouble_of_the_host(lines: Sequence[str]) -> tuple[str, str]:
    """Return the line that shows what is wrong with this machine, and what to do; else empty."""
    for kind, name, line in _shown([*map(_message, _own(lines))]):
        if kind is HostError:
            return line, HostError(name, end="", when="", lines="").hint
    return "", ""


def _shown(lines: Sequence[str]) -> Iterator[tuple[type[LoaderError], str, str]]:
    """Yield the causes that lines show, the one that counts first, each with its first line."""
    for kind, name, shown_by in _CAUSES:
        for line in lines:
            if re.search(shown_by, line):
                yield kind, name, line
                break


def quote(lines: Sequence[str], decisive: str = "") -> str:
    """Return the lines that say most, whole, as one line: the ``decisive`` one, then the last ones.

    Lines that are stamped as an error, or not at all, say more than the others. The first error is
    decisive by default.
    """
    own = _own(lines)
    first = decisive or next((_message(line) for line in own if _level(line) == "E"), "")
    more, level = [], ""
    for line in own:
        # an indented line belongs to the message above: a list of sampler parameters, say
        level = _level(line) or (level if line[0].isspace() else "")
        more += [line] if level in {"E", ""} else []
    chosen: list[str] = []
    room = _QUOTED_CHARACTERS - len(first)
    for line in reversed(dict.fromkeys(map(_message, more or own))):
        room -= len(line)
        if (room < 0 and (first or chosen)) or len(chosen) == _QUOTED_LINES:
            break
        if line != first:
            chosen.append(line)
    return " | ".join(filter(None, [first, *reversed(chosen)])) or "(it printed nothing)"


def _own(lines: Sequence[str]) -> list[str]:
    """Leave out empty lines, and those that repeat texts of the model's file or of a request."""
    foreign = (_OF_THE_MODEL, _OF_A_REQUEST)
    told = [line[:_LINE] for line in lines if line.strip()]
    return [line for line in told if not any(one.match(_message(line)) for one in foreign)]


def _message(line: str) -> str:
    return _STAMP.sub("", line).strip()


def _level(line: str) -> str:
    stamp = _STAMP.match(line)
    return stamp["level"] if stamp else ""
