"""Whether an installed runtime is still what was verified, asked again before it is executed.

Hashing 190 MB takes 0.05 s on two cores, so it is done before every start, and never twice for one:
what was hashed a moment ago in this process counts. What was only unpacked does not, although its
bytes were hashed on their way: between then and the start a model of 17 GB may have been fetched.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable

FRESH: Final = 10.0
"""Seconds for which files count as just hashed; a warm start needs less than one to its server."""


@final
class Soundness:
    """When a runtime's files were hashed the last time, and how to do it again.

    Args:
        look: hashes the files; raises ``IntegrityError`` where one is not what it must be.
        clock: seconds.
    """

    def __init__(
        self, look: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._clock = clock
        self._at: float | None = None

    def look(self) -> None:
        """Hash them now.

        Raises:
            IntegrityError: names the files that are damaged, missing or not listed.
            OSError: one cannot be read.
        """
        self._at = None
        self._look()
        self._at = self._clock()

    def require(self) -> None:
        """Hash them unless that was done within the last ``FRESH`` seconds.

        Raises:
            IntegrityError: as for ``look``.
            OSError: as for ``look``.
        """
        if self._at is None or self._clock() - self._at > FRESH:
            self.look()
