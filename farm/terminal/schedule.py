"""In which order sets are built, and when all of them will be done. Pure.

Longest first onto whichever host is free (Graham's LPT): never more than 4/3 - 1/(3m) of the best
schedule on m equal hosts (R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STRETCH: Final = 1.0
_HIT: Final = 0.3
"""Seconds of one compiler: a hit takes a twentieth of that, an average source of llama.cpp 2."""
_HALF: Final = 60.0
"""Seconds after which what was seen counts half."""
_TELLS: Final = 0.05
"""The share of the edges to compile that must be done before the rest is reckoned from them."""
UNKNOWN_SECONDS: Final = 1800.0
"""Taken for a set where nothing at all has been recorded; only its equality matters."""


@dataclass
class Pace:
    """How long ninja's edges take that are compiled, by its counter.

    What a compiler cache gives back takes next to nothing, and says nothing of what it does not
    have. So stretches of a second and more are looked at: one in which an edge took a compiler less
    than ``_HIT`` seconds was one of hits, and does not count. On a machine that is busy hits may
    look like compilers: what is older counts ever less.

    Attributes:
        began: when the first edge began, in the clock's seconds.
        jobs: compilers at a time.
    """

    began: float
    jobs: int = 1
    _done: int = 0
    _compiled: int = 0
    _edges: float = 0.0
    _seconds: float = 0.0

    def take(self, done: int, now: float) -> None:
        """Note ninja's counter."""
        passed, edges = now - self.began, done - self._done
        if passed < _STRETCH or edges < 1:
            return
        if passed * self.jobs >= edges * _HIT:
            kept = 0.5 ** (passed / _HALF)
            self._compiled += edges
            self._edges = self._edges * kept + edges
            self._seconds = self._seconds * kept + passed
        self.began, self._done = now, done

    def left(self, total: int, now: float) -> float | None:
        """Estimate the seconds for the edges that are left, were none of them in a cache.

        None as long as too few were compiled to tell.
        """
        to_compile = total - (self._done - self._compiled)
        if not self._compiled or self._compiled < to_compile * _TELLS:
            return None
        silent = now - self.began  # since the last edge: a part of how long the next one takes
        return (total - self._done) * (self._seconds + silent) / self._edges


def expected(keys: Sequence[str], recorded: Mapping[str, float]) -> dict[str, float]:
    """Return each set's seconds: recorded, else the median of what is recorded."""
    known = [recorded[key] for key in keys if key in recorded]
    other = median(known) if known else UNKNOWN_SECONDS
    return {key: recorded.get(key, other) for key in keys}


def longest_first(seconds: Mapping[str, float]) -> list[str]:
    """Return the keys in the order in which they are handed out; equal ones stay in order."""
    return sorted(seconds, key=lambda key: -seconds[key])


def finish(durations: Sequence[float], free_at: Sequence[float]) -> float:
    """Return when the last of ``durations``, handed out in order, ends.

    Args:
        durations: seconds, in the order in which they are handed out.
        free_at: when each host is free, in seconds from now; at least one.
    """
    hosts = list(free_at)
    heapq.heapify(hosts)
    last = max(hosts)
    for duration in durations:
        end = heapq.heappop(hosts) + duration
        heapq.heappush(hosts, end)
        last = max(last, end)
    return last


def lower_bound(durations: Sequence[float], hosts: int) -> float:
    """Return the seconds below which no schedule on equal hosts can be."""
    return max(*durations, sum(durations) / hosts)
