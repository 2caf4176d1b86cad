"""Plans a start of ``llama-server``: command line, memory, changes and notes of a second try.

A person's argument that cannot be taken raises ``SettingError``, which names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from llama_loader import gguf_header
from llama_loader.errors import LoaderError, SettingError
from llama_loader.events import Note
from llama_loader.gguf_header import ALL_LAYERS, COMPUTE_MARGIN
from llama_loader.server_log import LoadReport

_FITTING: Final = -1
"""``--n-gpu-layers``: as many as fit, by llama-server's own calculation (common/fit.cpp)."""
_MAIN_MEMORY_SHARE: Final = 0.8
"""Share of main memory for a model and its context: a container that takes all of it is killed."""
_PROMPTS_MIB: Final = 1024
"""Maximum for prompts that the server keeps besides those of its slots (``--cache-ram``)."""
_PROMPTS_SHARE: Final = 16
"""The part of main memory for them: 1/16; none if its size is unknown."""
_TRACE: Final = "4"
"""``-lv``: the level at which libllama logs where the weights are (common/log.cpp)."""
_LOOKUP_THREADS: Final = "1"
"""``--threads`` where all layers are on the GPU.

The CPU then looks up one row per token, which ggml gives to one thread (``ggml_get_n_tasks``). All
others, one per core by default, would wait for work in a busy loop (``--poll 50``).
"""
PARALLEL_UPLOAD: Final = "parallel-upload"
"""The patch of ``build/patches`` with which several threads read the weights and upload them.

What stays on the CPU is mapped as before, so the loader gives no option that turns mapping off, and
none that reads or locks the file (``--mlock``).
"""
UPLOAD_THREADS: Final = 12
"""Maximum: more were no faster on an H200 with 16 cores (docs/gpu.md)."""
_REUSE_PORT: Final = "--reuse-port"
_OURS: Final = frozenset(
    {
        *("--port", "-m", "--model", "-mu", "--model-url", "--models-dir", "--models-preset"),
        *("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-dr", "--docker-repo"),
        *("--api-prefix", "--ssl-key-file", "--ssl-cert-file"),
    }
)
"""Options of llama-server that would make it another server than the loader waits for."""
_SEVERAL: Final = frozenset(
    {"--control-vector", "--control-vector-scaled", "--lora", "--lora-scaled"}
)
"""Options that name several files, with commas between (common/arg.cpp of b11549)."""
_FILES: Final = re.compile(
    r"-(?:jf|mm|md|lcs|lcd)|--path|--.+-(?:file|path|dir)|--mmproj|--mcp-servers-config"
    r"|--model-draft|--spec-draft-model|--lookup-cache-(?:static|dynamic)"
)
"""Options that name one file or folder."""
_WRITTEN: Final = frozenset({"--log-file", "-lcd", "--lookup-cache-dynamic"})
"""Options whose file the server creates itself."""


@dataclass(frozen=True)
class ServerPlan:
    """What to run."""

    runtime: Path
    model: Path
    environ: Mapping[str, str]  # what it may see (``processes.environment``)
    devices: tuple[str, ...] = ()  # names for ``--device``; empty for the CPU
    # those that a start may take besides where these are too small; empty for none
    every_device: tuple[str, ...] = ()
    n_gpu_layers: int = ALL_LAYERS
    n_ctx: int = 4096
    port: int | None = None  # None for a free one
    startup_timeout: float = 120.0  # seconds until the first token
    # what each request must carry, unless it carries a key of ``extra``; empty for a random one at
    # each start, None for a server that requires none
    key: str | None = field(default="", repr=False)
    allow_cpu: bool = False  # a model that lands on the CPU is fine although devices were chosen
    pinned_build: bool = False  # the build is one of ours, so it has the newer options
    keeps_port: bool = True  # the server shares its port with a socket of this process (``server``)
    main_memory: int = 0  # bytes of it; what does not fit on the GPU must fit here
    # that compute on the CPU; None for one per core of the machine, as llama-server counts: it
    # reads neither its affinity nor its control groups (common/common.cpp)
    threads: int | None = None
    # weights on the CPU may be repacked for its instructions (AMX, AVX-512)
    repacked: bool = True
    extra: tuple[str, ...] = ()  # arguments from the person, last, so that they win

    @property
    def fitted(self) -> bool:
        """Whether the server finds out itself how many layers fit."""
        return self.n_gpu_layers == _FITTING

    def argv(self, port: int) -> list[str]:
        """Return the whole command line; the key comes by the standard input."""
        layers = self.n_gpu_layers if self.devices else 0
        options = {
            "--model": str(self.model),
            "--host": "127.0.0.1",
            "--port": str(port),
            "--ctx-size": str(self.n_ctx),
            "--n-gpu-layers": str(layers),
            "--device": ",".join(self.devices) or "none",
            "--verbosity": _TRACE,
        }
        if self.key is not None:
            options["--api-key-file"] = "/dev/stdin"
        if self.pinned_build:
            # by default it lets the pages of every origin read its answers (server-http.cpp)
            options["--cors-origins"] = "localhost"
            # by default it keeps prompts of earlier callers in up to 8 GiB (common/common.h)
            kept = min(_PROMPTS_MIB, self.main_memory // _PROMPTS_SHARE >> 20)
            options["--cache-ram"] = str(kept)
        if layers >= ALL_LAYERS:
            options["--threads"] = _LOOKUP_THREADS
        elif self.threads is not None:
            options["--threads"] = str(self.threads)
        if self.pinned_build and not self.fitted:
            # with layers and context given there is nothing to fit: saves loading the header twice
            options["--fit"] = "off"
        flags = ["--no-webui"]
        if self.pinned_build:
            # the first token, which is requested anyway, warms it up: one pass over the model less
            flags.append("--no-warmup")
        if self.pinned_build and self.keeps_port:
            flags.append(_REUSE_PORT)
        if not self.repacked:
            flags.append("--no-repack")
        pairs = [part for pair in options.items() for part in pair]
        return [str(self.runtime / "llama-server"), *pairs, *flags, *self.extra]

    def eased(self, error: LoaderError) -> ServerPlan | None:
        """Return the plan of another start, if a smaller one may cure ``error``.

        A free port that another program took before the server could is no fault of the plan.
        """
        if error.code == "PORT_IN_USE" and self.port is None:
            return self
        if self.pinned_build and self.keeps_port and _REUSE_PORT in error.message:
            return replace(self, keeps_port=False)  # a release of before that option
        if error.code == "ILLEGAL_INSTRUCTION" and self.repacked:
            return replace(self, repacked=False)
        if error.code == "OUT_OF_MEMORY" and self.every_device:  # before anything goes to the CPU
            return replace(self, devices=self.every_device, every_device=())
        all_layers = bool(self.devices) and self.n_gpu_layers >= ALL_LAYERS
        if error.code == "OUT_OF_MEMORY" and all_layers and self.pinned_build:
            stored = measure(self.model, self.n_ctx, self.extra)
            room = self.main_memory * _MAIN_MEMORY_SHARE - COMPUTE_MARGIN
            if stored is not None and stored <= room:
                return replace(self, n_gpu_layers=_FITTING)  # main memory has room for the rest
        return None


def not_as_asked(plan: ServerPlan, asked: ServerPlan, report: LoadReport) -> Iterator[Note]:
    """Yield notes about a start by ``plan`` if ``asked`` was the request.

    A model that is on none of its devices is ``MODEL_ON_CPU``, an error, unless the CPU is allowed.
    """
    if not plan.repacked:
        yield Note.of("CPU_NOT_REPACKED")
    if plan.devices != asked.devices:
        few, all_of_them = ", ".join(asked.devices), ", ".join(plan.devices)
        yield Note.of("DEVICES_ADDED", asked=few, devices=all_of_them)
    own_layers = last(plan.extra, "-ngl", "--gpu-layers", "--n-gpu-layers")
    all_asked = asked.n_gpu_layers >= ALL_LAYERS and own_layers is None
    if all_asked and report.offloaded and report.offloaded < (report.layers or 0):
        yield Note.of("LAYERS_LEFT_OVER", offloaded=report.offloaded, layers=report.layers)
    owners = report.owners(plan.devices)
    unused = [name for name in plan.devices if name not in owners]
    if owners and unused:
        yield Note.of("DEVICE_UNUSED", devices=", ".join(unused))
    told = report.buffers or report.offloaded is not None
    if plan.devices and plan.n_gpu_layers and not (told or plan.allow_cpu):
        yield Note.of("DEVICES_NOT_CHECKED", devices=", ".join(plan.devices))


def measure(model: Path, n_ctx: int, extra: Sequence[str] = ()) -> int | None:
    """Return the bytes that a start takes, as ``gguf_header.measure`` does.

    Of ``extra`` only the size of the context counts: a start that has no room for what else it
    loads takes more devices, or the CPU (``ServerPlan.eased``).
    """
    asked = last(extra, "-c", "--ctx-size") or ""
    tokens = int(asked) if re.fullmatch(r"[0-9]{1,9}", asked, re.ASCII) else n_ctx
    return gguf_header.measure(model, tokens)


def check(extra: tuple[str, ...], *, no_key: bool = False) -> tuple[Note, ...]:
    """Refuse a person's arguments that contradict the loader's own; return notes on the others."""
    for argument in extra:
        name = _name(argument.partition("=")[0])
        if name in _OURS:
            raise SettingError("EXTRA_ARGUMENT/ours", name=name)
    host = last(extra, "--host") or "127.0.0.1"
    if host not in {"127.0.0.1", "localhost", "0.0.0.0"}:  # noqa: S104 - compared, not bound to
        raise SettingError("EXTRA_ARGUMENT/host", host=host)
    if last(extra, "--api-key") == "":  # a variable of a script that is not set
        raise SettingError("EXTRA_ARGUMENT/empty-key")
    if not no_key:
        return ()
    if has_key(extra):
        raise SettingError("EXTRA_ARGUMENT/no-key")
    everywhere = host == "0.0.0.0"  # noqa: S104 - compared, not bound to
    return (Note.of("SERVER_OPEN/everywhere" if everywhere else "SERVER_OPEN"),)


def has_key(extra: tuple[str, ...]) -> bool:
    """Return whether a person gave llama-server a key. It takes the loader's own beside it."""
    return last(extra, "--api-key", "--api-key-file") is not None


def with_whole_paths(extra: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the arguments with relative files taken from ``folder``, where the person is."""
    found = list(extra)
    for at, name in enumerate(map(_name, extra[:-1]), start=1):
        if name in _SEVERAL:
            files = [str(folder / part) for part in extra[at].split(",")]
        elif _FILES.fullmatch(name):
            files = [str(folder / extra[at])]
        else:
            continue
        found[at] = ",".join(files)
        for file in files if name not in _WRITTEN else ():
            scaled = name.endswith("-scaled")  # FILE:0.5
            _require_file(name, Path(file.rpartition(":")[0] if scaled else file))
    return tuple(found)


def _require_file(name: str, place: Path) -> None:
    """Refuse a file that is not there, or one of keys that has none; wait for no FIFO's writer."""
    why = "holds no key"
    try:
        place.stat()
        if name != "--api-key-file" or (place.is_file() and place.read_bytes().strip()):
            return
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    raise SettingError("EXTRA_ARGUMENT/file", place=place, name=name, why=why)


def last(extra: Sequence[str], *names: str) -> str | None:
    """Return what follows the last of an option's names: llama-server takes that one."""
    found = [value for name, value in pairwise(extra) if _name(name) in names]
    return found[-1] if found else None


def _name(argument: str) -> str:
    """Return an option as it is listed: llama.cpp takes ``--api_key`` for ``--api-key``, too."""
    return argument.replace("_", "-") if argument.startswith("--") else argument
