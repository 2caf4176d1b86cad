"""Opens a URL of any kind that the loader reads from: HTTP, the Hub, a file of this machine."""

from __future__ import annotations

import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llama_loader import locations, web
from llama_loader.errors import NetworkError, SettingError
from llama_loader.locations import Hub, Local, Web
from llama_loader.patience import AttemptError, RangeError
from llama_loader.web import Body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from llama_loader.mirrors import Mirror
    from llama_loader.patience import Deadline, Patience


class Sources:
    """Opens mirrors. Keeps no connection.

    Args:
        offline: refuse everything but ``file://`` before a connection is opened.
        token: for the Hugging Face Hub, never sent anywhere else.
        endpoint: the Hub's address where it is not the usual one.
        patience: how long servers may take.
    """

    def __init__(
        self, *, offline: bool, token: str | None, endpoint: str | None, patience: Patience
    ) -> None:
        self._offline = offline
        self._token = token
        self._endpoint = endpoint
        self._patience = patience

    def allowed(self, urls: Sequence[str]) -> Sequence[str]:
        """Return the URLs that may be asked: offline, those of files.

        Raises:
            NetworkError: there are none.
        """
        if not self._offline:
            return urls
        local = [url for url in urls if url.startswith("file:")]
        if not local:
            raise NetworkError(
                "OFFLINE",
                f"{', '.join(urls)} is not here, and the loader may not open a connection",
                hint="unset YAKULINGO_SPACES_OFFLINE, or name a file:// URL",
            )
        return local

    def require_readable(self, url: str) -> None:
        """Refuse what is no URL to read from: a setting's fault, not the network's.

        Raises:
            SettingError: it is none, or the Hub's client or address cannot be used.
        """
        place = locations.parse(url)
        if isinstance(place, Hub):
            self._hub_url(place)

    @contextmanager
    def opened(
        self, mirror: Mirror, start: int, deadline: Deadline, *, end: int | None = None
    ) -> Iterator[Body]:
        """Open a mirror at ``start``, or at 0 where it cannot serve parts.

        Args:
            mirror: what is asked; learns the name of the content.
            start: offset in bytes.
            deadline: when to give up.
            end: offset behind the last byte that is wanted, None for all the rest.

        Raises:
            AttemptError: no bytes from there, this time.
        """
        first = start if mirror.ranges else 0
        until = end if mirror.ranges else None
        try:
            place = locations.parse(mirror.url)
            opened = self._opened(place, first, until, mirror.validator, deadline)
        except SettingError as error:
            # One of the manifest's mirrors; the others may do.
            raise AttemptError(error.message, final=True) from error
        with opened as body:
            if body.start and mirror.validator not in (None, body.etag, body.modified):
                raise RangeError("the file changed in the middle")
            mirror.validator = body.etag
            yield body

    def _opened(
        self,
        place: Web | Local | Hub,
        start: int,
        end: int | None,
        validator: str | None,
        deadline: Deadline,
    ) -> AbstractContextManager[Body]:
        if isinstance(place, Local):
            return _opened_file(place, start)
        url = place.url if isinstance(place, Web) else self._hub_url(place)
        return web.opened(
            url,
            start=start,
            end=end,
            validator=validator,
            token=self._token if isinstance(place, Hub) else None,
            patience=self._patience,
            deadline=deadline,
        )

    def _hub_url(self, place: Hub) -> str:
        try:
            from huggingface_hub import hf_hub_url
        except ImportError as error:
            raise SettingError(
                "HUB_CLIENT_MISSING",
                "huggingface_hub is not installed, so no hf:// URL can be read",
                hint="pip install huggingface_hub, or give an https:// URL",
            ) from error
        try:
            url = hf_hub_url(
                place.repo, place.path, revision=place.revision, endpoint=self._endpoint
            )
        except ValueError as error:
            raise SettingError("URL_REFUSED", f"{place.repo!r}: {error}") from error
        if not locations.is_allowed_web(url):  # the token would go over the wire in clear
            raise SettingError(
                "ENDPOINT_REFUSED",
                f"{self._endpoint} is neither https nor on loopback",
                hint="correct HF_ENDPOINT",
            )
        return url


@contextmanager
def _opened_file(place: Local, start: int) -> Iterator[Body]:
    try:
        status = place.path.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for, for ever
            raise AttemptError("it is not a file", final=True)
        stream = place.path.open("rb")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = error.strerror or str(error)
        raise AttemptError(reason, final=True, missing=missing) from error
    with stream:
        stream.seek(start)
        yield Body(start, status.st_size, None, None, _read_local(stream), is_local=True)


def _read_local(stream: Any) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            data: bytes = stream.read(size)
        except OSError as error:
            raise AttemptError(error.strerror or str(error), final=True) from error
        return data

    return read
