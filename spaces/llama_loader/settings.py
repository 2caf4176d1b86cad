"""Reads every setting once, from code, the command line or the environment, into a frozen object.

The only module that touches ``os.environ``. All three sources go through the same parsers, so a
wrong value is refused with the same words wherever it comes from. A value that cannot be used is
an error that names the variable, option or keyword and what it accepts; it is never replaced by a
default in silence. docs/settings.md has the table of all variables.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader.errors import SettingError, mistyped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "YAKULINGO_SPACES_"
NEUTRAL_PREFIX: Final = "LLAMA_SPACE_"
"""May stand in place of ``PREFIX`` in every variable."""
DEFAULT_REPO: Final = "mradermacher/translategemma-27b-it-i1-GGUF"
DEFAULT_FILE: Final = "translategemma-27b-it.i1-Q4_K_M.gguf"
DEFAULT_ENDPOINT: Final = "https://huggingface.co"
ALL_LAYERS: Final = 999
"""The value of N_GPU_LAYERS for "every layer"; more than any model has."""
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
"""The variables that a program started by the loader may see."""


@dataclass(frozen=True)
class Settings:
    """Everything that a person can set; docs/settings.md says what each variable means.

    Attributes:
        manifest_url, manifest_sha256: which release; None leaves it to ``release.json``.
        url, sha256: one tarball, by hand; wins over the manifest.
        devices: names such as ``CUDA0``; empty for ``auto``.
        n_gpu_layers: ``ALL_LAYERS`` for all that fit, 0 for the CPU.
        startup_timeout: seconds from the server's start to its first token.
        zerogpu_duration: seconds, None for computed.
        cuda_arch: compute capability without its dot (``90``), None for detected.
        previous: the release that this store used before the one in use now.
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
    hf_endpoint: str
    no_test_run: bool
    previous: bool
    store: Path
    zerogpu: bool
    library_path: tuple[Path, ...]
    inherited: Mapping[str, str]

    @property
    def cpu_chosen(self) -> bool:
        """No layer is meant for a GPU."""
        return self.n_gpu_layers == 0


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
    texts = {name: text for name, text in (options or {}).items() if text is not None}
    typed = _by_field(given)
    values = {name: _value(name, row, texts, typed, environ) for name, row in _FIELDS.items()}
    if values["sha256"] and not values["url"]:
        raise SettingError(
            "SETTING_INVALID",
            f"{PREFIX}LLAMA_CPP_SHA256 (--sha256) pins a tarball, but none is named",
            hint=f"set {PREFIX}LLAMA_CPP_URL (--url) to it; a manifest is pinned by"
            f" {PREFIX}LLAMA_CPP_MANIFEST_SHA256",
        )
    hub_offline = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE", "")
    values["offline"] = values["offline"] or _foreign_flag(hub_offline)
    values["hf_token"] = values["hf_token"] or _token_of_login(environ)
    values["store"] = values["store"] or _default_store(environ)
    return Settings(
        **values,
        zerogpu=_foreign_flag(environ.get("SPACES_ZERO_GPU", "")),
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
    """One setting.

    Attributes:
        variable: its full name with ``PREFIX``, or a name of the Hub's; empty if it has none.
        parse: turns text into the value, or raises ValueError.
        accepts: what ``parse`` takes, for people.
        option: of the command line.
        types: what its keyword takes.
        secret: a refused value is not quoted.
    """

    variable: str
    parse: Callable[[str], Any]
    default: Any
    accepts: str
    option: str = ""
    types: tuple[type, ...] = (str,)
    secret: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """Every name under which the environment may have it."""
        if not self.variable.startswith(PREFIX):
            return (self.variable,) if self.variable else ()
        return self.variable, NEUTRAL_PREFIX + self.variable.removeprefix(PREFIX)


def _by_field(given: Mapping[str, object]) -> dict[str, object]:
    """Return keyword values by the names of fields."""
    fields = {_keyword(name, row): name for name, row in _FIELDS.items()}
    for keyword in given:
        if keyword not in fields:
            near = difflib.get_close_matches(keyword, fields, 3, 0.5)
            raise SettingError(
                "SETTING_UNKNOWN",
                f"there is no setting {keyword!r}; near ones: {', '.join(near) or 'none'}",
                hint="see docs/settings.md for all of them",
            )
    return {fields[keyword]: value for keyword, value in given.items() if value is not None}


def _keyword(name: str, row: _Row) -> str:
    return row.variable.removeprefix(PREFIX).lower() or name


def _value(
    name: str,
    row: _Row,
    options: Mapping[str, str],
    typed: Mapping[str, object],
    environ: Mapping[str, str],
) -> Any:
    if name in options:
        return _parsed(row, row.option or name, options[name])
    if name in typed:
        return _checked(row, _keyword(name, row), typed[name])
    texts = {one: environ.get(one, "").strip() for one in row.variables}
    values = {one: _parsed(row, one, text) for one, text in texts.items() if text}
    if not values:
        return row.default
    first, *others = values
    if any(values[other] != values[first] for other in others):
        raise SettingError(
            "SETTING_CONFLICT",
            f"{first} and {others[0]} are set to different values",
            hint="unset one of them: both name the same setting",
        )
    return values[first]


def _parsed(row: _Row, source: str, text: str) -> Any:
    try:
        return row.parse(text.strip())
    except ValueError:
        shown = mistyped(text) if row.parse is _url else text
        raise _refused(row, source, repr(shown), row.accepts) from None


def _checked(row: _Row, keyword: str, value: object) -> Any:
    """Return a typed value as the setting's own; its range is that of the text."""
    accepts = f"{row.accepts} ({' or '.join(one.__name__ for one in row.types)})"
    shown = repr(mistyped(value) if row.parse is _url and isinstance(value, str) else value)
    if not isinstance(value, row.types) or isinstance(value, bool) != (row.types == (bool,)):
        raise _refused(row, keyword, shown, accepts)
    text = str(value)
    if isinstance(value, float):
        text = f"{value:.12f}"  # the parsers take no exponent
    elif isinstance(value, list | tuple):
        text = ",".join(map(str, value)) or "auto"
    try:
        return row.parse(text)
    except ValueError:
        raise _refused(row, keyword, shown, accepts) from None


def _refused(row: _Row, source: str, shown: str, accepts: str) -> SettingError:
    return SettingError(
        "SETTING_INVALID",
        f"{source} is {'not shown here' if row.secret else shown}, which is not {accepts}",
        hint=f"set {source} to {accepts}, or leave it out for the default ({_shown(row.default)})",
    )


def _shown(default: object) -> str:
    if default is None:
        return "unset"
    return "auto" if default == () else str(int(default) if default is False else default)


def _unset_empty_hub_variables() -> None:
    """Remove the variables that are set and empty before the Hub's client reads them.

    It takes ``HF_ENDPOINT=`` for an address and ``HF_HOME=`` for the working folder.
    """
    for name, text in list(os.environ.items()):
        if not text.strip() and name.startswith(("HF_", "HUGGINGFACE_", "XDG_CACHE_HOME")):
            del os.environ[name]


def _token_of_login(environ: Mapping[str, str]) -> str | None:
    """Return the token that ``hf auth login`` stored, as the Hub's client finds it."""
    if _foreign_flag(environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "")):
        return None
    named, home = environ.get("HF_TOKEN_PATH", "").strip(), environ.get("HF_HOME", "").strip()
    try:
        if named or home:
            place = _path(named) if named else _path(home) / "token"
        else:
            place = _cache(environ) / "huggingface" / "token"
        text = place.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None  # not logged in, or as another user
    row = _FIELDS["hf_token"]
    return str(_parsed(row, f"the token in {place}", text)) if text else None


def _default_store(environ: Mapping[str, str]) -> Path:
    """``$HF_HOME/llama-loader``, else in the user's cache folder."""
    home = environ.get("HF_HOME", "").strip()
    row = _Row("HF_HOME", _path, None, "a folder")
    return (_parsed(row, "HF_HOME", home) if home else _cache(environ)) / "llama-loader"


def _cache(environ: Mapping[str, str]) -> Path:
    """Return the user's cache folder, as the XDG Base Directory Specification names it."""
    cache, home = environ.get("XDG_CACHE_HOME", ""), environ.get("HOME", "").strip()
    return Path(cache) if cache.startswith("/") else Path(home or _home()) / ".cache"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user of no name, in a container
        return Path("/")


def _foreign_flag(text: str) -> bool:
    """Read another program's yes or no, which may be any text."""
    return text.lower() in {"1", "t", "true", "on", "yes"}


def _library_path(text: str) -> tuple[Path, ...]:
    """Leave out empty entries: to the dynamic linker they mean the working folder."""
    return tuple(Path(part) for part in re.split("[:;]", text) if part.startswith("/"))


# --- the parsers: text to value, or ValueError ---


def _matching(pattern: str, text: str) -> str:
    if not re.fullmatch(pattern, text, re.ASCII):
        raise ValueError(pattern)
    return text


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(_matching("[+-]?[0-9]{1,12}", text))
        if not low <= number <= high:
            raise ValueError(number)
        return number

    return parse


def _layers(text: str) -> int:
    """Any negative number stands for all of them."""
    number = _integer(-1, 100_000)(text)
    return ALL_LAYERS if number < 0 else number


def _decimal(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of decimal numbers without sign or exponent."""

    def parse(text: str) -> float:
        number = float(_matching(r"[0-9]{1,12}(\.[0-9]{1,12})?", text))
        if not low <= number <= high:
            raise ValueError(number)
        return number

    return parse


def _flag(text: str) -> bool:
    if text.lower() not in {"1", "true", "yes", "on", "0", "false", "no", "off"}:
        raise ValueError(text)
    return text.lower() in {"1", "true", "yes", "on"}


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda text: _matching("|".join(words), text.lower())


def _sha256(text: str) -> str:
    return _matching("[0-9a-f]{64}", text.lower().removeprefix("sha256:"))


def _devices(text: str) -> tuple[str, ...]:
    """``auto`` is the empty tuple; ``auto``, ``none`` and ``cpu`` stand alone."""
    if text.lower() == "auto":
        return ()
    names = tuple(
        _matching("[A-Za-z][A-Za-z0-9_.:-]{0,63}", name.strip()) for name in text.split(",")
    )
    distinct = {name.lower() for name in names}
    if len(distinct) < len(names) or (len(names) > 1 and distinct & {"auto", "none", "cpu"}):
        raise ValueError(text)
    return names


def _arch(text: str) -> str:
    """Take 90, 9.0, sm_90 or 120a; return the digits without a suffix, as hosts are described."""
    named = _matching(r"(sm_?)?[0-9]{1,2}\.?[0-9][af]?", text.lower())
    return re.sub("[^0-9]", "", named)


def _duration(text: str) -> int | None:
    return None if text.lower() in {"computed", "auto"} else _integer(1, 24 * 3600)(text)


def _url(text: str) -> str:
    """Only the scheme is looked at; the fetcher says what it can open."""
    if not re.match(r"(?:https?://|hf://|file:/)\S", text) or re.search(r"\s", text):
        raise ValueError(text)
    return text


def _http_url(text: str) -> str:
    if not re.fullmatch(r"https?://\S+", text):
        raise ValueError(text)
    return text.rstrip("/")


def _repository(text: str) -> str:
    if ".." in text:
        raise ValueError(text)
    return _matching(r"[\w.-]+/[\w.-]+", text)


def _path_inside(text: str) -> str:
    if not text or text.startswith("/") or ".." in text.split("/") or not text.isprintable():
        raise ValueError(text)
    return text


def _word(text: str) -> str:
    if not text or not text.isprintable() or re.search(r"\s", text):
        raise ValueError(text)
    return text


def _path(text: str) -> Path:
    """Make it absolute: the server that gets it runs in another folder."""
    if not text or "\0" in text:
        raise ValueError(text)
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name/…: no such user
        raise ValueError(text) from error


def _token(text: str) -> str:
    """Take what an HTTP header can carry; httpx encodes headers as ASCII."""
    if not text.isascii():
        raise ValueError
    return _word(text)


def _switch(variable: str, option: str) -> _Row:
    accepts = "1 or 0 (also true/false, yes/no, on/off)"
    return _Row(variable, _flag, default=False, accepts=accepts, option=option, types=(bool,))


def _number(
    name: str, low: int, high: int, default: int | None, accepts: str, option: str = ""
) -> _Row:
    return _Row(PREFIX + name, _integer(low, high), default, accepts, option, types=(int,))


_DIGEST: Final = "a sha256 of 64 hexadecimal digits"
_LINK: Final = "a URL: https://…, http:// on loopback, file:///… or hf://OWNER/REPO[@REV]/PATH"
_FIELDS: Final[Mapping[str, _Row]] = {
    "backend": _Row(
        PREFIX + "BACKEND", _one_of("gguf"), "gguf", "'gguf', the only backend of this loader"
    ),
    "manifest_url": _Row(PREFIX + "LLAMA_CPP_MANIFEST_URL", _url, None, _LINK, "--manifest"),
    "manifest_sha256": _Row(
        PREFIX + "LLAMA_CPP_MANIFEST_SHA256", _sha256, None, _DIGEST, "--manifest-sha256"
    ),
    "url": _Row(PREFIX + "LLAMA_CPP_URL", _url, None, _LINK, "--url"),
    "sha256": _Row(PREFIX + "LLAMA_CPP_SHA256", _sha256, None, _DIGEST, "--sha256"),
    "devices": _Row(
        PREFIX + "LLAMA_DEVICE",
        _devices,
        (),
        "'auto', or device names such as CUDA0 or CUDA0,CUDA1, each once",
        "--device",
        types=(str, list, tuple),
    ),
    "n_gpu_layers": _Row(
        PREFIX + "N_GPU_LAYERS",
        _layers,
        ALL_LAYERS,
        "a number of layers: 999 (or -1) for all that fit, 0 for the CPU",
        types=(int,),
    ),
    "allow_cpu": _switch(PREFIX + "ALLOW_CPU", "--allow-cpu"),
    "gguf_repo_id": _Row(
        PREFIX + "GGUF_REPO_ID", _repository, DEFAULT_REPO, "a repository: OWNER/NAME", "--hf"
    ),
    "gguf_filename": _Row(
        PREFIX + "GGUF_FILENAME", _path_inside, DEFAULT_FILE, "a file's path in it", "--hf"
    ),
    "gguf_revision": _Row(PREFIX + "GGUF_REVISION", _word, None, "a branch, tag or commit"),
    "gguf_sha256": _Row(PREFIX + "GGUF_SHA256", _sha256, None, _DIGEST),
    "gguf_path": _Row(
        PREFIX + "GGUF_PATH", _path, None, "a file's path", "--model", types=(str, Path)
    ),
    "n_ctx": _number("N_CTX", 16, 16_777_216, 4096, "a number of tokens from 16 to 16777216"),
    "temperature": _Row(
        PREFIX + "TEMPERATURE",
        _decimal(0, 10),
        0.0,
        "a decimal number from 0 to 10",
        types=(int, float),
    ),
    "max_new_tokens": _number("MAX_NEW_TOKENS", 1, 1_000_000, 1024, "a number from 1 to 1000000"),
    "max_chars": _number("MAX_CHARS", 1, 10_000_000, 2000, "a number from 1 to 10000000"),
    "server_port": _number(
        "LLAMA_SERVER_PORT", 1, 65535, None, "a TCP port from 1 to 65535", "--port"
    ),
    "startup_timeout": _Row(
        PREFIX + "LLAMA_SERVER_STARTUP_TIMEOUT",
        _decimal(1e-12, 24 * 3600),
        120.0,
        "a number of seconds above 0, at most 86400",
        types=(int, float),
    ),
    "zerogpu_size": _Row(
        PREFIX + "ZEROGPU_SIZE", _one_of("large", "xlarge"), "large", "'large' or 'xlarge'"
    ),
    "zerogpu_duration": _Row(
        PREFIX + "ZEROGPU_DURATION",
        _duration,
        None,
        "a number of seconds, or 'computed'",
        types=(int, str),
    ),
    "cuda_arch": _Row(
        PREFIX + "CUDA_ARCH", _arch, None, "a compute capability such as 90 or 12.0", "--arch"
    ),
    "offline": _switch(PREFIX + "OFFLINE", "--offline"),
    "hf_token": _Row(
        "HF_TOKEN", _token, None, "a token of ASCII characters without spaces", secret=True
    ),
    "hf_endpoint": _Row("HF_ENDPOINT", _http_url, DEFAULT_ENDPOINT, "an http(s) URL", secret=True),
    "previous": _switch("", "--previous"),
    "no_test_run": _switch("", "--no-test-run"),
    "store": _Row("", _path, None, "a folder's path", "--store", types=(str, Path)),
}
