"""``python3 -m llama_loader COMMAND``: fetch, devices, serve, doctor, verify.

docs/cli.md is the contract of outputs and exit statuses, which are decided here and nowhere else.
Each command imports what it needs itself, so that ``--help`` answers at once.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - Python 3.8 and 3.9 read this far
    sys.stderr.write("error[USAGE]: llama_loader needs Python 3.10 or newer\n")
    sys.exit(2)

if __name__ == "__main__":
    # -m puts the working folder before all others, also in one where any user may put a json.py;
    # not even __future__ is imported before it is out. (3.10 has no sys.flags.safe_path.)
    _put = not getattr(sys.flags, "safe_path", sys.flags.isolated)
    if _put and sys.path[0] != __file__.rsplit("/", 2)[0]:
        del sys.path[0]

import os
import signal

_OK, _FAILED, _USAGE, _SYSTEM, _INTERRUPTED = 0, 1, 2, 6, 130
"""The last one is 128 + SIGINT, as shells have it."""
_STOPPED = "error[INTERRUPTED]: interrupted; the next run resumes with what was verified"


def _end_at_once(number: int, frame: object) -> None:
    """Answer Ctrl-C while modules are imported: nothing was begun."""
    del number, frame
    os.write(2, f"{_STOPPED}\n".encode())
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _end_at_once)

import argparse
import difflib
import io
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from llama_loader import __version__
from llama_loader.errors import LoaderError, SettingError, printable, tell

if TYPE_CHECKING:
    from llama_loader.console import Console
    from llama_loader.events import Sink
    from llama_loader.settings import Settings

_OPTIONS = (
    ("--manifest", "manifest_url", "URL", "the release's manifest"),
    ("--manifest-sha256", "manifest_sha256", "HEX", "pins that manifest"),
    ("--url", "url", "URL", "a tarball instead of a manifest"),
    ("--sha256", "sha256", "HEX", "pins that tarball"),
    ("--store", "store", "DIR", "where runtimes are installed"),
    ("--arch", "cuda_arch", "N", "compute capability instead of the detected one, e.g. 90"),
    ("--device", "devices", "NAMES", "'auto', or names such as CUDA0,CUDA1"),
    ("--allow-cpu", "allow_cpu", "", "run where no GPU is found"),
    ("--offline", "offline", "", "never open a connection"),
    ("--no-test-run", "no_test_run", "", "do not try it with a tiny model"),
)
"""Option, field of ``Settings``, what it takes (nothing: it means ``1``) and its help."""
_MISPLACED = "comes before the command"


class _Parser(argparse.ArgumentParser):
    """Prints usage errors in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        """Print the error line, with a name that is near to a wrong one, and end with status 2."""
        found = re.search(r"(?:choice: '|arguments: )(-*)([^\s'=]*)", message)
        dashes, wrong = found.groups() if found else ("", "")
        known = re.findall(r"--([a-z-]+)", self.format_help()) if dashes else _COMMANDS
        near = difflib.get_close_matches(wrong, known, 1)
        hint = "".join(f"did you mean {dashes}{name}? " for name in near)
        file = re.search(r"arguments: (?:.* )?(\S+\.gguf)(?: |$)", message)
        if file and not near and self.prog.endswith((" serve", " doctor")):
            hint = f"did you mean --model {file[1]}? "
        if message.endswith(_MISPLACED):
            hint += "options come after the command: "
        after = "; options of llama-server go after --" if self.prog.endswith(" serve") else ""
        error = LoaderError("USAGE", message, hint=f"{hint}{self.prog} --help{after}")
        raise SystemExit(_complain(error.render(), _USAGE))

    def print_help(self, file: Any = None) -> None:
        """Print the help at once."""
        tell(file or sys.stdout, self.format_help(), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors are their lines, never a traceback."""
    sys.excepthook = _report_defect
    _print_anything()
    options = _parsed(list(sys.argv[1:] if arguments is None else arguments))
    from llama_loader.console import Console

    try:
        return options.run(options, Console()) or _OK
    except LoaderError as error:
        from llama_loader.settings import named

        return _complain(named(error.render()), error.exit_status)
    except KeyboardInterrupt:
        return _complain(_STOPPED, _INTERRUPTED)
    except ImportError as error:
        missing = _missing_package(error)
        return _complain(missing.render(), missing.exit_status)
    except OSError as error:
        return _complain(LoaderError("SYSTEM/output", error=error).render(), _SYSTEM)


def _parsed(given: list[str]) -> argparse.Namespace:
    extra: list[str] | None = None
    if "--" in given:
        extra = given[given.index("--") + 1 :]
        given = given[: given.index("--")]
    parser = _parser()
    if given and given[0].startswith("--") and given[0] not in {"--help", "--version"}:
        parser.error(f"{given[0].partition('=')[0]} {_MISPLACED}")
    options, unknown = parser.parse_known_args(given)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra is not None and options.command != "serve":
        parser.error(f"'{options.command}' takes no arguments after --")
    if getattr(options, "folder", None) == "":  # a variable of a script that is not set
        options.parser.error("argument DIR: is empty")
    options.extra = tuple(extra or ())
    return options


def _missing_package(error: ImportError) -> SettingError:
    """Return the error about a package that is not installed; the loader's own is a defect."""
    name = (error.name or "").partition(".")[0]
    if name in {"", "llama_loader"}:
        raise error
    package = {"minisign": "py-minisign", "backports": "backports.zstd"}.get(name, name)
    listed = Path(__file__).parent.parent / "requirements.txt"  # the installed wheel has none
    wanted = f"-r {shlex.quote(str(listed))}" if listed.is_file() else package
    python = shlex.quote(sys.executable)
    return SettingError(
        "PACKAGE_MISSING", package=package, error=error, python=python, wanted=wanted
    )


def _print_anything() -> None:
    """Make a stream that takes ASCII alone, or is closed (``fetch >&-``), cause no traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - while the process lives
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print one line with the place in the code, not a traceback; Python then exits with 1."""
    import traceback

    frame = traceback.extract_tb(trace)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    defect = LoaderError("UNEXPECTED", kind=kind.__name__, error=error, place=place)
    _complain(defect.render(), _FAILED)


def _complain(lines: str, status: int) -> int:
    """Print an error; return the status."""
    with suppress(OSError):
        _end(sys.stderr, lines)
    return status


def _print(options: argparse.Namespace, text: str, document: Any) -> None:
    """Print a command's result."""
    _end(sys.stdout, json.dumps(document) if options.json else text)


def _end(stream: TextIO, text: str) -> None:
    """Print the command's last output; a signal can no longer interrupt the command."""
    from llama_loader.console import Console, end_undisturbed

    end_undisturbed()
    Console().clear()
    tell(stream, text)


def _settings(options: argparse.Namespace, sink: "Sink") -> "Settings":
    """Read the environment and the options; each option is stored under its field's name."""
    from llama_loader import settings
    from llama_loader.console import clean_up_when_told

    clean_up_when_told()  # from here on there may be something to clean up
    fields = settings.Settings.__dataclass_fields__
    given = {name: text for name, text in vars(options).items() if name in fields}
    if getattr(options, "hf", None):
        repo, *name = options.hf
        if name[1:] or bool(name) == (":" in repo):
            raise SettingError("USAGE/hub")
        given["gguf_repo_id"], given["gguf_filename"] = repo, name[0] if name else None
    found = settings.load(given)
    for note in found.unknown:
        sink(note)
    return found


def _fetch(options: argparse.Namespace, console: "Console") -> None:
    from llama_loader import loader, report, self_test

    settings = _settings(options, console)
    prepared = loader.prepare(settings, sink=console)
    tested = None
    if not settings.no_test_run and self_test.possible(settings, prepared):
        console.stage("test run with a tiny model")
        tested = loader.try_runtime(settings, prepared)
    for note in report.notes(prepared):
        console(note)
    folder = printable(str(prepared.installed.folder))
    _print(options, folder, report.fetched(settings, prepared, tested))


def _devices(options: argparse.Namespace, console: "Console") -> None:
    from llama_loader import loader, model, report

    settings = _settings(options, console)
    prepared = loader.prepare(settings, sink=console)
    console.clear()
    loader.require_libraries(settings, prepared)
    listing = loader.list_devices(settings, prepared)
    if not options.json:  # also where none of them can be chosen
        tell(sys.stdout, report.device_lines(listing))
    path = model.at_hand(settings)
    chosen = loader.choose_devices(settings, prepared, path, listing=listing)
    line = printable(f"chosen: {report.chosen(chosen)}")
    _print(options, line, report.devices(listing, chosen))


def _serve(options: argparse.Namespace, console: "Console") -> None:
    from llama_loader import host

    settings = _settings(options, console)
    if not settings.model_named:
        raise SettingError("USAGE/model")
    looking = host.begin(settings)
    from llama_loader import loader, model, report, server, server_plan
    from llama_loader.events import Note

    for note in server_plan.check(options.extra, no_key=options.no_key):
        console(note)
    extra = server_plan.with_whole_paths(options.extra, Path.cwd())
    if settings.server_port is not None:
        server.free_port(settings.server_port)  # refused before anything is downloaded
    prepared = loader.prepare(settings, looking=looking, hashed=False, sink=console)
    loader.require_libraries(settings, prepared)
    with prepared.timeline.stage("model"):
        path = model.get(settings, sink=console)
    console.stage(f"starting llama-server on {path.name}")
    # one key for this command: clients keep working when the server is restarted
    key = None if options.no_key or server_plan.has_key(extra) else server.new_key()
    running = loader.start(settings, prepared, path, extra, key=key, sink=console)
    try:
        console.clear()
        if options.json:
            told = report.served(settings, prepared, running, path, key)
            tell(sys.stdout, json.dumps(told))
        elif key is not None:
            console(Note.of("API_KEY", key=key))
        with suppress(KeyboardInterrupt):  # from now on this is how it ends
            tell(sys.stdout, f"ready {running.url}")
            running.watch()
    finally:
        running.stop()


def _doctor(options: argparse.Namespace, console: "Console") -> int:
    from llama_loader import doctor
    from llama_loader.events import ignore

    if options.suppose is None:
        found = doctor.examine(lambda: _settings(options, ignore), sink=console)
        _print(options, found.as_text(), found.as_json())
        for check in found.checks:
            if not check.ok:
                error = LoaderError(check.code, check.detail, hint=check.hint)
                return _complain(error.render(), found.exit_status)
        return _OK
    supposed = doctor.suppose(options.suppose, _settings(options, console), console)
    _print(options, supposed.as_text(), supposed.as_json())
    if supposed.failure is not None:
        raise supposed.failure
    return _OK


def _verify(options: argparse.Namespace, console: "Console") -> None:
    from llama_loader import loader
    from llama_loader.store import Store

    settings, folder = _settings(options, console), Path(options.folder).absolute()
    entries = None
    if settings.manifest_url is not None or settings.manifest_sha256 is not None:
        entries = loader.read_manifest(settings, console)[0].artifacts
    installed = Store(settings.store, sink=console).verify(folder, entries)
    console.clear()
    entry = installed.artifact if entries is not None else None
    compared = f"the manifest's entry {entry.name}" if entry else "the runtime's own receipt"
    told = {"folder": str(installed.folder), "sha256": installed.sha256, "ok": True}
    text = f"ok {printable(str(installed.folder))}\ncompared with {compared}"
    _print(options, text, {**told, "compared_with": compared})


_COMMANDS = {
    "fetch": (_fetch, "install the runtime for this host; prints its folder"),
    "devices": (_devices, "what --list-devices finds, and which would be chosen"),
    "serve": (_serve, "serve a model until interrupted"),
    "doctor": (_doctor, "every fact, choice, check and hint on one page"),
    "verify": (_verify, "hash an installed runtime again"),
}


def _parser() -> _Parser:
    parser = _Parser(
        prog="python3 -m llama_loader",
        description="Fetches a verified llama-server for this machine, and runs it.",
        epilog="Options override the YAKULINGO_SPACES_… variables. Exit status: 0 done, 2 usage or"
        " setting, 3 network, 4 integrity or trust, 5 this host cannot run it, 6 disk or store,"
        " 7 the server did not start or died.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llama_loader {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run, parser=command)
        for option, field, value, meaning in _OPTIONS:
            if option == "--no-test-run" and name in {"devices", "serve", "verify"}:
                continue
            if value:
                command.add_argument(option, dest=field, metavar=value, help=meaning)
            else:
                command.add_argument(option, action="store_const", const="1", help=meaning)
        command.add_argument("--json", action="store_true", help="machine-readable output")
        if name in {"serve", "doctor"}:
            what = command.add_mutually_exclusive_group()
            what.add_argument("--model", dest="gguf_path", metavar="PATH", help="a GGUF file")
            taken = "a file on the Hub, or REPO:Q4_K_M"
            what.add_argument("--hf", nargs="+", metavar=("REPO", "FILE"), help=taken)
            port = "listen here (default: a free port)"
            command.add_argument("--port", dest="server_port", metavar="N", help=port)
        if name == "serve":
            command.usage = "%(prog)s (--model PATH | --hf REPO FILE) [options] [-- EXTRA ...]"
            no_key = "ask for no key (default: a random one, printed)"
            command.add_argument("--no-key", action="store_true", help=no_key)
        elif name == "doctor":
            command.add_argument(
                "--suppose",
                metavar="FACTS",
                help="say what another machine would fetch, e.g."
                " capability=12.0,driver=580,glibc=2.36,torch=cu128",
            )
        elif name == "verify":
            command.add_argument("folder", metavar="DIR", help="the folder that fetch printed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
