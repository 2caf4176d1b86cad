"""From what was typed to a process's exit status. Nothing else knows exit statuses."""

from __future__ import annotations

import difflib
import functools
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Final, ParamSpec

from invoke import tasks
from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from farm.errors import FarmError
from llama_loader.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

USAGE: Final = 2
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""

SEVERAL: Final = frozenset({"--define", "--also", "--variable"})
"""Options that take one value or more, and may be given again."""

_Arguments = ParamSpec("_Arguments")

task = functools.partial(tasks.task, auto_shortflags=False)
"""invoke's decorator without its automatic one-letter options: it gave `-h` to `--fresh`, so that
`invoke build-cpu -h` started a build instead of showing help."""


def verb(function: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn expected errors into their line and exit status; SIGTERM cleans up like Ctrl-C.

    An unexpected error of the disk is one line, too.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        # also SIGINT: a shell's `&` starts programs with it ignored, but its sender means it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        try:
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
                _help_first(program)
                program.core.unparsed[:] = _one_each(program)
            method(program)
        except ParseError as error:
            near = "".join(f"did you mean {name}? " for name in _near(program, error))
            told = "invoke --list, or invoke --help VERB, says what there is"
            _end(f"error[USAGE]: {error}\nhint: {near}{told}", USAGE)
        except BrokenPipeError:  # invoke --list | head
            _end_unread()

    return run


def _near(program: Program, error: ParseError) -> list[str]:
    """Return the verb, or the option of a verb, that is nearest to the one that is unknown."""
    wrong = re.search("'(.*)'", str(error))
    known = [*program.collection.task_names, *(error.context.flags if error.context else ())]
    return difflib.get_close_matches(wrong[1] if wrong else "", known, 1)


def _help_first(program: Program) -> None:
    """Read ``-h`` or ``--help`` after a verb as a request for the verb's help.

    invoke takes the word after a verb for the verb's first argument: ``invoke promote -h`` would
    promote a release of that name.
    """
    words = program.core.unparsed
    if len(words) > 1 and not {"-h", "--help"}.isdisjoint(words[1:]):
        program.args.help.value = words[0]
        words.clear()


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


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt
