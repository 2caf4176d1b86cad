"""Find the model: a local file, or one of a repository on the Hugging Face Hub.

``model_file`` refuses what cannot be served. Requests to the Hub raise the errors of ``hub``.
"""

from dataclasses import replace
from pathlib import Path

from llama_loader import gguf_header, hub, model_file
from llama_loader.errors import IntegrityError, NetworkError, SettingError
from llama_loader.events import Sink, ignore
from llama_loader.settings import Settings


def named(settings: Settings, *, ask: bool = True) -> Settings:
    """Return the settings with the file that ``OWNER/REPO:QUANTISATION`` means, as ``-hf`` does.

    The Hub lists the files; the Hub's cache, offline or if not to ``ask``.
    """
    repo, _, wanted = settings.gguf_repo_id.partition(":")
    if not wanted or settings.gguf_path is not None:
        return settings
    settings = replace(settings, gguf_repo_id=repo, gguf_filename=f"*{wanted}*.gguf")
    there = hub.files_in_cache(settings)
    fitting = gguf_header.of_quantisation(there, wanted)
    if ask and not settings.offline:
        try:
            there = hub.files(settings)
            fitting = gguf_header.of_quantisation(there, wanted)
        except NetworkError:  # then the files in the cache count, as for a file by its name
            if not fitting:
                raise
    if not fitting and not ask:
        return settings
    if not fitting:
        shown = ", ".join(there[:20]) or "none"
        raise SettingError("FILE_NOT_FOUND/quantisation", repo=repo, wanted=wanted, there=shown)
    return replace(settings, gguf_filename=fitting[0])


def get(settings: Settings, *, sink: Sink = ignore) -> Path:
    """Return the local path of the model (of its first part), fetched if it is not there yet."""
    settings = named(settings)
    pinned, given = settings.gguf_sha256, settings.gguf_path
    number, count = gguf_header.part(given.name if given else settings.gguf_filename)
    if pinned and count > 1:
        raise SettingError("MODEL_PIN_OF_PARTS", model=settings.model, number=number, count=count)
    known = at_hand(settings) if pinned else None
    path = given or hub.fetch(settings, sink)
    model_file.require_usable(path)
    try:
        if pinned:
            model_file.require_digest(path, pinned)
    except IntegrityError:
        if path != known:  # else each later start would find it
            hub.forget(settings, path)
        raise
    return path


def at_hand(settings: Settings) -> Path | None:
    """Return the model's local path if all of it is here already; fetch and ask nothing."""
    if settings.gguf_path is not None:
        return settings.gguf_path if settings.gguf_path.is_file() else None
    found = hub.cached(named(settings, ask=False))
    return found[0] if found and None not in found else None
