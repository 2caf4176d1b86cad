"""Reads every setting once, from code, the command line or the environment, into a frozen object.

The only module that touches ``os.environ``. All three sources go through the same parsers: a value
that cannot be used is an error that names the variable, option or keyword and what it accepts.
docs/settings.md has the table of all variables.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from llama_loader import setting_kinds as kinds
from llama_loader.errors import SettingError, mistyped
from llama_loader.events import Note
from llama_loader.gguf_header import ALL_LAYERS
from llama_loader.locations import HUB

PREFIX: Final = "YAKULINGO_SPACES_"
NEUTRAL_PREFIX: Final = "LLAMA_SPACE_"
"""May replace ``PREFIX`` in every variable."""
_PREFIXES: Final = (PREFIX, NEUTRAL_PREFIX)
DEFAULT_REPO: Final = "mradermacher/translategemma-27b-it-i1-GGUF"
DEFAULT_FILE: Final = "translategemma-27b-it.i1-Q4_K_M.gguf"
_INHERITED: Final = (
    "HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ",
    "CUDA_CACHE_DISABLE", "CUDA_CACHE_MAXSIZE", "CUDA_CACHE_PATH",
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
)  # fmt: skip
"""The variables that a program started by the loader may see."""
_MAX_TOKEN_FILE: Final = 4096
"""Bytes of a file that can be a token; the Hub's have 37 characters."""
_OLD_NAME: Final = "HUGGING_FACE_HUB_TOKEN"
_OF_THE_HUB: Final = {
    **dict.fromkeys(("HF_TOKEN_PATH", "XDG_CACHE_HOME"), kinds.path),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SPACES_ZERO_GPU"), kinds.flag),
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": kinds.flag,
}
"""Variables from which settings follow."""


@dataclass(frozen=True)
class _Row:
    """One setting: its variable, with ``PREFIX`` or of the Hub's, if any; its option, if any."""

    variable: str
    kind: kinds.Kind
    default: Any = None
    option: str = ""
    secret: bool = False  # a refused value is not quoted

    @property
    def variables(self) -> tuple[str, ...]:
        """Every name under which the environment may have it."""
        if not self.variable.startswith(PREFIX):
            return (self.variable,) if self.variable else ()
        return self.variable, NEUTRAL_PREFIX + self.variable.removeprefix(PREFIX)


def _setting(
    name: str, kind: kinds.Kind, default: object = None, option: str = "", *, secret: bool = False
) -> Any:
    """Return a field of ``Settings`` that carries its row."""
    variable = PREFIX + name if name and not name.startswith("HF_") else name
    return field(repr=not secret, metadata={"row": _Row(variable, kind, default, option, secret)})


@dataclass(frozen=True)
class Settings:
    """Everything that a person can set: one table, of which each row is a field.

    docs/settings.md explains each variable.
    """

    zerogpu: bool
    library_path: tuple[Path, ...]
    inherited: Mapping[str, str]  # the variables that a started program may see
    unknown: tuple[Note, ...]  # a note for each variable with a prefix of ours that is no setting
    prefix: str  # that of the variables that are set, for messages
    keywords: frozenset[str]  # what the code has given, by the names of keywords
    backend: str = _setting(
        "BACKEND", kinds.like("gguf", "'gguf', the only backend of this loader", lower=True), "gguf"
    )
    # None leaves the release to ``release.json``
    manifest_url: str | None = _setting("LLAMA_CPP_MANIFEST_URL", kinds.link, None, "--manifest")
    manifest_sha256: str | None = _setting(
        "LLAMA_CPP_MANIFEST_SHA256", kinds.digest, None, "--manifest-sha256"
    )
    url: str | None = _setting("LLAMA_CPP_URL", kinds.link, None, "--url")
    sha256: str | None = _setting("LLAMA_CPP_SHA256", kinds.digest, None, "--sha256")
    # empty for ``auto``
    devices: tuple[str, ...] = _setting("LLAMA_DEVICE", kinds.devices, (), "--device")
    n_gpu_layers: int = _setting("N_GPU_LAYERS", kinds.layers, ALL_LAYERS)
    allow_cpu: bool = _setting("ALLOW_CPU", kinds.flag, default=False, option="--allow-cpu")
    gguf_repo_id: str = _setting("GGUF_REPO_ID", kinds.repository, DEFAULT_REPO, "--hf")
    gguf_filename: str = _setting("GGUF_FILENAME", kinds.path_inside, DEFAULT_FILE, "--hf")
    gguf_revision: str | None = _setting(
        "GGUF_REVISION", kinds.like(r"\S+", "a branch, tag or commit")
    )
    gguf_sha256: str | None = _setting("GGUF_SHA256", kinds.digest)
    gguf_path: Path | None = _setting("GGUF_PATH", kinds.path, None, "--model")  # noqa: RUF009
    n_ctx: int = _setting("N_CTX", kinds.number("a number of tokens", 16, 16_777_216), 4096)
    temperature: float = _setting("TEMPERATURE", kinds.number("a decimal number", 0.0, 10.0), 0.0)
    # None for what the context leaves
    max_new_tokens: int | None = _setting("MAX_NEW_TOKENS", kinds.number("a number", 1, 1_000_000))
    max_chars: int = _setting("MAX_CHARS", kinds.number("a number", 1, 10_000_000), 20_000)
    # None for one for each CPU, at most 12
    load_threads: int | None = _setting("LOAD_THREADS", kinds.number("a number of threads", 0, 32))
    server_port: int | None = _setting(
        "LLAMA_SERVER_PORT", kinds.number("a TCP port", 1, 65535), None, "--port"
    )
    # from the server's start to its first token
    startup_timeout: float = _setting(
        "LLAMA_SERVER_STARTUP_TIMEOUT", kinds.number("a number of seconds", 0.001, 86400.0), 120.0
    )
    zerogpu_size: str = _setting(
        "ZEROGPU_SIZE", kinds.like("large|xlarge", "'large' or 'xlarge'", lower=True), "large"
    )
    # seconds, None for computed
    zerogpu_duration: int | None = _setting("ZEROGPU_DURATION", kinds.duration)
    # without its dot (``90``), None for detected
    cuda_arch: str | None = _setting("CUDA_ARCH", kinds.arch, None, "--arch")
    offline: bool = _setting("OFFLINE", kinds.flag, default=False, option="--offline")
    hf_token: str | None = _setting("HF_TOKEN", kinds.TOKEN, secret=True)
    # None for the Hub's default; also where the store lies
    hf_home: Path | None = _setting("HF_HOME", kinds.path)  # noqa: RUF009
    hf_endpoint: str = _setting("HF_ENDPOINT", kinds.web, HUB, secret=True)
    no_test_run: bool = _setting("", kinds.flag, default=False, option="--no-test-run")
    store: Path = _setting("", kinds.path, None, "--store")  # noqa: RUF009

    @property
    def model_named(self) -> bool:
        """Whether a person named the model; the default one has 17 GB."""
        is_default = (self.gguf_repo_id, self.gguf_filename) == (DEFAULT_REPO, DEFAULT_FILE)
        return self.gguf_path is not None or not is_default

    @property
    def model(self) -> str:
        """The model's name in messages."""
        if ":" in self.gguf_repo_id and self.gguf_path is None:
            return self.gguf_repo_id
        return str(self.gguf_path or f"{self.gguf_repo_id}/{self.gguf_filename}")

    @property
    def cpu_chosen(self) -> bool:
        """Whether the settings ask for no layer on a GPU."""
        return self.n_gpu_layers == 0

    @property
    def cpu_allowed(self) -> bool:
        """Whether the server may run where no GPU is found."""
        return self.allow_cpu or self.cpu_chosen


_FIELDS: Final[Mapping[str, _Row]] = {
    one.name: one.metadata["row"] for one in fields(Settings) if "row" in one.metadata
}
_KEYWORDS: Final[Mapping[str, str]] = {
    row.variable.removeprefix(PREFIX).lower() or name: name for name, row in _FIELDS.items()
}
"""The names of fields, by those of keywords."""
_MEANT: Final[Mapping[str, str]] = {
    **{  # reversed, as --hf means the repository first
        _FIELDS[name].option.strip("-").replace("-", "_") or keyword: keyword
        for keyword, name in reversed(list(_KEYWORDS.items()))
    },
    **{name: keyword for keyword, name in _KEYWORDS.items()},
    **{keyword: keyword for keyword in _KEYWORDS},
}
"""The keywords, by what a person may write instead: the names of options and of fields."""


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
    """
    if environ is None:
        _unset_empty_hub_variables()
        environ = os.environ
    chosen = _of_keywords(given)
    for name, text in (options or {}).items():
        if text is not None:
            chosen[name] = _read(_FIELDS[name], _FIELDS[name].option or name, text)
    keywords = frozenset(keyword for keyword, value in given.items() if value is not None)
    prefix = _prefix(environ, keywords)
    values = {
        name: chosen[name] if name in chosen else _of_environment(row, environ)
        for name, row in _FIELDS.items()
    }
    _drop_overridden(values, chosen)
    if values["sha256"] and not values["url"]:
        raise SettingError("SETTING_INVALID/pin", prefix=prefix)
    repo = values["gguf_repo_id"]
    if ":" in repo and values["gguf_filename"] != DEFAULT_FILE:
        raise SettingError("SETTING_CONFLICT/quantisation", repo=repo, prefix=prefix)
    hub = {name: _of_environment(_Row(name, kind), environ) for name, kind in _OF_THE_HUB.items()}
    values["offline"] |= bool(hub["HF_HUB_OFFLINE"] or hub["TRANSFORMERS_OFFLINE"])
    user = environ.get("HOME", "").strip() or os.path.expanduser("~")  # noqa: PTH111 - never raises
    if user == "~":  # no HOME and no entry in passwd; container engines take the root folder
        user = "/"
    home, cache = values["hf_home"], hub["XDG_CACHE_HOME"] or Path(user) / ".cache"
    values["store"] = values["store"] or (home or cache) / "llama-loader"
    if not values["hf_token"]:  # the Hub's client still reads its old name
        values["hf_token"] = _of_environment(_Row(_OLD_NAME, kinds.TOKEN, secret=True), environ)
    if not values["hf_token"] and not hub["HF_HUB_DISABLE_IMPLICIT_TOKEN"]:
        place = hub["HF_TOKEN_PATH"] or (home or cache / "huggingface") / "token"
        values["hf_token"] = _token_of_login(place)
    folders = re.split("[:;]", environ.get("LD_LIBRARY_PATH", ""))
    return Settings(
        **values,
        zerogpu=bool(hub["SPACES_ZERO_GPU"]),
        # an empty entry means the working folder to the dynamic linker
        library_path=tuple(Path(folder) for folder in folders if folder.startswith("/")),
        inherited=_inherited(environ),
        unknown=tuple(_unknown(environ)),
        prefix=prefix,
        keywords=keywords,
    )


def named(text: str, settings: Settings | None = None) -> str:
    """Return a message that names settings as their owner did: by keyword, or with that prefix.

    It also reports variables that are set without a prefix. Without
    ``settings``, which cannot be read or are not at hand, the variables alone tell.
    """
    prefix, told = settings.prefix if settings else _prefix(os.environ), prefixed(text, settings)
    keywords = settings.keywords if settings else ()
    found = dict.fromkeys(re.findall(rf"{PREFIX}(\w+)", text))
    bare = [name for name in found if name.lower() not in keywords and _is_bare(name)]
    remark = f"; set without the prefix {prefix}: {', '.join(bare)}"
    return told + remark if bare and remark not in told else told


def _is_bare(name: str) -> bool:
    given = [bool(os.environ.get(prefix + name)) for prefix in ("", *_PREFIXES)]
    return name.lower() in _KEYWORDS and given == [True, False, False]


def prefixed(text: str, settings: Settings | None = None) -> str:
    """Return a text that names settings as ``named`` does, without its remark."""
    prefix = settings.prefix if settings else _prefix(os.environ)
    keywords = settings.keywords if settings else ()

    def own(found: re.Match[str]) -> str:
        keyword = found[1].lower()
        if keyword == "gguf_path" and "gguf_repo_id" in keywords:  # it would win over the variable
            return "the keyword gguf_path instead of gguf_repo_id"
        return keyword if keyword in keywords else f"{prefix}{found[1]}{found[2] or ''}"

    return re.sub(rf"{PREFIX}(\w*)( \(on a command line [^()]*\))?", own, text)


def _prefix(environ: Mapping[str, str], keywords: frozenset[str] = frozenset()) -> str:
    """Return the prefix of the variables that are set, or the one for apps that give keywords."""
    neutral = {name.startswith(NEUTRAL_PREFIX) for name in environ if name.startswith(_PREFIXES)}
    return NEUTRAL_PREFIX if neutral == {True} or (keywords and not neutral) else PREFIX


def certificate_file() -> str | None:
    """Return the certificates that ``SSL_CERT_FILE`` names, which requests does not read itself."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        place = os.environ.get(name)
        if not place or os.path.isdir(place):  # noqa: PTH112 - Path's raises for some names
            continue
        try:
            _require_certificates(place)
        except OSError as error:
            code = "SETTING_INVALID/certificates"
            raise SettingError(code, name=name, place=place, error=error) from error
    return os.environ.get("SSL_CERT_FILE") or None


@lru_cache(maxsize=8)
def _require_certificates(place: str) -> None:
    """Read them once: that takes longer than a small request."""
    import ssl  # a start that opens no connection needs none of it

    ssl.create_default_context(cafile=place)


def bound_xet() -> None:
    """Have hf_xet give up on a storage that is silent for a minute; it waits for more than four.

    It keeps no log: it would write into the cache, also through a link of another user.
    """
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", "20s")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    os.environ.setdefault("HF_XET_LOG_DEST", os.devnull)


def renewed(settings: Settings) -> Settings:
    """Return the settings with what a started program may see of *this* process's environment.

    A ZeroGPU worker's ``CUDA_VISIBLE_DEVICES`` is set after the fork.
    """
    return replace(settings, inherited=_inherited(os.environ))


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _INHERITED if name in environ}


def _of_keywords(given: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of keywords by the names of fields."""
    found = {}
    for keyword, value in given.items():
        if keyword not in _KEYWORDS:
            raise SettingError("SETTING_UNKNOWN/keyword", keyword=keyword, near=_near(keyword))
        if value is not None:
            row = _FIELDS[_KEYWORDS[keyword]]
            found[_KEYWORDS[keyword]] = _read(row, keyword, value, row.kind.types)
    if {"gguf_path", "gguf_repo_id"} <= found.keys():  # the command line refuses both, too
        raise SettingError("SETTING_CONFLICT/model")
    return found


def _drop_overridden(values: dict[str, Any], chosen: Mapping[str, object]) -> None:
    """Unset variables that would win over what an option or a keyword names."""
    if "gguf_repo_id" in chosen and "gguf_path" not in chosen:
        values["gguf_path"] = None
    if "manifest_url" in chosen and "url" not in chosen:
        values.update(url=None, sha256=chosen.get("sha256"))


def _unknown(environ: Mapping[str, str]) -> Iterator[Note]:
    known = {name for row in _FIELDS.values() for name in row.variables}
    for name in sorted(environ.keys() - known):
        if name.startswith(("YAKULINGO_", "LLAMA_SPACE")) and environ[name].strip():
            yield Note.of("SETTING_UNKNOWN/variable", name=name, near=_near(name).upper())


def _near(name: str) -> str:
    """List the keywords that are like a keyword, an option or a variable."""
    import difflib  # only now: a start needs none of it

    bare = re.sub(r"^(YAKULINGO|LLAMA)_(SPACES?_)?", "", name.upper()).lower()
    near = difflib.get_close_matches(bare, _MEANT, 3, 0.5)
    return ", ".join(dict.fromkeys(_MEANT[one] for one in near)) or "none"


def _of_environment(row: _Row, environ: Mapping[str, str]) -> Any:
    texts = {name: environ.get(name, "").strip() for name in row.variables}
    values = {name: _read(row, name, text) for name, text in texts.items() if text}
    first, *others = values or [""]
    if any(values[other] != values[first] for other in others):
        raise SettingError("SETTING_CONFLICT/prefixes", first=first, other=others[0])
    return values.get(first, row.default)


def _read(row: _Row, source: str, value: object, types: tuple[type, ...] = ()) -> Any:
    """Parse a text, or a keyword's value of one of ``types``, whose range is that of its text."""
    names = " or ".join(one.__name__ for one in types)
    accepts = f"{row.kind.accepts} ({names})" if types else row.kind.accepts
    try:
        return row.kind.parse(_text(value, types or (str,)))
    except ValueError:
        text, is_link = str(value), row.kind is kinds.link
        shown = repr(mistyped(text) if is_link and value == text else value)
        default = "auto" if row.default == () else row.default
        if is_link and os.path.exists(text):  # noqa: PTH110 - never raises
            raise SettingError(
                "SETTING_INVALID/path",
                source=source,
                shown=shown,
                accepts=accepts,
                url=Path(text).resolve().as_uri(),
            ) from None
        is_text = isinstance(value, str) and types and str not in types
        raise SettingError(
            "SETTING_INVALID/text" if is_text else "SETTING_INVALID/value",
            source=source,
            shown="a text that is not shown here" if row.secret else shown,
            accepts=accepts,
            types=f"{'an' if int in types else 'a'} {names}",
            usual="unset" if default is None else int(default) if default is False else default,
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

    It reads ``HF_ENDPOINT=`` as an address and ``HF_HOME=`` as the working folder. With ``HOME=``
    Python uses the root folder as the user's home.
    """
    names = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TQDM_", "XDG_CACHE_HOME")
    for name, text in list(os.environ.items()):
        if not text.strip() and (name == "HOME" or name.startswith(names)):
            del os.environ[name]


def _token_of_login(place: Path) -> str | None:
    """Return the token that ``hf auth login`` stored; only a small, regular file is read."""
    try:
        found = place.stat()
        sound = stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_TOKEN_FILE
        text = place.read_text("utf-8", "surrogateescape").strip() if sound else ""
    except OSError:  # not logged in, or as another user
        return None
    if not sound:
        raise SettingError("SETTING_INVALID/token", place=place, max_token_file=_MAX_TOKEN_FILE)
    return str(_read(_FIELDS["hf_token"], f"the token in {place}", text)) if text else None
