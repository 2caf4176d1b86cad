"""The loader as other people have it: as a process, and in the wheel ``llama-space``.

The farm imports nothing of it. The wheel holds the loader and the engine, for anyone's Space. It is
built from a copy of ``spaces/`` with fixed times and modes, so that the same sources give the same
bytes; ``python -m farm.loader`` builds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import requests

from farm import PROJECT_ROOT, durable
from farm.errors import FarmError, PackError, UsageError
from farm.plan import SOURCE_DATE_EPOCH

_PYTHON: Final = (sys.executable, "-P", "-m")
"""Runs an installed module, or one on ``PYTHONPATH``; none of the folder where a verb is typed."""
_COMMAND: Final = (*_PYTHON, "llama_loader")
_SECRETS: Final = frozenset(
    {"FARM_SIGNING_KEY", "FARM_SIGNING_PASSWORD", "GITHUB_TOKEN", "HF_TOKEN"}
)
"""The loader gets files of this machine and the wheel's build none, so they need no token."""
_SECONDS: Final = 600.0
_ANSWER_SECONDS: Final = 300.0
_USAGE: Final = 2
_ERROR: Final = re.compile(
    r"^error\[(?P<code>\w+)\]: (?P<message>.*)(?:\nhint: (?P<hint>.*))?", re.MULTILINE
)
"""How the loader prints an error."""
SOURCE: Final = PROJECT_ROOT / "spaces"
PATTERN: Final = "llama_space-*-py3-none-any.whl"
_PARTS: Final = ("pyproject.toml", "requirements.txt", "llama_loader", "llama_space")
_SHOWN: Final = 2000
"""Characters of the build's output in an error."""


def run(
    *argv: str, variables: Mapping[str, str] | None = None, patience: float | None = _SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command of the loader, at most ``patience`` seconds; ignore its exit status."""
    return subprocess.run(
        [*_COMMAND, *argv],
        capture_output=True,
        text=True,
        env=environment(variables or {}),
        timeout=patience,
        check=False,
    )


def suppose(manifest: bytes, host: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask which artifact a described host would get: ``doctor --suppose``.

    Raises:
        UsageError: ``SUPPOSE_INVALID``: the description cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="llama-farm-suppose-") as folder:
        place = Path(folder) / "manifest.json"
        place.write_bytes(manifest)
        pin = hashlib.sha256(manifest).hexdigest()
        named = ("--manifest", place.as_uri(), "--manifest-sha256", pin)
        store = ("--store", str(Path(folder) / "store"))
        done = run("doctor", "--suppose", host, *named, *store, *options)
    if done.returncode == _USAGE:
        raise UsageError("SUPPOSE_INVALID", done.stderr.strip().partition(": ")[2])
    return done


def told(
    *argv: str, variables: Mapping[str, str] | None = None, patience: float | None = _SECONDS
) -> dict[str, Any]:
    """Run a command with ``--json`` and return its object.

    Raises:
        FarmError: the loader's own error (``UsageError`` for a setting or option), or
            ``LOADER_FAILED`` if it printed none.
    """
    done = run(*argv, "--json", variables=variables, patience=patience)
    if done.returncode != 0:
        if found := _ERROR.search(done.stderr):
            kind = UsageError if done.returncode == _USAGE else FarmError
            raise kind(found["code"], found["message"], hint=found["hint"] or "")
        raise FarmError("LOADER_FAILED", program=argv[0], output=done.stderr.strip())
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextmanager
def serving(*options: str, variables: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Run ``serve`` until the context is left; yields its object about the server.

    Raises:
        FarmError: ``LOADER_FAILED``: it ended before the server was ready; stderr has its error.
    """
    with subprocess.Popen(
        [*_COMMAND, "serve", *options, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(variables or {}),
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise FarmError("LOADER_FAILED/serve")
            served: dict[str, Any] = json.loads(line)
            yield served
        finally:
            process.send_signal(signal.SIGINT)


def complete(served: Mapping[str, Any], prompt: str | list[int], tokens: int) -> dict[str, Any]:
    """Ask a server of ``serving`` for tokens at temperature 0; returns its whole answer.

    Raises:
        requests.RequestException: it does not answer, or refuses.
        ValueError: what it answers is no object in JSON.
    """
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    key = {"Authorization": f"Bearer {served['api_key']}"}
    url = f"{served['url']}/completion"
    with requests.Session() as web:
        web.trust_env = False  # a proxy would get the key
        answer = web.post(url, json=body, headers=key, timeout=_ANSWER_SECONDS)
        answer.raise_for_status()
        return msgspec.convert(answer.json(), dict[str, Any])


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without those that the loader's programs must not see."""
    own = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return {**own, "PYTHONPATH": str(SOURCE), **variables}


def build_wheel(into: Path, source: Path = SOURCE) -> Path:
    """Build the wheel into a folder and return its path; a wheel of the same name is replaced.

    Raises:
        PackError: setuptools cannot build it; the message has its last output.
        OSError: the folder cannot be written.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama-farm-wheel-") as place:
        copy, made = Path(place) / "spaces", Path(place) / "made"
        copy.mkdir()
        for name in _PARTS:
            if (source / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source / name, copy / name, ignore=ignore)
            else:
                shutil.copyfile(source / name, copy / name)
        for path in copy.rglob("*"):  # modes that do not depend on this user's umask
            path.chmod(0o755 if path.is_dir() else 0o644)
        argv = ("build", "--wheel", "--no-isolation", "--outdir", str(made), str(copy))
        built = subprocess.run(
            (*_PYTHON, *argv),
            env=environment({"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}),
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode != 0:
            raise PackError("WHEEL_FAILED", output=(built.stdout + built.stderr)[-_SHOWN:])
        found = next(made.glob(PATTERN))
        durable.replace(into / found.name, found.read_bytes(), mode=0o644)
    return into / found.name


if __name__ == "__main__":
    print(build_wheel(Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT_ROOT / "dist"))
