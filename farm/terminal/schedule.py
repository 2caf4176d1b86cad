"""In which order sets are built, and when all of them will be done. Pure.

Longest first onto whichever host is free (Graham's LPT): never more than 4/3 - 1/(3m) of the best
schedule on m equal hosts (R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
"""

from __future__ import annotations

import heapq
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNKNOWN_SECONDS: Final = 1800.0
"""Taken for a set where nothing at all has been recorded; only its equality matters."""


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
