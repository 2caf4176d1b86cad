"""JSON without the lenience: one reading for each text, or an error that names the place.

Python's ``json`` takes the last of two equal keys, reads ``NaN`` and ``1e999`` and keeps lone
surrogates. Two readers of such a text can disagree about it, which is how a checked manifest
becomes a different one. Here each of them is an error with its JSON path (``$.artifacts[0].size``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from llama_loader.errors import IntegrityError

MAX_DEPTH = 64
"""Deepest nesting accepted; a manifest has 5 levels."""


@dataclass
class _Rejected:
    """Stands in the parsed tree where the text has something that is refused."""

    problem: str


def loads(data: bytes, *, what: str, max_bytes: int) -> Any:
    """Parse UTF-8 JSON of at most ``max_bytes``; errors call it ``what`` (``manifest https://…``).

    Raises:
        IntegrityError: too large, not UTF-8, not JSON, nested too deep, duplicate keys, a number
            that is not finite or a string with a lone surrogate.
    """
    if len(data) > max_bytes:
        raise IntegrityError(
            "JSON_TOO_LARGE", f"{what} is {len(data)} bytes; at most {max_bytes} are accepted"
        )
    try:
        tree = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=lambda name: _Rejected(f"{name} is not a number in JSON"),
            parse_float=_finite,
        )
    except RecursionError:
        raise IntegrityError("JSON_TOO_DEEP", f"{what} is nested too deep") from None
    except UnicodeDecodeError as error:
        raise IntegrityError("JSON_NOT_UTF8", f"{what} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise IntegrityError("JSON_MALFORMED", f"{what} is not JSON: {error}") from error
    _reject(tree, "$", what, 0)
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _Rejected("the key stands here twice") if key in found else value
    return found


def _finite(text: str) -> float | _Rejected:
    number = float(text)
    return number if math.isfinite(number) else _Rejected(f"{text} is not a finite number")


def _reject(value: object, path: str, what: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise IntegrityError(
            "JSON_TOO_DEEP", f"{what}: more than {MAX_DEPTH} levels at {path[:80]}"
        )
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        value = _Rejected("holds a lone surrogate")
    if isinstance(value, _Rejected):
        raise IntegrityError("JSON_AMBIGUOUS", f"{what}: {path}: {value.problem}")
    if isinstance(value, dict):
        for key, item in value.items():
            _reject(key, path, what, depth)
            _reject(item, f"{path}.{key}", what, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _reject(item, f"{path}[{index}]", what, depth + 1)
