"""The environment, read once into one frozen object. The only module that reads ``os.environ``.

Command line options override variables; both go through the same parsers, so that both are refused
with the same words. A value that cannot be parsed is an error that names the variable (or option)
and what it accepts: it is never replaced by a default in silence. The table of all variables is in
docs/settings.md.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader import parsers
from llama_loader.errors import SettingError, mistyped
from llama_loader.parsers import ALL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "YAKULINGO_SPACES_"
DEFAULT_REPO: Final = "mradermacher/translategemma-27b-it-i1-GGUF"
DEFAULT_FILE: Final = "translategemma-27b-it.i1-Q4_K_M.gguf"
_INHERITED: Final = (
    "HOME",
    "LANG",
    "LC_ALL",
    "PATH",
    "TMPDIR",
    "TZ",
    "CUDA_CACHE_DISABLE",
    "CUDA_CACHE_MAXSIZE",
    "CUDA_CACHE_PATH",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)
"""What a program that the loader starts may see of its surroundings (FAULTS row 58)."""


@dataclass(frozen=True)
class Settings:
    """Everything that a person can set. DESIGN.md 3.4 says what each variable means.

    Attributes:
        manifest_url, manifest_sha256: which release; None leaves it to ``release.json``.
        url, sha256: one tarball, by hand; wins over the manifest.
        devices: names such as ``CUDA0``; empty for ``auto``.
        n_gpu_layers: ``ALL_LAYERS`` for all that fit, 0 for the CPU.
        startup_timeout: seconds from the server's start to its first token.
        zerogpu_duration: seconds, None for computed.
        cuda_arch: compute capability without its dot (``90``), None for detected.
        no_test_run: do not try the runtime with the loader's own tiny model.
        store: where runtimes are installed.
        zerogpu: this is a ZeroGPU Space.
        library_path: folders of ``LD_LIBRARY_PATH``.
        inherited: the variables that a started program may see.
    """

    backend: str
    manifest_url: str | None
    manifest_sha256: str | None
    url: str | None
    sha256: str | None
    devices: tuple[str, ...]
    n_gpu_layers: int
    allow_cpu: bool
    gguf_repo_id: str
    gguf_filename: str
    gguf_revision: str | None
    gguf_sha256: str | None
    gguf_path: Path | None
    n_ctx: int
    temperature: float
    max_new_tokens: int
    max_chars: int
    server_port: int | None
    startup_timeout: float
    zerogpu_size: str
    zerogpu_duration: int | None
    cuda_arch: str | None
    offline: bool
    hf_token: str | None = field(repr=False)
    hf_endpoint: str | None
    no_test_run: bool
    store: Path
    zerogpu: bool
    library_path: tuple[Path, ...]
    inherited: Mapping[str, str]

    @property
    def cpu_chosen(self) -> bool:
        """No layer is meant for a GPU."""
        return self.n_gpu_layers == 0


def load(
    options: Mapping[str, str | None] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings.

    Args:
        options: command line values by field name (``{"cuda_arch": "90"}``); None is "not given".
        environ: instead of the process's environment.

    Raises:
        SettingError: a value cannot be parsed.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (options or {}).items() if value is not None}
    values = {name: _value(name, row, given, environ) for name, row in _FIELDS.items()}
    store = values.pop("store")
    if values["sha256"] and not values["url"]:
        raise SettingError(
            "SETTING_INVALID",
            f"{PREFIX}LLAMA_CPP_SHA256 (--sha256) pins a tarball, but none is named",
            hint=f"set {PREFIX}LLAMA_CPP_URL (--url) to it; a manifest is pinned by"
            f" {PREFIX}LLAMA_CPP_MANIFEST_SHA256",
        )
    return Settings(
        **values,
        store=_default_store(environ) if store is None else store,
        zerogpu=_flag_or_false(environ.get("SPACES_ZERO_GPU", "")),
        library_path=_library_path(environ.get("LD_LIBRARY_PATH", "")),
        inherited={name: environ[name] for name in _INHERITED if name in environ},
    )


def renewed(settings: Settings) -> Settings:
    """Return the settings with what a started program may see of *this* process's environment.

    A ZeroGPU worker is a fork whose ``CUDA_VISIBLE_DEVICES`` was set after it began.
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return replace(settings, inherited=inherited)


@dataclass(frozen=True)
class _Row:
    """One setting: its variable, its command line option, how to parse it, its default."""

    variable: str
    parse: Callable[[str], Any]
    default: Any
    accepts: str
    option: str = ""
    optional_text: bool = False
    secret: bool = False


def _value(name: str, row: _Row, given: Mapping[str, str], environ: Mapping[str, str]) -> Any:
    if name in given:
        source, text = row.option or name, given[name]
    elif row.variable in environ:
        source, text = row.variable, environ[row.variable]
        if row.optional_text and not text.strip():
            return row.default  # an empty text variable is how a Space's page unsets it
    else:
        return row.default
    try:
        return row.parse(text.strip())
    except parsers.RefusedError:
        shown = mistyped(text) if row.parse is parsers.url else text
        raise SettingError(
            "SETTING_INVALID",
            f"{source} is {'not shown here' if row.secret else repr(shown)}, which is not "
            f"{row.accepts}",
            hint=f"set {source} to {row.accepts}, or leave it away for the default"
            f" ({_shown(row.default)})",
        ) from None


def _shown(default: object) -> str:
    if default is None:
        return "unset"
    return "auto" if default == () else str(int(default) if default is False else default)


def _flag_or_false(text: str) -> bool:
    """Read another program's variable: what it means by odd values is its own affair."""
    return text.lower() in {"1", "t", "true"}


def _library_path(text: str) -> tuple[Path, ...]:
    """Empty entries mean the working folder to the dynamic linker: they are left out."""
    return tuple(Path(part) for part in re.split("[:;]", text) if part.startswith("/"))


def _default_store(environ: Mapping[str, str]) -> Path:
    """``$HF_HOME/llama-loader``, else in the user's cache folder."""
    if environ.get("HF_HOME", "").strip():
        row = _Row("HF_HOME", parsers.path, None, "a folder")
        return Path(_value("", row, {}, environ)) / "llama-loader"
    cache = environ.get("XDG_CACHE_HOME", "").strip()
    if cache.startswith("/"):
        return Path(cache) / "llama-loader"
    from platformdirs import user_cache_path

    return user_cache_path("llama-loader", appauthor=False)


_DIGEST: Final = "a sha256 of 64 hexadecimal digits"
_LINK: Final = "a URL: https://…, http:// on loopback, file:///… or hf://OWNER/REPO[@REV]/PATH"
_YES_NO: Final = "1 or 0 (also true/false, yes/no, on/off)"
_FIELDS: Final[Mapping[str, _Row]] = {
    "backend": _Row(
        PREFIX + "BACKEND",
        parsers.one_of("gguf"),
        "gguf",
        "'gguf', the only backend of this loader",
    ),
    "manifest_url": _Row(
        PREFIX + "LLAMA_CPP_MANIFEST_URL",
        parsers.url,
        None,
        _LINK,
        "--manifest",
        optional_text=True,
    ),
    "manifest_sha256": _Row(
        PREFIX + "LLAMA_CPP_MANIFEST_SHA256", parsers.sha256, None, _DIGEST, "--manifest-sha256"
    ),
    "url": _Row(PREFIX + "LLAMA_CPP_URL", parsers.url, None, _LINK, "--url", optional_text=True),
    "sha256": _Row(PREFIX + "LLAMA_CPP_SHA256", parsers.sha256, None, _DIGEST, "--sha256"),
    "devices": _Row(
        PREFIX + "LLAMA_DEVICE",
        parsers.devices,
        (),
        "'auto', or device names such as CUDA0 or CUDA0,CUDA1, each once",
        "--device",
    ),
    "n_gpu_layers": _Row(
        PREFIX + "N_GPU_LAYERS",
        parsers.layers,
        ALL_LAYERS,
        "a number of layers: 999 (or -1) for all that fit, 0 for the CPU",
    ),
    "allow_cpu": _Row(PREFIX + "ALLOW_CPU", parsers.flag, False, _YES_NO, "--allow-cpu"),  # noqa: FBT003
    "gguf_repo_id": _Row(
        PREFIX + "GGUF_REPO_ID",
        parsers.repository,
        DEFAULT_REPO,
        "a repository: OWNER/NAME",
        "--hf",
    ),
    "gguf_filename": _Row(
        PREFIX + "GGUF_FILENAME", parsers.path_inside, DEFAULT_FILE, "a file's path in it", "--hf"
    ),
    "gguf_revision": _Row(
        PREFIX + "GGUF_REVISION", parsers.text, None, "a branch, tag or commit", optional_text=True
    ),
    "gguf_sha256": _Row(PREFIX + "GGUF_SHA256", parsers.sha256, None, _DIGEST),
    "gguf_path": _Row(
        PREFIX + "GGUF_PATH", parsers.path, None, "a file's path", "--model", optional_text=True
    ),
    "n_ctx": _Row(
        PREFIX + "N_CTX",
        parsers.integer(16, 16_777_216),
        4096,
        "a number of tokens from 16 to 16777216",
    ),
    "temperature": _Row(
        PREFIX + "TEMPERATURE", parsers.temperature, 0.0, "a decimal number from 0 to 10"
    ),
    "max_new_tokens": _Row(
        PREFIX + "MAX_NEW_TOKENS", parsers.integer(1, 1_000_000), 1024, "a number from 1 to 1000000"
    ),
    "max_chars": _Row(
        PREFIX + "MAX_CHARS", parsers.integer(1, 10_000_000), 2000, "a number from 1 to 10000000"
    ),
    "server_port": _Row(
        PREFIX + "LLAMA_SERVER_PORT",
        parsers.integer(1, 65535),
        None,
        "a TCP port from 1 to 65535",
        "--port",
    ),
    "startup_timeout": _Row(
        PREFIX + "LLAMA_SERVER_STARTUP_TIMEOUT",
        parsers.seconds,
        120.0,
        "a number of seconds above 0, at most 86400",
    ),
    "zerogpu_size": _Row(
        PREFIX + "ZEROGPU_SIZE", parsers.one_of("large", "xlarge"), "large", "'large' or 'xlarge'"
    ),
    "zerogpu_duration": _Row(
        PREFIX + "ZEROGPU_DURATION", parsers.duration, None, "a number of seconds, or 'computed'"
    ),
    "cuda_arch": _Row(
        PREFIX + "CUDA_ARCH",
        parsers.arch,
        None,
        "a compute capability such as 90 or 12.0",
        "--arch",
    ),
    "offline": _Row(PREFIX + "OFFLINE", parsers.flag, False, _YES_NO, "--offline"),  # noqa: FBT003
    "hf_token": _Row(
        "HF_TOKEN", parsers.text, None, "a token without spaces", optional_text=True, secret=True
    ),
    "hf_endpoint": _Row(
        "HF_ENDPOINT", parsers.http_url, None, "an http(s) URL", optional_text=True, secret=True
    ),
    "no_test_run": _Row("", parsers.flag, False, _YES_NO, "--no-test-run"),  # noqa: FBT003
    "store": _Row("", parsers.path, None, "a folder's path", "--store"),
}
