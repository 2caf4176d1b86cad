"""The self test: does this runtime compute on this machine, with a tiny model of the loader's own?

It answers what a failed start leaves open: is the runtime at fault, or the user's model? The
tiny model (``tiny.gguf``, made by ``tests/rigs/tiny_model.py``) is a real llama in the
quantisations of a Q4_K_M file, and its answer is known, so a library that computes wrongly is found
too. ``fetch`` and ``doctor`` run it, and keep nothing of it (docs/decisions/0012-test-run.md).
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import gguf_header
from llama_loader.errors import HostError, LoaderError, ServerError
from llama_loader.gguf_header import ALL_LAYERS
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.settings import Settings

if TYPE_CHECKING:  # which imports this module
    from llama_loader.loader import Prepared

MODEL: Final = Path(__file__).absolute().with_name("tiny.gguf")
PROMPT: Final = "the quick brown fox jumps over the lazy dog 0123456789"
"""55 tokens: more than the 8 up to which ggml-cuda takes its kernels for single vectors."""
ANSWER: Final = "!"
TIMEOUT: Final = 30.0
"""Seconds for the start and the tokens. They take less than 1 s on an H200."""
_UNKNOWN: Final = re.compile(r"unknown (model arch|(pre-)?tokenizer)|key not found in model")
"""llama-server's message for a model that is newer than itself, before it looks for tensors."""
_SKIP: Final = "--no-test-run skips the test run"
_REPORT: Final = f"please report it with this text: this runtime does not work here; {_SKIP}"


@dataclass(frozen=True)
class SelfTest:
    """A self test that went well: the devices that computed (none: the CPU), and its seconds."""

    devices: tuple[str, ...]
    seconds: float


def possible(settings: Settings, prepared: Prepared) -> bool:
    """Return whether a runtime that was only fetched can be tried here.

    Not in the main process of a ZeroGPU Space, which has no GPU; not for another machine's
    architecture, nor while CUDA libraries are missing (a note names them).
    """
    host = prepared.host
    if settings.cuda_arch not in {None, *host.capabilities}:
        return False
    if settings.cpu_allowed:
        return True
    return bool(host.gpus) and not host.zerogpu and not prepared.missing


def run(prepared: Prepared, plan: ServerPlan) -> SelfTest:
    """Start the tiny model as ``plan`` starts the user's, and compare its answers.

    Raises as ``Server``; ``ServerError``, too, for a wrong answer.
    """
    at_once = not plan.devices or (prepared.choice is not None and prepared.choice.native)
    limit = TIMEOUT if at_once else max(TIMEOUT, plan.startup_timeout)  # the driver compiles first
    tiny = replace(
        plan,
        model=MODEL,
        every_device=(),
        n_gpu_layers=min(plan.n_gpu_layers, 1) * ALL_LAYERS,
        n_ctx=256,
        port=None,
        startup_timeout=limit,
        key="",
        main_memory=0,
        extra=(),
    )
    began = time.monotonic()
    with Server(tiny, before=prepared.require_sound) as server:
        for cached in (False, True):  # all tokens at once, then the last one on the cache
            _require_answer(server, began + limit, cached=cached)
        on_gpu = server.report.on_devices(tiny.devices)
        used = () if on_gpu is False else server.report.owners(tiny.devices) or tiny.devices
    return SelfTest(used, time.monotonic() - began)


def require_known(prepared: Prepared, plan: ServerPlan) -> None:
    """Refuse a model whose architecture, or vocabulary, this llama-server does not know.

    The server is given the model's keys without its tensors, which may be many gigabytes, on the
    CPU: it ends at the first missing tensor if the rest is right. ``ServerError`` if it does not.
    """
    with tempfile.NamedTemporaryFile(prefix=f"{plan.model.stem[:50]}-", suffix=".gguf") as file:
        file.write(gguf_header.without_tensors(plan.model))
        file.flush()
        keys = replace(plan, model=Path(file.name), devices=(), every_device=(), port=None)
        try:
            with Server(replace(keys, startup_timeout=TIMEOUT), before=prepared.require_sound):
                pass
        except LoaderError as error:
            if _UNKNOWN.search(error.message):
                raise


def blaming_the_runtime(error: LoaderError) -> LoaderError:
    """Return an error that adds that the user's model is not the cause, and no hint about it."""
    message = f"the test run with the loader's own tiny model failed: {error.message}"
    host = isinstance(error, HostError)
    hint = f"{error.hint}; {_SKIP}" if host and error.hint else _REPORT
    kind = HostError if host else ServerError
    return kind(error.code, f"{message} (your model is not the cause)", hint=hint)


def _require_answer(server: Server, deadline: float, *, cached: bool) -> None:
    left = max(0.1, deadline - time.monotonic())
    asked = {"max_tokens": 1, "timeout": left, "cache_prompt": cached}
    answer = server.ask(lambda client: client.completion(PROMPT, **asked)).text
    if answer != ANSWER:
        raise ServerError("WRONG_ANSWER", right=ANSWER, answer=answer[:40])
