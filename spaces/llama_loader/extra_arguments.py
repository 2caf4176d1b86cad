"""What a person gives llama-server after ``--``: looked at before anything is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llama_loader.errors import SettingError
from llama_loader.events import Note

_OURS: Final = {
    "--port": "--port N, before the --",
    "-m": "--model PATH, before the --",
    "--model": "--model PATH, before the --",
    "--model-url": "--hf REPO FILE, before the --",
    "-mu": "--hf REPO FILE, before the --",
    "-hf": "--hf REPO FILE, before the --",
    "--hf-repo": "--hf REPO FILE, before the --",
}
"""Options of llama-server that would make it another server than the loader waits for."""
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost"})
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - compared with, not bound to
_KEYS: Final = frozenset({"--api-key", "--api-key-file"})


def check(extra: tuple[str, ...]) -> tuple[Note, ...]:
    """Refuse what contradicts the loader's own arguments; return what should be said.

    Raises:
        SettingError: names the argument, and what to give instead.
    """
    for argument in extra:
        name = argument.partition("=")[0]
        if name in _OURS:
            raise SettingError(
                "EXTRA_ARGUMENT",
                f"{name} after -- would start another server than the one that is waited for",
                hint=f"give {_OURS[name]}",
            )
    host = _value(extra, "--host")
    if host is None or host in _LOOPBACK:
        return ()
    if host != _EVERYWHERE:
        raise SettingError(
            "EXTRA_ARGUMENT",
            f"--host {host}: the loader reaches its server on loopback alone",
            hint=f"give --host {_EVERYWHERE} with --api-key, or put a proxy before it",
        )
    if _KEYS & set(extra):
        return ()
    return (
        Note(
            "SERVER_OPEN",
            "everybody who reaches this machine can use the server: it listens on all of its"
            " addresses and asks for no key",
            "add --api-key KEY or --api-key-file FILE after --",
        ),
    )


def own_key(extra: tuple[str, ...]) -> str | None:
    """Return the first key that a person gave llama-server, None for none.

    Without it the loader's own request for the first token would be refused.
    """
    key = _value(extra, "--api-key")
    if key is not None:
        return key.split(",")[0]
    path = _value(extra, "--api-key-file")
    if path is None:
        return None
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:  # llama-server says so
        return None
    return next((line for line in lines if line and not line.startswith("#")), None)


def _value(extra: tuple[str, ...], option: str) -> str | None:
    return next((value for name, value in zip(extra, extra[1:]) if name == option), None)  # noqa: B905, RUF007 - Python 3.10 has no strict
