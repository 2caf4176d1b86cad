"""Reads what a llama-server prints: where the weights are, and why it ended."""

import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Final, NamedTuple

from llama_loader.errors import HostError, LoaderError, ServerError, SettingError

KEPT_LINES: Final = 200
ARGUMENT_INVALID: Final = "SERVER_ARGUMENT_INVALID"
_FIRST_ERRORS: Final = 20
"""Lines stamped as errors that are kept whatever follows them: the first one is the cause."""
_LINE: Final = 2000
"""Bytes kept of one line."""
_MAX_BUFFERS: Final = 100
"""Of a report: some for each device. A model's text could name one in each of a million lines."""

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
    """Reads a server's output to its end, so that it never blocks on a full pipe.

    Attributes:
        report: what has been said so far about where the weights went.
    """

    def __init__(self) -> None:
        self.report = LoadReport(None, None, {})
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._errors: list[str] = []
        self._stamped = False
        self._ended = threading.Event()

    def tail(self) -> list[str]:
        """Return the last lines, oldest first, and before them the first errors."""
        lines = list(self._lines.copy())
        return [*(line for line in self._errors if line not in lines), *lines]

    def read(self, output: IO[bytes]) -> None:
        """Read in a thread of its own, until the output ends."""
        name = "llama-server-log"
        threading.Thread(target=self._read, args=(output,), name=name, daemon=True).start()

    def finish(self, timeout: float = 2.0) -> None:
        """Wait for the output's end, at most ``timeout`` seconds."""
        self._ended.wait(timeout)

    def _read(self, output: IO[bytes]) -> None:
        begins = True  # a line's beginning says whose it is
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
            self.report = replace(self.report, offloaded=int(found[1]), layers=int(found[2]))
        if (found := _BUFFER.fullmatch(message)) and len(self.report.buffers) < _MAX_BUFFERS:
            more = self.report.buffers.get(found[1], 0) + int(float(found[2]) * 1024**2)
            self.report = replace(self.report, buffers={**self.report.buffers, found[1]: more})


_QUOTED_LINES: Final = 6
_QUOTED_CHARACTERS: Final = 700
_MEMORY_HINT: Final = (
    "take a smaller quantisation or model, lower YAKULINGO_SPACES_N_CTX, or lower"
    " YAKULINGO_SPACES_N_GPU_LAYERS"
)
_NOT_EXECUTABLE_HINT: Final = (
    "put the store on a disk whose files may be executed: --store DIR, or HF_HOME; and check that"
    " the release is for this machine's processor and system"
)


INVALID_DEVICE_HINT: Final = (
    "--list-devices empty or 'invalid device' usually means a Vulkan build of llama-server, and"
    " ZeroGPU shows no Vulkan device: point YAKULINGO_SPACES_LLAMA_CPP_URL (or the manifest) at a"
    " CUDA build and set YAKULINGO_SPACES_LLAMA_DEVICE=auto"
)
"""For archives that are not ours; after the original YakuLingo guide."""


class _Cause(NamedTuple):
    kind: type[LoaderError]
    code: str
    shown_by: str
    sentence: str
    hint: str


_server, _host, _setting = (partial(_Cause, it) for it in (ServerError, HostError, SettingError))
_CAUSES: Final = (
    _setting(
        ARGUMENT_INVALID,
        r"^status 0 while loading$",
        "ended: it did what it was asked to, without an error, and did not serve",
        "an argument after `--`, such as --help, may make it print something and end: leave it out",
    ),
    _server(
        "PORT_IN_USE",
        r"couldn't bind HTTP server socket",
        "ended: another program has the port",
        "leave YAKULINGO_SPACES_LLAMA_SERVER_PORT unset to get a free one",
    ),
    _host(
        "RUNTIME_NOT_EXECUTABLE",
        r"failed to map segment from shared object",
        "ended: a library of the runtime may not be executed where it is stored (noexec)",
        _NOT_EXECUTABLE_HINT,
    ),
    _host(
        "LIBRARY_MISSING",
        r"error while loading shared libraries: .*cannot open shared object",
        "ended: a library that it needs is not on this machine",
        "`python -m llama_loader doctor` names the package that brings it",
    ),
    _host(
        "GLIBC_TOO_OLD",
        r"version `GLIBC\S*' not found",
        "ended: it was built for a newer system than this one",
        "use a release built on an older system, or a newer base image",
    ),
    _host(
        "LIBRARY_MISMATCH",
        r"symbol lookup error|undefined symbol|version `\S+' not found|relocation error"
        r"|error while loading shared libraries|Error (?:relocating|loading shared library) ",
        "ended: a library on this machine does not fit the others",
        "take the folder that the line names out of LD_LIBRARY_PATH, or install the packages that"
        " `python -m llama_loader doctor` names",
    ),
    _host(
        "INVALID_DEVICE",
        r"invalid device: ",
        "ended: a device that was named is not there",
        INVALID_DEVICE_HINT,
    ),
    _setting(
        ARGUMENT_INVALID,
        r"^error: (?:invalid argument|unknown argument)|^error while handling argument",
        "ended: it does not take an argument that it was given",
        "look at the arguments after `--`; `llama-server --help` lists what it takes",
    ),
    _host(
        "NO_KERNEL_IMAGE",
        r"no kernel image is available|device kernel image is invalid",
        "ended: this build has no code for this GPU",
        "leave YAKULINGO_SPACES_CUDA_ARCH unset, or publish a set for this GPU",
    ),
    _host(
        "LIBRARY_MISSING",
        r"PTX JIT compiler library not found",
        "ended: the driver's libnvidia-ptxjitcompiler.so.1 is not on this machine",
        "give the container the driver's compute libraries (NVIDIA_DRIVER_CAPABILITIES), or use a"
        " release that has machine code for this GPU",
    ),
    _host(
        "DRIVER_TOO_OLD",
        r"forward compatibility was attempted",
        "ended: CUDA's compat libcuda.so.1 was found before the driver's own",
        "remove the folder of that compat libcuda.so.1 from LD_LIBRARY_PATH and ld.so.conf: this"
        " GPU does not take it",
    ),
    _host(
        "DRIVER_TOO_OLD",
        r"CUDA driver version is insufficient|PTX was compiled with an unsupported toolchain"
        r"|unsupported display driver / cuda driver|not supported in the installed CUDA driver",
        "ended: the NVIDIA driver is older than this build's CUDA",
        "update the driver, or use a release of an older CUDA line (cu124)",
    ),
    _server(
        "OUT_OF_MEMORY",
        r"cudaMalloc failed|CUDA error: out of memory|(?:unable|failed) to allocate CUDA",
        "ended: not enough GPU memory for the model and its context",
        _MEMORY_HINT,
    ),
    _server(
        "OUT_OF_MEMORY",
        r"(?i)out of memory|insufficient memory|unable to allocate|failed to allocate .*buffer"
        r"|std::bad_alloc|ENOMEM",
        "ended: not enough main memory for the model and its context",
        _MEMORY_HINT,
    ),
    _server(
        "CUDA_ERROR",
        r"CUDA error(?!: (?:system not yet initialized|no CUDA-capable device|driver is a stub))",
        "was stopped by a CUDA error",
        "the server is started anew; if it happens again, report it with this text",
    ),
    _host(
        "LIBRARY_MISSING",
        r"no backends are loaded",
        "ended: it finds no libggml-*.so with code for this machine's CPU or GPU",
        "use an archive that has them in the folder of llama-server; a release of the demo has code"
        " for one kind of CPU: `invoke build-cpu` builds for all",
    ),
    _server(
        "BAD_MODEL",
        r"error loading model|failed to load model|failed to open GGUF|invalid magic"
        r"|unknown model architecture|failed to read (?:magic|header)",
        "cannot load the model",
        "is the file there, whole, GGUF, and of an architecture that this build knows?",
    ),
    _server(
        "SERVER_KILLED",
        r"^SIGKILL ",
        "was killed (SIGKILL) {when}",
        "usually the system ran out of main memory: take a smaller model or context",
    ),
    _host(
        "ILLEGAL_INSTRUCTION",
        r"^SIGILL ",  # the same instruction comes at the same place again
        "used an instruction that this CPU does not have (SIGILL) {when}",
        "a virtual machine may announce more (AMX, AVX-512) than it allows; on a GPU all layers"
        " must be there: check YAKULINGO_SPACES_N_GPU_LAYERS and the device",
    ),
    _host(
        "LIBRARY_MISSING",
        r"cannot open shared object file",
        "ended: a plugin needs a library that is not on this machine",
        "`python -m llama_loader doctor` names the package that brings it",
    ),
    _host(
        "NO_DEVICE",
        r"driver is a stub",
        "ended: a CUDA toolkit's stub libcuda.so.1 was found before the driver's own",
        "remove the toolkit's folder 'stubs' from LD_LIBRARY_PATH and ld.so.conf",
    ),
    _host(
        "NO_DEVICE",
        r"system not yet initialized",
        "ended: the GPUs are not ready",
        "these GPUs need nvidia-fabricmanager in the driver's version: start it, or take another"
        " machine",
    ),
    _host(
        "NO_DEVICE",
        r"no CUDA-capable device|failed to initialize CUDA|CUDA error",
        "ended: CUDA finds no GPU",
        "does nvidia-smi work here, and is CUDA_VISIBLE_DEVICES unset?",
    ),
    _server("SERVER_CRASHED", r"^(?:SIG\w+|status -[0-9]+) while ", "was ended by {end}", ""),
    _server("SERVER_ENDED", r"^status [0-9]+ while ", "ended with {end}", ""),
)
"""Causes of an end: the first counts that a line shows, or how it ended (``SIGILL while …``)."""


def explain(status: int, lines: Sequence[str], *, loading: bool) -> LoaderError:
    """Turn an end with a ``status`` (negative for a signal) and its last lines into an error."""
    when = "while loading" if loading else "while it served"
    how = next((one.name for one in signal.Signals if one == -status), f"status {status}")
    end = f"{how} {when}"
    cause, line = next(_shown([end, *map(_message, _own(lines))]))
    sentence = cause.sentence.format(end=end, when=when)
    quoted = quote(lines, line if line != end else "")
    message = f"llama-server {sentence}; its last lines: {quoted}"
    return cause.kind(cause.code, message, hint=cause.hint)


def not_executable(why: str) -> HostError:
    """Return the error of a llama-server that the system does not execute."""
    message = f"cannot start llama-server: {why}"
    return HostError("RUNTIME_NOT_EXECUTABLE", message, hint=_NOT_EXECUTABLE_HINT)


def trouble_of_the_host(lines: Sequence[str]) -> tuple[str, str]:
    """Return the line that shows what is wrong with this machine, and what to do; empty for none.

    A CUDA build that finds no device says why in the lines before its list, and ends well.
    """
    shown = _shown([*map(_message, _own(lines))])
    return next(((line, cause.hint) for cause, line in shown if cause.kind is HostError), ("", ""))


def _shown(lines: Sequence[str]) -> Iterator[tuple[_Cause, str]]:
    """Yield the causes that lines show, the one that counts first, each with its first line."""
    for cause in _CAUSES:
        for line in lines:
            if re.search(cause.shown_by, line):
                yield cause, line
                break


def quote(lines: Sequence[str], decisive: str = "") -> str:
    """Return the lines that say most, whole, as one line: the decisive one, then the last ones.

    Lines that are stamped as an error, or not at all, say more than the others. ``decisive`` is the
    message that decided, by default the first that is stamped as an error.
    """
    own = _own(lines)
    first = decisive or next((_message(line) for line in own if _level(line) == "E"), "")
    more, level = [], ""
    for line in own:
        # an indented line goes on with the message above: a list of sampler parameters, say
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
    """Leave out empty lines, and those that repeat texts of the model's file."""
    return [line for line in lines if line.strip() and not _OF_THE_MODEL.match(_message(line))]


def _message(line: str) -> str:
    return _STAMP.sub("", line).strip()


def _level(line: str) -> str:
    stamp = _STAMP.match(line)
    return stamp["level"] if stamp else ""
