"""Estimates how many seconds of GPU time a call needs. Has no side effects.

ZeroGPU cuts off a call that takes longer than it asked for. A call that asks for more waits longer
in the queue, and is refused where it asks for more than the visitor's quota.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

SHORTEST, LONGEST = 15, 120
"""Seconds; ZeroGPU's own default is 60, and it counts 1.5 for each on half a GPU. The least leaves
room for a start where ZeroGPU gives a call to another worker than the warm one."""
_MARGIN: Final = 1.3
"""For a GPU that others heat up, and a context that grows."""
_SPARE: Final = 4.0
"""Seconds for what is around it: the fork, the connection, the end."""
_EXTRA_TOKENS: Final = 64
_PROMPT_SPEED: Final = 10.0
"""A prompt is read at least so many times faster than an answer is written."""


@dataclass(frozen=True)
class Speeds:
    """What was measured so far, or is assumed.

    Attributes:
        start: seconds from a cold worker to a server that answers. 45 are 17 GB from a slow disk.
        tokens: a second. 25 are half of what a 27B model in 4 bits can reach on 0.9 TB/s.
    """

    start: float = 45.0
    tokens: float = 25.0


def seconds(characters: int, max_tokens: int, speeds: Speeds, *, warm: bool) -> int:
    """Return the seconds for one answer.

    Args:
        characters: of the prompt; a token has at least one, mostly.
        max_tokens: the longest answer. An answer is assumed to have no more tokens than its prompt
            has characters.
        speeds: measured so far.
        warm: the worker has a server already.
    """
    answer = min(max_tokens, characters + _EXTRA_TOKENS)
    work = answer / speeds.tokens + characters / (speeds.tokens * _PROMPT_SPEED)
    start = 0.0 if warm else speeds.start
    total = math.ceil((start + work) * _MARGIN + _SPARE)
    return max(SHORTEST, min(total, LONGEST))


def characters(messages: Iterable[object]) -> int:
    """Count the characters of a chat whose contents are texts or lists of parts."""
    total = 0
    waiting: list[object] = list(messages)
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, Iterable):
            waiting += one
    return total
