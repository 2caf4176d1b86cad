"""Why a llama-server ended: pure functions from its exit status and its last lines to an error."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Final

from llama_loader.devices import INVALID_DEVICE_HINT
from llama_loader.errors import HostError, LoaderError, ServerError, SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

ARGUMENT_INVALID: Final = "SERVER_ARGUMENT_INVALID"

_STAMP: Final = re.compile(r"^[0-9]+(?:\.[0-9]+){3} [IWED] ")
_QUOTED_LINES: Final = 6
_QUOTED_CHARACTERS: Final = 700
_WORTH_QUOTING: Final = re.compile(
    r"error|fail|invalid|unknown (?:model|arg)|cannot|abort|memory", re.IGNORECASE
)
_NO_MEMORY: Final = re.compile(
    r"out of memory|insufficient memory|cudaMalloc failed|unable to allocate|"
    r"failed to allocate .*buffer|std::bad_alloc|ENOMEM",
    re.IGNORECASE,
)
_SIZES: Final = re.compile(
    r"allocating [0-9.]+ MiB on device [0-9]+|attempted to allocate [0-9.]+ M[iB]+"
    r"|failed to allocate \S+ buffer of size [0-9]+|model buffer size = +[0-9.]+ MiB"
    r"|KV buffer size = +[0-9.]+ MiB|[0-9]+ MiB free"
)

_Kind = type[LoaderError]
_KNOWN: Final[tuple[tuple[str, _Kind, str, str, str], ...]] = (
    # (what a line says, kind, code, our sentence, hint); the first match counts
    (
        r"couldn't bind HTTP server socket",
        ServerError,
        "PORT_IN_USE",
        "another program has the port",
        "leave YAKULINGO_SPACES_LLAMA_SERVER_PORT unset to get a free one",
    ),
    (
        r"error while loading shared libraries",
        HostError,
        "LIBRARY_MISSING",
        "a library that it needs is not on this machine",
        "`python -m llama_loader doctor` names the package that brings it",
    ),
    (
        r"version `GLIBC\S*' not found",
        HostError,
        "GLIBC_TOO_OLD",
        "it was built for a newer system than this one",
        "use a release built on an older system, or a newer base image",
    ),
    (
        r"invalid device: ",
        HostError,
        "INVALID_DEVICE",
        "a device that was named is not there",
        INVALID_DEVICE_HINT,
    ),
    (
        r"^error: (?:invalid argument|unknown argument)|^error while handling argument",
        SettingError,
        ARGUMENT_INVALID,
        "it does not take an argument that it was given",
        "look at the arguments after `--`; `llama-server --help` lists what it takes",
    ),
    (
        r"no kernel image is available",
        HostError,
        "NO_KERNEL_IMAGE",
        "this build has no code for this GPU",
        "leave YAKULINGO_SPACES_CUDA_ARCH unset, or publish a set for this GPU",
    ),
    (
        r"CUDA driver version is insufficient",
        HostError,
        "DRIVER_TOO_OLD",
        "the NVIDIA driver is older than this build's CUDA",
        "update the driver, or use a release of an older CUDA line (cu124)",
    ),
)
_MEMORY_HINT: Final = (
    "take a smaller quantisation or model, lower YAKULINGO_SPACES_N_CTX, or lower"
    " YAKULINGO_SPACES_N_GPU_LAYERS"
)
_BAD_MODEL: Final = re.compile(
    r"error loading model|failed to load model|failed to open GGUF|invalid magic|"
    r"unknown model architecture|failed to read (?:magic|header)"
)


def explain(status: int, lines: Sequence[str], *, loading: bool) -> LoaderError:
    """Turn an end into an error.

    Args:
        status: exit status, negative for a signal.
        lines: the last lines that it printed, oldest first.
        loading: it had not answered yet.
    """
    clean = [_STAMP.sub("", line) for line in lines]
    quoted = f"; its last lines: {quote(clean)}"
    for pattern, kind, code, sentence, hint in _KNOWN:
        if any(re.search(pattern, line) for line in clean):
            return kind(code, f"llama-server ended: {sentence}{quoted}", hint=hint)
    if any(_NO_MEMORY.search(line) for line in clean):
        return _out_of_memory(clean)
    if any("CUDA error" in line for line in clean):
        return ServerError(
            "CUDA_ERROR",
            f"llama-server was stopped by a CUDA error{quoted}",
            hint="the server is started anew; if it happens again, report it with this text",
        )
    if loading and any(_BAD_MODEL.search(line) for line in clean):
        return ServerError(
            "BAD_MODEL",
            f"llama-server cannot load the model{quoted}",
            hint="is the file there, whole, GGUF, and of an architecture that this build knows?",
        )
    return _by_status(status, quoted, loading=loading)


def quote(lines: Sequence[str]) -> str:
    """Return the lines that say most, as one line: those that complain, else the last ones."""
    clean = [_STAMP.sub("", line).strip() for line in lines if line.strip()]
    telling = [line for line in clean if _WORTH_QUOTING.search(line)] or clean
    text = " | ".join(dict.fromkeys(telling[-_QUOTED_LINES:]))
    return text[-_QUOTED_CHARACTERS:] or "(it printed nothing)"


def _out_of_memory(lines: Sequence[str]) -> ServerError:
    on_gpu = any(re.search(r"cudaMalloc|on device [0-9]|CUDA[0-9]+ buffer", line) for line in lines)
    sizes = dict.fromkeys(found for line in lines for found in _SIZES.findall(line))
    where = "GPU" if on_gpu else "main"
    said = f" ({'; '.join(list(sizes)[-_QUOTED_LINES:])})" if sizes else ""
    return ServerError(
        "OUT_OF_MEMORY",
        f"not enough {where} memory for the model and its context{said}; llama-server's last"
        f" lines: {quote(lines)}",
        hint=_MEMORY_HINT,
    )


def _by_status(status: int, quoted: str, *, loading: bool) -> LoaderError:
    when = "while loading" if loading else "while it served"
    if status == -signal.SIGKILL:
        return ServerError(
            "SERVER_KILLED",
            f"llama-server was killed (SIGKILL) {when}{quoted}",
            hint="usually the system ran out of main memory: take a smaller model or context",
        )
    if status == -signal.SIGILL:
        # the same instruction comes at the same place again: no reason to try it once more
        return HostError(
            "ILLEGAL_INSTRUCTION",
            f"llama-server used an instruction that this CPU does not have (SIGILL) {when}{quoted}",
            hint="a virtual machine may announce more (AMX, AVX-512) than it allows; on a GPU all"
            " layers must be there: check YAKULINGO_SPACES_N_GPU_LAYERS and the device",
        )
    if status < 0:
        name = _signal_name(-status)
        return ServerError("SERVER_CRASHED", f"llama-server was ended by {name} {when}{quoted}")
    return ServerError("SERVER_ENDED", f"llama-server ended with status {status} {when}{quoted}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
