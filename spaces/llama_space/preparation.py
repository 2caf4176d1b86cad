"""Prepares everything that needs no GPU: manifest, runtimes, model, this machine's facts.

On ZeroGPU the app's process has no GPU, and may not know which one a worker will get: then the
runtimes for both kinds of GPU that ZeroGPU has are fetched (docs/zerogpu.md).
"""

from dataclasses import replace
from typing import Any, Final

from llama_loader import events, gguf_header, host, model, report
from llama_loader.errors import HostError
from llama_loader.events import Note, Sink
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared, prepare
from llama_loader.settings import Settings
from llama_space.values import Ready

ZEROGPU_ARCHITECTURES: Final = ("120", "90")
"""Half an RTX Pro 6000 Blackwell today, slices of an H200 before that and as the fallback."""
PLAIN_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that adds nothing: with it llama-server's chat is a completion."""


def run(settings: Settings, sink: Sink) -> tuple[Ready, dict[str, Any]]:
    """Fetch and verify what is not in the store yet; return it, and its part of the status.

    Raises:
        LoaderError: any of ``prepare``'s and ``model.get``'s.
    """
    for note in settings.unknown:
        sink(note)
    facts = host.begin(settings).result()
    prepared = _runtimes(settings, facts, sink)
    first = prepared[0]
    for note in report.notes(first):
        sink(note)
    if not settings.model_named and model.at_hand(settings) is None:
        sink(Note.of("MODEL_DEFAULT", model=settings.model))
    with prepared[-1].timeline.stage("model"):
        path = model.get(settings, sink=sink)
    known = {
        **runtime(first),
        "verified": report.trust(settings, first) in {"pinned", "signed"},
        "model": path.name,
        "model_sha256": settings.gguf_sha256,
        "timeline": events.summed(stage for one in prepared for stage in one.timeline.stages),
    }
    if settings.url:
        settings = replace(settings, sha256=first.installed.sha256)
    size = sum(part.stat().st_size for part in gguf_header.files(path))
    told = server_arguments(gguf_header.chat_template(path))
    return Ready(settings, first.released, path, size, facts, told), known


def _runtimes(settings: Settings, facts: HostFacts, sink: Sink) -> list[Prepared]:
    """Install what may be needed; an architecture that the release lacks becomes a note."""
    # If it lacks all of them, that is an error
    found: list[Prepared] = []
    refused: list[HostError] = []
    for arch in likely(settings, facts):
        wished, released = replace(settings, cuda_arch=arch), found[0].released if found else None
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
    one = not settings.zerogpu or known or chosen
    return (settings.cuda_arch,) if one else ZEROGPU_ARCHITECTURES


def runtime(prepared: Prepared) -> dict[str, Any]:
    """Return which runtime was chosen, as fields of a ``Status``."""
    installed, architecture = prepared.installed, None
    if artifact := installed.artifact:
        archs = (*artifact.cuda.sass, *artifact.cuda.ptx) if artifact.cuda else ("cpu",)
        architecture = ";".join(dict.fromkeys(archs))
    digest = installed.sha256
    return {"release": prepared.release, "architecture": architecture, "digest": digest}


def server_arguments(template: str | None) -> tuple[str, ...]:
    """Return what llama-server must be told about the chat template in the model's header.

    A base model has none, and would get ChatML's marks, which it has never seen.
    """
    return ("--chat-template", PLAIN_TEMPLATE) if template is None else ()
