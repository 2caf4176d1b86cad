"""Small wrong versions of a module: one operator, one constant or one statement changed in each.

What is changed: comparisons, ``and``/``or``, conditions, ``not``, arithmetic, numbers, booleans,
strings of one word (keys, codes, patterns; sentences are for people), returned values; and
statements that are left out: calls, ``raise``, ``yield``, ``continue``/``break``, changes of an
attribute or an item. Docstrings, annotations, ``TYPE_CHECKING`` blocks and ``/`` (which joins
paths here, and fails at once as anything else) are left alone.
"""

from __future__ import annotations

import ast
import copy
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_COMPARED: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COMPUTED: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Pow: ast.Mult,
}
_WITH_NOTHING: Final = (ast.Raise, ast.Continue, ast.Break, ast.Delete, ast.Assert)
_FOR_READERS: Final = {"annotation", "returns", "type_comment", "format_spec"}
_Path = tuple[tuple[str, int | None], ...]


class Mutant(NamedTuple):
    """One wrong version.

    Attributes:
        line: where the change is.
        function: first line of the function that it is in, None for what runs at import.
        change: in words, for people; with the line's text it names the mutant for good.
        tree: the whole module.
    """

    line: int
    function: int | None
    change: str
    tree: ast.Module


class _Change(NamedTuple):
    words: str
    make: Callable[[Any], Any]


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module's source, in the order of its text."""
    tree = ast.parse(source)
    for path, node, function in _places(tree, (), None):
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            _put(changed, path, change.make)
            line = getattr(node, "lineno", 0)
            yield Mutant(line, function, change.words, ast.fix_missing_locations(changed))


def _places(
    node: ast.AST, path: _Path, function: int | None
) -> Iterator[tuple[_Path, ast.AST, int | None]]:
    """Every node that may be changed, with the way to it and the function that it runs in."""
    for field, value in ast.iter_fields(node):
        if field in _FOR_READERS:
            continue
        inside = _first_line(node) if _is_function(node) and field == "body" else function
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            if not isinstance(item, ast.AST) or _is_left_alone(item):
                continue
            here = (*path, (field, index if isinstance(value, list) else None))
            yield here, item, inside
            yield from _places(item, here, inside)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _first_line(node: Any) -> Any:
    """As a code object counts: a function begins with its first decorator."""
    return min(one.lineno for one in [node, *node.decorator_list])


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.Import | ast.ImportFrom)


def _changes(node: ast.AST) -> Iterator[_Change]:
    if isinstance(node, ast.expr):
        yield from _expression_changes(node)
    elif isinstance(node, ast.stmt):
        yield from _statement_changes(node)


def _expression_changes(node: ast.expr) -> Iterator[_Change]:
    before = ast.unparse(node)
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in _COMPARED[type(operator)]:
                yield _Change(f"{before}: {other.__name__}", _compare(index, other))
    elif isinstance(node, ast.BoolOp):
        other_bool = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield _Change(f"{before}: {other_bool.__name__}", _operator(other_bool()))
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        computed = _COMPUTED[type(node.op)]
        yield _Change(f"{before}: {computed.__name__}", _operator(computed()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield _Change(f"{before}: without {type(node.op).__name__}", _operand)
    elif isinstance(node, ast.Constant):
        yield from _constant_changes(node)
    elif isinstance(node, ast.IfExp):
        yield _Change(f"{before}: not", _negated)


def _constant_changes(node: ast.Constant) -> Iterator[_Change]:
    value = node.value
    other: Any = None
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, int | float):
        other = value + 1
    elif isinstance(value, str) and " " not in value:
        other = f"{value}XX"
    elif isinstance(value, bytes) and b" " not in value:
        other = value + b"XX"
    if other is not None:
        yield _Change(f"{value!r}: {other!r}", lambda _: ast.Constant(other))


def _statement_changes(node: ast.stmt) -> Iterator[_Change]:
    before = ast.unparse(node).partition("\n")[0]
    if isinstance(node, ast.If | ast.While):
        yield _Change(f"{before} not", _negated)
    elif isinstance(node, ast.Return) and not _is_none(node.value):
        yield _Change(f"{before}: return None", lambda _: ast.Return(ast.Constant(None)))
    elif isinstance(node, _WITH_NOTHING) or _is_effect(node):
        yield _Change(f"{before}: left out", lambda _: ast.Pass())


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_effect(node: ast.stmt) -> bool:
    """A statement whose absence does not end in a NameError at once."""
    if isinstance(node, ast.Assign):
        return any(isinstance(one, ast.Attribute | ast.Subscript) for one in node.targets)
    return isinstance(node, ast.Expr | ast.AugAssign)


def _compare(index: int, other: type[ast.cmpop]) -> Callable[[Any], Any]:
    def make(node: Any) -> Any:
        node.ops[index] = other()
        return node

    return make


def _operator(other: ast.boolop | ast.operator) -> Callable[[Any], Any]:
    def make(node: Any) -> Any:
        node.op = other
        return node

    return make


def _operand(node: Any) -> Any:
    return node.operand


def _negated(node: Any) -> Any:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _put(tree: Any, path: _Path, make: Callable[[Any], Any]) -> None:
    """Replace the node at the end of the path by what ``make`` makes of it."""
    for field, index in path[:-1]:
        value = getattr(tree, field)
        tree = value if index is None else value[index]
    field, index = path[-1]
    value = getattr(tree, field)
    if index is None:
        setattr(tree, field, make(value))
    else:
        value[index] = make(value[index])
