"""The self test: does this runtime compute on this machine, with a tiny model of the loader's own?

It tells apart what a failed start leaves open: is the runtime at fault, or the user's model? The
tiny model (``tiny.gguf``, a quarter of a megabyte, made by ``farm/tiny_model.py``) is a real llama
in the quantisations of a Q4_K_M file, and its answer is known, so a library that computes wrongly
is found too. ``fetch`` and ``doctor`` run it; ``loader.start`` only after a start has failed: one
that succeeds is the better proof (docs/decisions/0012-test-run.md, 0047-self-test-record.md).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from llama_loader import disk, notes, strict_json
from llama_loader.errors import HostError, IntegrityError, LoaderError, ServerError, SettingError
from llama_loader.events import ignore
from llama_loader.gguf_header import ALL_LAYERS
from llama_loader.server import Server
from llama_loader.supervisor import TRANSIENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.events import Sink
    from llama_loader.loader import Prepared
    from llama_loader.server_plan import ServerPlan
    from llama_loader.settings import Settings

FOLDER: Final = "self-tests"
"""In the store: a file for each runtime, by the digest of its archive."""
MODEL: Final = Path(__file__).absolute().with_name("tiny.gguf")
PROMPT: Final = "the quick brown fox jumps over the lazy dog 0123456789"
"""55 tokens: more than the 8 up to which ggml-cuda takes its kernels for single vectors."""
ANSWER: Final = "!"
TIMEOUT: Final = 30.0
"""Seconds for the start and the tokens. They take less than 1 s on an H200."""
DOUBTFUL: Final = TRANSIENT | {
    *("MODEL_ON_CPU", "NO_ANSWER", "REQUEST_REFUSED", "SERVER_GAVE_UP", "START_TIMEOUT"),
}
"""Errors of a start that leave open who is at fault; the others name it."""
_N_CTX: Final = 256
_MAX_BYTES: Final = 64 * 1024
_SKIP: Final = "--no-test-run skips the test run"
_REPORT: Final = f"please report it with this text: this runtime does not work here; {_SKIP}"


class SelfTest(msgspec.Struct, frozen=True):
    """A self test that went well, as it is kept in the store.

    Attributes:
        machine: what it holds for: driver, GPUs, CPU and CUDA libraries.
        devices: those that computed; empty for the CPU.
        seconds: what it cost.
        by: ``tiny model``, or ``model`` where a start of the user's own was the proof.
        kept: it was read from the store; nothing ran now.
    """

    machine: list[str]
    devices: tuple[Annotated[str, Meta(pattern=r"\A\w{1,64}\Z")], ...]
    seconds: Annotated[float, Meta(ge=0, le=86_400)]
    by: Literal["tiny model", "model"] = "tiny model"
    kept: bool = False


def possible(settings: Settings, prepared: Prepared) -> bool:
    """Return whether a runtime that was only fetched can be tried here.

    Not in the main process of a ZeroGPU Space, which has no GPU; not for another machine's
    architecture, nor while CUDA libraries are missing (a note names them).
    """
    host = prepared.host
    if settings.cuda_arch not in {None, *host.capabilities}:
        return False
    if settings.allow_cpu or settings.cpu_chosen:
        return True
    return bool(host.gpus) and not host.zerogpu and not prepared.missing


def kept(settings: Settings, prepared: Prepared) -> SelfTest | None:
    """Return the good result of an earlier run on this machine and the devices that are meant.

    One that the CPU gave counts only where the CPU is chosen, or allowed and there is no GPU.
    """
    found, choice = _read(prepared), prepared.choice
    if found is None or found.machine != _machine(prepared):
        return None
    named = {name.lower() for name in settings.devices}
    on_cpu = settings.cpu_chosen or named in ({"none"}, {"cpu"})
    if settings.allow_cpu and not named:
        on_gpu = choice is None or (choice.runs_on == "gpu" and not prepared.missing)
        on_cpu = on_cpu or not (on_gpu and prepared.host.visible_count)
    return found if on_cpu != bool(found.devices) else None


def run(prepared: Prepared, plan: ServerPlan, sink: Sink = ignore) -> SelfTest:
    """Start the tiny model as ``plan`` starts the user's; keep the result, remove it on a failure.

    Raises:
        HostError: this machine cannot run the runtime, or it ran on the CPU instead.
        ServerError: it did not start, answer in time, or answer rightly.
        LoaderError: it is damaged and cannot be installed again, or there is no room for its log.
    """
    at_once = not plan.devices or (prepared.choice is not None and prepared.choice.native)
    limit = TIMEOUT if at_once else max(TIMEOUT, plan.startup_timeout)  # the driver compiles first
    tiny = replace(
        plan,
        model=MODEL,
        every_device=(),
        n_gpu_layers=min(plan.n_gpu_layers, 1) * ALL_LAYERS,
        n_ctx=_N_CTX,
        port=None,
        startup_timeout=limit,
        keyed=True,
        main_memory=0,
        extra=(),
    )
    began = time.monotonic()
    try:
        with Server(tiny, before=prepared.require_sound) as server:
            # which device holds how much of the tiny model says nothing
            told = notes.given_up if server.report.told else notes.not_as_asked
            for note in told(server):
                sink(note)
            for cached in (False, True):  # all tokens at once, then the last one on the cache
                _require_answer(server, began + limit, cached=cached)
            used = _really_used(server)
    except (HostError, ServerError):
        with contextlib.suppress(OSError):  # a store that is read-only keeps no new one either
            _record(prepared).unlink(missing_ok=True)
        raise
    devices, seconds = plan.devices if used is None else used, time.monotonic() - began
    done = SelfTest(_machine(prepared), devices, seconds)
    if used is not None:
        _write(prepared, done)
    return done


def remember(settings: Settings, prepared: Prepared, server: Server) -> None:
    """Keep a good result where the user's own model gave a token: nothing proves more."""
    used = _really_used(server)
    if settings.no_test_run or server.started is None or used is None:
        return
    if kept(settings, prepared) is None:
        _write(prepared, SelfTest(_machine(prepared), used, server.started.first_token, by="model"))


def judged(
    settings: Settings, prepared: Prepared, plan: ServerPlan, error: LoaderError
) -> LoaderError | None:
    """Say who is at fault when a start has failed; None where its error says so already.

    Args:
        settings: as for the start.
        prepared: as for the start.
        plan: of the start, so that the tiny model takes the same way.
        error: what the start ended with.
    """
    if settings.no_test_run or error.code not in DOUBTFUL:
        return None
    try:
        with blaming_the_runtime():
            run(prepared, plan)
    except (HostError, ServerError) as told:
        message = f"{told.message}; with your model: {error.message}"
        return type(told)(told.code, message, hint=told.hint)
    except IntegrityError as damaged:  # this is why, then
        return damaged
    except LoaderError:  # a full disk, say, keeps the tiny model from telling
        return None
    hint = "look at the model, its size and the server's arguments"
    return type(error)(
        error.code,
        f"{error.message}; the loader's own tiny model answers here, so the runtime works",
        hint=f"{error.hint}; {hint}" if error.hint else hint,
    )


@contextlib.contextmanager
def blaming_the_runtime() -> Iterator[None]:
    """Add to errors that the user's model is not the cause; hints about it would mislead."""
    try:
        yield
    except (HostError, ServerError, SettingError) as error:  # others: it was not even started
        message = f"the test run with the loader's own tiny model failed: {error.message}"
        host = isinstance(error, HostError)
        hint = f"{error.hint}; {_SKIP}" if host and error.hint else _REPORT
        kind = HostError if host else ServerError
        raise kind(error.code, f"{message} (your model is not the cause)", hint=hint) from error


def _require_answer(server: Server, deadline: float, *, cached: bool) -> None:
    left, client = max(0.1, deadline - time.monotonic()), server.client()
    try:
        answer = client.completion(PROMPT, max_tokens=1, timeout=left, cache_prompt=cached).text
    except ServerError:
        server.wait(0.5)  # a broken connection comes a moment before the end of the process
        server.check()
        raise
    if answer != ANSWER:
        raise ServerError(
            "WRONG_ANSWER",
            f"llama-server computes wrongly: to a prompt whose answer is {ANSWER!r} it answers"
            f" {answer[:40]!r}",
        )


def _really_used(server: Server) -> tuple[str, ...] | None:
    """Return those of the server's devices that hold weights; none where the CPU has them all.

    None where it does not say which, and so proves nothing of any.
    """
    names, report = server.plan.devices, server.report
    owners = report.owners(names)
    if owners or not names or report.on_devices(names) is False:
        return owners
    return names if report.offloaded and len(names) == 1 else None


def _machine(prepared: Prepared) -> list[str]:
    """Return what a result holds for: if one of these changes, the runtime is tried again."""
    host = prepared.host
    gpus = [f"GPU {gpu.name} {gpu.uuid}" for gpu in host.visible]
    named = f"CUDA_VISIBLE_DEVICES {host.visible_devices}"
    used = [f"{one.folder}/{one.soname} {one.version}" for one in prepared.libraries]
    return [f"driver {host.driver}", *gpus, named, f"CPU {host.cpu}, glibc {host.glibc}", *used]


def _record(prepared: Prepared) -> Path:
    store = prepared.installed.root.parents[1]
    return store / FOLDER / f"{prepared.installed.sha256}.json"


def _read(prepared: Prepared) -> SelfTest | None:
    """Read a record; one that cannot be read counts as none."""
    path = _record(prepared)
    try:
        with disk.Folder.open(path.parent) as place:
            data = place.read(path.name, _MAX_BYTES)
        tree = strict_json.loads(data or b"", what=FOLDER, max_bytes=_MAX_BYTES)
        return msgspec.structs.replace(msgspec.convert(tree, SelfTest), kept=True)
    except (OSError, IntegrityError, msgspec.ValidationError):
        return None


def _write(prepared: Prepared, done: SelfTest) -> None:
    """Write the record; a store that cannot be written keeps none."""
    path = _record(prepared)
    with (
        contextlib.suppress(OSError),
        disk.Folder.open(path.parents[1]) as store,
        store.folder("staging") as staging,
        store.folder(FOLDER, make=0o755) as folder,
    ):
        folder.replace(path.name, msgspec.json.encode(done), staging=staging)
