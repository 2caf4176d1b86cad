"""Reads what a llama-server prints: where the weights are, and why it ended."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Final, NamedTuple

from llama_loader.devices import INVALID_DEVICE_HINT
from llama_loader.errors import HostError, LoaderError, ServerError, SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_BYTES: Final = 2 * 1024 * 1024
"""Most that the log file and its predecessor (``.1``) take together."""
KEPT_LINES: Final = 200
ARGUMENT_INVALID: Final = "SERVER_ARGUMENT_INVALID"
_LINE: Final = 2000
"""Characters kept of one line."""
_BLOCK: Final = 64 * 1024

_STAMP: Final = re.compile(r"^[0-9]+(?:\.[0-9]+){3} (?P<level>[IWED]) ")
"""What llama-server puts before a message (common/log.cpp): minutes to microseconds, the level."""
_OFFLOADED: Final = re.compile(
    r"(?:llm_)?load_tensors: offloaded ([0-9]{1,6})/([0-9]{1,6}) layers to GPU"
)
_BUFFER: Final = re.compile(
    r"(?:llm_)?load_tensors: +(\S+) model buffer size = +([0-9]{1,9}(?:\.[0-9]{1,6})?) MiB"
)
_OF_THE_MODEL: Final = re.compile(r"llama_model_loader: - kv|(?:llm_load_)?print_(?:info|meta): ")
"""Lines that repeat the model file's own texts."""


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

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.path = path
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._lock = threading.Lock()
        self._written = 0
        self._stamped = False
        self._report = LoadReport(None, None, {})
        self._thread = threading.Thread(target=self._pump, name="llama-server-log", daemon=True)
        self._thread.start()

    def tail(self, count: int = KEPT_LINES) -> list[str]:
        """Return the last lines, oldest first."""
        with self._lock:
            return list(self._lines)[-count:]

    def report(self) -> LoadReport:
        """Return what has been said so far about where the weights went."""
        return self._report

    def finish(self, timeout: float = 2.0) -> None:
        """Wait for the output's end, at most ``timeout`` seconds."""
        self._thread.join(timeout)

    def _pump(self) -> None:
        rest = b""
        with self._stream as stream:
            while block := stream.read1(_BLOCK):  # type: ignore[attr-defined]
                self._write(block)
                *lines, rest = (rest + block).split(b"\n")
                self._keep(lines)
                rest = rest[:_BLOCK]  # a line's beginning says whose it is
            self._keep([rest] if rest else [])

    def _write(self, block: bytes) -> None:
        """Add to the file, or begin it anew. A full disk costs the log, nothing else."""
        with contextlib.suppress(OSError):
            if self._written + len(block) > MAX_BYTES // 2:
                self.path.replace(f"{self.path}.1")
                self._written = 0
            with self.path.open("ab") as file:
                file.write(block)
            self._written += len(block)

    def _keep(self, lines: list[bytes]) -> None:
        texts = [line[:_LINE].decode("utf-8", "replace").rstrip() for line in lines]
        with self._lock:
            for text in texts:
                self._lines.append(text)
                self._learn(text)

    def _learn(self, line: str) -> None:
        """Take the server's report of where the weights are, and nothing that the model says.

        llama-server prints texts of the model's file, line breaks included. Its own messages have
        a stamp in all builds that stamp any.
        """
        stamp = _STAMP.match(line)
        self._stamped = self._stamped or stamp is not None
        message = line[stamp.end() :] if stamp else line
        if self._stamped and not stamp:
            return
        if found := _OFFLOADED.fullmatch(message):
            self._report = replace(self._report, offloaded=int(found[1]), layers=int(found[2]))
        if found := _BUFFER.fullmatch(message):
            buffers = dict(self._report.buffers)
            buffers[found[1]] = buffers.get(found[1], 0) + int(float(found[2]) * 1024**2)
            self._report = replace(self._report, buffers=buffers)


_QUOTED_LINES: Final = 6
_QUOTED_CHARACTERS: Final = 700
_WORTH_QUOTING: Final = re.compile(
    r"error|fail|invalid|unknown (?:model|arg)|cannot|abort|memory|GGML_ASSERT|what\(\)",
    re.IGNORECASE,
)
_SIZES: Final = re.compile(
    r"allocating [0-9.]+ MiB on device [0-9]+|attempted to allocate [0-9.]+ M[iB]+"
    r"|failed to allocate \S+ buffer of size [0-9]+|model buffer size = +[0-9.]+ MiB"
    r"|KV buffer size = +[0-9.]+ MiB|[0-9]+ MiB free"
)
NOT_EXECUTABLE_HINT: Final = (
    "put the store on a disk whose files may be executed: --store DIR, or HF_HOME; and check that"
    " the release is for this machine's processor and system"
)


class _Cause(NamedTuple):
    """A cause of an end that one line shows, or the signal."""

    shown_by: str | signal.Signals
    kind: type[LoaderError]
    code: str
    sentence: str
    hint: str


_CAUSES: Final = (  # the first that is shown counts
    _Cause(
        r"couldn't bind HTTP server socket",
        ServerError,
        "PORT_IN_USE",
        "ended: another program has the port",
        "leave YAKULINGO_SPACES_LLAMA_SERVER_PORT unset to get a free one",
    ),
    _Cause(
        r"failed to map segment from shared object",
        HostError,
        "RUNTIME_NOT_EXECUTABLE",
        "ended: a library of the runtime may not be executed where it is stored (noexec)",
        NOT_EXECUTABLE_HINT,
    ),
    _Cause(
        r"error while loading shared libraries: .*cannot open shared object",
        HostError,
        "LIBRARY_MISSING",
        "ended: a library that it needs is not on this machine",
        "`python -m llama_loader doctor` names the package that brings it",
    ),
    _Cause(
        r"version `GLIBC\S*' not found",
        HostError,
        "GLIBC_TOO_OLD",
        "ended: it was built for a newer system than this one",
        "use a release built on an older system, or a newer base image",
    ),
    _Cause(
        r"symbol lookup error|undefined symbol|version `\S+' not found"
        r"|error while loading shared libraries",
        HostError,
        "LIBRARY_MISMATCH",
        "ended: a library on this machine does not fit the others",
        "take the folder that the line names out of LD_LIBRARY_PATH, or install the packages that"
        " `python -m llama_loader doctor` names",
    ),
    _Cause(
        r"invalid device: ",
        HostError,
        "INVALID_DEVICE",
        "ended: a device that was named is not there",
        INVALID_DEVICE_HINT,
    ),
    _Cause(
        r"^error: (?:invalid argument|unknown argument)|^error while handling argument",
        SettingError,
        ARGUMENT_INVALID,
        "ended: it does not take an argument that it was given",
        "look at the arguments after `--`; `llama-server --help` lists what it takes",
    ),
    _Cause(
        r"no kernel image is available|device kernel image is invalid",
        HostError,
        "NO_KERNEL_IMAGE",
        "ended: this build has no code for this GPU",
        "leave YAKULINGO_SPACES_CUDA_ARCH unset, or publish a set for this GPU",
    ),
    _Cause(
        r"CUDA driver version is insufficient|PTX was compiled with an unsupported toolchain"
        r"|forward compatibility was attempted|unsupported display driver / cuda driver"
        r"|not supported in the installed CUDA driver",
        HostError,
        "DRIVER_TOO_OLD",
        "ended: the NVIDIA driver is older than this build's CUDA",
        "update the driver, or use a release of an older CUDA line (cu124)",
    ),
    _Cause(
        r"(?i)out of memory|insufficient memory|cudaMalloc failed|unable to allocate"
        r"|failed to allocate .*buffer|std::bad_alloc|ENOMEM",
        ServerError,
        "OUT_OF_MEMORY",
        "",
        "",
    ),
    _Cause(
        r"CUDA error",
        ServerError,
        "CUDA_ERROR",
        "was stopped by a CUDA error",
        "the server is started anew; if it happens again, report it with this text",
    ),
    _Cause(
        r"error loading model|failed to load model|failed to open GGUF|invalid magic"
        r"|unknown model architecture|failed to read (?:magic|header)",
        ServerError,
        "BAD_MODEL",
        "cannot load the model",
        "is the file there, whole, GGUF, and of an architecture that this build knows?",
    ),
    _Cause(
        signal.SIGKILL,
        ServerError,
        "SERVER_KILLED",
        "was killed (SIGKILL)",
        "usually the system ran out of main memory: take a smaller model or context",
    ),
    _Cause(
        signal.SIGILL,  # the same instruction comes at the same place again
        HostError,
        "ILLEGAL_INSTRUCTION",
        "used an instruction that this CPU does not have (SIGILL)",
        "a virtual machine may announce more (AMX, AVX-512) than it allows; on a GPU all layers"
        " must be there: check YAKULINGO_SPACES_N_GPU_LAYERS and the device",
    ),
)
_MEMORY_HINT: Final = (
    "take a smaller quantisation or model, lower YAKULINGO_SPACES_N_CTX, or lower"
    " YAKULINGO_SPACES_N_GPU_LAYERS"
)
_FOLDER: Final = re.compile(r"(/[^\s:]*)/[^/\s:]+(?=: (?:undefined symbol|version `))")
"""In a line of the dynamic linker: the folder of the library that it complains of."""


def explain(status: int, lines: Sequence[str], *, loading: bool) -> LoaderError:
    """Turn an end into an error.

    Args:
        status: exit status, negative for a signal.
        lines: the last lines that it printed, oldest first.
        loading: it had not answered yet.
    """
    own = [_STAMP.sub("", line) for line in _without_the_models(lines)]
    when = "while loading" if loading else "while it served"
    for cause in _CAUSES:
        if isinstance(cause.shown_by, signal.Signals):
            if status == -cause.shown_by:
                message = f"llama-server {cause.sentence} {when}; its last lines: {quote(lines)}"
                return cause.kind(cause.code, message, hint=cause.hint)
            continue
        shown = _first(cause.shown_by, own)
        if shown is None or (cause.code == "BAD_MODEL" and not loading):
            continue
        if cause.code == "OUT_OF_MEMORY":
            return _out_of_memory(lines, own, shown)
        folder = _FOLDER.search(shown) if cause.code == "LIBRARY_MISMATCH" else None
        where = f" (in {folder[1]})" if folder else ""
        message = f"llama-server {cause.sentence}{where}; its last lines: {quote(lines, shown)}"
        return cause.kind(cause.code, message, hint=cause.hint)
    quoted = f"; its last lines: {quote(lines)}"
    if status < 0:
        name = next((one.name for one in signal.Signals if one == -status), f"signal {-status}")
        return ServerError("SERVER_CRASHED", f"llama-server was ended by {name} {when}{quoted}")
    return ServerError("SERVER_ENDED", f"llama-server ended with status {status} {when}{quoted}")


def quote(lines: Sequence[str], decisive: str = "") -> str:
    """Return the lines that say most, whole, as one line: the decisive one first.

    Args:
        lines: what was printed, oldest first.
        decisive: the message that decided; by default the first error that was logged, else the
            first line that complains. Where no line complains, the last ones are quoted.
    """
    own = [line.strip() for line in _without_the_models(lines) if line.strip()]
    complaints = [line for line in own if _WORTH_QUOTING.search(line)]
    errors = [line for line in complaints if (at := _STAMP.match(line)) and at["level"] == "E"]
    first = decisive.strip() or _STAMP.sub("", next(iter([*errors, *complaints]), ""))
    chosen: list[str] = []
    room = _QUOTED_CHARACTERS - len(first)
    for line in reversed(dict.fromkeys(_STAMP.sub("", line) for line in complaints or own)):
        room -= len(line)
        if (room < 0 and (first or chosen)) or len(chosen) == _QUOTED_LINES:
            break
        if line != first:
            chosen.append(line)
    return " | ".join(filter(None, [first, *reversed(chosen)])) or "(it printed nothing)"


def _without_the_models(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not _OF_THE_MODEL.match(_STAMP.sub("", line))]


def _first(pattern: str, lines: Sequence[str]) -> str | None:
    return next((line for line in lines if re.search(pattern, line)), None)


def _out_of_memory(lines: Sequence[str], own: Sequence[str], shown: str) -> ServerError:
    on_gpu = _first(r"cudaMalloc|on device [0-9]|CUDA[0-9]+ buffer", own) is not None
    sizes = dict.fromkeys(found for line in own for found in _SIZES.findall(line))
    where = "GPU" if on_gpu else "main"
    said = f" ({'; '.join(list(sizes)[-_QUOTED_LINES:])})" if sizes else ""
    return ServerError(
        "OUT_OF_MEMORY",
        f"not enough {where} memory for the model and its context{said}; llama-server's last"
        f" lines: {quote(lines, shown)}",
        hint=_MEMORY_HINT,
    )
