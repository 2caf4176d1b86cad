"""The kinds of values that a setting can have: what each accepts, and how its text is parsed."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from llama_loader.gguf_header import ALL_LAYERS

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Kind:
    """A kind of values: what it accepts, for people; what a keyword's value may be; the parser.

    ``parse`` turns text into a value, or raises ValueError.
    """

    accepts: str
    types: tuple[type, ...]
    parse: Callable[[str], Any]


def _matched(pattern: str, text: str) -> str:
    """Return printable text that matches a pattern, or the part of it that is the group."""
    matched = re.fullmatch(pattern, text)
    if not matched or not text.isprintable():
        raise ValueError(text)
    return matched[matched.lastindex or 0]


def like(pattern: str, accepts: str, *, lower: bool = False) -> Kind:
    """Return the kind of texts that match a pattern, or their part that is its group."""
    return Kind(accepts, (str,), lambda text: _matched(pattern, text.lower() if lower else text))


def number(what: str, low: _Number, high: _Number) -> Kind:
    """Return the kind of numbers of the limits' type."""
    kind = type(low)

    def parse(text: str) -> _Number:
        found = kind(_matched(r"[+-]?[0-9]{1,12}(?:\.[0-9]{1,12})?", text))
        if not low <= found <= high:
            raise ValueError(text)
        return found

    types = tuple(dict.fromkeys((int, kind)))
    return Kind(f"{what} from {low:.16g} to {high:.16g}", types, parse)


@partial(Kind, "a number of layers: 999 (or -1) for all that fit, 0 for the CPU", (int,))
def layers(text: str) -> int:
    """Take -1 for all layers, too."""
    count: int = number("", -1, 100_000).parse(text)
    return ALL_LAYERS if count < 0 else count


@partial(Kind, "1 or 0 (also true/false, yes/no, on/off)", (bool,))
def flag(text: str) -> bool:
    """Take the words that people write for yes and no."""
    words = "1|true|yes|on|0|false|no|off"
    return _matched(words, text.lower()) in {"1", "true", "yes", "on"}


@partial(
    Kind, "'auto', or device names such as CUDA0 or CUDA0,CUDA1, each once", (str, list, tuple)
)
def devices(text: str) -> tuple[str, ...]:
    """Parse names of devices; ``auto`` (the empty tuple), ``none`` and ``cpu`` stand alone."""
    if text.lower() == "auto":
        return ()
    name = "[A-Za-z][A-Za-z0-9_.:-]{0,63}"
    names = tuple(_matched(name, one.strip()) for one in text.split(","))
    distinct = {one.lower() for one in names}
    if len(distinct) < len(names) or (len(names) > 1 and distinct & {"auto", "none", "cpu"}):
        raise ValueError(text)
    return names


@partial(Kind, "a compute capability such as 90 or 12.0", (str,))
def arch(text: str) -> str:
    """Take 90, 9.0, sm_90 or 120a; return the digits without a suffix, as hosts are described."""
    return re.sub("[^0-9]", "", _matched(r"(?:sm_?)?[0-9]{1,2}\.?[0-9][af]?", text.lower()))


@partial(Kind, "a number of seconds, or 'computed'", (int,))
def duration(text: str) -> int | None:
    """Take whole seconds up to a day; None for computed ones."""
    return None if text.lower() in {"computed", "auto"} else number("", 1, 86400).parse(text)


@partial(Kind, "the path of a file or folder", (str, Path))
def path(text: str) -> Path:
    """Expand it as the Hub's client does; absolute, as the server runs in another folder."""
    if not text or "\0" in text:
        raise ValueError(text)
    try:
        return Path(os.path.expandvars(text)).expanduser().absolute()
    except RuntimeError as error:  # ~name/…: no such user
        raise ValueError(text) from error


digest = like("(?:sha256:)?([0-9a-f]{64})", "a sha256 of 64 hexadecimal digits", lower=True)
link = like(  # ``locations`` decides what can be opened
    r"(?:https?://|hf://|file:/)\S+",
    "a URL: https://…, http://127.0.0.1:PORT/…, file:///… or hf://OWNER/REPO[@REV]/PATH",
)
web = like(r"(https?://\S*[^\s/])/*", "an http(s) URL")
TOKEN: Final = like("[!-~]+", "a token of ASCII characters without spaces")
"""httpx encodes headers as ASCII."""
repository = like(
    r"(?!.*\.\.)[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)?",
    "a repository: OWNER/NAME:QUANTISATION, or OWNER/NAME",
)
path_inside = like(r"(?!/)(?!(?:.*/)?\.\.(?:/|$)).+", "a file's path in it")
