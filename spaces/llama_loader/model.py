"""The model file: a local path, or a file of a repository on the Hugging Face Hub.

The Hub's own client does the fetching (resume, cache, ``HF_ENDPOINT``, proxies); here its errors
become sentences, and a pinned digest is checked.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader import disk
from llama_loader.errors import (
    IntegrityError,
    LoaderError,
    NetworkError,
    SettingError,
    StoreError,
)
from llama_loader.events import Downloading, ignore

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_loader.events import Sink
    from llama_loader.settings import Settings

_BLOCK: Final = 4 * 1024 * 1024


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: ``path``, or repository, file and revision."""

    path: Path | None
    repo_id: str
    filename: str
    revision: str | None = None
    sha256: str | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return str(self.path) if self.path else f"{self.repo_id}/{self.filename}"


def from_settings(settings: Settings) -> ModelSource:
    """Return what the settings name; a local path wins."""
    return ModelSource(
        settings.gguf_path,
        settings.gguf_repo_id,
        settings.gguf_filename,
        settings.gguf_revision,
        settings.gguf_sha256,
    )


def get(source: ModelSource, settings: Settings, *, sink: Sink = ignore) -> Path:
    """Return the model's local path, fetched where it is not there yet; ``sink`` hears how far.

    A local path is not looked into: llama-server says what is wrong with it.

    Raises:
        NetworkError: the Hub cannot be reached, or does not have it for this token.
        SettingError: no such repository, file or revision; huggingface_hub is not installed.
        IntegrityError: it is not the file that the pinned digest names.
        StoreError: it cannot be written.
    """
    path = source.path or _from_hub(source, settings, sink)
    if source.sha256:
        _check(path, source.sha256)
    return path


def at_hand(source: ModelSource) -> Path | None:
    """Return the model's local path where it is here already; nothing is fetched or asked for."""
    if source.path is not None:
        return source.path if source.path.is_file() else None
    try:
        from huggingface_hub import errors, try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(source.repo_id, source.filename, revision=source.revision)
    except (OSError, ValueError, errors.HFValidationError):
        return None
    return Path(found) if isinstance(found, str) else None


def _from_hub(source: ModelSource, settings: Settings, sink: Sink) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise SettingError(
            "HUB_CLIENT_MISSING",
            "huggingface_hub is not installed, so no model can be fetched from the Hub",
            hint="pip install huggingface_hub, or give a local file with --model",
        ) from error
    import logging

    # its advice ("you are sending unauthenticated requests …") is not for our stderr
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = huggingface_hub.hf_hub_download(
            source.repo_id,
            source.filename,
            revision=source.revision,
            token=settings.hf_token or False,
            endpoint=settings.hf_endpoint,
            local_files_only=settings.offline,
            **_progress(huggingface_hub.hf_hub_download, source.filename, sink),
        )
    except _hub_errors() as error:
        raise _explained(error, source, settings) from error
    return Path(found)


def _progress(download: Callable[..., object], name: str, sink: Sink) -> dict[str, Any]:
    """Return the option that makes the Hub's client tell ``sink`` how far it is.

    Its progress is a tqdm class; older clients (before 1.0) take none, and say nothing then.
    """
    if sink is ignore or "tqdm_class" not in inspect.signature(download).parameters:
        return {}
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[misc] # it has no types
        """Draws nothing; each step becomes an event."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            sink(Downloading(name, int(self.n), int(self.total) if self.total else None))
            return drawn

    return {"tqdm_class": Told}


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub client raises: its own, the system's, and those of its HTTP library.

    Which library that is changed from version to version (requests, httpx, httpx2); requests'
    errors are OSErrors.
    """
    from huggingface_hub import errors

    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    transport = [library.HTTPError for library in libraries]
    return (OSError, ValueError, errors.HfHubHTTPError, *transport)


def _explained(error: Exception, source: ModelSource, settings: Settings) -> LoaderError:
    """Turn any of the Hub client's errors (its own, its HTTP library's, the system's) into ours."""
    from huggingface_hub import errors

    endpoint = settings.hf_endpoint or "https://huggingface.co"
    if isinstance(error, errors.GatedRepoError):
        return _gated(source, endpoint, has_token=settings.hf_token is not None)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_local(source.label, endpoint, offline=settings.offline)
    for kind, code, sentence, hint in (
        (
            errors.RepositoryNotFoundError,
            "REPOSITORY_NOT_FOUND",
            f"{endpoint} has no repository {source.repo_id}, or it is private",
            "check YAKULINGO_SPACES_GGUF_REPO_ID; for a private one set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            "REVISION_NOT_FOUND",
            f"{source.repo_id} has no revision {source.revision}",
            "check YAKULINGO_SPACES_GGUF_REVISION",
        ),
        (
            errors.EntryNotFoundError,
            "FILE_NOT_FOUND",
            f"{source.repo_id} has no file {source.filename}",
            "check YAKULINGO_SPACES_GGUF_FILENAME against the repository's list of files",
        ),
        (errors.HFValidationError, "REPOSITORY_INVALID", f"{source.repo_id}: {error}", ""),
    ):
        if isinstance(error, kind):
            return SettingError(code, sentence, hint=hint)
    return _no_bytes(error, source, endpoint)


def _no_bytes(error: Exception, source: ModelSource, endpoint: str) -> LoaderError:
    """The disk's errors carry a number and a file; all others are the network's.

    A write to a disk that is full has a number alone.
    """
    if isinstance(error, OSError) and disk.is_full(error):
        from huggingface_hub import constants

        return disk.failure(Path(constants.HF_HUB_CACHE), error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return StoreError("MODEL_NOT_WRITTEN", f"cannot write {source.label}: {error}")
    return NetworkError(
        "HUB_UNREACHABLE",
        f"cannot fetch {source.label} from {endpoint}: {error}",
        hint="try again; with a copy at hand give it with --model",
    )


def _gated(source: ModelSource, endpoint: str, *, has_token: bool) -> NetworkError:
    state = "and this HF_TOKEN has no access to it" if has_token else "and HF_TOKEN is not set"
    return NetworkError(
        "MODEL_GATED",
        f"{source.repo_id} is gated, {state}",
        hint=f"accept its licence at {endpoint}/{source.repo_id} and set HF_TOKEN in the Space's"
        " secrets to a token of that account",
    )


def _not_local(what: str, endpoint: str, *, offline: bool) -> NetworkError:
    if offline:
        return NetworkError(
            "OFFLINE",
            f"{what} is not in the local cache, and offline is set",
            hint="fetch it once with YAKULINGO_SPACES_OFFLINE=0, or give a file with --model",
        )
    return NetworkError(
        "HUB_UNREACHABLE",
        f"cannot reach {endpoint}, and {what} is not in the local cache",
        hint="try again; with a copy at hand give it with --model",
    )


def _check(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise SettingError("MODEL_NOT_READABLE", f"{path}: {error.strerror}") from error
    if digest.hexdigest() != sha256:
        raise IntegrityError(
            "MODEL_SHA256_MISMATCH",
            f"{path} has the sha256 {digest.hexdigest()}, pinned is {sha256}",
            hint="correct YAKULINGO_SPACES_GGUF_SHA256, or delete the file to have it fetched anew",
        )
