"""Which URL is asked next, when, and what is said when none is left. Pure but for the dice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from llama_loader.errors import IntegrityError, LoaderError, NetworkError
from llama_loader.patience import AttemptError, Patience, RangeError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_WRONG: Final = 2
"""Wrong bytes are fetched once more from the same URL: then it is the file, not the way."""
_SLOWEST_BACKOFF: Final = 8.0


class WrongBytesError(AttemptError):
    """What came is not what was published."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass
class Mirror:
    """A URL, and how it did.

    Attributes:
        url: of the file.
        ranges: whether it may be asked for a part.
        validator: names the content that it sent last.
        failures: since something was last gained from it.
        wait: seconds before it is asked again.
        slow: the rest is worth several connections at once.
        alone: several were tried, and did not do.
    """

    url: str
    ranges: bool = True
    validator: str | None = None
    failures: int = 0
    wait: float = 0.0
    wrong: int = 0
    gone: bool = False
    missing: bool = False
    slow: bool = False
    alone: bool = False

    def gained(self) -> None:
        """Forget what went wrong: it moves on."""
        self.failures = self.wrong = 0


@dataclass
class Mirrors:
    """The URLs of one file, in the order of preference."""

    name: str
    urls: Sequence[str]
    patience: Patience
    reasons: list[str] = field(default_factory=list)
    code: str = ""

    def __post_init__(self) -> None:
        self._all = [Mirror(url) for url in self.urls]

    def best(self) -> Mirror:
        """Return the mirror to ask now: the first of those that failed least.

        Raises:
            IntegrityError: none is left, and what one of them sends is wrong.
            NetworkError: none is left.
        """
        usable = [mirror for mirror in self._all if not mirror.gone]
        if not usable:
            raise self.given_up()
        return min(usable, key=lambda mirror: mirror.failures)

    def failed(self, mirror: Mirror, error: AttemptError) -> None:
        """Note an attempt that failed."""
        self.reasons.append(f"{mirror.url}: {error}")
        mirror.failures += 1
        mirror.wait = backoff(mirror.failures, error.wait, self.patience)
        if isinstance(error, RangeError):
            mirror.ranges, mirror.validator, mirror.wait = False, None, 0.0
        elif isinstance(error, WrongBytesError):
            self.code = error.code
            mirror.wrong, mirror.wait = mirror.wrong + 1, 0.0
        exhausted = mirror.failures >= self.patience.attempts or mirror.wrong >= MAX_WRONG
        mirror.gone = mirror.gone or error.final or exhausted
        mirror.missing = error.missing

    def given_up(self) -> LoaderError:
        """Return the error that names every URL and why it did not do."""
        told = "; ".join(dict.fromkeys(self.reasons))
        if any(mirror.wrong >= MAX_WRONG for mirror in self._all):
            return IntegrityError(
                self.code,
                f"{self.name} is not what was published: {told}",
                hint="the file behind the URL is not the one that the manifest describes, or a "
                "page that asks for a login: open the URL in a browser",
            )
        return NetworkError(
            "UNREACHABLE",
            f"{self.name} cannot be fetched: {told}",
            hint="is the address right, and does this machine reach it? A mirror can be listed in "
            "the manifest's urls, or the release opened as file://",
            missing=all(mirror.missing for mirror in self._all),
        )


def backoff(failures: int, asked: float | None, patience: Patience) -> float:
    """Seconds before the next attempt: what the server asked for, else 1, 2, 4, 8 jittered."""
    jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret
    own = float(min(2 ** (failures - 1), _SLOWEST_BACKOFF)) * jitter
    return own if asked is None else min(asked, patience.longest_wait)
