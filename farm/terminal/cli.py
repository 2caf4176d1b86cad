"""Turns a command line into an exit status. No other module sets exit statuses."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from inspect import Parameter, Signature, signature
from itertools import pairwise
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    NamedTuple,
    ParamSpec,
    get_args,
    get_origin,
    get_type_hints,
)

from invoke import tasks
from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from farm import options
from farm.errors import FarmError
from llama_loader.errors import LoaderError

USAGE: Final = 2
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""

SEVERAL: Final = frozenset({"--define", "--also", "--variable"})
"""Options that take one value or more, and may be given again."""

_Arguments = ParamSpec("_Arguments")

_HELP: Final = re.compile(r"^    (\w+): (.+)$", re.MULTILINE)
"""A line under ``Args`` or ``Attributes`` of a docstring."""
_MISSING: Final = re.compile(r"'(\S+)' did not receive required positional arguments: (.+)")
"""invoke's message for a verb that lacks a required argument."""
_NO_FOLDER: Final = "arguments: 'folder'"
"""Verbs with an optional release folder: invoke takes an option with a default as named only."""


def guarded(function: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn expected errors into their line and exit status; SIGTERM cleans up like Ctrl-C.

    An unexpected error of the disk is one line, too. Nothing is done where another user can swap a
    temporary folder, or what the farm keeps in a checkout that is this user's alone.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        # also SIGINT: a shell's `&` starts programs with it ignored, but its sender means it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        try:
            _require_own_folders()
            function(*args, **kwargs)
        except FarmError as error:
            _end(error.render(), error.exit_status)
        except LoaderError as error:
            _end(error.render(), 1)
        except BrokenPipeError:
            _end_unread()
        except OSError as error:
            _end(f"error[SYSTEM]: {error}\nhint: is there room, and may this user write?", 1)
        except KeyboardInterrupt:
            _end("error[INTERRUPTED]: stopped; the same command resumes", INTERRUPTED)

    return run


def _require_own_folders() -> None:
    # `invoke --list` imports none of the work
    from farm import STATE_FOLDER, durable  # noqa: PLC0415

    durable.require_own_temporary()
    durable.require_own_out(STATE_FOLDER, "FOLDER_NOT_OWN")


def verb(function: Callable[..., None]) -> Callable[..., Any]:
    """Make a verb of a function whose parameters, after invoke's context, are its options.

    A parameter may be a class of ``farm.options``: then its fields are options. Help is an option's
    line in the docstring; a field without one is no option. invoke's own one-letter options are
    off: it gave `-h` to `--fresh`, so that `invoke build-cpu -h` started a build.
    """
    found = tuple(_options(function))
    classes = {one.of: one.kind for one in found if one.kind}

    @functools.wraps(function)
    def run(context: object, **typed: Any) -> None:
        given: dict[str, Any] = {name: {} for name in classes}
        for of, kind, option, _ in found:
            value = _value(option, typed.get(option.name, _typed(option.default)))
            (given[of] if kind else given)[option.name] = value
        function(context, **given | {name: kind(**given[name]) for name, kind in classes.items()})

    guard: Any = guarded(run)
    shape = (o.replace(default=_typed(o.default), kind=o.KEYWORD_ONLY) for _, _, o, _ in found)
    guard.__signature__ = Signature([Parameter("_", Parameter.POSITIONAL_ONLY), *shape])
    guard.__doc__ = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    return tasks.task(
        guard,
        auto_shortflags=False,
        help={one.option.name: f"{one.help}{_default(one.option.default)}" for one in found},
        iterable=[one.option.name for one in found if isinstance(one.option.default, tuple)],
    )


def _default(default: Any) -> str:
    """Return a default as help shows it: of what a person types, not of switches."""
    shown = isinstance(_typed(default), str) and _typed(default)
    return f" (default: {default})" if shown else ""


class _Option(NamedTuple):
    """An option, and its help. ``of``: the parameter that it is a field of; ``kind``: its class."""

    of: str
    kind: Any
    option: Parameter
    help: str


def _options(function: Callable[..., None]) -> Iterator[_Option]:
    helps = dict(_HELP.findall(inspect.getdoc(function) or ""))
    for parameter in _parameters(function)[1:]:
        kind, *told = _parts(parameter.annotation)
        if not is_dataclass(kind):
            yield _Option(parameter.name, None, parameter, helps[parameter.name])
            continue
        lines = dict(_HELP.findall(inspect.getdoc(kind) or ""))
        only = told[0] if told else options.Only(*lines)
        for field in _parameters(kind):
            if field.name in only.names:
                own = field.replace(default=only.defaults.get(field.name, field.default))
                yield _Option(parameter.name, kind, own, lines[field.name])


def _parameters(of: Any) -> list[Parameter]:
    hints = get_type_hints(of, include_extras=True)
    found = signature(of).parameters.values()
    return [one.replace(annotation=hints.get(one.name, object)) for one in found]


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return a type, and what ``Annotated`` adds to it."""
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)


def _typed(default: Any) -> Any:
    """Return a default as it would be typed: of a number, invoke would parse the text itself."""
    if default in (None, Parameter.empty) or isinstance(default, bool):
        return default
    return None if isinstance(default, tuple) else str(default)


def _value(option: Parameter, text: Any) -> Any:
    """Return the value of what was typed."""
    if text is None and not isinstance(option.default, tuple):
        return None
    kind, *parse = _parts(option.annotation)
    name, kinds = f"--{option.name.replace('_', '-')}", (kind, *get_args(kind))
    if parse or int in kinds:
        return (*parse, options.number)[0](name, text)
    if isinstance(option.default, tuple):
        return tuple(text or ())
    if Path in kinds:
        return Path(text) if text or option.default is not None else None
    return text


def refuse_wrong_usage() -> None:
    """Make invoke report wrong usage with our error line and status 2, and show help for ``-h``.

    invoke's own status for an unknown verb or option is 1, the same as for a failed build, and no
    setting changes it. invoke is already running when it loads ``tasks.py``, so this replaces the
    methods of its program. A second call changes nothing.
    """
    for name in ("parse_tasks", "parse_cleanup"):
        method = getattr(Program, name)
        if not hasattr(method, "__wrapped__"):
            setattr(Program, name, _as_usage(method))


def _as_usage(method: Callable[[Program], None]) -> Callable[[Program], None]:
    @functools.wraps(method)
    def run(program: Program) -> None:
        try:
            if method.__name__ == "parse_tasks":
                # after a verb, too: invoke takes the next word for the verb's first argument, so
                # that `invoke promote -h` would promote a release of that name
                words = program.core.unparsed
                if len(words) > 1 and not {"-h", "--help"}.isdisjoint(words[1:]):
                    program.args.help.value = words[0]
                    words.clear()
                program.core.unparsed[:] = _one_each(program)
            method(program)
        except ParseError as error:
            if str(error).endswith(_NO_FOLDER):
                program.core.unparsed += ["--folder", "dist"]
                return run(program)
            if missing := _MISSING.fullmatch(str(error)):
                given, names = missing[1], missing[2].replace("'", "").replace("_", "-").upper()
                hint = f"invoke --help {given} says what it takes"
                _end(f"error[USAGE]: {given} needs {names}\nhint: {hint}", USAGE)
            near = " or ".join(_near(program, error))
            told = "invoke --list, or invoke --help VERB, says what there is"
            asked = f"did you mean {near}? " if near else ""
            _end(f"error[USAGE]: {error}\nhint: {asked}{told}", USAGE)
        except BrokenPipeError:  # invoke --list | head
            _end_unread()

    return run


def _near(program: Program, error: ParseError) -> list[str]:
    """Return the verbs, or options of a verb, that begin with the unknown one, or the nearest.

    Without a near one, it is a value whose option was left out: ``invoke status dist``.
    """
    found = re.search("'(-*)(.*)'", str(error))
    dashes, wrong = found.groups() if found else ("", "")
    flags = error.context.flags if error.context and dashes else ()
    known = [name.lstrip("-") for name in flags or program.collection.task_names]
    if wrong == "dry-run" and "check" in known:  # of a build it has another name
        wrong = "check"
    begun = [name for name in known if wrong and name.startswith(wrong)]
    near = [f"{dashes}{name}" for name in begun or difflib.get_close_matches(wrong, known, 1)]
    verb = error.context if error.context and error.context.name and wrong and not dashes else None
    return near or (_with_options(program.core.unparsed, verb) if verb else [])


def _with_options(words: list[str], verb: Any) -> list[str]:
    """Return the command with an option before each value without one, if it has such a value."""
    words = words[words.index(str(verb.name)) :]
    taken = [one for one in verb.args.values() if one.takes_value]
    taking = {f"--{one.name.replace('_', '-')}": one.positional for one in taken}
    given = {word.partition("=")[0] for word in words}
    ordered = sorted(taking, key=lambda name: not taking[name])
    left = iter(["" if taking[name] else name for name in ordered if name not in given])
    whole = ["invoke", *words[:1]]
    for before, word in pairwise(words):
        alone = not word.startswith("-") and before not in taking
        whole += [next(left, "") if alone else "", word]
    whole = [word for word in whole if word]
    return [shlex.join(whole)] if whole[1:] != words else []


def _one_each(program: Program) -> list[str]:
    """Write ``--also a b`` as ``--also a --also b``: invoke takes ``b`` for another verb."""
    words: list[str] = []
    option = ""
    for word in program.core.unparsed:
        if word.startswith("-"):
            option = word if word in SEVERAL else ""
        elif word in program.collection.task_names:
            option = ""
        elif option and words[-1] != option:
            words.append(option)
        words.append(word)
    return words


def _end_unread() -> None:
    # Python's own last flush must not fail, too, in a second message
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _end("error[OUTPUT_CLOSED]: the program that read the output has ended, so this stopped", 1)


def _end(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    raise Exit(code=status)
