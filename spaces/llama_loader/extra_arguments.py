"""What a person gives llama-server after ``--``: looked at before anything is fetched."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader.errors import SettingError
from llama_loader.events import Note

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        *("--log-prompts-dir", "--mcp-servers-config", "--video-ffmpeg-dir"),
    }
)
"""Those that name files or folders (common/arg.cpp of b11549)."""
_SEVERAL: Final = frozenset(
    {"--control-vector", "--control-vector-scaled", "--lora", "--lora-scaled"}
)
"""Those of them that take several, with commas between."""
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost"})
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - compared with, not bound to


def check(extra: tuple[str, ...]) -> tuple[Note, ...]:
    """Refuse what contradicts the loader's own arguments; return what should be said.

    Raises:
        SettingError: names the argument, and what to give instead.
    """
    for argument in extra:
        name = _name(argument.partition("=")[0])
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
    if own_key(extra) is not None:
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

    Without it the loader's own request for the first token would be refused. An empty key is none
    for llama-server, too: it then asks nobody for one.

    Raises:
        SettingError: a key that no request can carry.
    """
    for key in _keys(extra):
        if key != key.strip() or not key.isprintable():
            raise SettingError(
                "EXTRA_ARGUMENT",
                "a key of --api-key or --api-key-file has spaces around it or ends in CR: no"
                " request can carry it",
                hint="write one key a line, with line ends of Unix",
            )
        return key
    return None


def _keys(extra: tuple[str, ...]) -> Iterator[str]:
    """Give the keys as llama-server reads them (common/arg.cpp)."""
    for keys in _values(extra, "--api-key"):
        yield from filter(None, keys.split(","))
    for path in _values(extra, "--api-key-file"):
        with contextlib.suppress(OSError):  # llama-server says so
            lines = Path(path).read_bytes().decode("utf-8", "replace").split("\n")
            yield from (line for line in lines if line and not line.startswith("#"))


def with_whole_paths(extra: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the arguments with relative files taken from ``folder``, where the person is.

    llama-server runs in a folder of its own, because it would load any ``libggml-*.so`` that lies
    in its working folder.
    """
    found, named = [], ""
    for argument in extra:
        if named:
            parts = argument.split(",") if named in _SEVERAL else [argument]
            found.append(",".join(str(folder / part) for part in parts))
            named = ""
        else:
            found.append(argument)
            named = _name(argument) if _name(argument) in _FILES else ""
    return tuple(found)


def last(extra: tuple[str, ...], *names: str) -> str | None:
    """Return what follows the last of an option's names: llama-server takes that one."""
    found = [extra[at + 1] for at, name in enumerate(extra[:-1]) if _name(name) in names]
    return found[-1] if found else None


def _values(extra: tuple[str, ...], option: str) -> list[str]:
    """Return what follows an option, each time that it is given."""
    return [extra[at + 1] for at, name in enumerate(extra[:-1]) if _name(name) == option]


def _name(argument: str) -> str:
    """Return an option as it is listed: llama.cpp takes ``--api_key`` for ``--api-key``, too."""
    return argument.replace("_", "-") if argument.startswith("--") else argument
