"""Reads every setting once, from code, the command line or the environment, into a frozen object.

The only module that touches ``os.environ``. All three sources go through the same parsers, so a
wrong value is refused with the same words wherever it comes from. A value that cannot be used is
an error that names the variable, option or keyword and what it accepts; it is never replaced by a
default in silence. docs/settings.md has the table of all variables.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from llama_loader.errors import SettingError, mistyped
from llama_loader.gguf_header import ALL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "YAKULINGO_SPACES_"
NEUTRAL_PREFIX: Final = "LLAMA_SPACE_"
"""May stand in place of ``PREFIX`` in every variable."""
DEFAULT_REPO: Final = "mradermacher/translategemma-27b-it-i1-GGUF"
DEFAULT_FILE: Final = "translategemma-27b-it.i1-Q4_K_M.gguf"
DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_INHERITED: Final = (
    "HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ",
    "CUDA_CACHE_DISABLE", "CUDA_CACHE_MAXSIZE", "CUDA_CACHE_PATH",
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
)  # fmt: skip
"""The variables that a program started by the loader may see."""
_DIGEST: Final = "a sha256 of 64 hexadecimal digits"
_LINK: Final = "a URL: https://…, http:// on loopback, file:///… or hf://OWNER/REPO[@REV]/PATH"
_NAMES: Final = "'auto', or device names such as CUDA0 or CUDA0,CUDA1, each once"
_LAYERS: Final = "a number of layers: 999 (or -1) for all that fit, 0 for the CPU"
_SECONDS: Final = "a number of seconds above 0, at most 86400"
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "Path": (str, Path),
    "tuple[str, ...]": (str, list, tuple),
}
"""What a keyword takes, by the type of the field that it sets."""
_YES_NO: Final = "1 or 0 (also true/false, yes/no, on/off)"
_Number = TypeVar("_Number", int, float)


# Parsers: each turns text into a value, or raises ValueError.


def _like(pattern: str, *, lower: bool = False) -> Callable[[str], str]:
    """Return a parser of printable text; a pattern's group is the part that counts."""

    def parse(text: str) -> str:
        matched = re.fullmatch(pattern, text.lower() if lower else text)
        if not matched or not text.isprintable():
            raise ValueError(text)
        return matched[matched.lastindex or 0]

    return parse


_sha256 = _like("(?:sha256:)?([0-9a-f]{64})", lower=True)
_url = _like(r"(?:https?://|hf://|file:/)\S+")  # the fetcher says what it can open
_http_url = _like(r"(https?://\S*[^\s/])/*")
_repository = _like(r"(?!.*\.\.)[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_path_inside = _like(r"(?!/)(?!(?:.*/)?\.\.(?:/|$)).+")
_token = _like("[!-~]+")  # httpx encodes headers as ASCII
_digits = _like(r"[+-]?[0-9]{1,12}(?:\.[0-9]{1,12})?")


def _number(low: _Number, high: _Number) -> Callable[[str], _Number]:
    """Return a parser of numbers of the limits' type."""
    kind = type(low)

    def parse(text: str) -> _Number:
        number = kind(_digits(text))
        if not low <= number <= high:
            raise ValueError(text)
        return number

    return parse


def _layers(text: str) -> int:
    number = _number(-1, 100_000)(text)
    return ALL_LAYERS if number < 0 else number


def _flag(text: str) -> bool:
    return _like("1|true|yes|on|0|false|no|off", lower=True)(text) in {"1", "true", "yes", "on"}


def _devices(text: str) -> tuple[str, ...]:
    """``auto`` is the empty tuple; ``auto``, ``none`` and ``cpu`` stand alone."""
    if text.lower() == "auto":
        return ()
    name = _like("[A-Za-z][A-Za-z0-9_.:-]{0,63}")
    names = tuple(name(one.strip()) for one in text.split(","))
    distinct = {one.lower() for one in names}
    if len(distinct) < len(names) or (len(names) > 1 and distinct & {"auto", "none", "cpu"}):
        raise ValueError(text)
    return names


def _arch(text: str) -> str:
    """Take 90, 9.0, sm_90 or 120a; return the digits without a suffix, as hosts are described."""
    return re.sub("[^0-9]", "", _like(r"(?:sm_?)?[0-9]{1,2}\.?[0-9][af]?", lower=True)(text))


def _duration(text: str) -> int | None:
    return None if text.lower() in {"computed", "auto"} else _number(1, 24 * 3600)(text)


def _path(text: str) -> Path:
    """Make it absolute: the server that gets it runs in another folder."""
    if not text or "\0" in text:
        raise ValueError(text)
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name/…: no such user
        raise ValueError(text) from error


@dataclass(frozen=True)
class _Row:
    """One setting.

    Attributes:
        variable: its full name with ``PREFIX``, or a name of the Hub's; empty if it has none.
        parse: turns text into the value, or raises ValueError.
        accepts: what ``parse`` takes, for people.
        option: of the command line.
        secret: a refused value is not quoted.
    """

    variable: str
    parse: Callable[[str], Any]
    default: Any
    accepts: str
    option: str = ""
    secret: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """Every name under which the environment may have it."""
        if not self.variable.startswith(PREFIX):
            return (self.variable,) if self.variable else ()
        return self.variable, NEUTRAL_PREFIX + self.variable.removeprefix(PREFIX)


def _setting(
    name: str,
    parse: Callable[[str], Any],
    default: object,
    accepts: str,
    option: str = "",
    *,
    secret: bool = False,
) -> Any:
    """Return a field of ``Settings`` that carries its row."""
    variable = PREFIX + name if name and not name.startswith("HF_") else name
    row = _Row(variable, parse, default, accepts, option, secret)
    return field(repr=not secret, metadata={"row": row})


def _switch(name: str, option: str) -> Any:
    return _setting(name, _flag, default=False, accepts=_YES_NO, option=option)


@dataclass(frozen=True)
class Settings:
    """Everything that a person can set: one table, of which each row is a field.

    docs/settings.md says what each variable means. Where the value alone does not tell:

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

    zerogpu: bool
    library_path: tuple[Path, ...]
    inherited: Mapping[str, str]
    backend: str = _setting(
        "BACKEND", _like("gguf", lower=True), "gguf", "'gguf', the only backend of this loader"
    )
    manifest_url: str | None = _setting("LLAMA_CPP_MANIFEST_URL", _url, None, _LINK, "--manifest")
    manifest_sha256: str | None = _setting(
        "LLAMA_CPP_MANIFEST_SHA256", _sha256, None, _DIGEST, "--manifest-sha256"
    )
    url: str | None = _setting("LLAMA_CPP_URL", _url, None, _LINK, "--url")
    sha256: str | None = _setting("LLAMA_CPP_SHA256", _sha256, None, _DIGEST, "--sha256")
    devices: tuple[str, ...] = _setting("LLAMA_DEVICE", _devices, (), _NAMES, "--device")
    n_gpu_layers: int = _setting("N_GPU_LAYERS", _layers, ALL_LAYERS, _LAYERS)
    allow_cpu: bool = _switch("ALLOW_CPU", "--allow-cpu")
    gguf_repo_id: str = _setting(
        "GGUF_REPO_ID", _repository, DEFAULT_REPO, "a repository: OWNER/NAME", "--hf"
    )
    gguf_filename: str = _setting(
        "GGUF_FILENAME", _path_inside, DEFAULT_FILE, "a file's path in it", "--hf"
    )
    gguf_revision: str | None = _setting(
        "GGUF_REVISION", _like(r"\S+"), None, "a branch, tag or commit"
    )
    gguf_sha256: str | None = _setting("GGUF_SHA256", _sha256, None, _DIGEST)
    gguf_path: Path | None = _setting("GGUF_PATH", _path, None, "a file's path", "--model")  # noqa: RUF009
    n_ctx: int = _setting(
        "N_CTX", _number(16, 16_777_216), 4096, "a number of tokens from 16 to 16777216"
    )
    temperature: float = _setting(
        "TEMPERATURE", _number(0.0, 10.0), 0.0, "a decimal number from 0 to 10"
    )
    max_new_tokens: int = _setting(
        "MAX_NEW_TOKENS", _number(1, 1_000_000), 1024, "a number from 1 to 1000000"
    )
    max_chars: int = _setting(
        "MAX_CHARS", _number(1, 10_000_000), 2000, "a number from 1 to 10000000"
    )
    server_port: int | None = _setting(
        "LLAMA_SERVER_PORT", _number(1, 65535), None, "a TCP port from 1 to 65535", "--port"
    )
    startup_timeout: float = _setting(
        "LLAMA_SERVER_STARTUP_TIMEOUT", _number(1e-12, 86400.0), 120.0, _SECONDS
    )
    zerogpu_size: str = _setting(
        "ZEROGPU_SIZE", _like("large|xlarge", lower=True), "large", "'large' or 'xlarge'"
    )
    zerogpu_duration: int | None = _setting(
        "ZEROGPU_DURATION", _duration, None, "a number of seconds, or 'computed'"
    )
    cuda_arch: str | None = _setting(
        "CUDA_ARCH", _arch, None, "a compute capability such as 90 or 12.0", "--arch"
    )
    offline: bool = _switch("OFFLINE", "--offline")
    hf_token: str | None = _setting(
        "HF_TOKEN", _token, None, "a token of ASCII characters without spaces", secret=True
    )
    hf_endpoint: str = _setting(
        "HF_ENDPOINT", _http_url, DEFAULT_ENDPOINT, "an http(s) URL", secret=True
    )
    no_test_run: bool = _switch("", "--no-test-run")
    store: Path = _setting("", _path, None, "a folder's path", "--store")  # noqa: RUF009

    @property
    def cpu_chosen(self) -> bool:
        """No layer is meant for a GPU."""
        return self.n_gpu_layers == 0


_FIELDS: Final[Mapping[str, _Row]] = {
    one.name: one.metadata["row"] for one in fields(Settings) if "row" in one.metadata
}


def load(
    options: Mapping[str, str | None] | None = None,
    environ: Mapping[str, str] | None = None,
    **given: object,
) -> Settings:
    """Read the settings: an option wins over a keyword, a keyword over a variable.

    Args:
        options: command line values by field name (``{"cuda_arch": "90"}``); None is "not given".
        environ: instead of the process's environment.
        given: typed values, named like the variables without prefix in lower case
            (``n_ctx=8192``, ``gguf_path=Path("m.gguf")``), and ``store``; None is "not given".

    Raises:
        SettingError: a value cannot be used, or a keyword is unknown.
    """
    if environ is None:
        _unset_empty_hub_variables()
        environ = os.environ
    chosen = _by_field(given)
    for name, text in (options or {}).items():
        if text is not None:
            chosen[name] = _read(_FIELDS[name], _FIELDS[name].option or name, text)
    values = {
        name: chosen[name] if name in chosen else _of_environment(row, environ)
        for name, row in _FIELDS.items()
    }
    if values["sha256"] and not values["url"]:
        raise SettingError(
            "SETTING_INVALID",
            f"{PREFIX}LLAMA_CPP_SHA256 (--sha256) pins a tarball, but none is named",
            hint=f"set {PREFIX}LLAMA_CPP_URL (--url) to it; a manifest is pinned by"
            f" {PREFIX}LLAMA_CPP_MANIFEST_SHA256",
        )
    values["offline"] |= _hub_flag("HF_HUB_OFFLINE", environ) or _hub_flag(
        "TRANSFORMERS_OFFLINE", environ
    )
    home, cache = _folder("HF_HOME", environ), _cache(environ)
    values["store"] = values["store"] or (home or cache) / "llama-loader"
    if not values["hf_token"] and not _hub_flag("HF_HUB_DISABLE_IMPLICIT_TOKEN", environ):
        place = _folder("HF_TOKEN_PATH", environ) or (home or cache / "huggingface") / "token"
        values["hf_token"] = _token_of_login(place)
    folders = re.split("[:;]", environ.get("LD_LIBRARY_PATH", ""))
    return Settings(
        **values,
        zerogpu=environ.get("SPACES_ZERO_GPU", "").lower() in {"1", "t", "true"},
        # an empty entry means the working folder to the dynamic linker
        library_path=tuple(Path(folder) for folder in folders if folder.startswith("/")),
        inherited=_inherited(environ),
    )


def certificate_file() -> str | None:
    """Return the certificates that ``SSL_CERT_FILE`` names, which requests does not read itself."""
    return os.environ.get("SSL_CERT_FILE") or None


def bound_xet() -> None:
    """Have hf_xet give up on a storage that is silent for a minute; it waits for more than four."""
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", "20s")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")


def renewed(settings: Settings) -> Settings:
    """Return the settings with what a started program may see of *this* process's environment.

    A ZeroGPU worker is a fork whose ``CUDA_VISIBLE_DEVICES`` was set after it began.
    """
    return replace(settings, inherited=_inherited(os.environ))


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _INHERITED if name in environ}


def _by_field(given: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of keywords by the names of fields."""
    names = {
        row.variable.removeprefix(PREFIX).lower() or name: name for name, row in _FIELDS.items()
    }
    found = {}
    for keyword, value in given.items():
        if keyword not in names:
            import difflib  # only now: a start needs none of it

            near = difflib.get_close_matches(keyword, names, 3, 0.5)
            raise SettingError(
                "SETTING_UNKNOWN",
                f"there is no setting {keyword!r}; near ones: {', '.join(near) or 'none'}",
                hint="see docs/settings.md for all of them",
            )
        if value is not None:
            name = names[keyword]
            kind = str(Settings.__dataclass_fields__[name].type).removesuffix(" | None")
            found[name] = _read(_FIELDS[name], keyword, value, _KINDS[kind])
    return found


def _of_environment(row: _Row, environ: Mapping[str, str]) -> Any:
    texts = {name: environ.get(name, "").strip() for name in row.variables}
    values = {name: _read(row, name, text) for name, text in texts.items() if text}
    first, *others = values or [""]
    if any(values[other] != values[first] for other in others):
        raise SettingError(
            "SETTING_CONFLICT",
            f"{first} and {others[0]} are set to different values",
            hint="unset one of them: both name the same setting",
            setting=first,
        )
    return values.get(first, row.default)


def _read(row: _Row, source: str, value: object, types: tuple[type, ...] = ()) -> Any:
    """Parse a text, or a keyword's value of one of ``types``, whose range is that of its text."""
    accepts = row.accepts + (f" ({' or '.join(one.__name__ for one in types)})" if types else "")
    try:
        return row.parse(_text(value, types or (str,)))
    except ValueError:
        shown = repr(mistyped(value) if row.parse is _url and isinstance(value, str) else value)
        default = "auto" if row.default == () else row.default
        raise SettingError(
            "SETTING_INVALID",
            f"{source} is {'not shown here' if row.secret else shown}, which is not {accepts}",
            hint=f"set {source} to {accepts}, or leave it out for the default ("
            f"{'unset' if default is None else int(default) if default is False else default})",
            setting=source,
        ) from None


def _text(value: object, types: tuple[type, ...]) -> str:
    """Write a value as its parser takes it; one of another type is a ValueError."""
    if not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
        raise ValueError(value)
    if isinstance(value, float):
        return f"{value:.12f}"  # the parsers take no exponent
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "auto"
    return str(value).strip()


def _unset_empty_hub_variables() -> None:
    """Remove the variables that are set and empty before the Hub's client reads them.

    It takes ``HF_ENDPOINT=`` for an address and ``HF_HOME=`` for the working folder.
    """
    for name, text in list(os.environ.items()):
        if not text.strip() and name.startswith(("HF_", "HUGGINGFACE_", "XDG_CACHE_HOME")):
            del os.environ[name]


def _folder(variable: str, environ: Mapping[str, str]) -> Path | None:
    text = environ.get(variable, "").strip()
    row = _Row(variable, _path, None, "a folder")
    return Path(_read(row, variable, text)) if text else None


def _cache(environ: Mapping[str, str]) -> Path:
    """Return the user's cache folder, as the XDG Base Directory Specification names it."""
    if environ.get("XDG_CACHE_HOME", "").startswith("/"):
        return Path(environ["XDG_CACHE_HOME"])
    home = environ.get("HOME", "").strip() or os.path.expanduser("~")  # noqa: PTH111 - never raises
    return Path(home) / ".cache"


def _token_of_login(place: Path) -> str | None:
    """Return the token that ``hf auth login`` stored."""
    try:
        text = place.read_text("utf-8", "surrogateescape").strip()
    except OSError:  # not logged in, or as another user
        return None
    return str(_read(_FIELDS["hf_token"], f"the token in {place}", text)) if text else None


def _hub_flag(variable: str, environ: Mapping[str, str]) -> bool:
    """Read a variable as the Hub's client does: any other text is no."""
    return environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
