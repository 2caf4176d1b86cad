"""Find the model: a local file, or one of a repository on the Hugging Face Hub.

The Hub's own client fetches (resume, cache, ``HF_ENDPOINT``, proxies); this module turns its errors
into sentences, fetches all parts of a split model, and checks a pinned digest.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader import disk, gguf_header, locations
from llama_loader.errors import (
    IntegrityError,
    LoaderError,
    NetworkError,
    SettingError,
    StoreError,
)
from llama_loader.events import Downloading, ignore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from llama_loader.events import Sink
    from llama_loader.settings import Settings

_ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the Hub may take to answer a question about a file."""
_BLOCK: Final = 4 * 1024 * 1024
_PIECE: Final = re.compile(r"\.gguf[.-](part|split)", re.IGNORECASE)
"""Names of files that are cut anywhere, such as ``m.gguf.part1of2`` and ``m.gguf-split-a``."""


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
        """Its name in messages."""
        return str(self.path) if self.path else f"{self.repo_id}/{self.filename}"


def from_settings(settings: Settings) -> ModelSource:
    """Return the source that the settings name; a local path wins."""
    return ModelSource(
        settings.gguf_path,
        settings.gguf_repo_id,
        settings.gguf_filename,
        settings.gguf_revision,
        settings.gguf_sha256,
    )


def get(source: ModelSource, settings: Settings, *, sink: Sink = ignore) -> Path:
    """Return the local path of the model (of its first part), fetched if it is not there yet.

    A local file is not looked into: llama-server says what is wrong with it.

    Raises:
        NetworkError: the Hub cannot be reached, or does not have it for this token.
        SettingError: no such repository, file or revision; not a model's first part, or a digest
            for one of several parts; huggingface_hub is not installed.
        IntegrityError: it is not the file that the pinned digest names.
        StoreError: it cannot be written.
    """
    _require_whole(source)
    path = source.path or _from_hub(source, settings, sink)
    if source.sha256:
        _check(path, source.sha256)
    return path


def at_hand(source: ModelSource) -> Path | None:
    """Return the model's local path if all of it is here already; fetch and ask nothing."""
    if source.path is not None:
        return source.path if source.path.is_file() else None
    try:
        from huggingface_hub import errors, try_to_load_from_cache
    except ImportError:
        return None
    first = None
    for name in gguf_header.parts(source.filename):
        try:
            found = try_to_load_from_cache(source.repo_id, name, revision=source.revision)
        except (OSError, ValueError, errors.HFValidationError):
            return None
        if not isinstance(found, str):
            return None
        first = first or Path(found)
    return first


def _require_whole(source: ModelSource) -> None:
    """Refuse what cannot be served, or not be verified, because the model is in several files."""
    name = source.path.name if source.path else source.filename
    number, count = gguf_header.part(name)
    if number != 1 or not count or _PIECE.search(name):
        raise SettingError(
            "MODEL_PART",
            f"{source.label} is not the first part of a model",
            hint="name the file that ends in -00001-of-….gguf; pieces such as .part1of2 have to be"
            " joined to one file first",
        )
    if source.sha256 and count > 1:
        names = list(islice(gguf_header.parts(name), 3))
        more = f" and {count - 3} more" if count > len(names) else ""
        raise SettingError(
            "MODEL_PIN_OF_PARTS",
            f"a sha256 pins one file, but {source.label} is the first of {count} files"
            f" ({', '.join(names)}{more}): pins of split models are not possible yet",
            hint="unset YAKULINGO_SPACES_GGUF_SHA256, or use a model in one file; a commit in"
            " YAKULINGO_SPACES_GGUF_REVISION names all files of a repository",
        )


def size_on_hub(source: ModelSource, settings: Settings) -> int | None:
    """Return the bytes that the Hub names for all parts of a model, in a small request for each.

    Raises:
        NetworkError: the Hub does not answer within seconds, or not for this token.
        SettingError: no such repository, file or revision; huggingface_hub is not installed.
    """
    _require_whole(source)
    client, token = _hub_client(settings), settings.hf_token or False
    total = 0
    for name in gguf_header.parts(source.filename):
        place = {"revision": source.revision, "endpoint": settings.hf_endpoint}
        with _hub_errors(replace(source, filename=name), settings):
            url = client.hf_hub_url(source.repo_id, name, **place)
            answer = client.get_hf_file_metadata(url, token=token, timeout=_ANSWER_TIMEOUT)
        if answer.size is None:
            return None
        total += answer.size
    return total


def _hub_client(settings: Settings) -> ModuleType:
    endpoint = settings.hf_endpoint or locations.HUB
    # the Hub's client resolves the name ``localhost``, and sends the token wherever that leads
    allowed = locations.is_allowed_web(endpoint)
    scheme, host, _ = locations.origin(endpoint) if allowed else ("", None, None)
    if scheme != "https" and not locations.is_loopback(host or ""):
        raise SettingError(
            "ENDPOINT_REFUSED",
            f"{locations.shown(endpoint)!r} is neither https nor on loopback",
            hint="correct HF_ENDPOINT; on this machine give the address, such as 127.0.0.1",
        )
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
    return huggingface_hub


def _from_hub(source: ModelSource, settings: Settings, sink: Sink) -> Path:
    """Fetch all parts; return the first one's path."""
    download = _hub_client(settings).hf_hub_download
    total = None
    if gguf_header.part(source.filename)[1] > 1 and not settings.offline:
        with suppress(NetworkError):  # the parts may be in the cache
            total = size_on_hub(source, settings)
    found: list[Path] = []
    for name in gguf_header.parts(source.filename):
        before = sum(path.stat().st_size for path in found)
        with _hub_errors(replace(source, filename=name), settings):
            path = download(
                source.repo_id,
                name,
                revision=source.revision,
                token=settings.hf_token or False,
                endpoint=settings.hf_endpoint,
                local_files_only=settings.offline,
                **_progress(download, source.filename, before, total, sink),
            )
        found.append(Path(path))
    return found[0]


def _progress(
    download: Callable[..., object], name: str, before: int, total: int | None, sink: Sink
) -> dict[str, Any]:
    """Return the option that makes the Hub's client report its progress to ``sink``.

    Its progress is a tqdm class; clients before 1.0 take none, and report nothing.
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
            sink(Downloading(name, before + int(self.n), total or int(self.total or 0) or None))
            return drawn

    return {"tqdm_class": Told}


@contextmanager
def _hub_errors(source: ModelSource, settings: Settings) -> Iterator[None]:
    """Turn what the Hub client raises into the loader's errors.

    That is its own errors, the system's, and those of its HTTP library, which changed from version
    to version (requests, httpx, httpx2); requests' errors are OSErrors.
    """
    from huggingface_hub import errors

    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    transport = [library.HTTPError for library in libraries]
    try:
        yield
    except (OSError, ValueError, errors.HfHubHTTPError, *transport) as error:
        raise _explained(error, source, settings) from error


def _explained(error: Exception, source: ModelSource, settings: Settings) -> LoaderError:
    from huggingface_hub import errors

    endpoint = locations.shown(settings.hf_endpoint or locations.HUB)
    if isinstance(error, errors.GatedRepoError):
        state = "this HF_TOKEN has no access to it" if settings.hf_token else "HF_TOKEN is not set"
        return NetworkError(
            "MODEL_GATED",
            f"{source.repo_id} is gated, and {state}",
            hint=f"accept its licence at {endpoint}/{source.repo_id} and set HF_TOKEN in the"
            " Space's secrets to a token of that account",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if not settings.offline:
            return _no_bytes(error, source, endpoint)
        return NetworkError(
            "OFFLINE",
            f"{source.label} is not in the local cache, and offline is set",
            hint="fetch it once with YAKULINGO_SPACES_OFFLINE=0, or give a file with --model",
        )
    hint = ""
    if isinstance(error, errors.RepositoryNotFoundError):
        code = "REPOSITORY_NOT_FOUND"
        what = f"{endpoint} has no repository {source.repo_id}, or it is private"
        hint = "check YAKULINGO_SPACES_GGUF_REPO_ID; for a private one set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        code, what = "REVISION_NOT_FOUND", f"{source.repo_id} has no revision {source.revision}"
        hint = "check YAKULINGO_SPACES_GGUF_REVISION"
    elif isinstance(error, errors.EntryNotFoundError):
        code, what = "FILE_NOT_FOUND", f"{source.repo_id} has no file {source.filename}"
        hint = "check YAKULINGO_SPACES_GGUF_FILENAME against the repository's list of files"
    elif isinstance(error, errors.HFValidationError):
        code, what = "REPOSITORY_INVALID", f"{source.repo_id}: {error}"
    else:
        return _no_bytes(error, source, endpoint)
    return SettingError(code, what, hint=hint)


def _no_bytes(error: Exception, source: ModelSource, endpoint: str) -> LoaderError:
    """Tell errors of the disk, which carry a number and a file, from those of the network.

    A write to a full disk carries a number alone.
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
