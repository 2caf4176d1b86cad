"""Processes run tests side by side: files that share something take turns in one of them.

xdist's own groups (``xdist_group``) do nothing with pytest 9.2: it reads no other node ids.
"""

from typing import Any, Final

ENGINE: Final = frozenset(
    f"tests/integration/test_{name}.py"
    for name in (
        *("clean_engine", "docker_cache", "docker_engine", "documentation", "image_lines"),
        *("look", "provenance", "reproducible", "spine"),
    )
)
"""They look at all that is in the Docker engine, or build in this checkout's own ``.farm``."""
_LONGEST: Final = (
    *("engine", "tests/integration/test_workflows.py", "browser"),
    *("tests/integration/test_dask_engine.py", "tests/integration/test_pythons.py"),
)


def of(path: str) -> str:
    """Return what a file of tests shares with others: the engine, a browser, or nothing."""
    if path.startswith("tests/browser/"):
        return "browser"
    return "engine" if path in ENGINE else path


def rank(path: str) -> int:
    """Return how early a file's tests begin: what takes longest in one process comes first."""
    shared = of(path)
    return _LONGEST.index(shared) if shared in _LONGEST else len(_LONGEST)


def scheduler(config: Any, log: Any) -> Any:
    """Return a scheduler of xdist that gives all files that share something to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Turns(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return of(super()._split_scope(nodeid))

    return Turns(config, log)
