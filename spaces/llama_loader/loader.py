"""The façade of the loader: settings → a verified runtime (``prepare``) → a server (``start``).

This module decides the order in which the others are called; it has no bytes, processes or HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from llama_loader import (
    cuda_libraries,
    devices,
    disk,
    gpus,
    host,
    processes,
    selection,
    self_test,
    server_plan,
    trust,
)
from llama_loader.concurrency import Background
from llama_loader.cuda_libraries import Library
from llama_loader.devices import DeviceChoice, Listing
from llama_loader.errors import HostError, IntegrityError, LoaderError, ServerError, SettingError
from llama_loader.events import Note, Sink, Stage, Timeline, ignore
from llama_loader.fetch import Fetcher
from llama_loader.host import HostFacts
from llama_loader.manifest import Artifact, Manifest
from llama_loader.receipt import Installed
from llama_loader.selection import Choice
from llama_loader.self_test import SelfTest
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.settings import Settings
from llama_loader.store import Store


@dataclass(frozen=True)
class Prepared:
    """A verified runtime; ``choice`` and ``released`` are None where a tarball was given by URL."""

    installed: Installed
    host: HostFacts
    choice: Choice | None
    # CUDA libraries that it will use; ``origin`` is ``release`` for fetched ones
    libraries: tuple[Library, ...]
    missing: tuple[str, ...]  # sonames of those that this machine lacks
    timeline: Timeline
    # the fetched ones, None where this host has its own, or none are had
    runtime_libraries: Installed | None = None
    released: tuple[Manifest, str] | None = None  # the trusted manifest and its URL
    # installs again what was damaged; None where ``prepare`` did not make this object
    repair: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    @property
    def release(self) -> str | None:
        """The release's name; None for an archive by URL."""
        return self.released[0].release if self.released else None

    @property
    def uploads(self) -> bool:
        """The build can upload weights with several threads."""
        applied = self.released[0].source.patches if self.released else ()
        return any(patch.name == server_plan.PARALLEL_UPLOAD for patch in applied)

    @property
    def lacking(self) -> HostError | None:
        """The error of a machine without the CUDA libraries; None where it has all of them."""
        name = self.choice.artifact.name if self.choice else "the archive"
        error = selection.missing_libraries(name, self.missing, self.host.libraries)
        return error if self.missing else None

    def require_sound(self) -> None:
        """Hash what is about to be executed, now; install it again once where it is damaged.

        Raises as ``Installed.verify`` and ``prepare``; ``StoreError`` if others can change a folder
        above it.
        """
        for installed in filter(None, (self.installed, self.runtime_libraries)):
            with disk.errors(installed.root):
                disk.trusted(disk.nearest(installed.root.parent))  # others may write now
            try:
                installed.verify()
            except IntegrityError as error:
                # without a manifest, contradicting digests of pieces come from an earlier one
                is_damage = error.code == "RUNTIME_DAMAGED" or self.released is None
                if self.repair is None or not is_damage:
                    raise
                self.repair()
                installed.verify()
            with disk.errors(installed.root):
                disk.trusted(installed.root.parent)  # it may have been missing above


def prepare(
    settings: Settings,
    *,
    looking: Background[HostFacts] | None = None,
    released: tuple[Manifest, str] | None = None,
    hashed: bool = True,
    sink: Sink = ignore,
) -> Prepared:
    """Resolve, fetch, verify and unpack what this host needs.

    ``looking`` is ``host.begin``, where that was called before; ``released`` is that of an earlier
    call, a manifest that is trusted already. What is installed is hashed again, unless ``hashed``
    is False: then ``start`` does it. Raises any ``LoaderError`` but the server's.
    """
    sink = timeline = Timeline(sink)
    store, fetcher = Store(settings.store, sink=sink), fetcher_for(settings, sink)
    with timeline.stage("resolve"):
        looking = looking or host.begin(settings)
        if released is None and not settings.url:
            released = trust.manifest(settings, store, fetcher, sink)
        facts = looking.result()
        arch, cpu = settings.cuda_arch, settings.cpu_allowed
        choice = None
        if released is not None:
            meant = facts.only(settings.devices)
            choice = selection.select(released[0], meant, arch=arch, allow_cpu=cpu)
    repair = partial(prepare, settings, released=released, sink=sink)
    if released is None or choice is None:
        url, pin = settings.url or "", settings.sha256
        installed = store.install_archive(url, pin, fetcher, hashed=hashed)
        needs = cuda_libraries.read_needs(installed.library_folders)
        taken, missing = cuda_libraries.split_needs(needs, facts.libraries)
        return Prepared(installed, facts, None, taken, missing, timeline, repair=repair)
    for note in _unused_gpus(settings, facts, choice):
        sink(note)

    def install(artifact: Artifact, note: Note | None = None) -> Installed:
        urls = artifact.resolved_urls(released[1])
        return store.install(artifact, urls, fetcher, note=note, hashed=hashed)

    installed, brought = install(choice.artifact), choice.runtime_libraries
    libraries, missing, added = choice.libraries, choice.missing, None
    if brought:
        packages = " ".join(cuda_libraries.packages(missing))
        note = Note.of(
            "CUDA_RUNTIME_FETCHED",
            megabytes=brought.size / 1e6,
            artifact=brought.name,
            missing=", ".join(missing),
            packages=packages,
        )
        added = install(brought, note)
        version = brought.cuda.toolkit if brought.cuda else None
        fetched = [Library(name, added.folder, version, "release") for name in brought.provides]
        # first, because cuBLAS needs the cuBLASLt of its own version
        own = [one for one in libraries if one.soname not in brought.provides]
        libraries, missing = (*fetched, *own), ()
    return Prepared(installed, facts, choice, libraries, missing, timeline, added, released, repair)


def read_manifest(settings: Settings, sink: Sink) -> tuple[Manifest, str]:
    """Return the trusted manifest and its URL; nothing else is fetched. Raises as ``prepare``."""
    store, fetcher = Store(settings.store, sink=sink), fetcher_for(settings, sink)
    return trust.manifest(settings, store, fetcher, sink)


def fetcher_for(settings: Settings, sink: Sink) -> Fetcher:
    """Return what opens URLs as the settings say."""
    token, endpoint = settings.hf_token, settings.hf_endpoint
    return Fetcher(offline=settings.offline, token=token, endpoint=endpoint, sink=sink)


def _unused_gpus(settings: Settings, facts: HostFacts, choice: Choice) -> list[Note]:
    """Return a note for each GPU, or the named architecture, that the artifact does not serve."""
    if settings.cuda_arch and choice.runs_on != "gpu":
        arch, name = selection.dotted([settings.cuda_arch]), choice.artifact.name
        return [Note.of("ARCH_UNUSED", arch=arch, artifact=name)]
    to_come = facts.gpu_source == "zerogpu"  # ZeroGPU documents several kinds and attaches one
    chosen = settings.cuda_arch or settings.devices or settings.cpu_chosen
    if to_come or chosen or choice.runs_on != "gpu":
        return []
    notes = [Note.of("DRIVER_COMPLAINT", complaint=complaint) for complaint in facts.complaints]
    for gpu in facts.visible:
        code = gpu.capability
        if code is None:
            notes.append(Note.of("GPU_UNKNOWN", gpu=gpu.name))
        elif code not in choice.capabilities:
            note = Note.of(
                "GPU_UNUSED",
                gpu=gpu.name,
                artifact=choice.artifact.name,
                building=selection.building(facts.capabilities),
                capability=code,
                dotted=selection.dotted([code]),
            )
            notes.append(note)
    return notes


def environment(settings: Settings, prepared: Prepared) -> dict[str, str]:
    """Return what the runtime's programs may see: the allow-list and the libraries' folders.

    The program's own folder comes first (``$ORIGIN``, which also works for a path with a colon): a
    folder of CUDA libraries may hold another build's ``libggml-base.so``, and LD_LIBRARY_PATH is
    searched before RUNPATH. GPUs are counted as nvidia-smi counts them, unless
    ``CUDA_DEVICE_ORDER`` says otherwise. A folder that the dynamic linker cannot be given, because
    of its name, is a ``SettingError``.
    """
    folders = list(prepared.installed.library_folders[1:])
    folders += [*cuda_libraries.folders(prepared.libraries), *prepared.host.driver_folders]
    odd = next((folder for folder in folders if set(str(folder)) & set(":;$")), None)
    if odd is not None:
        raise SettingError("LIBRARY_FOLDER_UNUSABLE", folder=str(odd))
    inherited = {"CUDA_DEVICE_ORDER": gpus.BY_BUS, **settings.inherited}
    environ = processes.environment(inherited, libraries=folders)
    searched = filter(None, ("$ORIGIN", environ.get("LD_LIBRARY_PATH")))
    return {**environ, "LD_LIBRARY_PATH": ":".join(searched)}


def require_libraries(settings: Settings, prepared: Prepared) -> None:
    """Refuse to start a runtime that ``lacking`` is about, unless the CPU is allowed."""
    if (lacking := prepared.lacking) and not settings.cpu_allowed:
        raise lacking


def list_devices(settings: Settings, prepared: Prepared) -> Listing:
    """Run ``llama-server --list-devices``; errors are its own and those of ``require_sound``."""
    environ = environment(settings, prepared)
    prepared.require_sound()
    return devices.list_devices(prepared.installed.folder, environ)


def choose_devices(
    settings: Settings,
    prepared: Prepared,
    model: Path | None,
    extra: tuple[str, ...] = (),
    *,
    listing: Listing | None = None,
) -> DeviceChoice:
    """Choose the devices for a model; asks llama-server only where the driver cannot tell.

    ``model`` is None where it is not known yet; ``extra``, the arguments after ``--``, may take
    memory too; ``listing`` is what ``list_devices`` found, where that was called already. No device
    or an unknown one, and missing CUDA libraries, are a ``HostError``.
    """
    if settings.cpu_chosen:
        return DeviceChoice((), "n_gpu_layers is 0: the CPU alone")
    require_libraries(settings, prepared)
    choice = prepared.choice if not settings.devices else None
    if choice is not None and listing is None:
        if choice.runs_on == "cpu":
            return DeviceChoice((), choice.reason)
        if prepared.missing:
            missing = ", ".join(prepared.missing)
            return DeviceChoice((), f"{missing} is missing, and the CPU is allowed")
        listing = devices.by_the_driver(prepared.host)
    listing = listing or list_devices(settings, prepared)
    found = listing.devices
    if choice is not None:
        found = devices.with_code(found, prepared.host.gpus, choice.capabilities)
    return devices.choose(
        found,
        settings.devices,
        needed=server_plan.measure(model, settings.n_ctx, extra) if model else None,
        allow_cpu=settings.allow_cpu,
        printed=listing.output if prepared.choice is not None else None,
    )


def plan_server(
    settings: Settings,
    prepared: Prepared,
    model: Path,
    extra: tuple[str, ...] = (),
    *,
    key: str | None = "",
    listing: Listing | None = None,
) -> ServerPlan:
    """Return the plan of a server for this model; errors are those of ``choose_devices``."""
    chosen = choose_devices(settings, prepared, model, extra, listing=listing)
    environ = environment(settings, prepared)
    if prepared.uploads:
        threads = min(prepared.host.cpus, server_plan.UPLOAD_THREADS)
        asked = settings.load_threads  # 0 is upstream's own way
        environ["LLAMA_UPLOAD_THREADS"] = str(threads if asked is None else asked)
    return ServerPlan(
        runtime=prepared.installed.folder,
        model=model,
        environ=environ,
        devices=chosen.names,
        every_device=chosen.every,
        n_gpu_layers=settings.n_gpu_layers,
        n_ctx=settings.n_ctx,
        port=settings.server_port,
        startup_timeout=settings.startup_timeout,
        key="" if key is None and server_plan.has_key(extra) else key,
        allow_cpu=settings.allow_cpu,
        pinned_build=prepared.choice is not None,
        main_memory=prepared.host.memory,
        threads=prepared.host.threads,
        extra=extra,
    )


def try_runtime(settings: Settings, prepared: Prepared, listing: Listing | None = None) -> SelfTest:
    """Try a runtime with the loader's own tiny model, on every device that may be chosen.

    What the test costs goes to the timeline. Errors are those of ``self_test.run``.
    """
    with prepared.timeline.stage("test run"):
        try:
            if listing is None and not settings.cpu_chosen:
                listing = list_devices(settings, prepared)
            plan = plan_server(settings, prepared, self_test.MODEL, listing=listing)
            return self_test.run(prepared, replace(plan, devices=plan.every_device or plan.devices))
        except (HostError, ServerError, SettingError) as error:  # others: it was not even started
            raise self_test.blaming_the_runtime(error) from error


def start(
    settings: Settings,
    prepared: Prepared,
    model: Path,
    extra: tuple[str, ...] = (),
    *,
    key: str | None = "",
    listing: Listing | None = None,
    sink: Sink = ignore,
    made: Callable[[Server], None] | None = None,
) -> Server:
    """Start a server and wait for its first token; its times go to the timeline.

    Files that were damaged since ``prepare`` are found before they are executed, and installed
    again. ``extra`` and ``listing`` are those of ``choose_devices``; ``key`` is that of
    ``ServerPlan``; ``made`` is called with each server before it starts, so that another thread can
    stop a start. Errors are those of ``choose_devices`` and of ``Server``.
    """
    timeline = prepared.timeline
    asked, patch = settings.load_threads, server_plan.PARALLEL_UPLOAD
    if asked is not None and not prepared.uploads:
        sink(Note.of("LOAD_THREADS_UNUSED", asked=asked, parallel_upload=patch))
    with timeline.stage("devices"):
        plan = plan_server(settings, prepared, model, extra, key=key, listing=listing)
    server = Server(plan, before=prepared.require_sound, sink=sink)
    if made is not None:
        made(server)
    try:
        if (times := server.keep().started) is not None:
            loaded, first_token = times
            timeline(Stage("start", loaded))
            timeline(Stage("first token", first_token - loaded))
    except BaseException as error:  # also an interrupt: the caller has no server yet to stop
        server.stop()
        code = error.code if isinstance(error, LoaderError) else ""
        if code == "BAD_MODEL":
            from llama_loader.model_file import require_as_named

            require_as_named(model)  # then these bytes are why
        unseen = code == "INVALID_DEVICE" and plan.devices
        if not unseen or settings.devices or listing:
            raise
    else:
        return server
    # the server does not see a GPU that the driver names (MIG, say): ask what it sees
    seen = list_devices(settings, prepared)
    return start(settings, prepared, model, extra, key=key, listing=seen, sink=sink, made=made)
