"""Fetch a model from the Hugging Face Hub, or find it in the Hub's cache.

The Hub's own client asks, keeps the cache and fetches by Xet. Without Xet, and after a download
that was cut off, the loader downloads by itself, because that client starts over.

Requests to the Hub raise ``NetworkError`` (it cannot be reached, or has nothing for this token),
``SettingError`` (no such repository, revision or file; huggingface_hub is not installed) and
``StoreError`` (the model cannot be written, or has no room).
"""

import contextlib
import errno
import glob
import io
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Final

from llama_loader import disk, gguf_header, hub_client, model_file
from llama_loader.concurrency import Background
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, StoreError
from llama_loader.events import Downloading, Event, Note, Sink
from llama_loader.fetch import Fetcher
from llama_loader.locations import Web
from llama_loader.settings import Settings

_ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the Hub may be silent when it answers a question about a file."""
_LONGEST_NAME: Final = 1024
"""Characters of a file's name; longer ones of a list count for none."""
_LARGEST: Final = 1 << 50
"""Bytes of a file that a Hub may name; more is a mistake or a lie."""
_LEFT_BEHIND: Final = 600.0
"""Seconds after the last byte of a download by the Hub's client; then its process was killed."""
_SILENCE: Final = 20.0
"""Seconds without a byte of a download after which a note is told, again and again."""


def files(settings: Settings) -> list[str]:
    """Return the names of the GGUF files that a repository has."""
    client = hub_client.of(settings)
    api = client.HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token or False)

    def ask() -> list[str]:
        repo, revision = settings.gguf_repo_id, settings.gguf_revision
        try:
            told = api.model_info(repo, revision=revision, timeout=_ANSWER_TIMEOUT)
            names = [str(one.rfilename) for one in told.siblings or ()]
        except (TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"its list of files cannot be read: {error}") from error
        # the Hub's own limit of a path is shorter
        names = [name for name in names if ".." not in name and len(name) < _LONGEST_NAME]
        return [name for name in names if name.lower().endswith(".gguf")]

    with hub_client.its_errors(settings):
        found: list[str] = hub_client.answered(ask)
        return found


def files_in_cache(settings: Settings) -> list[str]:
    """Return the names of the GGUF files of a repository that are in the Hub's cache."""
    try:
        snapshots = _folder(settings) / "snapshots"
        found = [path.relative_to(snapshots) for path in snapshots.glob("**/*.gguf")]
    except (ImportError, ValueError, OSError, RecursionError):  # two: folders without end
        return []
    return ["/".join(path.parts[1:]) for path in found]


def cached(settings: Settings) -> list[Path | None]:
    """Return where each part lies in the Hub's cache; None for a part that does not."""
    try:
        from huggingface_hub import errors, try_to_load_from_cache
    except (ImportError, ValueError):  # the second is a variable of its own: see hub_client
        return []
    if not _is_small(_ref(settings)):
        return [None]
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
    commit: str
    etag: str
    size: int | None
    by_xet: bool
    settings: Settings

    @property
    def blobs(self) -> Path:
        """The repository's folder ``blobs``, in the Hub's cache or in the one that replaces it."""
        return _folder(self.settings) / "blobs"

    @property
    def begun(self) -> Path:
        """Where a download without Xet collects its bytes, for the next process too."""
        return self.blobs / f"{self.etag}.llama-loader.incomplete"

    def to_be_resumed(self) -> bool:
        """Return whether an earlier process was ended, in either way, while it fetched this."""
        return any(self.blobs.glob(f"{glob.escape(self.etag)}.*.incomplete"))

    def sweep(self) -> None:
        """Remove what the Hub's client left behind."""
        for path in self.blobs.glob(f"{glob.escape(self.etag)}.*.incomplete"):
            with contextlib.suppress(FileNotFoundError):  # its process is done with it now
                if path != self.begun and path.stat().st_mtime < time.time() - _LEFT_BEHIND:
                    disk.open_own(self.begun).close()  # for ``to_be_resumed``
                    path.unlink()

    def left(self) -> int:
        """Return the bytes that are still to come."""
        here = next((one for one in (self.blobs / self.etag, self.begun) if one.is_file()), None)
        return max(0, (self.size or 0) - (here.stat().st_size if here else 0))


def _on_hub(settings: Settings) -> list[_Remote]:
    """Ask the Hub for each part of a model."""
    model_file.require_first(settings.gguf_filename, settings.model)
    client, found = hub_client.of(settings), []
    for name in gguf_header.parts(settings.gguf_filename):
        one = replace(settings, gguf_filename=name)
        place = {"revision": settings.gguf_revision, "endpoint": settings.hf_endpoint}
        with hub_client.its_errors(one):
            url = client.hf_hub_url(settings.gguf_repo_id, name, **place)
            options = {"token": settings.hf_token or False, "timeout": _ANSWER_TIMEOUT}
            answer = hub_client.answered(partial(client.get_hf_file_metadata, url, **options))
        named_by = (answer.commit_hash or "", answer.etag or "")
        if not all(named_by) or not 0 <= (answer.size or 0) < _LARGEST:
            told = f"X-Repo-Commit {named_by[0][:80]!r}, ETag {named_by[1][:80]!r}, or its size"
            raise hub_client.failure("HUB_UNUSABLE", settings, f"{told} for {one.model}")
        pinned, etag = settings.gguf_sha256, named_by[1]
        # before its first byte comes: each later start would find it, and ask no other server
        if pinned and model_file.ETAG_OF_LARGE.fullmatch(etag) and etag != pinned:
            raise IntegrityError(
                "MODEL_SHA256_MISMATCH", path=settings.model, digest=etag, sha256=pinned
            )
        found.append(
            _Remote(
                Web(url, settings.hf_token),
                *named_by,
                answer.size or None,  # some mirrors answer HEAD with a length of 0
                answer.xet_file_data is not None,
                settings,
            )
        )
    return found


def _folder(settings: Settings) -> Path:
    """Return the repository's folder in the Hub's cache."""
    return hub_client.cache() / f"models--{settings.gguf_repo_id.replace('/', '--')}"


def size(settings: Settings) -> int | None:
    """Return the bytes that the Hub names for all parts of a model, in a small request for each."""
    remote = _on_hub(settings)
    _require_room(settings, remote)
    return _size(remote)


def _size(remote: list[_Remote]) -> int | None:
    sizes = [one.size for one in remote]
    return None if None in sizes else sum(filter(None, sizes))


def fetch(settings: Settings, sink: Sink) -> Path:
    """Fetch all parts of a model that are not in the Hub's cache; return the first one's path.

    Those of an earlier commit count where the Hub does not say what is newer.
    """
    model_file.require_first(settings.gguf_filename, settings.model)
    client, here = hub_client.of(settings), [one for one in cached(settings) if one]
    names = [*gguf_header.parts(settings.gguf_filename)]
    commits = {part.parents[name.count("/")].name for part, name in zip(here, names, strict=False)}
    is_whole = len(here) == len(names)
    if is_whole and (settings.offline or commits == {settings.gguf_revision}):
        return here[0]
    if settings.offline:
        raise hub_client.failure("OFFLINE/model", settings)
    try:
        remote = _on_hub(settings)
    except LoaderError:
        if is_whole:
            return here[0]
        raise
    if is_whole and commits == {one.commit for one in remote}:
        return here[0]
    _require_own_cache(settings, sink)
    found = list[Path]()
    with disk.errors(hub_client.cache()):
        for one in remote:
            one.sweep()
    _require_room(settings, remote)
    for name, one in zip(names, remote, strict=True):
        done = sum(part.stat().st_size for part in found)
        transfer = _Transfer(settings.gguf_filename, done, _size(remote), sink)
        found.append(_fetched(client, replace(settings, gguf_filename=name), one, transfer))
    return found[0]


def forget(settings: Settings, path: Path) -> None:
    """Remove a file from the Hub's cache: the next start asks the Hub again.

    Of what a link leads to, only a blob of this repository goes: another user may have put it.
    """
    blob = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
    path.unlink(missing_ok=True)
    if blob.parent == Path(os.path.normpath(_folder(settings) / "blobs")):
        blob.unlink(missing_ok=True)


def _require_own_cache(settings: Settings, sink: Sink) -> None:
    """Have the Hub's client keep files in a private folder if it cannot use its cache.

    That is a cache which cannot be written, or where another user has put a link: the client would
    write to what it leads to. Or a list of a commit's files, which the client takes paths from, or
    a folder in place of a lock or of a begun download.

    A link of this user's that leads nowhere is a ``StoreError``.
    """
    from huggingface_hub import constants

    cache, folder = hub_client.cache(), _folder(settings)
    place = next(one for one in (cache, *cache.parents) if os.path.exists(one))  # noqa: PTH110
    inner = PurePosixPath(settings.gguf_filename).parent
    ends = [_ref(settings), folder / "blobs", folder / "snapshots", cache / ".locks" / folder.name]
    ends += [cache / "CACHEDIR.TAG", *(one / inner for one in (folder / "snapshots").glob("*"))]
    ends += [*ends[1].glob("*.incomplete"), *ends[3].glob("*.lock")]
    ways = {one for end in ends for one in (end, *end.parents) if one.is_relative_to(cache)}
    links = [*filter(os.path.islink, ways)]  # Path's methods fail for too long a name (3.11)
    lists = [folder / "trees", *(folder / "trees").glob("*")]
    lists += filter(os.path.isdir, (one for one in ends if one.suffix in {".lock", ".incomplete"}))
    looked_at = [*links, *filter(os.path.lexists, lists)]
    foreign = [one for one in looked_at if one.lstat().st_uid not in {0, os.geteuid()}]
    may_write = cache.is_absolute() and os.access(place, os.W_OK | os.X_OK)
    if may_write and not foreign and _is_small(_ref(settings)):
        for one in links:
            if one != _ref(settings) and not os.path.exists(one):  # noqa: PTH110
                raise StoreError("STORE_FAILED/link", link=one, to=one.readlink())
        return
    with disk.errors(cache):
        own = disk.make_private_folder("llama-loader-hub")
    constants.HF_HUB_CACHE = str(own)
    sink(Note.of("MODEL_CACHE_TEMPORARY", cache=cache, own=own))


def _ref(settings: Settings) -> Path:
    """Return the file of the Hub's cache with the commit that a revision's name points to."""
    return _folder(settings) / "refs" / (settings.gguf_revision or "main")


def _is_small(ref: Path) -> bool:
    """Whether the Hub's client, which reads a ref as a whole, may look at it, if there is one."""
    try:
        status = ref.stat()
    except OSError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_size <= _LONGEST_NAME


def _require_room(settings: Settings, remote: list[_Remote]) -> None:
    """Refuse a model that the disk has no room for, before its first byte comes."""
    cache = _folder(settings)
    with disk.errors(cache.parent):
        size = sum(one.left() for one in remote)
        free = shutil.disk_usage(disk.nearest(cache)).free
        if free < size:
            sizes = f"takes {size / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, f"{settings.model} {sizes}")


@dataclass
class _Transfer:
    """Downloads one part of a model; reports the progress of all parts to ``sink``."""

    name: str  # of the model
    before: int  # bytes of the parts before this one
    total: int | None  # bytes of all parts; None for as many as the download is told of
    sink: Sink
    # bytes of this part that have come. Xet has two bars: the one that is further counts
    furthest: int = 0

    def told(self, event: Event) -> None:
        if isinstance(event, Downloading):
            self.tell(event.done, event.total)

    def tell(self, done: int, size: int | None) -> None:
        self.furthest = max(self.furthest, done)
        self.sink(Downloading(self.name, self.before + self.furthest, self.total or size))

    def bar(self) -> type:
        """Return a progress bar class for the Hub's client that draws nothing and reports bytes."""
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


def _fetched(client: ModuleType, settings: Settings, remote: _Remote, transfer: _Transfer) -> Path:
    """Fetch one file; what Xet's storage does not give comes from the Hub itself."""
    from huggingface_hub import constants

    def download() -> str:
        xet_is_here = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
        by_xet = remote.by_xet and xet_is_here and remote.size is not None
        if not by_xet or remote.to_be_resumed():
            _download(settings, remote, transfer)
        path: str = client.hf_hub_download(
            settings.gguf_repo_id,
            settings.gguf_filename,
            revision=settings.gguf_revision,
            token=settings.hf_token or False,
            endpoint=settings.hf_endpoint,
            tqdm_class=transfer.bar(),
        )
        return path

    with hub_client.its_errors(settings):
        try:
            return _watched(download, settings.model, transfer)
        except (RuntimeError, OSError) as error:  # the first is hf_xet's only kind
            if isinstance(error, OSError) and hub_client.XET_PLACE not in str(error):
                raise
            transfer.sink(Note.of("XET_UNREACHABLE", model=settings.model, error=error))
            constants.HF_HUB_DISABLE_XET = True
            return _watched(download, settings.model, transfer)


def _download(settings: Settings, remote: _Remote, transfer: _Transfer) -> None:
    """Put a file where the Hub's client looks for it, after the bytes of an earlier process."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # what it imports

    blobs, blob = remote.blobs, remote.blobs / remote.etag
    lock = blobs.parents[1] / ".locks" / blobs.parent.name / f"{remote.etag}.lock"
    for folder in (blobs, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the client's own: it has one for each file
        if blob.exists():
            return
        _go_on(settings, remote, transfer)
        try:
            size, pinned = remote.begun.stat().st_size, settings.gguf_sha256
            if model_file.ETAG_OF_LARGE.fullmatch(remote.etag):
                name = "MODEL_SHA256_MISMATCH/hub"
                model_file.require_digest(remote.begun, remote.etag, name)
            elif (header := gguf_header.read(remote.begun)) is None or header.end > size:
                told = f"what it sends for {settings.model} is no whole GGUF file"
                raise hub_client.failure("HUB_UNUSABLE", settings, told)
            elif pinned:
                model_file.require_digest(remote.begun, pinned)
        except LoaderError:
            remote.begun.unlink()
            raise
        remote.begun.replace(blob)


def _go_on(settings: Settings, remote: _Remote, transfer: _Transfer) -> None:
    """Fetch what a begun file lacks; one of unknown size that is too large is removed."""
    with disk.open_own(remote.begun) as file:
        try:
            Fetcher(sink=transfer.told).resume(remote.place, file, remote.size)
        except NetworkError as error:
            is_wrong = remote.size is None and 200 in error.refusals  # noqa: PLR2004 - HTTP's OK
            if is_wrong or not file.tell():
                remote.begun.unlink()
            name = "HUB_UNREACHABLE" if 0 in error.refusals else "HUB_UNUSABLE"
            if error.refusals & {401, 403}:
                name = "HUB_REFUSED"
            raise hub_client.failure(name, settings, error.message) from error
        except OSError as error:
            if remote.size is None and disk.is_full(error):  # perhaps it never ends
                remote.begun.unlink()
            raise


def _watched(download: Callable[[], str], what: str, transfer: _Transfer) -> Path:
    """Download a file and return its path; a note reports each time that no byte arrives."""
    downloading = Background(partial(hub_client.downloaded, download, what))
    before = transfer.furthest
    while not downloading.wait(_SILENCE):
        if transfer.furthest == before:
            transfer.sink(Note.of("DOWNLOAD_SILENT", model=what, seconds=_SILENCE))
        before = transfer.furthest
    return Path(downloading.result())
