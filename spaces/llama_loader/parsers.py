"""What a setting's text may be: each parser returns a value, or refuses the text. Pure.

Which setting takes which is the table in ``settings``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ALL_LAYERS: Final = 999
"""The seed's word for "every layer"; more than any model has."""


class RefusedError(Exception):
    """A parser's answer to a text that it does not take."""


def layers(text: str) -> int:
    """Take a number of layers; any negative one is all of them."""
    number = integer(-1, 100_000)(text)
    return ALL_LAYERS if number < 0 else number


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,12}", text, re.ASCII) or not low <= int(text) <= high:
            raise RefusedError
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Take seconds, at most a day."""
    number = decimal(text)
    if not 0 < number <= 24 * 3600:
        raise RefusedError
    return number


def temperature(text: str) -> float:
    """Take a temperature from 0 to 10."""
    number = decimal(text)
    if not 0 <= number <= 10:  # noqa: PLR2004 - said in what the variable accepts
        raise RefusedError
    return number


def decimal(text: str) -> float:
    """Take a decimal number without sign or exponent."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text, re.ASCII):
        raise RefusedError
    number = float(text)
    return number if math.isfinite(number) else 0.0


def flag(text: str) -> bool:
    """Take what people write for yes and no."""
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise RefusedError


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of some words, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise RefusedError
        return text.lower()

    return parse


def sha256(text: str) -> str:
    """Take a digest, with or without ``sha256:`` before it."""
    digest = text.lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise RefusedError
    return digest


def devices(text: str) -> tuple[str, ...]:
    """Take ``auto``, the empty tuple, or names, each once; ``devices`` knows which are there.

    ``auto``, ``none`` and ``cpu`` stand alone: beside a name they would say two things.
    """
    if text.lower() == "auto":
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}", name) for name in names):
        raise RefusedError
    distinct = {name.lower() for name in names}
    if len(distinct) < len(names) or (len(names) > 1 and distinct & {"auto", "none", "cpu"}):
        raise RefusedError
    return names


def arch(text: str) -> str:
    """Take 90, 9.0, sm_90 or 120a; give the digits without a suffix, as hosts are described."""
    matched = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.?([0-9])[af]?", text.lower(), re.ASCII)
    if not matched:
        raise RefusedError
    return f"{matched[1]}{matched[2]}"


def duration(text: str) -> int | None:
    """Take whole seconds, or ``computed``, which is None."""
    return None if text.lower() in {"computed", "auto"} else integer(1, 24 * 3600)(text)


def url(text: str) -> str:
    """Take a URL: only its scheme is looked at, ``fetch`` says what it can open."""
    if not re.match(r"(?:https?://|hf://|file:/)\S", text) or re.search(r"\s", text):
        raise RefusedError
    return text


def http_url(text: str) -> str:
    """Take an http(s) URL; without its last slash."""
    if not re.fullmatch(r"https?://\S+", text):
        raise RefusedError
    return text.rstrip("/")


def repository(text: str) -> str:
    """Take ``OWNER/NAME``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) or ".." in text:
        raise RefusedError
    return text


def path_inside(text: str) -> str:
    """Take a relative path that stays inside."""
    if not text or text.startswith("/") or ".." in text.split("/") or not text.isprintable():
        raise RefusedError
    return text


def text(text: str) -> str:
    """Take printable text without spaces."""
    if not text or not text.isprintable() or re.search(r"\s", text):
        raise RefusedError
    return text


def path(text: str) -> Path:
    """Take a path, made absolute: the server that gets it runs in another folder."""
    if not text or "\0" in text:
        raise RefusedError
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~nobody/…: no such user
        raise RefusedError from error
