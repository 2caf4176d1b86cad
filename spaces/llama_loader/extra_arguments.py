"""What a person gives llama-server after ``--``: looked at before anything is fetched."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from llama_loader.errors import SettingError
from llama_loader.events import Note

_MODEL, _HUB = "--model PATH, before the --", "--hf REPO FILE, before the --"
_OURS: Final = {
    "--port": "--port N, before the --",
    **dict.fromkeys(("-m", "--model", "--models-dir", "--models-preset"), _MODEL),
    **dict.fromkeys(("-mu", "--model-url", "-dr", "--docker-repo"), _MODEL),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"), _HUB),
}
"""Options of llama-server that would make it another server than the loader waits for."""
_FILES: Final = frozenset(
    {
        *("--api-key-file", "--chat-template-file", "--grammar-file", "--log-file"),
        *("--control-vector", "--control-vector-scaled", "--lora", "--lora-scaled"),
        *("-jf", "--json-schema-file", "-mm", "--mmproj", "--media-path", "--path"),
        *("-lcs", "--lookup-cache-static", "-lcd", "--lookup-cache-dynamic"),
        *("-md", "--model-draft", "--spec-draft-model", "--slot-save-path"),
        *("--ssl-cert-file", "--ssl-key-file", "--ui-config-file", "--webui-config-file"),
        *("--log-prompts-dir", "--mcp-servers-config"),
    }
)
"""Those that name files or folders (common/arg.cpp of b11549), several ones with commas."""
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
    host = next(reversed(_values(extra, "--host")), None)  # the last one counts
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
    for key in _values(extra, "--api-key"):
        return key.split(",")[0]
    lines = []
    for path in _values(extra, "--api-key-file"):
        with contextlib.suppress(OSError):  # llama-server says so
            lines += Path(path).read_text("utf-8", "replace").splitlines()
    return next((line for line in lines if line and not line.startswith("#")), None)


def with_whole_paths(extra: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the arguments with relative files taken from ``folder``, where the person is.

    llama-server runs in a folder of its own, because it would load any ``libggml-*.so`` that lies
    in its working folder.
    """
    found, named = [], False
    for argument in extra:
        parts = argument.split(",") if named else []
        found.append(",".join(str(folder / part) for part in parts) if named else argument)
        named = not named and argument in _FILES
    return tuple(found)


def _values(extra: tuple[str, ...], option: str) -> list[str]:
    """Return what follows an option, each time that it is given."""
    return [extra[at + 1] for at, name in enumerate(extra[:-1]) if name == option]
