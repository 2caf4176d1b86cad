"""Where errors and notes are made, and what their sentences need: neither mypy nor ruff looks."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Formatter


def values(told: Mapping[str, str]) -> set[str]:
    """Return the names of the values that a sentence and its hint are filled in with."""
    fields = (field for _, field, _, _ in Formatter().parse("".join(told.values())))
    return {re.split(r"[.[]", field)[0] for field in fields if field}


def says_nothing(told: Mapping[str, str]) -> bool:
    """Return whether a sentence has no word of its own, such as ``{path}: {why}``."""
    return not re.search("[a-z]", re.sub("{.*?}", "", told["what"]))


def uses(paths: Iterable[Path]) -> Iterator[tuple[ast.Call, set[str], set[str]]]:
    """Yield each call that has a sentence's name alone, the names, and its values' names."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(args=[ast.Constant() | ast.IfExp() as first], keywords=given):
                    constants = (one for one in ast.walk(first) if isinstance(one, ast.Constant))
                    said = {one.value for one in constants if isinstance(one.value, str)}
                    names = {one for one in said if re.fullmatch("[A-Z_0-9]+(/[a-z-]+)?", one)}
                    if names:
                        yield node, names, {str(keyword.arg) for keyword in given}
