"""Makes a site out of this folder with Sphinx: ``nox -s docs``.

Lines such as ``% errors`` in a page are replaced by what the code says, so that a reference cannot
be older than the code.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from invoke.collection import Collection

import llama_space
import tasks
from farm.release import json_schema
from llama_loader import __main__ as loader
from llama_loader import doctor as examination
from llama_loader import errors as loader_errors
from llama_loader import settings as loader_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sphinx.application import Sphinx

project = "llama-server for Spaces"
html_title = project
html_theme = "furo"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
smartquotes = False
html_show_copyright = False
exclude_patterns = ["figures"]

_ROOT: Final = Path(__file__).resolve().parents[1]
_PACKAGES: Final = ("llama_loader", "llama_space", "translator")
_CODES: Final = json.loads((_ROOT / "spaces/translator/sentences_ja.json").read_text("utf-8"))
"""All codes: a test compares them with the sources (tests/translator/test_sentences.py)."""
_SENTENCES: Final = json.loads((_ROOT / "spaces/llama_loader/sentences.json").read_text("utf-8"))
_FARM_SENTENCES: Final = json.loads((_ROOT / "farm/sentences.json").read_text("utf-8"))
_KINDS: Final = {
    name: kind.exit_status
    for name, kind in vars(loader_errors).items()
    if inspect.isclass(kind) and issubclass(kind, loader_errors.LoaderError)
}

_STATUSES: Final = {
    1: "Exit status 1: a wrong call, or a defect",
    2: "Exit status 2: usage or setting",
    3: "Exit status 3: network",
    4: "Exit status 4: integrity or trust",
    5: "Exit status 5: this host cannot run it",
    6: "Exit status 6: disk or store",
    7: "Exit status 7: the server did not start, or died",
    0: "Warnings, and codes of several kinds",
}


def errors() -> str:
    """Return all codes with the sentences and hints that go with them, by exit status."""
    found: dict[tuple[int, str], set[tuple[str, str]]] = {}
    for package in _PACKAGES:
        for status, code, what, cure in _raised(package):
            said = found.setdefault((status, code), set())
            if what.strip("… :().,"):
                said.add((what, cure))
    for name, words in _SENTENCES.items():  # some are chosen where they are raised
        code, told = name.partition("/")[0], _told(words)
        places = [said for (_, known), said in found.items() if known == code]
        if not any(told in said for said in places):
            (places or [found.setdefault((0, code), set())])[0].add(told)
    sections = dict.fromkeys(_STATUSES, "")
    for (status, code), said in sorted(found.items()):
        if said:
            sections[status] += f"`{code}`\n" + "".join(map(_definition, sorted(said))) + "\n"
    return "".join(
        f"## {_STATUSES[status]}\n\n{section}" for status, section in sections.items() if section
    )


def farm_errors() -> str:
    """Return the farm's codes with their sentences and hints."""
    found: dict[str, list[str]] = {}
    for name, words in _FARM_SENTENCES.items():
        found.setdefault(name.partition("/")[0], []).append(_definition(_told(words)))
    return "".join(f"`{code}`\n{''.join(said)}\n" for code, said in sorted(found.items()))


def _definition(said: tuple[str, str]) -> str:
    what, cure = (text.replace("<", "\\<").replace("*", "\\*") for text in said)
    return f": {what}\n" + (f"\n  *{cure}*\n" if cure else "")


def _raised(package: str) -> Iterator[tuple[int, str, str, str]]:
    causes = _ROOT / "spaces" / package / "causes.json"  # of an end, which llama-server's log shows
    for kind, name, _ in json.loads(causes.read_text("utf-8")) if causes.exists() else ():
        yield from _row(kind, [ast.Constant(name)])
    for path in sorted((_ROOT / "spaces" / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(func=function, args=given, keywords=named):
                    kind = function.id if isinstance(function, ast.Name) else ""
                    hints = [one.value for one in named if one.arg == "hint"]
                    yield from _row(kind, [*given, *hints])
                    wrong = [one.value for one in named if one.arg == "wrong"]  # of a download
                    yield from _row("IntegrityError", wrong)
                case ast.Tuple(elts=given):
                    yield from _row("", given)


def _row(kind: str, given: list[ast.expr]) -> Iterator[tuple[int, str, str, str]]:
    values = [one.value if isinstance(one, ast.Constant) else None for one in given]
    for number, value in enumerate(values):
        if not isinstance(value, str) or value.partition("/")[0] not in _CODES:
            continue
        what, cure, *_ = [*(_words(one) for one in given[number + 1 :]), "", ""]
        if value in _SENTENCES and not what:
            what, cure = _told(_SENTENCES[value])
        if what not in _CODES:
            yield _KINDS.get(kind, 0), value.partition("/")[0], what, cure


def _told(words: dict[str, str]) -> tuple[str, str]:
    """Return a sentence and its hint, with ``…`` for what is filled in when it is raised."""
    what, cure = (re.sub(r"{\w[^}]*}", "…", words.get(name, "")) for name in ("what", "hint"))
    return what, cure.replace("{{", "{").replace("}}", "}")


def _words(said: ast.expr) -> str:
    """Return the text of a string, with ``…`` for what is filled in when it is raised."""
    match said:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_words(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _words(left) + _words(right)
    return "…"


def schema() -> str:
    """Return the manifest's JSON Schema."""
    return f"```json\n{json.dumps(json_schema(), indent=2)}\n```\n"


def doctor() -> str:
    """Return the JSON Schema of ``doctor --json``."""
    return f"```json\n{json.dumps(examination.json_schema(), indent=2)}\n```\n"


def settings() -> str:
    """Return every variable with its option, what it accepts and its default."""
    rows = (one.metadata["row"] for one in fields(loader_settings.Settings) if one.metadata)
    table = [
        f"| `{row.variable}` | {row.option and f'`{row.option}`'} | {row.kind.accepts} |"
        f" {'' if row.default in {None, ()} else f'`{row.default}`'} |"
        for row in rows
        if row.variable
    ]
    head = ["| variable | option | accepts | default |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *table]) + "\n"


def commands() -> str:
    """Return the help of every command of the loader."""
    actions = loader._parser()._actions  # noqa: SLF001 - argparse lists commands nowhere else
    subparsers = next(one.choices for one in actions if isinstance(one.choices, dict))
    return "\n".join(
        f"### {name}\n\n```text\n{command.format_help()}```\n"
        for name, command in subparsers.items()
    )


def verbs() -> str:
    """Return every verb of the farm with its options; their help has their defaults."""
    farm = Collection.from_module(tasks)
    lines = []
    for verb in sorted(farm.to_contexts(), key=lambda one: str(one.name)):
        lines.append(f"## {verb.name}\n\n{inspect.getdoc(farm[verb.name])}\n")
        if verb.args:
            lines.append("| option | meaning |\n| --- | --- |")
        for option in verb.args.values():
            name = f"`{'' if option.positional else '--'}{option.name.replace('_', '-')}`"
            lines.append(f"| {name} | {option.help or ''} |")
        lines.append("")
    return "\n".join(lines)


def api() -> str:
    """Return the public names of ``llama_space``, their signatures and docstrings."""
    public = {name: getattr(llama_space, name) for name in llama_space.__all__}
    return "\n".join(f"{_described(name, thing)}" for name, thing in public.items())


def _described(name: str, thing: object) -> str:
    lines = [f"## {name}\n", f"{_doc(thing)}\n"]
    if inspect.isclass(thing) and not issubclass(thing, BaseException):
        for method, function in vars(thing).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                lines.append(f"### {name}.{method}\n")
                lines.append(f"```python\n{method}{_signature(function)}\n```\n")
                lines.append(f"{_doc(function)}\n")
    return "\n".join(lines)


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    given = [one for name, one in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=given)).replace("'", "")


def _doc(thing: object) -> str:
    return f"```text\n{inspect.getdoc(thing) or ''}\n```"


def decisions() -> str:
    """Return a table of contents with every record's title, by number."""
    names = sorted(path.stem for path in (_ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```", ""])


_GENERATED: Final[dict[str, Callable[[], str]]] = {
    "settings": settings,
    "commands": commands,
    "verbs": verbs,
    "errors": errors,
    "farm_errors": farm_errors,
    "schema": schema,
    "doctor": doctor,
    "api": api,
    "decisions": decisions,
}


def _filled(app: Sphinx, name: str, source: list[str]) -> None:
    del app, name
    for word, made in _GENERATED.items():
        if f"% {word}\n" in source[0]:
            source[0] = source[0].replace(f"% {word}\n", made())


def setup(app: Sphinx) -> None:
    """Fill in what is generated while Sphinx reads a page."""
    app.connect("source-read", _filled)
