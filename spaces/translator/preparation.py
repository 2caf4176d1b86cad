"""Everything that needs no GPU: manifest, runtimes, model, page cache. For the app's process.

On ZeroGPU no GPU is attached there, and which one a worker will get may not be known: then the
runtimes for both kinds that ZeroGPU has are fetched (docs/zerogpu.md).
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from llama_loader import host, model, report
from llama_loader.errors import HostError, SettingError
from llama_loader.events import Note, Stage
from llama_loader.prepare import prepare
from llama_loader.timeline import Timeline
from translator.values import Runtime

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.events import Sink
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Manifest
    from llama_loader.prepare import Prepared
    from llama_loader.settings import Settings

ZEROGPU_ARCHITECTURES: Final = ("120", "90")
"""Half an RTX Pro 6000 Blackwell today, slices of an H200 before that and as the fallback."""
_BLOCK: Final = 16 * 1024 * 1024
_CACHE_SHARE: Final = 0.6
"""Of main memory: a model that takes more would push itself out of the page cache."""


@dataclass(frozen=True)
class Ready:
    """All that a worker needs to start a server: picklable, and it opens no connection.

    Attributes:
        settings: as given; an archive without a pin is pinned to what was fetched.
        released: the trusted manifest and its URL; None where a tarball was given by URL.
        model: the model's file.
        pinned: by the person; what pins an archive only since it was fetched proves nothing.
    """

    settings: Settings
    released: tuple[Manifest, str] | None
    model: Path
    pinned: bool = True


@dataclass(frozen=True)
class Preparation:
    """What was got ready.

    Attributes:
        ready: what workers get.
        runtimes: one for each architecture that may be needed; the likeliest first.
        model_sha256: of the model where it is pinned, or where the Hub's cache names it.
        timeline: (stage, seconds), each stage once.
        memory: bytes of main memory that this process may use; 0 for unknown.
    """

    ready: Ready
    runtimes: tuple[Runtime, ...]
    model_sha256: str | None
    timeline: tuple[tuple[str, float], ...]
    memory: int


def run(settings: Settings, sink: Sink) -> Preparation:
    """Fetch and verify whatever is not here yet.

    Raises:
        LoaderError: any of ``prepare``'s and ``model.get``'s.
    """
    looking = host.begin(settings)
    timeline = Timeline()
    prepared = _runtimes(settings, looking.result(), timeline.listening(sink))
    for note in report.notes(prepared[0]):
        sink(note)
    with timeline.stage("model"):
        path = _model(settings, sink)
    stages = [stage for one in prepared for stage in one.timeline.stages]
    pinned = not settings.url or settings.sha256 is not None
    if not pinned:
        settings = replace(settings, sha256=prepared[0].installed.sha256)
    return Preparation(
        ready=Ready(settings, prepared[0].released, path, pinned),
        runtimes=tuple(map(runtime, prepared)),
        model_sha256=settings.gguf_sha256 or _named_digest(path),
        timeline=summed([*stages, *(one for one in timeline.stages if one.name == "model")]),
        memory=prepared[0].host.memory,
    )


def _runtimes(settings: Settings, facts: HostFacts, sink: Sink) -> list[Prepared]:
    """Install what may be needed; an architecture that the release lacks is said, unless all do."""
    found: list[Prepared] = []
    refused: list[HostError] = []
    for arch in likely(settings, facts):
        wished = replace(settings, cuda_arch=arch)
        released = found[0].released if found else None
        try:
            found.append(prepare(wished, released=released, sink=sink))
        except HostError as error:
            if error.code != "NO_ARTIFACT_FOR_GPU":
                raise
            refused.append(error)
    if not found:
        raise refused[0]
    for one in refused:
        sink(Note(one.code, one.message, one.hint))
    return found


def likely(settings: Settings, facts: HostFacts) -> tuple[str | None, ...]:
    """Return the compute capabilities to prepare for; None is what this machine shows."""
    known = bool(facts.capabilities) and facts.gpu_source != "zerogpu"
    chosen = settings.cuda_arch or settings.url or settings.cpu_chosen
    if not settings.zerogpu or known or chosen:
        return (settings.cuda_arch,)
    return ZEROGPU_ARCHITECTURES


def runtime(prepared: Prepared, *, pinned: bool = True) -> Runtime:
    """Say what was chosen; ``Ready.pinned`` says whether it can be called verified."""
    installed = prepared.installed
    artifact = installed.artifact
    architecture = None
    if artifact is not None:
        code = (*artifact.cuda.sass, *artifact.cuda.ptx) if artifact.cuda else ("cpu",)
        architecture = ";".join(dict.fromkeys(code))
    name = artifact.name if artifact else None
    digest, verified = installed.sha256, installed.verified and pinned
    return Runtime(installed.release, name, architecture, digest, verified)


def summed(stages: list[Stage]) -> tuple[tuple[str, float], ...]:
    """Add up stages of one name, in the order of their first."""
    seconds: dict[str, float] = {}
    for one in stages:
        seconds[one.name] = seconds.get(one.name, 0.0) + one.seconds
    return tuple((name, round(took, 4)) for name, took in seconds.items())


def _model(settings: Settings, sink: Sink) -> Path:
    """Fetch the model; a local one must be there, or a GPU would be asked for in vain."""
    path = model.get(model.from_settings(settings), settings, sink=sink)
    if not path.is_file():
        raise SettingError(
            "MODEL_MISSING",
            f"there is no file {path}",
            hint="correct YAKULINGO_SPACES_GGUF_PATH, or unset it to have the model fetched",
        )
    return path


def _named_digest(path: Path) -> str | None:
    """The Hub's cache names a large file by its sha256; the client has checked its size only."""
    with contextlib.suppress(OSError):
        name = path.resolve().name
        return name if re.fullmatch("[0-9a-f]{64}", name) else None
    return None


def warm(path: Path, memory: int) -> bool:
    """Read a file once, so that the next reader finds it in main memory.

    Args:
        path: the file.
        memory: bytes of main memory; 0 for unknown, then nothing is read.

    Returns:
        Whether it was read.
    """
    try:
        if path.stat().st_size > memory * _CACHE_SHARE:
            return False
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass
    except OSError:
        return False
    return True
