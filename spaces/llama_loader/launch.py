"""From a verified runtime and a model to a server that answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import devices, gguf_header, gpus, notes, selection, server_plan
from llama_loader.devices import DeviceChoice
from llama_loader.errors import HostError, LoaderError
from llama_loader.events import ignore
from llama_loader.prepare import environment
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.supervisor import Supervisor

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.devices import Device, Listing
    from llama_loader.events import Sink
    from llama_loader.prepare import Prepared
    from llama_loader.settings import Settings
    from llama_loader.verdicts import Verdict

_ONLY_DEVICE: Final = "CUDA0"
"""What llama-server calls the GPU of a machine that has one."""


def choose_devices(
    settings: Settings, prepared: Prepared, model: Path | None, extra: tuple[str, ...] = ()
) -> DeviceChoice:
    """Choose the devices for a model; asks llama-server only where there is a question.

    One GPU, or several equal ones, and an artifact of ours made for them, leave nothing to ask:
    listing costs 0.4 s on an H200 and 0.9 s on two H100s, and the server itself refuses a device
    that is not there (docs/decisions/0044-several-equal-gpus.md).

    Raises:
        HostError: no device, an unknown one, or missing CUDA libraries.
    """
    on_cpu = _cpu_alone(settings, prepared)
    if on_cpu is not None:
        return on_cpu
    facts = prepared.host
    if prepared.choice is not None and not settings.devices and facts.visible_count == 1:
        seen = facts.gpus[0].name if len(facts.gpus) == 1 else "by CUDA_VISIBLE_DEVICES"
        return DeviceChoice((_ONLY_DEVICE,), f"the only one: {seen}")
    known = _known_devices(settings, prepared)
    if known is not None:
        return _chosen(settings, prepared, known, model, extra)
    return ask_devices(settings, prepared, model, extra=extra)


def _known_devices(settings: Settings, prepared: Prepared) -> tuple[Device, ...] | None:
    """Return what llama-server would list, where the driver's word is enough to know it."""
    order = environment(settings, prepared)["CUDA_DEVICE_ORDER"] == gpus.BY_BUS
    facts = prepared.host
    ours = prepared.choice is not None and not settings.devices
    if not ours or not order or facts.gpu_source != "nvml" or facts.visible_devices is not None:
        return None
    return devices.by_the_driver(facts.gpus)


def _cpu_alone(settings: Settings, prepared: Prepared) -> DeviceChoice | None:
    """Choose no device where no GPU can be meant; None where there may be one to choose."""
    if settings.cpu_chosen:
        return _no_layers()
    require_libraries(prepared, allow_cpu=settings.allow_cpu)
    choice = prepared.choice
    if choice is None or settings.devices:
        return None
    if choice.runs_on == "cpu":
        return DeviceChoice((), choice.reason)
    if prepared.missing:
        missing = ", ".join(prepared.missing)
        return DeviceChoice((), f"{missing} is not here, and the CPU is allowed")
    return None


def ask_devices(
    settings: Settings,
    prepared: Prepared,
    model: Path | None,
    listing: Listing | None = None,
    *,
    extra: tuple[str, ...] = (),
) -> DeviceChoice:
    """Choose among what ``--list-devices`` finds, or has found (``listing``).

    Raises:
        HostError: no device, or an unknown one.
    """
    if listing is None:
        listing = list_devices(settings, prepared)
    return _chosen(settings, prepared, listing.devices, model, extra)


def would_choose(settings: Settings, prepared: Prepared, listing: Listing) -> DeviceChoice:
    """Say what a start of the model that the settings name would choose, as far as it is here.

    Raises:
        HostError: no device, or an unknown one.
    """
    from llama_loader import model  # only now: a start has its path

    if settings.cpu_chosen:
        return _no_layers()
    path = model.at_hand(model.from_settings(settings))
    chosen = ask_devices(settings, prepared, path, listing)
    if path is None and not settings.devices and len(chosen.names) > 1:
        return replace(chosen, reason="all: the model is not here yet to be measured")
    return chosen


def _no_layers() -> DeviceChoice:
    return DeviceChoice((), "YAKULINGO_SPACES_N_GPU_LAYERS is 0: the CPU alone")


def served(found: tuple[Device, ...], prepared: Prepared) -> tuple[Device, ...]:
    """Leave out devices for which the artifact has no code: hosts may mix GPUs.

    The listing has names alone, so the host's GPUs of that name tell the capability. What is
    unknown or could be either stays, and so do all where none would: the server says why.
    """
    choice = prepared.choice
    if choice is None or choice.runs_on != "gpu":
        return found
    known: dict[str, set[str | None]] = {}
    for gpu in prepared.host.gpus:
        known.setdefault(_plain_name(gpu.name), set()).add(gpu.capability)

    def usable(device: Device) -> bool:
        capabilities = known.get(_plain_name(device.description), {None})
        return None in capabilities or not capabilities.isdisjoint(choice.capabilities)

    kept = tuple(one for one in found if not one.is_cuda or usable(one))
    return kept if any(one.is_cuda for one in kept) else found


def _plain_name(name: str) -> str:
    return name.casefold().removeprefix("nvidia ").strip()


def _chosen(
    settings: Settings,
    prepared: Prepared,
    found: tuple[Device, ...],
    model: Path | None,
    extra: tuple[str, ...],
) -> DeviceChoice:
    size = server_plan.measure(model, settings.n_ctx, extra) if model else None
    return devices.choose(
        found if settings.devices else served(found, prepared),
        settings.devices,
        needed=size.stored if size else None,
        allow_cpu=settings.allow_cpu,
        each=gguf_header.COMPUTE_MARGIN,
    )


def list_devices(
    settings: Settings, prepared: Prepared, *, timeout: float = devices.TIMEOUT
) -> Listing:
    """Run ``llama-server --list-devices``.

    Raises:
        HostError: as for ``devices.list_devices``.
        IntegrityError: a file of the runtime is not what it was any more.
        StoreError: one cannot be read.
    """
    prepared.require_sound()
    environ = environment(settings, prepared)
    return devices.list_devices(prepared.runtime, environ, timeout=timeout)


def require_libraries(prepared: Prepared, *, allow_cpu: bool) -> None:
    """Refuse to start anything whose CUDA libraries are not here.

    Raises:
        HostError: names them, and the packages that bring them.
    """
    if allow_cpu:
        return
    if prepared.choice is not None:
        selection.require_libraries(prepared.choice, prepared.host)
    elif prepared.missing:
        raise selection.missing_libraries("the archive", prepared.missing, prepared.host.libraries)


def plan_server(
    settings: Settings,
    prepared: Prepared,
    model: Path,
    extra: tuple[str, ...] = (),
    *,
    keyed: bool = True,
) -> ServerPlan:
    """Return the plan of a server for this model.

    Raises:
        HostError: as for ``choose_devices``.
    """
    with prepared.timeline.stage("devices"):
        chosen = choose_devices(settings, prepared, model, extra)
    return ServerPlan(
        runtime=prepared.runtime,
        model=model,
        environ=environment(settings, prepared),
        devices=chosen.names,
        every_device=chosen.every,
        n_gpu_layers=settings.n_gpu_layers,
        n_ctx=settings.n_ctx,
        port=settings.server_port,
        startup_timeout=settings.startup_timeout,
        keyed=keyed,
        own_key=server_plan.own_key(extra),
        allow_cpu=settings.allow_cpu,
        pinned_build=prepared.choice is not None,
        main_memory=prepared.host.memory,
        threads=prepared.host.threads,
        extra=extra,
    )


def try_runtime(
    settings: Settings,
    prepared: Prepared,
    listing: Listing | None = None,
    *,
    sink: Sink = ignore,
) -> Verdict:
    """Try a runtime with the loader's own tiny model, on every device that may be chosen.

    A good verdict that was kept is enough. What it costs goes to the timeline.

    Args:
        settings: what was asked for.
        prepared: the runtime.
        listing: what ``--list-devices`` found, where it was asked already.
        sink: told what the server's start gave up.

    Raises:
        HostError: this machine cannot run it.
        ServerError: it does not start, or answers wrongly or too late.
    """
    from llama_loader import self_test

    kept = self_test.kept(settings, prepared)
    if kept is not None:
        return kept

    def choose() -> DeviceChoice:
        on_cpu = _cpu_alone(settings, prepared)
        if on_cpu is not None:
            return on_cpu
        found = listing or list_devices(settings, prepared, timeout=self_test.TIMEOUT)
        return ask_devices(settings, prepared, None, found)

    with prepared.timeline.stage("test run"):
        return self_test.run(settings, prepared, choose, sink)


def start(
    settings: Settings,
    prepared: Prepared,
    model: Path,
    extra: tuple[str, ...] = (),
    *,
    keyed: bool = True,
    sink: Sink = ignore,
) -> Supervisor:
    """Start a server and wait for its first token; its times go to the timeline.

    A start that works is remembered as a good test run. After one that does not, the loader's own
    tiny model tells whether the runtime is at fault, where the error leaves that open.

    Raises:
        LoaderError: as for ``choose_devices`` and ``Server.start``.
    """
    plan = plan_server(settings, prepared, model, extra, keyed=keyed)
    try:
        supervisor = _started(settings, prepared, plan, sink)
    except HostError as error:
        if error.code != "INVALID_DEVICE" or settings.devices or not plan.devices:
            raise
        # a GPU of which the driver tells is not visible to the server: ask what it sees
        chosen = ask_devices(settings, prepared, model, extra=extra)
        plan = replace(plan, devices=chosen.names, every_device=chosen.every)
        supervisor = _started(settings, prepared, plan, sink)
    try:
        _note_start(settings, prepared, supervisor.server, sink)
    except BaseException:  # a signal, say: nobody has the supervisor yet to stop it
        supervisor.stop()
        raise
    return supervisor


def _note_start(settings: Settings, prepared: Prepared, server: Server, sink: Sink) -> None:
    from llama_loader import self_test  # only now: the server runs already

    if server.started is not None:
        prepared.timeline.add("start", server.started.loaded)
        first_token = server.started.first_token - server.started.loaded
        prepared.timeline.add("first token", first_token)
    for note in notes.not_as_asked(server):
        sink(note)
    self_test.remember(settings, prepared, server)


def _started(settings: Settings, prepared: Prepared, plan: ServerPlan, sink: Sink) -> Supervisor:
    supervisor = Supervisor(Server(plan, before=prepared.require_sound), sink=sink)
    try:
        supervisor.start()
    except LoaderError as error:
        from llama_loader import self_test

        judged = self_test.judged(settings, prepared, plan.devices, error)
        if judged is None:
            raise
        raise judged from error
    return supervisor
