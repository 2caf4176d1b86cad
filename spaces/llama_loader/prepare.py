"""From the settings to a verified runtime on this machine.

settings → manifest + host → choice → store → installed. Nothing here knows bytes, processes or
HTTP: it says in which order the rooms are entered, and keeps the time of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from llama_loader import cuda_libraries, gpus, host, processes, selection
from llama_loader.events import Note, Timeline, ignore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llama_loader.concurrency import Background
    from llama_loader.cuda_libraries import Library
    from llama_loader.events import Sink
    from llama_loader.fetch import Fetcher
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact, Manifest
    from llama_loader.selection import Choice
    from llama_loader.settings import Settings
    from llama_loader.store import Installed, Store


@dataclass(frozen=True)
class Prepared:
    """A verified runtime.

    Attributes:
        installed: what the store says about it.
        host: this machine.
        choice: why this artifact; None where a tarball was given by URL.
        libraries: CUDA libraries that it will use; ``origin`` is ``release`` for fetched ones.
        missing: sonames of those that are not here.
        timeline: resolve, fetch, verify, unpack.
        runtime_libraries: the fetched ones, None where this host has its own, or none are had.
        released: the trusted manifest and its URL; None where a tarball was given by URL.
    """

    installed: Installed
    host: HostFacts
    choice: Choice | None
    libraries: tuple[Library, ...]
    missing: tuple[str, ...]
    timeline: Timeline
    runtime_libraries: Installed | None = None
    released: tuple[Manifest, str] | None = None

    @property
    def runtime(self) -> Path:
        """The folder that holds ``llama-server``."""
        return self.installed.folder

    def require_sound(self) -> None:
        """Hash what is about to be executed, now.

        Raises:
            IntegrityError: names the files that are damaged, missing or not listed.
            StoreError: one cannot be read.
        """
        for installed in filter(None, (self.installed, self.runtime_libraries)):
            installed.verify()


def prepare(
    settings: Settings,
    *,
    looking: Background[HostFacts] | None = None,
    released: tuple[Manifest, str] | None = None,
    sink: Sink = ignore,
) -> Prepared:
    """Resolve, fetch, verify and unpack what this host needs.

    Args:
        settings: what was asked for.
        looking: ``host.begin``, where that was called before.
        released: ``Prepared.released`` of an earlier call: a manifest that is trusted already.
        sink: told of progress.

    Raises:
        LoaderError: any of the loader's errors but those of the server.
    """
    timeline = Timeline()
    with timeline.stage("resolve"):
        store = _store(settings, timeline.listening(sink))
        looking = looking or host.begin(settings)
        if released is None and not settings.url:
            released = _released(settings, store, sink)
        facts = looking.result()
        if released is not None:
            manifest, url = released
            choice = selection.select(manifest, facts, wishes(settings))
    if released is None:
        return _from_archive(settings, store, facts, timeline, sink)

    def install(artifact: Artifact, note: Note | None = None) -> Installed:
        urls, fetcher = artifact.resolved_urls(url), _fetcher(settings, sink)
        return store.install(artifact, urls, fetcher, release=manifest.release, note=note)

    installed, brought = install(choice.artifact), choice.runtime_libraries
    added = install(brought, _fetched_note(choice, brought)) if brought else None
    if brought is None or added is None:
        return Prepared(
            *(installed, facts, choice, choice.libraries, choice.missing, timeline),
            released=released,
        )
    libraries = _with_release(choice.libraries, brought, added.folder)
    return Prepared(installed, facts, choice, libraries, (), timeline, added, released)


def resolve(
    settings: Settings, *, facts: HostFacts | None = None, sink: Sink = ignore
) -> tuple[Manifest, HostFacts, Choice]:
    """Read the manifest and choose, without fetching anything else.

    Args:
        settings: what was asked for.
        facts: another machine instead of this one.
        sink: told of progress.

    Raises:
        LoaderError: the manifest cannot be had or trusted, or nothing in it fits this host.
    """
    facts = host.detect(settings) if facts is None else facts
    manifest, _ = _released(settings, _store(settings, sink), sink)
    return manifest, facts, selection.select(manifest, facts, wishes(settings))


def _fetched_note(choice: Choice, brought: Artifact) -> Note:
    packages = " ".join(cuda_libraries.packages(choice.missing))
    return Note(
        "CUDA_RUNTIME_FETCHED",
        f"fetching {brought.size / 1e6:.0f} MB of CUDA libraries ({brought.name}), because this"
        f" machine lacks {', '.join(choice.missing)}",
        f"to have nothing to fetch, add to requirements.txt (or pip install): {packages}",
    )


def _with_release(
    here: tuple[Library, ...], brought: Artifact, folder: Path
) -> tuple[Library, ...]:
    """Put the release's libraries before the host's, all of them where one was missing.

    cuBLAS is made for the cuBLASLt of its own version: what comes together is taken together.
    """
    version = brought.cuda.toolkit if brought.cuda else None
    fetched = [
        cuda_libraries.Library(soname, folder, version, "release") for soname in brought.provides
    ]
    return (*fetched, *(one for one in here if one.soname not in brought.provides))


def wishes(settings: Settings) -> selection.Wishes:
    """Return what the settings say about the choice."""
    return selection.Wishes(
        arch=settings.cuda_arch, allow_cpu=settings.allow_cpu or settings.cpu_chosen
    )


def _released(settings: Settings, store: Store, sink: Sink) -> tuple[Manifest, str]:
    from llama_loader import trust

    return trust.manifest(settings, store, _fetcher(settings, sink), sink)


def _from_archive(
    settings: Settings, store: Store, facts: HostFacts, timeline: Timeline, sink: Sink
) -> Prepared:
    installed = store.install_archive(settings.url or "", settings.sha256, _fetcher(settings, sink))
    needs = cuda_libraries.read_needs(installed.folder)
    taken, missing = cuda_libraries.split_needs(needs, facts.libraries)
    return Prepared(installed, facts, None, taken, missing, timeline)


def environment(settings: Settings, prepared: Prepared) -> dict[str, str]:
    """Return what the runtime's programs may see: the allow-list and the libraries' folders.

    A foreign archive may lack a RUNPATH: its own folder comes first. GPUs are counted as nvidia-smi
    counts them, unless ``CUDA_DEVICE_ORDER`` says otherwise.
    """
    own = [] if prepared.choice else [prepared.runtime]
    folders = [*own, *cuda_libraries.folders(prepared.libraries)]
    return processes.environment(
        {"CUDA_DEVICE_ORDER": gpus.BY_BUS, **settings.inherited}, libraries=folders
    )


def _store(settings: Settings, sink: Sink) -> Store:
    from llama_loader.store import Store as OnDisk

    return OnDisk(settings.store, sink=sink)


def _fetcher(settings: Settings, sink: Sink) -> Fetcher:
    def make() -> Fetcher:
        from llama_loader.fetch import Fetcher as Reader

        return Reader(
            offline=settings.offline,
            token=settings.hf_token,
            endpoint=settings.hf_endpoint,
            sink=sink,
        )

    return cast("Fetcher", _WhenAsked(make))


class _WhenAsked:
    """Stands for an object that is made when it is first asked for anything.

    A warm start fetches nothing: eight modules less to import, a tenth of what it imports.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> object:
        return self._make()

    def __getattr__(self, name: str) -> object:
        return getattr(self._made, name)
