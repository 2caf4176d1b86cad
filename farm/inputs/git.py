"""Runs git: with a deadline and bounds, and without what a source or its server names to run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Final

from farm import durable
from farm.errors import SourceError
from farm.inputs.packages import ANSWER, DEADLINE

SETTINGS: Final = "foreign"
"""The file in ``foreign``'s folder with the settings of a foreign repository; git only
reads single values from it (``git config --file``)."""
_SILENCE: Final = 60
"""Seconds without a byte after which git leaves a server."""
_ONLINE: Final = ("fetch", "ls-remote", "rev-list", "worktree")
"""Verbs that may contact a server: ``rev-list`` if the server left out parents of a commit."""
_PROTOCOLS: Final = "https:ssh:git:file"
"""Protocols of mirrors; ``ext::`` and the like run a program. Servers may redirect to
``http``, also of this machine."""
_INHERITED: Final = (
    *("GIT_ASKPASS", "GIT_CONFIG_", "GIT_EXEC_PATH", "GIT_HTTP_", "GIT_PROXY_"),
    *("GIT_SSH", "GIT_SSL_"),
)
"""The person's settings for servers. Not inherited: a hook's ``GIT_DIR`` names its repository."""
_MOST: Final = 16 << 20
"""Bytes that git may print; all paths of a source of 50,000 files take some 5 MB."""
_LIMITED: Final = 'ulimit -Sd 1048576; ulimit -Sf 4194304; exec "$0" "$@"'
"""git, with at most 1 GiB of memory of its own (KiB), and 2 GiB in a file (blocks of 512 bytes)."""
_HARMLESS: Final = re.compile(
    r"(core|extensions)\.(filemode|symlinks|ignorecase|autocrlf|eol|objectformat|refstorage)"
    r"\n([a-z0-9]+)"
)
"""Settings that tell how a repository and its work tree are written."""
_PLAIN: Final = b"* -ident -working-tree-encoding\n"


@contextmanager
def foreign(tree: Path) -> Iterator[tuple[str, ...]]:
    """Yield git's options for a foreign work tree, whose settings may name programs.

    git reads none of them, also if they are changed meanwhile: its folder is a private one with
    the history's names, whose objects are found in the tree's. Its index is HEAD's: that of the
    tree can name files to git as unchanged.

    Raises:
        SourceError: ``GIT_UNREADABLE``: ``.git`` leads nowhere, or is larger than a source's;
            ``GIT_FAILED``: HEAD has no such tree.
    """
    with tempfile.TemporaryDirectory(prefix="llama-farm-git-") as folder:
        own = Path(folder)
        at = ("-C", folder, f"--git-dir={folder}", f"--work-tree={tree}")
        try:
            _borrow(tree, own)
        except (OSError, ValueError) as error:
            raise SourceError("GIT_UNREADABLE", tree=tree, why=error) from error
        asked = ("config", "--file", SETTINGS, "--no-includes", "--null", "--list")
        told = map(_HARMLESS.fullmatch, run(*asked, at=at).stdout.split("\0"))
        lines = ["[core]\nrepositoryformatversion = 1\n"]
        lines += ["[{}]\n{} = {}\n".format(*one.groups()) for one in told if one]
        (own / "config").write_text("".join(lines), "ascii")
        # with these two, changed code can look like HEAD's; git does not compare HEAD's own
        # attributes with their digest
        (own / "info" / "attributes").write_bytes(_PLAIN)
        call("read-tree", "--prefix=", "HEAD", at=at)  # with a prefix it keeps no tree's digest
        if call("write-tree", "--missing-ok", at=at) != call("rev-parse", "HEAD^{tree}", at=at):
            raise SourceError("GIT_UNREADABLE", tree=tree, why="a tree of HEAD has another digest")
        yield at


def _borrow(tree: Path, own: Path) -> None:
    """Copy what names a tree's history to a folder of ours, which leads to the tree's objects."""
    place = tree / ".git"
    if not place.is_dir():  # of a further work tree, or of a submodule
        named = _line(place)
        if not named.startswith("gitdir: "):
            raise ValueError("its .git is no folder, and names none")
        place = tree / named.removeprefix("gitdir: ")
    shared = place / _line(place / "commondir") if (place / "commondir").exists() else place
    if place != shared and (shared / "reftable").is_dir():
        raise ValueError("its references are in reftables of several work trees")
    for name in ("refs", "info"):
        (own / name).mkdir()
    (own / "objects" / "info").mkdir(parents=True)
    (own / "objects" / "info" / "alternates").write_bytes(os.fsencode(shared / "objects") + b"\n")
    copied = {own / "HEAD": place / "HEAD"}
    more = (shared / "packed-refs", shared / "shallow")
    copied.update({own / one.name: one for one in more if one.exists()})
    if (shared / "config").exists():
        copied[own / SETTINGS] = shared / "config"
    for folder in filter(Path.is_dir, (shared / "refs", shared / "reftable")):
        found = durable.files(folder, durable.SMALL)
        copied.update({own / one.relative_to(shared): one for one in found})
    for to, one in copied.items():
        content = durable.read_small(one, follow=False)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(content)


def ignored(tree: Path) -> Iterator[Path]:
    """Yield the paths that git ignores in a foreign work tree; for a whole folder its path alone.

    Raises:
        SourceError: as ``foreign`` and ``call``.
        UsageError: ``SOURCE_UNREADABLE``: there is more than a source has.
    """
    asked = ("ls-files", "--others", "--ignored", "--exclude-per-directory=.gitignore")
    with foreign(tree) as at:
        told = call(*asked, "--directory", "-z", at=at)
    if told.count("\0") > durable.MOST_FILES:
        raise durable.unreadable(tree, f"git ignores more than {durable.MOST_FILES} files there")
    yield from (tree / name for name in told.split("\0") if name)


def _line(path: Path) -> str:
    return os.fsdecode(durable.read_small(path, follow=False)).rstrip("\n")


def call(*argv: str, at: tuple[str, ...] = ()) -> str:
    """Run git as ``run`` does; return what it printed.

    Raises:
        SourceError: ``GIT_FAILED``, ``GIT_MISSING``.
    """
    done = run(*argv, at=at)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SourceError("GIT_FAILED", verb=argv[0], why=last[0])
    return done.stdout.rstrip("\n")


def run(*argv: str, at: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run git with a deadline and bounds: without hooks or monitors, offline but for four verbs.

    These have an hour, the others five minutes.

    Raises:
        SourceError: ``GIT_FAILED``: it was not done in time, or printed too much;
            ``GIT_MISSING``.
    """
    if (program := shutil.which("git")) is None:
        raise SourceError("GIT_MISSING")
    options = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *at)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith(_INHERITED)
    }
    limits = {"GIT_HTTP_LOW_SPEED_LIMIT": "1", "GIT_HTTP_LOW_SPEED_TIME": str(_SILENCE)}
    limits["GIT_NO_REPLACE_OBJECTS"] = "1"
    limits["GIT_TERMINAL_PROMPT"] = "0"  # a server would ask for a password, and wait
    online = argv[0] in _ONLINE
    allowed = os.environ.get("GIT_ALLOW_PROTOCOL", _PROTOCOLS) if online else ""
    try:
        with subprocess.Popen(
            ["sh", "-c", _LIMITED, program, *options, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**inherited, **limits, "GIT_ALLOW_PROTOCOL": allowed},
        ) as process:
            try:
                told, problem = _heard(process, DEADLINE if online else ANSWER)
            except OSError:
                process.terminate()  # git then ends the programs that it started
                raise
    except OSError as error:
        raise SourceError("GIT_FAILED", verb=argv[0], why=str(error)) from error
    return subprocess.CompletedProcess(argv, process.returncode, told, problem)


def _heard(process: subprocess.Popen[bytes], seconds: float) -> list[str]:
    """Return what a program prints to its two pipes until it closes both.

    Raises:
        OSError: it is too much, or takes too long.
    """
    end = time.monotonic() + seconds
    pipes = [pipe.fileno() for pipe in (process.stdout, process.stderr) if pipe]
    told = {pipe: bytearray() for pipe in pipes}
    with DefaultSelector() as open_pipes:
        for pipe in pipes:
            open_pipes.register(pipe, EVENT_READ)
        while open_pipes.get_map():
            left = end - time.monotonic()
            ready = open_pipes.select(left) if left > 0 else []
            if not ready:
                raise TimeoutError(f"not done within {seconds:g} s")
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                told[key.fd] += piece
                if not piece:
                    open_pipes.unregister(key.fd)
            if sum(map(len, told.values())) > _MOST:
                raise OSError(f"it prints more than {_MOST >> 20} MiB")
    return [text.decode("utf-8", "surrogateescape") for text in told.values()]
