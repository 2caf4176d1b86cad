"""Runs git: with a deadline, and without any program or server that a source names."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Final

from farm.errors import SourceError
from farm.inputs.packages import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path

_SILENCE: Final = 60
"""Seconds without a byte after which git leaves a server."""
_ONLINE: Final = ("fetch", "ls-remote", "worktree")
"""The verbs that may go to a server; a work tree's own settings are none of their business."""
_NOTHING: Final = "LLAMA_FARM_NOTHING"
"""An empty variable, for git's ``--config-env``."""


def foreign(tree: Path) -> tuple[str, ...]:
    """Return git's options for somebody else's work tree, whose own settings may name programs.

    None of them is started: no hook, no monitor, no filter of a file's content, and no transport
    for objects that a partial clone lacks (``run``).
    """
    at = ("-C", str(tree))
    listed = run("config", "--null", "--name-only", "--get-regexp", r"^filter\.", at=at)
    filters = {name.rpartition(".")[0] for name in listed.stdout.split("\0") if name}
    # An empty `process` counts before `clean`; an empty `required` is false.
    return (*at, *(f"--config-env={one}.{key}={_NOTHING}"
                   for one in sorted(filters) for key in ("process", "required")))  # fmt: skip


def call(*argv: str, at: tuple[str, ...] = ()) -> str:
    """Run git as ``run`` does; return what it printed.

    Raises:
        SourceError: ``GIT_FAILED``, ``GIT_MISSING``.
    """
    done = run(*argv, at=at)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SourceError("GIT_FAILED", verb=argv[0], why=last[0])
    return done.stdout.strip()


def run(*argv: str, at: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run git with a deadline: without hooks or monitors, and offline but for three verbs.

    Raises:
        SourceError: ``GIT_FAILED``: it was not done in time; ``GIT_MISSING``.
    """
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *at, *argv]
    limits = {"GIT_HTTP_LOW_SPEED_LIMIT": "1", "GIT_HTTP_LOW_SPEED_TIME": str(_SILENCE)}
    offline = {} if argv[0] in _ONLINE else {"GIT_ALLOW_PROTOCOL": ""}
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            env={**os.environ, _NOTHING: "", **limits, **offline},
        ) as process:
            try:
                told, problem = process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired as error:
                process.terminate()  # git then ends the programs that it started
                raise TimeoutError(f"not done within {DEADLINE:g} s") from error
    except FileNotFoundError as error:
        raise SourceError("GIT_MISSING") from error
    except OSError as error:
        raise SourceError("GIT_FAILED", verb=argv[0], why=str(error)) from error
    return subprocess.CompletedProcess(command, process.returncode, told, problem)
