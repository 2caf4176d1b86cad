"""Find the model: a local file, or one of a repository on the Hugging Face Hub.

The Hub's own client asks, keeps the cache and fetches by Xet. Without Xet, and after a download
that was cut off, the loader downloads by itself, because that client begins anew. This module turns
the client's errors into sentences, fetches all parts of a split model, and refuses what cannot be
served.

What asks the Hub raises ``NetworkError`` (it cannot be reached, or has nothing for this token),
``SettingError`` (no such repository, revision or file; huggingface_hub is not installed) and
``StoreError`` (the model cannot be written, or has no room).
"""

import errno
import glob
import hashlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from llama_loader import disk, gguf_header, locations
from llama_loader.concurrency import Background
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Downloading, Event, Note, Sink, ignore
from llama_loader.fetch import Fetcher
from llama_loader.locations import Web
from llama_loader.settings import Settings, bound_xet, certificate_file

_ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the Hub may be silent when it answers a question about a file."""
_ANSWERED: Final = 60.0
"""Seconds until the whole answer is here: the client's own time begins anew with every byte."""
_XET_PLACE: Final = "/xet-read-token"
"""In the address at which the Hub gives the way to its Xet storage; mirrors may not have it."""
_NAME: Final = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,200}")
"""An ETag or commit as the Hub's client takes it: for the name of a file or folder of its cache."""
_LEFT_BEHIND: Final = 600.0
"""Seconds after the last byte of a download by the Hub's client; then its process was killed."""
_SILENCE: Final = 20.0
"""Seconds without a byte of a download after which a note is told, again and again."""
_BLOCK: Final = 4 * 1024 * 1024
_PIECE: Final = re.compile(r"\.gguf[.-](part|split)", re.IGNORECASE)
"""Names of files that are cut anywhere, such as ``m.gguf.part1of2`` and ``m.gguf-split-a``."""


def label(settings: Settings) -> str:
    """Return the model's name in messages."""
    if ":" in settings.gguf_repo_id and settings.gguf_path is None:
        return settings.gguf_repo_id
    return str(settings.gguf_path or f"{settings.gguf_repo_id}/{settings.gguf_filename}")


def named(settings: Settings, *, ask: bool = True) -> Settings:
    """Return the settings with the file that ``OWNER/REPO:QUANTISATION`` means, as ``-hf`` does.

    The Hub is asked which files there are; the Hub's cache, offline or if not to ``ask``.
    """
    repo, _, wanted = settings.gguf_repo_id.partition(":")
    if not wanted or settings.gguf_path is not None:
        return settings
    settings = replace(settings, gguf_repo_id=repo, gguf_filename=f"*{wanted}*.gguf")
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(wanted)}(?=[-./])", re.IGNORECASE)
    there = _files_in_cache(settings)
    fitting = _fitting(there, pattern)
    if ask and not settings.offline:
        try:
            there = _files_on_hub(settings)
            fitting = _fitting(there, pattern)
        except NetworkError:  # then what is here already counts, as for a file by its name
            if not fitting:
                raise
    if not fitting and not ask:
        return settings
    if not fitting:
        raise SettingError(
            "FILE_NOT_FOUND/quantisation",
            repo=repo,
            wanted=wanted,
            there=", ".join(there[:20]) or "none",
        )
    return replace(settings, gguf_filename=min(fitting, key=lambda name: (len(name), name)))


def _fitting(names: list[str], pattern: re.Pattern[str]) -> list[str]:
    return [
        name
        for name in names
        if pattern.search(name) and "mmproj" not in name.lower() and gguf_header.part(name)[0] == 1
    ]


def _files_on_hub(settings: Settings) -> list[str]:
    client = _hub_client(settings)
    api = client.HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token or False)

    def ask() -> list[str]:
        repo, revision = settings.gguf_repo_id, settings.gguf_revision
        try:
            told = api.model_info(repo, revision=revision, timeout=_ANSWER_TIMEOUT)
            names = [str(one.rfilename) for one in told.siblings or ()]
        except (TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"its list of files cannot be read: {error}") from error
        return [name for name in names if name.lower().endswith(".gguf") and ".." not in name]

    with _hub_errors(settings):
        found: list[str] = _answered(ask)
        return found


def _answered(ask: Callable[[], Any]) -> Any:
    """Return what the Hub answers, if it does so in time."""
    asking = Background(ask)
    if not asking.wait(_ANSWERED):
        raise TimeoutError(f"no whole answer within {_ANSWERED:g} s")
    return asking.result()


def _files_in_cache(settings: Settings) -> list[str]:
    try:
        snapshots = _folder(settings) / "snapshots"
    except (ImportError, ValueError):
        return []
    return ["/".join(path.relative_to(snapshots).parts[1:]) for path in snapshots.glob("**/*.gguf")]


def get(settings: Settings, *, sink: Sink = ignore) -> Path:
    """Return the local path of the model (of its first part), fetched if it is not there yet.

    Raises:
        SettingError: it is no whole model, or a digest is pinned for one of several parts.
        IntegrityError: it is not the file that the pinned digest names.
    """
    settings = named(settings)
    pinned, given = settings.gguf_sha256, settings.gguf_path
    name = given.name if given else settings.gguf_filename
    number, count = gguf_header.part(name)
    if pinned and count > 1:
        raise SettingError("MODEL_PIN_OF_PARTS", model=label(settings), number=number, count=count)
    path = given or _from_hub(settings, sink)
    require_usable(path)
    if pinned:
        _require_digest(path, pinned)
    return path


def require_usable(path: Path) -> None:
    """Refuse what is no model that llama-server can serve, by its name, its parts and its header.

    Whether the architecture is known, llama-server alone can say.

    Raises:
        SettingError: names the file and what it is.
    """
    with _reading(path):
        if not path.is_file():  # nor a FIFO, whose reader would wait for ever
            raise SettingError("MODEL_MISSING", path=path)
        number, count = gguf_header.part(path.name)
        missing = [one for one in gguf_header.files(path) if not one.is_file()]
        if missing or number > 1:
            raise SettingError("MODEL_INCOMPLETE", path=path, count=count, missing=len(missing))
        _require_first(path.name, str(path))
    headers = [_whole(one) for one in gguf_header.files(path)]
    header = headers[0]
    kind = header.texts.get("type", "model")
    architecture = header.texts.get("architecture", "without an architecture")
    if architecture == "clip" or kind == "mmproj":
        kind = "multimodal projector (mmproj)"
    elif kind == "model" and architecture in {"controlvector", "without an architecture"}:
        kind = architecture
    elif kind == "model" and not any(one.end for one in headers):
        kind = "vocabulary, without tensors"
    if kind != "model":  # or an adapter, an imatrix
        raise SettingError(
            "MODEL_PROJECTOR" if "mmproj" in kind else "MODEL_KIND",
            f"{path} is a GGUF file of another kind ({kind}), not a language model",
            hint="name the model's own GGUF file: --model, --hf, or YAKULINGO_SPACES_GGUF_…",
        )
    declared = header.numbers.get("count", 0)  # split.count
    if declared not in {0, gguf_header.part(path.name)[1]}:
        raise SettingError("MODEL_PART", path=path, declared=declared)


def _whole(path: Path) -> gguf_header.Header:
    """Return the header of a part of a model; refuse one that ends before its tensors do."""
    header = gguf_header.read(path)
    with _reading(path), path.open("rb") as file:
        head, size = file.read(16), path.stat().st_size
    if header is None:
        raise SettingError("MODEL_NOT_GGUF", path=path, head=head)
    if size < header.end:
        raise SettingError("MODEL_INCOMPLETE/cut", path=path.resolve(), size=size, end=header.end)
    return header


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError("MODEL_NOT_READABLE", path=path, why=error.strerror) from error


def _require_first(name: str, label: str) -> None:
    number, count = gguf_header.part(name)
    if number != 1 or not count or _PIECE.search(name):
        raise SettingError("MODEL_PART/later", label=label)


def require_as_named(path: Path) -> None:
    """Hash a model of the Hub's cache, where the sha256 of a large file is the name of its bytes.

    Raises:
        IntegrityError: a file of it has other bytes than the Hub's; names it.
    """
    for part in gguf_header.files(path):
        place = Path(os.path.realpath(part))
        if re.fullmatch("[0-9a-f]{64}", place.name):
            _require_digest(
                place,
                place.name,
                "by its name it should be",
                "delete this file; it is fetched anew",
            )


def _require_digest(
    path: Path,
    sha256: str,
    told: str = "pinned is",
    cure: str = "correct YAKULINGO_SPACES_GGUF_SHA256, or delete the file to have it fetched anew",
) -> None:
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise IntegrityError(
            "MODEL_SHA256_MISMATCH",
            path=path,
            digest=digest.hexdigest(),
            told=told,
            sha256=sha256,
            hint=cure,
        )


def at_hand(settings: Settings) -> Path | None:
    """Return the model's local path if all of it is here already; fetch and ask nothing."""
    if settings.gguf_path is not None:
        return settings.gguf_path if settings.gguf_path.is_file() else None
    found = _cached(named(settings, ask=False))
    return found[0] if found and None not in found else None


def _cached(settings: Settings) -> list[Path | None]:
    """Return where each part lies in the Hub's cache; None for a part that does not."""
    try:
        from huggingface_hub import errors, try_to_load_from_cache
    except (ImportError, ValueError):  # the second is a variable of its own: see _hub_client
        return []
    found: list[Path | None] = []
    for name in gguf_header.parts(settings.gguf_filename):
        try:
            path = try_to_load_from_cache(
                settings.gguf_repo_id, name, revision=settings.gguf_revision
            )
        except (OSError, ValueError, errors.HFValidationError):
            path = None
        found.append(Path(path) if isinstance(path, str) else None)
    return found


@dataclass(frozen=True)
class _Remote:
    """A file on the Hub, by the Hub's own answer; ``size`` is None where it names none."""

    place: Web
    etag: str
    size: int | None
    by_xet: bool
    blobs: Path

    @property
    def begun(self) -> Path:
        """Where a download without Xet collects its bytes, for the next process too."""
        return self.blobs / f"{self.etag}.llama-loader.incomplete"

    def to_be_resumed(self) -> bool:
        """Return whether an earlier process was ended, in either way, while it fetched this."""
        return any(self.blobs.glob(f"{glob.escape(self.etag)}.*.incomplete"))

    def left(self) -> int:
        """Return the bytes that are still to come; sweep what the Hub's client left behind."""
        for path in self.blobs.glob(f"{glob.escape(self.etag)}.*.incomplete"):
            if path != self.begun and path.stat().st_mtime < time.time() - _LEFT_BEHIND:
                self.begun.touch()  # for ``to_be_resumed``
                path.unlink()
        here = next((one for one in (self.blobs / self.etag, self.begun) if one.is_file()), None)
        return max(0, (self.size or 0) - (here.stat().st_size if here else 0))


def _on_hub(settings: Settings) -> list[_Remote]:
    """Ask the Hub for each part of a model."""
    _require_first(settings.gguf_filename, label(settings))
    client, found = _hub_client(settings), []
    for name in gguf_header.parts(settings.gguf_filename):
        one = replace(settings, gguf_filename=name)
        place = {"revision": settings.gguf_revision, "endpoint": settings.hf_endpoint}
        with _hub_errors(one):
            url = client.hf_hub_url(settings.gguf_repo_id, name, **place)
            options = {"token": settings.hf_token or False, "timeout": _ANSWER_TIMEOUT}
            answer = _answered(partial(client.get_hf_file_metadata, url, **options))
        named_by = (answer.commit_hash or "", answer.etag or "")
        if not all(map(_NAME.fullmatch, named_by)) or (answer.size or 0) < 0:
            told = f"X-Repo-Commit {named_by[0][:80]!r}, ETag {named_by[1][:80]!r}"
            raise _unusable(settings, f"{told} for {label(one)}")
        found.append(
            _Remote(
                Web(url, settings.hf_token),
                answer.etag,
                answer.size or None,  # some mirrors answer HEAD with a length of 0
                answer.xet_file_data is not None,
                _folder(settings) / "blobs",
            )
        )
    return found


def _folder(settings: Settings) -> Path:
    """Return the repository's folder in the Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{settings.gguf_repo_id.replace('/', '--')}")


def size_on_hub(settings: Settings) -> int | None:
    """Return the bytes that the Hub names for all parts of a model, in a small request for each."""
    settings = named(settings)
    remote = _on_hub(settings)
    _require_room(settings, remote)
    return _size(remote)


def _size(remote: list[_Remote]) -> int | None:
    sizes = [one.size for one in remote]
    return None if None in sizes else sum(filter(None, sizes))


def _hub_client(settings: Settings) -> ModuleType:
    locations.require_endpoint(settings.hf_endpoint)
    certificate_file()
    bound_xet()
    try:
        import huggingface_hub.constants  # which reads its variables
        import huggingface_hub.file_download  # tqdm reads variables too
        import huggingface_hub.utils.logging
    except ValueError as error:
        raise SettingError("SETTING_INVALID/hub-client", error=error) from error
    except ImportError as error:
        raise SettingError("HUB_CLIENT_MISSING") from error
    # its advice ("you are sending unauthenticated requests …", "Retrying") is not for our stderr
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return huggingface_hub


def _from_hub(settings: Settings, sink: Sink) -> Path:
    """Fetch all parts; return the first one's path."""
    _require_first(settings.gguf_filename, label(settings))
    client, remote = _hub_client(settings), []
    if None in _cached(settings) and not settings.offline:
        _require_writable(sink)
        remote = _on_hub(settings)
        _require_room(settings, remote)
    names, found, done = gguf_header.parts(settings.gguf_filename), [], 0
    for name, one in zip_longest(names, remote):
        transfer = _Transfer(settings.gguf_filename, done, _size(remote), sink)
        found.append(_fetched(client, replace(settings, gguf_filename=name), one, transfer))
        done += found[-1].stat().st_size
    return found[0]


def _require_writable(sink: Sink) -> None:
    """Have the Hub's client keep files in a private folder if its cache cannot be written."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    place = next(one for one in (cache, *cache.parents) if os.path.exists(one))  # noqa: PTH110
    if cache.is_absolute() and os.access(place, os.W_OK | os.X_OK):
        return
    with disk.errors(cache):
        own = disk.make_private_folder("llama-loader-hub")
    constants.HF_HUB_CACHE = str(own)
    sink(Note.of("MODEL_CACHE_TEMPORARY", cache=cache, own=own))


def _require_room(settings: Settings, remote: list[_Remote]) -> None:
    """Refuse a model that the disk has no room for, before its first byte comes."""
    cache = _folder(settings)
    with disk.errors(cache.parent):
        size = sum(one.left() for one in remote)
        free = shutil.disk_usage(disk.nearest(cache)).free
        if free < size:
            sizes = f"takes {size / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, f"{label(settings)} {sizes}")


@dataclass
class _Transfer:
    """One part of a model on its way; tells ``sink`` how far all parts are.

    Attributes:
        name: of the model.
        before: bytes of the parts before this one.
        total: bytes of all parts; None for as many as the download is told of.
        furthest: bytes of this part that have come. Xet has two bars: the one that is further
            counts.
    """

    name: str
    before: int
    total: int | None
    sink: Sink
    furthest: int = 0

    def told(self, event: Event) -> None:
        if isinstance(event, Downloading):
            self.tell(event.done, event.total)

    def tell(self, done: int, size: int | None) -> None:
        self.furthest = max(self.furthest, done)
        self.sink(Downloading(self.name, self.before + self.furthest, self.total or size))

    def bar(self) -> type:
        """Return a class of progress bars for the Hub's client that draws nothing, and tells."""
        from tqdm import tqdm

        tell = self.tell

        class Told(tqdm):  # type: ignore[misc] # it has no types
            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                drawn_nowhere = {"disable": False, "file": io.StringIO()}
                super().__init__(*arguments, **{**options, **drawn_nowhere})

            def update(self, n: float | None = 1) -> bool | None:
                drawn: bool | None = super().update(n)
                tell(int(self.n), int(self.total or 0) or None)
                return drawn

        return Told


def _fetched(
    client: ModuleType, settings: Settings, remote: _Remote | None, transfer: _Transfer
) -> Path:
    """Fetch one file; what Xet's storage does not give is asked of the Hub itself."""
    from huggingface_hub import constants

    def download() -> str:
        xet_is_here = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
        by_xet = remote and remote.by_xet and xet_is_here and remote.size is not None
        if remote and (not by_xet or remote.to_be_resumed()):
            _download(settings, remote, transfer)
        path: str = client.hf_hub_download(
            settings.gguf_repo_id,
            settings.gguf_filename,
            revision=settings.gguf_revision,
            token=settings.hf_token or False,
            endpoint=settings.hf_endpoint,
            local_files_only=settings.offline,
            tqdm_class=transfer.bar(),
        )
        return path

    with _hub_errors(settings):
        try:
            return _watched(download, label(settings), transfer)
        except (RuntimeError, OSError) as error:  # the first is hf_xet's only kind
            if isinstance(error, OSError) and _XET_PLACE not in str(error):
                raise
            transfer.sink(Note.of("XET_UNREACHABLE", model=label(settings), error=error))
            constants.HF_HUB_DISABLE_XET = True
            return _watched(download, label(settings), transfer)


def _download(settings: Settings, remote: _Remote, transfer: _Transfer) -> None:
    """Put a file's bytes where the Hub's client looks for them, after those of an earlier process.

    An ETag of 64 hexadecimal digits is the sha256 of a large file.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # what it imports

    blobs, blob = remote.blobs, remote.blobs / remote.etag
    lock = blobs.parents[1] / ".locks" / blobs.parent.name / f"{remote.etag}.lock"
    for folder in (blobs, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the client's own: it has one for each file
        if blob.exists():
            return
        with remote.begun.open("ab") as file:
            try:
                Fetcher(sink=transfer.told).resume(remote.place, file, remote.size)
            except NetworkError as error:
                if not file.tell():
                    remote.begun.unlink()
                if error.refusals & {401, 403}:
                    raise _refused(settings, error.message) from error
                failure = _unreachable if 0 in error.refusals else _unusable
                raise failure(settings, error.message) from error
        cure = "try again, as the file is removed; if other bytes come again, correct HF_ENDPOINT"
        try:
            if re.fullmatch("[0-9a-f]{64}", remote.etag):
                _require_digest(remote.begun, remote.etag, "the Hub's is", cure)
            elif gguf_header.read(remote.begun) is None:
                told = f"what it sends for {label(settings)} is no GGUF file"
                raise _unusable(settings, told)
        except LoaderError:
            remote.begun.unlink()
            raise
        remote.begun.replace(blob)


def _watched(download: Callable[[], str], what: str, transfer: _Transfer) -> Path:
    """Download a file and return its path; a note tells each time that no byte of it comes."""
    downloading, before = Background(download), transfer.furthest
    while not downloading.wait(_SILENCE):
        if transfer.furthest == before:
            transfer.sink(Note.of("DOWNLOAD_SILENT", model=what, seconds=_SILENCE))
        before = transfer.furthest
    return Path(downloading.result())


@contextmanager
def _hub_errors(settings: Settings) -> Iterator[None]:
    """Turn what the Hub's client raises into the loader's errors.

    That is its own errors, the system's, and those of its HTTP library, which changed from version
    to version. ImportError is a proxy of a kind (SOCKS) that needs a package.
    """
    from huggingface_hub import errors

    http: type[Exception] = errors.HTTPError  # type: ignore[attr-defined] # what it imports
    # of httpx, or httpx2: a redirect to an address of 64 kB, say
    library = sys.modules.get(http.__module__.partition(".")[0])
    invalid: type[Exception] = getattr(library, "InvalidURL", http)
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, http, invalid) as error:
        raise _explained(error, settings) from error


def _explained(error: Exception, settings: Settings) -> LoaderError:
    from huggingface_hub import errors

    endpoint, repo = settings.hf_endpoint, settings.gguf_repo_id
    if isinstance(error, errors.GatedRepoError):
        state = "this HF_TOKEN has no access to it" if settings.hf_token else "HF_TOKEN is not set"
        return NetworkError("MODEL_GATED", repo=repo, state=state, endpoint=endpoint)
    if isinstance(error, errors.LocalEntryNotFoundError) and settings.offline:
        return NetworkError("OFFLINE/model", model=label(settings))
    # a mirror may not have the Hub's X-Error-Code
    hint, status = "", getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.RepositoryNotFoundError):
        code, what = (
            "REPOSITORY_NOT_FOUND",
            f"{endpoint} has no repository {repo}, or it is private",
        )
        hint = "check YAKULINGO_SPACES_GGUF_REPO_ID; for a private one set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        code, what = (
            "REVISION_NOT_FOUND",
            f"{repo} has no revision {settings.gguf_revision or 'main'}",
        )
        hint = "check YAKULINGO_SPACES_GGUF_REVISION"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        code, what = "FILE_NOT_FOUND", f"{repo} has no file {settings.gguf_filename}"
        hint = "check YAKULINGO_SPACES_GGUF_FILENAME against the repository's list of files"
    elif isinstance(error, errors.HFValidationError):
        code, what = "REPOSITORY_INVALID", f"{repo}: {error}"
        hint = "check YAKULINGO_SPACES_GGUF_REPO_ID"
    elif status == 404:  # noqa: PLR2004 - HTTP's Not Found
        code, what = "FILE_NOT_FOUND", f"{endpoint} has no {label(settings)}: {error}"
        hint = "check HF_ENDPOINT, YAKULINGO_SPACES_GGUF_REPO_ID and YAKULINGO_SPACES_GGUF_FILENAME"
    elif 400 <= status < 500 and status not in {408, 429}:  # noqa: PLR2004 - not "later"
        return _refused(settings, f"status {status}: {error}")
    else:
        return _no_bytes(error, settings)
    return SettingError(code, what, hint=hint)


def _no_bytes(error: Exception, settings: Settings) -> LoaderError:
    """Tell errors of the disk from those of the network: a write to a full one names no file."""
    from huggingface_hub import constants

    if isinstance(error, OSError):
        names_a_file = error.errno is not None and error.filename is not None
        if names_a_file or disk.is_full(error):
            return disk.failure(Path(constants.HF_HUB_CACHE), error)
    by_xet = isinstance(error, RuntimeError) or _XET_PLACE in str(error)
    return _unreachable(settings, str(error), " with HF_HUB_DISABLE_XET=1" if by_xet else "")


def _unreachable(settings: Settings, reason: str, how: str = "") -> NetworkError:
    if settings.hf_endpoint != locations.HUB:
        how += ", or correct HF_ENDPOINT"
    return NetworkError(
        "HUB_UNREACHABLE",
        model=label(settings),
        endpoint=settings.hf_endpoint,
        reason=reason,
        how=how,
    )


def _refused(settings: Settings, reason: str) -> NetworkError:
    return NetworkError(
        "HUB_REFUSED", endpoint=settings.hf_endpoint, model=label(settings), reason=reason
    )


def _unusable(settings: Settings, reason: str) -> NetworkError:
    return NetworkError("HUB_UNUSABLE", endpoint=settings.hf_endpoint, reason=reason)
