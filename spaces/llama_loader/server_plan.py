"""What a ``llama-server`` is started with: its command line, and the plan of a second try."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from llama_loader import sizing
from llama_loader.parsers import ALL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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


@dataclass(frozen=True)
class ServerPlan:
    """What to run.

    Attributes:
        runtime: folder that holds ``llama-server``.
        model: GGUF file.
        environ: what it may see (``processes.environment``).
        devices: names for ``--device``; empty for the CPU.
        every_device: those that a start may take besides where these are too small; empty for none.
        n_gpu_layers: ``ALL_LAYERS`` for all that fit.
        n_ctx: tokens.
        port: None for a free one.
        startup_timeout: seconds until the first token.
        keyed: only who has the server's random key may use it.
        own_key: a key that the person set in ``extra``.
        allow_cpu: a model that lands on the CPU is fine although devices were chosen.
        pinned_build: the build is one of ours, so it knows the newer options.
        fitted: the server finds out itself how many layers fit; else all must.
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
    fitted: bool = False
    main_memory: int = 0
    threads: int | None = None
    repacked: bool = True
    extra: tuple[str, ...] = ()

    def argv(self, port: int, key_file: Path | None) -> list[str]:
        """Return the whole command line."""
        layers = self.n_gpu_layers if self.devices else 0
        if self.fitted:
            layers = _FITTING
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
        if not self.pinned_build:
            return None
        all_layers = bool(self.devices) and self.n_gpu_layers >= ALL_LAYERS
        if error.code == "OUT_OF_MEMORY" and all_layers and not self.fitted and self._spills():
            return replace(self, fitted=True)
        return None

    def _spills(self) -> bool:
        """Whether main memory takes whatever the GPU leaves over, with room to spare."""
        size = sizing.measure(self.model, self.n_ctx, self.extra)
        return size is not None and size.needed <= self.main_memory * _MAIN_MEMORY_SHARE
