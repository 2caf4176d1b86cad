"""The Hub's own client: how it is made, how long it may take, and its errors as sentences.

It is huggingface_hub from version 1.1 on, which sends its requests by a client of httpx or httpx2.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from llama_loader import disk, locations
from llama_loader.concurrency import Background
from llama_loader.errors import LoaderError, NetworkError, SettingError
from llama_loader.settings import Settings, bound_xet, certificate_file

_ANSWERED: Final = 60.0
"""Seconds for the whole answer: the client's own timeout restarts with every byte."""
_LONGEST_ANSWER: Final = 4 << 20
"""Bytes of an answer that is no file; the list of a repository of 10,000 files has some 2 MB."""
_LONG_WAIT: Final = re.compile(r"\d{3,}|[6-9]\d")
"""Seconds in ``Retry-After`` or ``RateLimit`` that the client would sleep: a minute or more."""
_asking: Final = threading.local()
"""``until``: when the question that this thread asks the Hub has to be answered; ``downloads``:
whether it downloads a file."""
_told: Final[dict[str, tuple[int | str | None, ...]]] = {}
"""What the Hub answered of each URL when the loader asked."""
_downloads: Final[list[str]] = []
"""Running ones: they may take long, but not the client's other requests meanwhile."""
_NAME: Final = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,200}")
"""An ETag or commit as the Hub's client takes it: for the name of a file or folder of its cache."""
XET_PLACE: Final = "/xet-read-token"
"""Part of the address where the Hub names its Xet storage; mirrors may not have it."""


class _UnusableError(ValueError):
    """The Hub answers its client what the loader does not let that act upon."""


def of(settings: Settings) -> ModuleType:
    """Return huggingface_hub, bounded, and with the environment in order that it reads.

    Raises:
        SettingError: a variable of its own is wrong, or it is not installed, or too old.
    """
    locations.require_endpoint(settings.hf_endpoint)
    certificate_file()
    bound_xet()
    try:
        import huggingface_hub.constants  # which reads its variables
        import huggingface_hub.file_download  # tqdm reads variables too
        import huggingface_hub.utils._http as http
        import huggingface_hub.utils.logging
        from huggingface_hub import set_client_factory  # not before 1.0
    except ValueError as error:
        raise SettingError("SETTING_INVALID/hub-client", error=error) from error
    except ImportError as error:
        raise SettingError("HUB_CLIENT_MISSING") from error
    if huggingface_hub.__version__.startswith("1.0."):  # its hf_hub_download has no tqdm_class
        raise SettingError("HUB_CLIENT_MISSING")
    # else it looks for variables that the server lists, and reports which of them are set
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    # version 2.4 began a store of all repositories; ``hub`` does not look whose its files are
    huggingface_hub.constants.HF_HUB_DISABLE_SHARED_BLOBS = True
    # its advice ("you are sending unauthenticated requests …", "Retrying") is not for our stderr
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    make = getattr(http, "_GLOBAL_CLIENT_FACTORY", None)  # perhaps the app's
    if make is not None and not hasattr(make, "is_bounded"):
        set_client_factory(_bounded(make))
    return huggingface_hub


def cache() -> Path:
    """Return the folder in which the client keeps all repositories."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def use_home(home: Path) -> None:
    """Have the client keep all repositories under ``home``, unless HF_HUB_CACHE names a folder."""
    with suppress(ImportError, ValueError):  # ``of`` tells of them
        from huggingface_hub import constants

        if constants.default_cache_path == constants.HF_HUB_CACHE:
            constants.HF_HUB_CACHE = str(home / "hub")


def answered(ask: Callable[[], Any]) -> Any:
    """Return what the Hub answers, if it does so in time; the connection ends with the time."""

    def asked() -> Any:
        _asking.until = time.monotonic() + _ANSWERED
        return ask()

    asking = Background(asked)
    if not asking.wait(_ANSWERED):
        from huggingface_hub import close_session

        close_session()
        raise TimeoutError(_late())
    return asking.result()


def downloaded(download: Callable[[], str], what: str) -> str:
    """Return what ``download`` does. Other requests meanwhile are bounded.

    Xet sends its requests in its own threads, to an address that the Hub names.
    """
    _asking.downloads = True  # the thread ends with it
    _downloads.append(what)
    try:
        return download()
    finally:
        _downloads.remove(what)


def _late() -> str:
    return f"no whole answer within {_ANSWERED:g} s"


def _bounded(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return what makes the Hub's client with bounds for answers that are no files."""

    def made() -> Any:
        client = make()
        # one cookie that is no ASCII would make an error of each later request
        client.cookies.jar.set_policy(DefaultCookiePolicy(netscape=False))
        # only files are streamed; everything else is taken into memory as a whole
        client.stream = partial(client.stream, extensions={"is_streamed": True})
        client.event_hooks["request"].append(_begin_request)
        client.event_hooks["response"].append(_bound_answer)
        return client

    made.is_bounded = True  # type: ignore[attr-defined]
    return made


def _begin_request(request: Any) -> None:
    """Have a question answered in plain bytes, and in time, wherever it is redirected to.

    A file comes by Xet, or the loader downloads it: with a digest, a least rate, and a next time.
    """
    until = getattr(_asking, "until", None)
    if hasattr(_asking, "downloads") and "is_streamed" in request.extensions:
        raise _UnusableError("neither the file that it named before nor its Xet storage")
    is_question = request.method == "GET" and "is_streamed" not in request.extensions
    if until is None and is_question and _downloads:
        until = time.monotonic() + _ANSWERED
    if until is not None:
        request.headers["Accept-Encoding"] = "identity"
        request.extensions.setdefault("answered_until", until)


def _bound_answer(response: Any) -> None:
    """Bound the bytes and the time of an answer, unless it is a file's download.

    A few compressed megabytes could become gigabytes: an encoded answer is refused, although
    none was requested.
    """
    names = _plain_names(response)
    if response.request.method == "HEAD":
        _require_same(response, names)
    for header in {"retry-after", "ratelimit"} & {*response.headers}:
        response.headers[header] = _LONG_WAIT.sub("60", response.headers[header])
    until = response.request.extensions.get("answered_until")
    if response.request.method == "HEAD" or (until is None and response.status_code in {200, 206}):
        return
    if until and response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("its answer is compressed, which was not asked for")
    stream, library = response.stream, sys.modules[type(response).__module__.partition(".")[0]]

    class Bounded(library.SyncByteStream):  # type: ignore[name-defined, misc]
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in stream:
                size += len(piece)
                if size > _LONGEST_ANSWER:
                    raise ValueError(f"its answer is longer than {_LONGEST_ANSWER} bytes")
                if until and time.monotonic() > until:
                    raise TimeoutError(_late())
                yield piece

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()


def _plain_names(response: Any) -> dict[str, str | None]:
    """Return what the Hub's client makes a path of; refuse what is no name of a file or folder.

    It takes a commit of every answer, also of one that a file is missing, and the ETag of HEAD.
    Those of other answers may have a slash. A redirect that the loader would not follow is refused.
    """
    headers, to = response.headers, response.headers.get("Location", "")
    if response.has_redirect_location and not locations.redirected(str(response.request.url), to):
        raise _UnusableError(f"redirected to {locations.shown(to[:200])!r}, which is not https")
    named = {"X-Repo-Commit": headers.get("X-Repo-Commit")}
    if response.request.method == "HEAD" and response.status_code < HTTPStatus.BAD_REQUEST:
        tag = headers.get("X-Linked-Etag") or headers.get("ETag")
        named["ETag"] = tag and tag.lstrip("W/").strip('"')  # as the client does
    for header, value in named.items():
        if value is not None and not _NAME.fullmatch(value):
            raise _UnusableError(f"{header} {value[:80]!r}")
    return named


def _require_same(response: Any, named: dict[str, str | None]) -> None:
    """Refuse another file than the loader saw: the client asks again after ``hub`` did."""
    headers, status = response.headers, response.status_code
    if status >= HTTPStatus.BAD_REQUEST and status != HTTPStatus.NOT_FOUND:
        return  # it cannot tell now
    length = None if response.is_redirect else headers.get("Content-Length")
    size, url = headers.get("X-Linked-Size") or length, str(response.request.url)
    told = (status, *named.values(), size, headers.get("X-Xet-Hash"))
    url = url.partition("?")[0]  # a signature differs each time
    if hasattr(_asking, "until"):
        _told[url] = told
    elif hasattr(_asking, "downloads") and told != _told.get(url):
        raise _UnusableError(f"first {_told.get(url)}, then {told}")


@contextmanager
def its_errors(settings: Settings) -> Iterator[None]:
    """Turn what the Hub's client raises into the loader's errors.

    That is its own errors, the system's, and those of its HTTP library, which changed from version
    to version. ImportError is a proxy of a kind (SOCKS) that needs a package.
    """
    from huggingface_hub import errors

    http: type[Exception] = errors.HTTPError  # type: ignore[attr-defined] # what it imports
    # of httpx, or httpx2: a redirect to an address of 64 kB, say
    library = sys.modules.get(http.__module__.partition(".")[0])
    no_url: type[Exception] = getattr(library, "InvalidURL", http)
    try:
        yield
    except _UnusableError as error:
        raise failure("HUB_UNUSABLE", settings, f"{error} for {settings.model}") from error
    except (OSError, ValueError, ArithmeticError, RuntimeError, ImportError, http, no_url) as error:
        raise _explained(error, settings) from error


def _explained(error: Exception, settings: Settings) -> LoaderError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        name = "MODEL_GATED" if settings.hf_token is None else "MODEL_GATED/token"
        return failure(name, settings)
    # a mirror may not have the Hub's X-Error-Code
    status = getattr(getattr(error, "response", None), "status_code", 0)
    wrong = {
        errors.RepositoryNotFoundError: "REPOSITORY_NOT_FOUND",
        errors.RevisionNotFoundError: "REVISION_NOT_FOUND",
        errors.RemoteEntryNotFoundError: "FILE_NOT_FOUND",
        errors.HFValidationError: "REPOSITORY_INVALID",
    }
    names = [name for kind, name in wrong.items() if isinstance(error, kind)]
    if names or status == 404:  # noqa: PLR2004 - HTTP's Not Found
        return SettingError(
            names[0] if names else "FILE_NOT_FOUND/mirror",
            endpoint=settings.hf_endpoint,
            repo=settings.gguf_repo_id,
            revision=settings.gguf_revision or "main",
            file=settings.gguf_filename,
            model=settings.model,
            error=error,
        )
    if 400 <= status < 500 and status not in {408, 429}:  # noqa: PLR2004 - not "later"
        return failure("HUB_REFUSED", settings, f"status {status}: {error}")
    if isinstance(error, OSError):  # a write to a full disk names no file
        names_a_file = error.errno is not None and error.filename is not None
        if names_a_file or disk.is_full(error):
            return disk.failure(cache(), error)
    by_xet = isinstance(error, RuntimeError) or XET_PLACE in str(error)
    how = " with HF_HUB_DISABLE_XET=1" if by_xet else ""
    return failure("HUB_UNREACHABLE", settings, str(error), how)


def failure(name: str, settings: Settings, reason: str = "", how: str = "") -> NetworkError:
    """Return the error of a Hub that does not give a model; ``how`` ends the hint."""
    if settings.hf_endpoint != locations.HUB:
        how += ", or correct HF_ENDPOINT"
    named = "" if settings.model_named else " (the default, as no model is named)"
    return NetworkError(
        name,
        model=settings.model + named,
        endpoint=settings.hf_endpoint,
        repo=settings.gguf_repo_id,
        reason=reason,
        how=how,
    )
