"""The loader's errors: each has a code, a sentence, a hint and the exit status of its kind.

The exit statuses are a contract (docs/faults.md): 2 usage or setting, 3 network, 4 integrity or
trust, 5 this host cannot run it, 6 disk or store, 7 the server did not start or died. They are
turned into a process's exit status in ``__main__`` only. What is shown to people goes through
``safe`` or ``printable``.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, TextIO

_Sentences = Mapping[str, Mapping[str, str]]
_SENTENCES: Final[_Sentences] = json.loads(
    Path(__file__).with_name("sentences.json").read_text("utf-8")
)
"""``what`` happened and the ``hint`` by code, with ``{names}`` of values: read once, at import, for
an error may be that no more files can be opened."""

_URL: Final = re.compile(r"(?P<scheme>[A-Za-z0-9+.-]{0,32})://(?P<rest>\S+)")
"""Schemes are short. Without a bound, 64 kB from a mirror without ``:`` take half a minute."""
_CLOSING: Final = ")]}>'\",;:."
"""What a sentence may put right behind a URL."""
_UNTRUSTED: Final = "certificate verify failed"
"""OpenSSL's words, which the messages of all libraries contain."""
_TRUSTING: Final = (
    "this machine trusts no authority that vouches for the certificate: behind a proxy that makes"
    " its own, name the file with its authority's certificate in SSL_CERT_FILE and"
    " REQUESTS_CA_BUNDLE"
)


class LoaderError(Exception):
    """Root of everything that the loader raises on purpose.

    Attributes:
        code: short upper-case name that can be searched for, e.g. ``SHA256_MISMATCH``.
        message: what happened, to which file or setting; one printable line without secrets.
        hint: what to do about it; another one, may be empty.

    The words are those of ``sentences.json``, filled in with ``values``, unless a ``message`` is
    given. A code that has several sentences is given with the case: ``PORT_IN_USE/bind``.
    """

    exit_status: ClassVar[int] = 1

    def __init__(
        self, code: str, message: str | None = None, *, hint: str = "", **values: object
    ) -> None:
        if message is None:
            code, message, hint = sentence(code, hint, values)
        hint = advice(message, hint)
        super().__init__(code, message)
        self.code = code
        self.message, self.hint = safe(message), safe(hint)

    @property
    def status(self) -> int:
        """The exit status of its kind."""
        return self.exit_status

    @property
    def is_owners(self) -> bool:
        """Whether only the app's owner can remove the cause: a setting, trust, the host, a disk."""
        return self.exit_status in {2, 4, 5, 6} and not self.code.startswith("ZEROGPU_")

    @property
    def for_visitors(self) -> str:
        """What a page tells its visitors: no code, path or setting is in it."""
        if self.is_owners:
            return "No answer: the owner must correct this app; its log names the error."
        return "No answer now: try again in a minute, or begin a new chat."

    def __str__(self) -> str:
        return f"{self.code}: {self.message}{self.hint and f'; {self.hint}'}"

    def render(self) -> str:
        """Return the ``error[CODE]: …`` line and, where there is one, the ``hint: …`` line."""
        line = f"error[{self.code}]: {self.message}"
        return f"{line}\nhint: {self.hint}" if self.hint else line


class SettingError(LoaderError):
    """A variable or option that cannot be used as it is (exit status 2)."""

    exit_status = 2


class NetworkError(LoaderError):
    """Bytes could not be had (exit status 3)."""

    exit_status = 3
    # the HTTP status of each server whose answer will not change; 0 for others
    refusals: frozenset[int] = frozenset({0})


class IntegrityError(LoaderError):
    """Bytes, a manifest or an archive are not what was promised (exit status 4)."""

    exit_status = 4


class HostError(LoaderError):
    """This host cannot run what there is (exit status 5)."""

    exit_status = 5


class StoreError(LoaderError):
    """Disk or store trouble (exit status 6)."""

    exit_status = 6


class ServerError(LoaderError):
    """The server did not start, or died (exit status 7)."""

    exit_status = 7


def sentence(
    name: str, hint: str, values: Mapping[str, object], known: _Sentences = _SENTENCES
) -> tuple[str, str, str]:
    """Return the code, the sentence and the hint of a code, or of a case of it; ``hint`` wins."""
    told = known[name]
    hint = hint or told.get("hint", "").format(**values)
    return name.partition("/")[0], told["what"].format(**values), hint


def advice(message: str, hint: str) -> str:
    """Return the hint, or the one about certificates if the message names a refused one."""
    return _TRUSTING if _UNTRUSTED in message else hint


def safe(text: str) -> str:
    """Return foreign text as one printable line, without secrets; for sentences."""
    return printable(" ".join(without_secrets(text).split()))


def printable(text: str) -> str:
    """Escape what a terminal or a reader of lines would act on; for names and paths.

    Manifests, files' names and a server's log are foreign text. Terminal codes, line breaks, C0
    and C1, bidirectional marks and separators could draw a line of their own, or change another.
    """
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost user names, passwords, queries and fragments.

    A Space's log is public, and a query is where signed URLs carry their signature. What may be a
    secret goes, also where that takes more than needed: a password may hold ``/`` and ``@``.
    """
    return _URL.sub(_without_secrets, text)


def mistyped(url: str, *, user: bool = True) -> str:
    """Return a malformed URL for a message, without the parts that may hold a secret.

    Everything up to the last ``@`` goes (unless it ends no ``user``), and what follows ``?`` or
    ``#``: without a proper scheme it is unknown where a password begins.
    """
    place = re.split(r"[?#]", url, maxsplit=1)[0]
    shown = f"…@{place.rpartition('@')[2]}" if user and "@" in place else place
    return shown if place == url else f"{shown}{url[len(place)]}…"


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url["scheme"], url["rest"]
    # hf://OWNER/REPO@REVISION/PATH has an @ and no user
    shown = mistyped(rest, user=scheme.lower() != "hf" or ":" in rest.partition("@")[0])
    closing = rest[len(rest.rstrip(_CLOSING)) :] if shown.endswith("…") else ""
    return f"{scheme}://{shown}{closing}"


def tell(stream: TextIO, text: str, end: str = "\n") -> None:
    """Write at once; a reader that has ended (``| head``) gets nothing, and stops nothing."""
    try:
        stream.write(text + end)
        stream.flush()
    except OSError as error:
        # what is left in the buffer must not be tried again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
