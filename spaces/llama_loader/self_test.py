"""The test run: does this runtime compute on this machine, with a tiny model of the loader's own?

It tells apart what a failed start leaves open: is the runtime at fault, or the user's model? The
tiny one (``tiny.gguf``, a quarter of a megabyte, made by ``farm/tiny_model.py``) is a real llama
in the quantisations of a Q4_K_M file, and its answer is known: a library that computes wrongly is
found too. The verdict is kept in the store by GPU, driver and artifact, so that it is paid once.

``fetch`` and ``doctor`` run it; ``launch.start`` only after it has failed, because a start that
succeeds is the better proof and must not wait (docs/decisions/0012-test-run.md).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import notes, verdicts
from llama_loader.errors import (
    HostError,
    IntegrityError,
    LoaderError,
    ServerError,
    StoreError,
)
from llama_loader.events import ignore
from llama_loader.gguf_header import ALL_LAYERS
from llama_loader.prepare import environment
from llama_loader.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_loader.devices import DeviceChoice
    from llama_loader.events import Sink
    from llama_loader.prepare import Prepared
    from llama_loader.server import Server
    from llama_loader.server_plan import ServerPlan
    from llama_loader.settings import Settings

VERSION: Final = 1
"""Of the test: a verdict of another version does not count."""
MODEL: Final = Path(__file__).absolute().with_name("tiny.gguf")
PROMPT: Final = "the quick brown fox jumps over the lazy dog 0123456789"
"""55 tokens: more than the 8 up to which ggml-cuda takes its kernels for single vectors."""
ANSWER: Final = "!"
TIMEOUT: Final = 30.0
"""Seconds for the device list, and again for the tokens. Both together take 1 s on an H200."""
DOUBTFUL: Final = frozenset(
    {
        "CUDA_ERROR",
        "MODEL_ON_CPU",
        "NO_ANSWER",
        "REQUEST_REFUSED",
        "SERVER_CRASHED",
        "SERVER_ENDED",
        "SERVER_GAVE_UP",
        "SERVER_KILLED",
        "START_TIMEOUT",
    }
)
"""Errors of a start that leave open who is at fault; the others name it."""

_N_CTX: Final = 256
_ENOUGH: Final = 3
"""So many times what the first devices took must be left to try the next: a machine that is merely
slow is not to be blamed by the deadline."""
_CPU, _ALL = "cpu", "all"
_SKIP: Final = "--no-test-run skips the test run"
_REPORT: Final = f"please report it with this text: this runtime does not work here; {_SKIP}"


def possible(settings: Settings, prepared: Prepared) -> bool:
    """Whether a runtime that was only fetched can be tried here.

    Not in the main process of a ZeroGPU Space, which has no GPU; not where a runtime for another
    machine was asked for, or the libraries are missing still (a note says so).
    """
    host = prepared.host
    meant = settings.cuda_arch is None or settings.cuda_arch in host.capabilities
    if settings.allow_cpu or settings.cpu_chosen:
        return meant
    attached = bool(host.gpus) and host.gpu_source not in {"zerogpu", "none"} and not host.zerogpu
    return attached and meant and not prepared.missing


def kept(settings: Settings, prepared: Prepared) -> Verdict | None:
    """Return the good verdict of an earlier run for this GPU, driver, artifact and devices.

    A bad one does not count: it may have been a passing trouble. Nor does one that the CPU gave,
    where nobody lets the CPU do.
    """
    path = _path(prepared, _meant(settings, prepared))
    found = verdicts.read(path) if path else None
    return found if found and (found.devices or _cpu_will_do(settings)) else None


def run(
    settings: Settings,
    prepared: Prepared,
    choose: Callable[[], DeviceChoice],
    sink: Sink = ignore,
) -> Verdict:
    """Run it on the devices that ``choose`` finds, and keep the verdict.

    What the server's start gave up is told to ``sink``.

    Raises:
        HostError: this machine cannot run the runtime, or it ran on the CPU instead.
        ServerError: it did not start, answer in time, or answer rightly.
        IntegrityError: a file of it is not what it was any more.
        StoreError: there is no room for its log.
    """
    began = time.monotonic()
    try:
        meant = choose().names
        used = _compute(settings, prepared, meant, sink)
    except (StoreError, IntegrityError):  # it was not even started
        raise
    except LoaderError as error:
        told = _runtime_trouble(error)
        _keep_bad(prepared, _meant(settings, prepared), told, time.monotonic() - began)
        raise told from error
    verdict = Verdict(ok=True, devices=meant, seconds=time.monotonic() - began)
    if used is None:
        return verdict
    verdict = replace(verdict, devices=used)
    _keep(prepared, _tested(settings, prepared, used), verdict)
    return verdict


def remember(settings: Settings, prepared: Prepared, server: Server) -> None:
    """Keep a good verdict where the user's own model gave a token: nothing proves more."""
    started = server.started
    if settings.no_test_run or started is None:
        return
    used = _really_used(server)
    if used is None:  # nobody knows what it proved
        return
    label = _tested(settings, prepared, used)
    path = _path(prepared, label)
    if path is not None and verdicts.read(path) is None:
        _keep(
            prepared, label, Verdict(ok=True, devices=used, seconds=started.first_token, by="model")
        )


def judged(
    settings: Settings, prepared: Prepared, devices: tuple[str, ...], error: LoaderError
) -> LoaderError | None:
    """Say who is at fault when a start has failed; None where its error says so already.

    Args:
        settings: as for the start.
        prepared: as for the start.
        devices: those of the start, so that the tiny model takes the same way.
        error: what the start ended with.
    """
    if settings.no_test_run or error.code not in DOUBTFUL:
        return None
    began = time.monotonic()
    try:
        used = _compute(settings, prepared, devices)
    except StoreError:  # the disk keeps the tiny model from telling: the start's error stands
        return None
    except IntegrityError as damaged:  # this is why, then
        return damaged
    except LoaderError as trouble:
        told = _runtime_trouble(trouble)
        _keep_bad(prepared, _tested(settings, prepared, devices), told, time.monotonic() - began)
        return type(told)(
            told.code, f"{told.message}; with your model: {error.message}", hint=told.hint
        )
    if used is not None:
        verdict = Verdict(ok=True, devices=used, seconds=time.monotonic() - began)
        _keep(prepared, _tested(settings, prepared, used), verdict)
    works = "the loader's own tiny model answers here, so the runtime works"
    hint = "look at the model, its size and the server's arguments"
    return type(error)(
        error.code,
        f"{error.message}; {works}",
        hint=f"{error.hint}; {hint}" if error.hint else hint,
    )


def _compute(
    settings: Settings, prepared: Prepared, devices: tuple[str, ...], sink: Sink = ignore
) -> tuple[str, ...] | None:
    """Start the tiny model as the user's would be; returns the devices that it really used.

    None where the server did not say. A model of one layer reaches two devices at most, so it is
    started again on those that got nothing, as long as there is time for that.

    Raises:
        LoaderError: as for ``Server.start``, or another answer than the known one.
    """
    limit = _limit(settings, prepared, devices)
    began = time.monotonic()
    used = _compute_once(_plan(settings, prepared, devices, limit), prepared, sink)
    longest = time.monotonic() - began
    while used and len(used) < len(devices):
        left = limit - (time.monotonic() - began)
        if left < _ENOUGH * longest:
            break
        rest = tuple(name for name in devices if name not in used)
        try:
            more = _compute_once(_plan(settings, prepared, rest, left), prepared, ignore)
        except ServerError as error:
            if error.code != "OUT_OF_MEMORY":
                raise
            break  # somebody else has that GPU: a start takes others, and it is not proven
        if not more:
            break
        used = tuple(name for name in devices if name in {*used, *more})
    return used


def _plan(
    settings: Settings, prepared: Prepared, devices: tuple[str, ...], limit: float
) -> ServerPlan:
    from llama_loader.server_plan import ServerPlan

    return ServerPlan(
        runtime=prepared.runtime,
        model=MODEL,
        environ=environment(settings, prepared),
        devices=devices,
        n_gpu_layers=0 if settings.cpu_chosen else ALL_LAYERS,
        n_ctx=_N_CTX,
        startup_timeout=limit,
        allow_cpu=settings.allow_cpu,
        pinned_build=prepared.choice is not None,
        threads=prepared.host.threads,
    )


def _compute_once(plan: ServerPlan, prepared: Prepared, sink: Sink) -> tuple[str, ...] | None:
    from llama_loader.server import Server

    deadline = time.monotonic() + plan.startup_timeout
    with Server(plan, before=prepared.require_sound) as server:
        unchecked = () if server.report.told else notes.placement(server)
        for note in (*notes.given_up(server), *unchecked):
            sink(note)
        for cached in (False, True):  # all tokens at once, then the last one alone on the cache
            answer = _answer(server, deadline, cached=cached)
            if answer != ANSWER:
                raise ServerError(
                    "WRONG_ANSWER",
                    f"llama-server computes wrongly: to a prompt whose answer is {ANSWER!r} it"
                    f" answers {answer[:40]!r}",
                )
        return _really_used(server)


def _limit(settings: Settings, prepared: Prepared, devices: tuple[str, ...]) -> float:
    """Seconds for the tokens; as for any start where the driver may have to compile first.

    A start's own limit does not shorten it: a runtime must not be blamed for somebody's haste.
    """
    at_once = not devices or (prepared.choice is not None and prepared.choice.native)
    return TIMEOUT if at_once else max(TIMEOUT, settings.startup_timeout)


def _answer(server: Server, deadline: float, *, cached: bool) -> str:
    left = max(0.1, deadline - time.monotonic())
    try:
        return (
            server.client().completion(PROMPT, max_tokens=1, timeout=left, cache_prompt=cached).text
        )
    except ServerError:
        server.wait(0.5)  # a broken connection comes a moment before the end of the process
        server.check()
        raise


def _really_used(server: Server) -> tuple[str, ...] | None:
    """Return those of the server's devices that hold weights; none where the CPU has them all.

    None where it does not say which, and so proves nothing of any.
    """
    names, report = server.plan.devices, server.report
    owners = report.owners(names)
    if owners or not names or report.on_devices(names) is False:
        return owners
    return names if report.offloaded and len(names) == 1 else None


def _runtime_trouble(error: LoaderError) -> HostError | ServerError:
    """Say that the user's model is not the cause; hints about that model would mislead."""
    message = f"the test run with the loader's own tiny model failed: {error.message}"
    if isinstance(error, HostError):
        hint = f"{error.hint}; {_SKIP}" if error.hint else _REPORT
        return HostError(error.code, f"{message} (your model is not the cause)", hint=hint)
    return ServerError(error.code, f"{message} (your model is not the cause)", hint=_REPORT)


def _cpu_will_do(settings: Settings) -> bool:
    """Whether a person allowed the CPU, or chose it."""
    return settings.allow_cpu or settings.cpu_chosen or _cpu_named(settings)


def _cpu_named(settings: Settings) -> bool:
    return [name.lower() for name in settings.devices] in (["none"], ["cpu"])


def _meant(settings: Settings, prepared: Prepared) -> list[str]:
    """Name the devices that a start would take, without asking for them."""
    choice = prepared.choice
    named = [name.lower() for name in settings.devices]
    if named:
        return [_CPU] if _cpu_named(settings) or settings.cpu_chosen else named
    on_cpu = choice is not None and (choice.runs_on == "cpu" or bool(prepared.missing))
    return [_CPU] if settings.cpu_chosen or on_cpu or not prepared.host.visible_count else [_ALL]


def _tested(settings: Settings, prepared: Prepared, used: tuple[str, ...]) -> list[str]:
    """Name the devices that were used, in the words of ``_meant``."""
    if not used or settings.cpu_chosen:
        return [_CPU]
    if not settings.devices and len(used) >= prepared.host.visible_count:
        return [_ALL]
    return [name.lower() for name in used]


def _path(prepared: Prepared, devices: list[str]) -> Path | None:
    """Return a verdict's file; None for a runtime that lies in no store."""
    runtimes = prepared.installed.root.parent
    if runtimes.name != "runtimes":
        return None
    return runtimes.parent / verdicts.FOLDER / f"{_key(prepared, devices)}.json"


def _key(prepared: Prepared, devices: list[str]) -> str:
    """Digest everything that a verdict holds for."""
    host = prepared.host
    facts = [
        VERSION,
        [[gpu.name, gpu.uuid, gpu.capability] for gpu in host.gpus],
        host.driver,
        host.visible_devices,
        host.device_order,
        host.cpu,
        host.glibc,
        hashlib.sha256(MODEL.read_bytes()).hexdigest(),
        prepared.installed.sha256,
        [[one.soname, str(one.folder), one.version] for one in prepared.libraries],
        devices,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _keep_bad(prepared: Prepared, devices: list[str], error: LoaderError, seconds: float) -> None:
    bad = Verdict(
        ok=False,
        devices=(),
        seconds=seconds,
        code=error.code,
        message=error.message,
        hint=error.hint,
    )
    _keep(prepared, devices, bad)


def _keep(prepared: Prepared, devices: list[str], verdict: Verdict) -> None:
    """Write a verdict for the next run, and for people."""
    path = _path(prepared, devices)
    if path is None:
        return
    facts = {
        "artifact": prepared.installed.sha256,
        "gpus": [asdict(gpu) for gpu in prepared.host.gpus],
        "driver": prepared.host.driver,
        "for": devices,
    }
    verdicts.write(path, verdict, facts)
