"""From a verified runtime and a model to a server that answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import devices, extra_arguments, model_file, select
from llama_loader.devices import DeviceChoice
from llama_loader.errors import HostError
from llama_loader.events import ignore
from llama_loader.prepare import environment
from llama_loader.server import Server, ServerPlan
from llama_loader.supervisor import Supervisor

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.events import Sink
    from llama_loader.prepare import Prepared
    from llama_loader.settings import Settings

_ONLY_DEVICE: Final = "CUDA0"
"""What llama-server calls the GPU of a machine that has one."""


def choose_devices(settings: Settings, prepared: Prepared, model: Path | None) -> DeviceChoice:
    """Choose the devices for a model; asks llama-server only where there is a question.

    One GPU, and an artifact of ours made for it, leave nothing to ask: listing costs 0.4 s on an
    H200, and the server itself refuses a device that is not there.

    Raises:
        HostError: no device, an unknown one, or missing CUDA libraries.
    """
    if settings.cpu_chosen:
        return DeviceChoice((), "YAKULINGO_SPACES_N_GPU_LAYERS is 0: the CPU alone")
    require_libraries(prepared, allow_cpu=settings.allow_cpu)
    choice, gpus = prepared.choice, prepared.host.gpus
    if choice is not None and not settings.devices:
        if choice.runs_on == "cpu":
            return DeviceChoice((), choice.reason)
        if prepared.missing:
            missing = ", ".join(prepared.missing)
            return DeviceChoice((), f"{missing} is not here, and the CPU is allowed")
        if len(gpus) == 1:
            return DeviceChoice((_ONLY_DEVICE,), f"the only one: {gpus[0].name}")
    return ask_devices(settings, prepared, model)


def ask_devices(settings: Settings, prepared: Prepared, model: Path | None) -> DeviceChoice:
    """Choose among what ``--list-devices`` finds.

    Raises:
        HostError: no device, or an unknown one.
    """
    listing = devices.list_devices(prepared.runtime, environment(settings, prepared))
    size = model_file.measure(model, settings.n_ctx) if model else None
    return devices.choose(
        listing.devices,
        settings.devices,
        needed=size.needed if size else None,
        allow_cpu=settings.allow_cpu,
    )


def require_libraries(prepared: Prepared, *, allow_cpu: bool) -> None:
    """Refuse to start anything whose CUDA libraries are not here.

    Raises:
        HostError: names them, and the packages that bring them.
    """
    if allow_cpu:
        return
    if prepared.choice is not None:
        select.require_libraries(prepared.choice, prepared.host)
    elif prepared.missing:
        raise select.missing_libraries("the archive", prepared.missing, prepared.host.libraries)


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
        chosen = choose_devices(settings, prepared, model)
    return ServerPlan(
        runtime=prepared.runtime,
        model=model,
        environ=environment(settings, prepared),
        devices=chosen.names,
        n_gpu_layers=settings.n_gpu_layers,
        n_ctx=settings.n_ctx,
        port=settings.server_port,
        startup_timeout=settings.startup_timeout,
        keyed=keyed,
        own_key=extra_arguments.own_key(extra),
        allow_cpu=settings.allow_cpu,
        pinned_build=prepared.choice is not None,
        extra=extra,
    )


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

    Raises:
        LoaderError: as for ``choose_devices`` and ``Server.start``.
    """
    plan = plan_server(settings, prepared, model, extra, keyed=keyed)
    supervisor = Supervisor(Server(plan), sink=sink)
    try:
        server = supervisor.start()
    except HostError as error:
        if error.code != "INVALID_DEVICE" or settings.devices or not plan.devices:
            raise
        # the one GPU of this machine is not visible to the server: ask what it sees
        chosen = ask_devices(settings, prepared, model)
        supervisor = Supervisor(Server(replace(plan, devices=chosen.names)), sink=sink)
        server = supervisor.start()
    if server.started is not None:
        prepared.timeline.add("start", server.started.loaded)
        first_token = server.started.first_token - server.started.loaded
        prepared.timeline.add("first token", first_token)
    return supervisor
