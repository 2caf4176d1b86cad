"""The mutants of benchmarks/mutants.py: each compiles, differs, and is what it says."""

from __future__ import annotations

import ast
import textwrap

import pytest

from benchmarks.mutants import mutants


def changed(source: str) -> list[str]:
    """The mutants of a source, written out again."""
    return [ast.unparse(mutant.tree) for mutant in mutants(source)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = a < b", {"x = a <= b", "x = a >= b"}),
        ("x = a and b", {"x = a or b"}),
        ("x = not a", {"x = a"}),
        ("x = a + b", {"x = a - b"}),
        ("x = 'word'", {"x = 'wordXX'"}),
        ("x = True", {"x = False"}),
        ("x = 4", {"x = 5"}),
        ("x = b if a else c", {"x = b if not a else c"}),
        ("call()", {"pass"}),
        ("x.y = z", {"pass"}),
        ("x += y", {"pass"}),
        ("raise x", {"pass"}),
        ("if a:\n    pass", {"if not a:\n    pass"}),
        ("def f():\n    return x", {"def f():\n    return None"}),
        # left alone: sentences, docstrings, annotations, paths, what would be a NameError at once
        ("x = 'a sentence'", set()),
        ("'''word'''", set()),
        ("x: 'word'", set()),
        ("x = a / b", set()),
        ("x = y", set()),
        ("if TYPE_CHECKING:\n    x = 1", set()),
    ],
)
def test_what_becomes_of(source: str, found: set[str]) -> None:
    assert set(changed(source)) == found


def test_a_mutant_knows_its_function_as_a_code_object_does() -> None:
    source = textwrap.dedent(
        """
        @decorated(1)
        def outer(x=2):
            return x > 3
        """
    )
    by_change = {mutant.change: (mutant.line, mutant.function) for mutant in mutants(source)}
    assert by_change["1: 2"] == (2, None)
    assert by_change["2: 3"] == (3, None)
    assert by_change["3: 4"] == (4, 2)


def test_every_mutant_is_another_module() -> None:
    source = "def f(a, b):\n    if a == b and a:\n        g(1)\n    return [a, 'x']\n"
    every = changed(source)
    assert len(set(every)) == len(every) == 7
    assert source.strip() not in every
    for text in every:
        compile(text, "x", "exec")
