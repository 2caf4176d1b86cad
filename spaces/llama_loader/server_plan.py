"""Plans a start of ``llama-server``: the command line, the memory, what a second try changes."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import gguf_header
from llama_loader.errors import SettingError
from llama_loader.events import Note
from llama_loader.gguf_header import ALL_LAYERS, ModelSize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_loader.errors import LoaderError

_FITTING: Final = -1
"""``--n-gpu-layers``: as many as fit, by llama-server's own reckoning (common/fit.cpp)."""
_MAIN_MEMORY_SHARE: Final = 0.8
"""Of main memory a model and its context may take: a container that takes all of it is killed."""
_TRACE: Final = "4"
"""``-lv``: the level at which libllama says where the weights went (common/log.cpp)."""
_LOOKUP_THREADS: Final = "1"
"""``--threads`` where all layers are on the GPU.

The CPU then looks up one row per token, which ggml gives to one thread (``ggml_get_n_tasks``). All
others, one per core by default, wait for work in a busy loop of 6.5 million rounds (``--poll 50``)
and so take the whole machine for nothing as long as tokens come.
"""

_MODEL, _HUB = "--model PATH, before the --", "--hf REPO FILE, before the --"
_OURS: Final = {
    "--port": "--port N, before the --",
    **dict.fromkeys(("-m", "--model", "--models-dir", "--models-preset"), _MODEL),
    **dict.fromkeys(("-mu", "--model-url", "-dr", "--docker-repo"), _MODEL),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"), _HUB),
}
"""Options of llama-server that would make it another server than the loader waits for."""
_SEVERAL: Final = frozenset(
    {"--control-vector", "--control-vector-scaled", "--lora", "--lora-scaled"}
)
"""Options that name several files, with commas between (common/arg.cpp of b11549)."""
_FILES: Final = _SEVERAL | {
    *("--api-key-file", "--chat-template-file", "--grammar-file", "--log-file"),
    *("-jf", "--json-schema-file", "-mm", "--mmproj", "--media-path", "--path"),
    *("-lcs", "--lookup-cache-static", "-lcd", "--lookup-cache-dynamic"),
    *("-md", "--model-draft", "--spec-draft-model", "--slot-save-path"),
    *("--ssl-cert-file", "--ssl-key-file", "--ui-config-file", "--webui-config-file"),
    *("--log-prompts-dir", "--mcp-servers-config", "--video-ffmpeg-dir"),
}
"""Those and the ones that name one file or folder."""
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost"})
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True)
class ServerPlan:
    """What to run.

    Attributes:
        runtime: folder that holds ``llama-server``.
        model: GGUF file.
        environ: what it may see (``processes.environment``).
        devices: names for ``--device``; empty for the CPU.
        every_device: those that a start may take besides where these are too small; empty for none.
        n_gpu_layers: ``ALL_LAYERS`` for all.
        n_ctx: tokens.
        port: None for a free one.
        startup_timeout: seconds until the first token.
        keyed: only who has the server's random key may use it.
        own_key: a key that the person set in ``extra``.
        allow_cpu: a model that lands on the CPU is fine although devices were chosen.
        pinned_build: the build is one of ours, so it knows the newer options.
        main_memory: bytes of it; what does not fit on the GPU must fit here.
        threads: that compute on the CPU; None for one per core of the machine, as llama-server
            reckons: it asks neither its affinity nor its control groups (common/common.cpp).
        repacked: weights on the CPU may be laid out anew for its instructions (AMX, AVX-512).
        extra: arguments from the person, last, so that they win.
    """

    runtime: Path
    model: Path
    environ: Mapping[str, str]
    devices: tuple[str, ...] = ()
    every_device: tuple[str, ...] = ()
    n_gpu_layers: int = ALL_LAYERS
    n_ctx: int = 4096
    port: int | None = None
    startup_timeout: float = 120.0
    keyed: bool = True
    own_key: str | None = field(default=None, repr=False)
    allow_cpu: bool = False
    pinned_build: bool = False
    main_memory: int = 0
    threads: int | None = None
    repacked: bool = True
    extra: tuple[str, ...] = ()

    @property
    def fitted(self) -> bool:
        """Whether the server finds out itself how many layers fit."""
        return self.n_gpu_layers == _FITTING

    def argv(self, port: int, key_file: Path | None) -> list[str]:
        """Return the whole command line."""
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
        if key_file is not None:
            options["--api-key-file"] = str(key_file)
        if layers >= ALL_LAYERS:
            options["--threads"] = _LOOKUP_THREADS
        elif self.threads is not None:
            options["--threads"] = str(self.threads)
        if self.pinned_build and not self.fitted:
            # with layers and context given there is nothing to fit: saves loading the header twice
            options["--fit"] = "off"
        flags = ["--no-webui"]
        if self.pinned_build:
            # the first token, which is asked for anyway, warms it up: one pass over the model less
            flags.append("--no-warmup")
        if not self.repacked:
            flags.append("--no-repack")
        pairs = [part for pair in options.items() for part in pair]
        return [str(self.runtime / "llama-server"), *pairs, *flags, *self.extra]

    def eased(self, error: LoaderError) -> ServerPlan | None:
        """Return the plan of a start that asks for less, where that may cure ``error``."""
        if error.code == "ILLEGAL_INSTRUCTION" and self.repacked:
            return replace(self, repacked=False)
        if error.code == "OUT_OF_MEMORY" and self.every_device:  # before anything goes to the CPU
            return replace(self, devices=self.every_device, every_device=())
        all_layers = bool(self.devices) and self.n_gpu_layers >= ALL_LAYERS
        if error.code == "OUT_OF_MEMORY" and all_layers and self.pinned_build:
            size = measure(self.model, self.n_ctx, self.extra)
            if size is not None and size.needed <= self.main_memory * _MAIN_MEMORY_SHARE:
                return replace(self, n_gpu_layers=_FITTING)  # main memory has room for the rest
        return None


def measure(model: Path, n_ctx: int, extra: Sequence[str] = ()) -> ModelSize | None:
    """Return the bytes that a start takes; None where the model cannot be read as GGUF.

    Args:
        model: the GGUF file.
        n_ctx: tokens, unless ``extra`` has another number.
        extra: arguments after ``--``. A draft model and a projector count where they can be read;
            cache types and layers that are kept from the GPU do not: the figure errs to the safe
            side.
    """
    asked = last(extra, "-c", "--ctx-size") or ""
    tokens = int(asked) if re.fullmatch(r"[0-9]{1,9}", asked, re.ASCII) else n_ctx
    size = gguf_header.measure(model, tokens)
    if size is None:
        return None
    draft = last(extra, "-md", "--model-draft", "--spec-draft-model")
    beside = gguf_header.measure(Path(draft), tokens) if draft else None
    if beside is not None:
        size = ModelSize(size.file + beside.file, size.context + beside.context)
    projector = last(extra, "-mm", "--mmproj")
    if projector:
        with contextlib.suppress(OSError, ValueError):  # llama-server reports it
            size = replace(size, file=size.file + Path(projector).stat().st_size)
    return size


def check(extra: tuple[str, ...]) -> tuple[Note, ...]:
    """Refuse a person's arguments that contradict the loader's own; return notes on the others.

    Raises:
        SettingError: names the argument, and what to give instead.
    """
    for argument in extra:
        name = _name(argument.partition("=")[0])
        if name in _OURS:
            raise SettingError(
                "EXTRA_ARGUMENT",
                f"{name} after -- would start another server than the one that is waited for",
                hint=f"give {_OURS[name]}",
            )
    host = last(extra, "--host")
    if host is None or host in _LOOPBACK:
        return ()
    if host != _EVERYWHERE:
        raise SettingError(
            "EXTRA_ARGUMENT",
            f"--host {host}: the loader reaches its server on loopback alone",
            hint=f"give --host {_EVERYWHERE} with --api-key, or put a proxy before it",
        )
    if own_key(extra) is not None:
        return ()
    return (
        Note(
            "SERVER_OPEN",
            "everybody who reaches this machine can use the server: it listens on all of its"
            " addresses and asks for no key",
            "add --api-key KEY or --api-key-file FILE after --",
        ),
    )


def own_key(extra: tuple[str, ...]) -> str | None:
    """Return the first key that a person gave llama-server, None for none.

    Without it the loader's own request for the first token would be refused. An empty key is none
    for llama-server, too: it then asks nobody for one.

    Raises:
        SettingError: a key that no request can carry.
    """
    keys = [key for given in _values(extra, "--api-key") for key in given.split(",")]
    for path in _values(extra, "--api-key-file"):  # read as llama-server does (common/arg.cpp)
        with contextlib.suppress(OSError):  # llama-server reports it
            lines = Path(path).read_bytes().decode("utf-8", "replace").split("\n")
            keys += [line for line in lines if not line.startswith("#")]
    key = next(filter(None, keys), None)
    if key is not None and (key != key.strip() or not key.isprintable()):
        raise SettingError(
            "EXTRA_ARGUMENT",
            "a key of --api-key or --api-key-file has spaces around it or ends in CR: no request"
            " can carry it",
            hint="write one key a line, with line ends of Unix",
        )
    return key


def with_whole_paths(extra: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the arguments with relative files taken from ``folder``, where the person is.

    llama-server runs in a folder of its own, because it would load any ``libggml-*.so`` that lies
    in its working folder.
    """
    found = list(extra)
    for at, name in enumerate(map(_name, extra[:-1]), start=1):
        if name in _FILES:
            parts = extra[at].split(",") if name in _SEVERAL else [extra[at]]
            found[at] = ",".join(str(folder / part) for part in parts)
    return tuple(found)


def last(extra: Sequence[str], *names: str) -> str | None:
    """Return what follows the last of an option's names: llama-server takes that one."""
    return next(reversed(_values(extra, *names)), None)


def _values(extra: Sequence[str], *names: str) -> list[str]:
    """Return what follows an option, each time that it is given."""
    return [extra[at + 1] for at, name in enumerate(extra[:-1]) if _name(name) in names]


def _name(argument: str) -> str:
    """Return an option as it is listed: llama.cpp takes ``--api_key`` for ``--api-key``, too."""
    return argument.replace("_", "-") if argument.startswith("--") else argument
