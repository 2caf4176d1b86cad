"""Whether the compiler cache that machines share answers where the compilers run.

ccache itself goes on without its remote storage and says nothing: a build that ought to take
a minute takes an hour. So it is asked before the first step, and its errors are counted after the
last one. The address is never shown: it may hold a password.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from farm.engines import shared_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from farm.engines.base import LineSink, Workspace

_FOLDER: Final = ".cache-probe"
_PROBE: Final = """
mkdir -p "$1" && cd "$1" && printf 'int probe;\\n' > probe.c || exit
for _ in first again; do
    rm -rf "$1/cache"
    CCACHE_DIR=$1/cache "$2" cc -c probe.c -o probe.o
    CCACHE_DIR=$1/cache "$2" --print-stats
done
cd .. && rm -rf "$1"
"""
"""Two compilations, each with an empty cache: ccache has to ask the storage, and may fill it."""
_ERRORS: Final = ("remote_storage_error", "remote_storage_timeout")
_GOES_ON: Final = "the build goes on with this machine's own cache"


@dataclass
class CacheWatch:
    """Tells of a shared storage that does not answer; does nothing where none is named.

    Args:
        workspace: where compilers run.
        environment: of the build's steps.
        say: takes one coded line.
    """

    workspace: Workspace
    environment: Mapping[str, str]
    say: LineSink
    _before: int = 0

    def begin(self) -> None:
        """Ask the storage for one object."""
        if not self._needed:
            return
        launcher, build = self.workspace.layout.launcher, self.workspace.layout.build
        found = self._counters("sh", "-c", _PROBE, "sh", str(build / _FOLDER), launcher)
        if trouble := _trouble(found):
            self.say(f"{trouble}; {_GOES_ON}")
        self._before = self._counted()

    def end(self) -> None:
        """Say how often it did not answer, or refused, since the beginning."""
        if self._needed and (errors := self._counted() - self._before) > 0:
            self.say(
                f"note[CCACHE_REMOTE_ERRORS]: the shared compiler cache failed {errors} times: "
                "what it missed was compiled here, or stays on this machine"
            )

    @property
    def _needed(self) -> bool:
        return "CCACHE_REMOTE_STORAGE" in self.environment

    def _counted(self) -> int:
        found = self._counters(self.workspace.layout.launcher, "--print-stats")
        return sum(found[name] for name in _ERRORS)

    def _counters(self, *argv: str) -> Counter[str]:
        lines: list[str] = []
        self.workspace.run(argv, self.environment, lines.append)
        found: Counter[str] = Counter()
        for name, *value in (line.split("\t") for line in lines):
            if value and value[0].isdigit():
                found[name] += int(value[0])
        return found


def _trouble(found: Counter[str]) -> str | None:
    """Return what is wrong, from what the probe's two compilations counted."""
    if not found.keys() & set(_ERRORS):
        return (
            f"note[CCACHE_TOO_OLD]: {shared_cache.VARIABLE} needs ccache 4.7, and this one is older"
        )
    if any(found[name] for name in _ERRORS):
        return "note[CCACHE_REMOTE_DOWN]: the shared compiler cache does not answer, or refuses"
    # To ccache a refused GET is a miss, not an error (docs/building.md)
    if found["remote_storage_write"] and not found["remote_storage_hit"]:
        return (
            "note[CCACHE_REMOTE_UNREADABLE]: the shared compiler cache takes objects and gives "
            "none back"
        )
    return None
