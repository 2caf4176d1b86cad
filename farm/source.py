"""llama.cpp's source: a hash-pinned archive, a git ref, or a folder → one ``Source``.

The build number and the commit come with the source, whichever way it came: they end in
``llama-server --version`` and in the manifest.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from farm.errors import SourceError, UsageError
from farm.inputs.packages import cache_folder, extract_subtree, fetch_package
from farm.inputs.unpack import new_folder
from farm.kept.folder_digest import files
from farm.kept.kept_source import kept

if TYPE_CHECKING:
    from pathlib import Path

    from farm.inputs.pins import SourcePin

GIT_REMOTE: Final = "https://github.com/ggml-org/llama.cpp"
"""A mirror is named with git's own ``url.<base>.insteadOf`` setting."""

SHORT_COMMIT: Final = 9
"""Digits of the commit in ``llama-server --version``, as llama.cpp's own releases have."""

_VERSION_PART: Final = re.compile(r"set\(LLAMA_VERSION_(MAJOR|MINOR|PATCH)\s+(\d+)\)")


@dataclass(frozen=True)
class Source:
    """A source tree and what is known of it.

    ``build`` is llama.cpp's build number, 0 where it is not known; ``commit`` has 40 digits
    (followed by ``-dirty`` for a changed work tree); ``sha256`` is the archive's; ``note`` is
    a line that a person must see.
    """

    tree: Path
    version: str | None
    build: int
    commit: str | None
    origin: str
    sha256: str | None
    project: str = "llama.cpp"
    note: str | None = None

    @property
    def short_commit(self) -> str:
        """The commit as ``llama-server --version`` shows it, ``unknown`` where it is not known."""
        if self.commit is None:
            return "unknown"
        digits, _, dirty = self.commit.partition("-")
        return digits[:SHORT_COMMIT] + (f"-{dirty}" if dirty else "")


def from_archive(pin: SourcePin) -> Source:
    """Fetch the pinned archive (a verified cached copy is used again) and unpack its tree.

    Raises:
        SourceError: no network and no cached copy, or the bytes are not those of the pin.
    """
    archive = fetch_package(pin)
    key = hashlib.sha256(f"{pin.sha256}#{pin.subdir}".encode()).hexdigest()
    tree, note = kept(key, lambda folder: extract_subtree(archive, pin.subdir, folder))
    return Source(
        tree=tree,
        version=pin.llama_version,
        build=pin.build,
        commit=pin.commit,
        origin=f"pypi:{pin.filename}#{pin.subdir}",
        sha256=pin.sha256,
        note=note,
    )


def from_ref(ref: str, *, remote: str = GIT_REMOTE) -> Source:
    """Fetch a tag, branch or commit of a repository, by its address: none is remembered.

    What one repository gave is never looked at for another one.

    Raises:
        UsageError: the repository has no such ref, or its address is not https.
        SourceError: git is missing or the repository cannot be reached.
    """
    _require_https(remote)
    repository = cache_folder("git") / f"{hashlib.sha256(remote.encode()).hexdigest()}.git"
    if not (repository / "HEAD").is_file():
        _git("init", "--quiet", "--bare", str(repository))
    fetch = ("fetch", "--quiet", "--prune", "--force", "--filter=blob:none", "--tags", remote)
    _git("-C", str(repository), *fetch, "+refs/heads/*:refs/remotes/origin/*")
    commit = _resolve_ref(repository, ref)
    tree, note = kept(commit, lambda folder: _check_out(repository, commit, folder))
    count = _git("-C", str(repository), "rev-list", "--count", commit)
    origin = f"git+{remote}@{ref}"
    return Source(tree, read_version(tree), int(count), commit, origin, None, note=note)


def from_folder(folder: Path) -> Source:
    """Take a folder as it is; its own git history, if any, gives build number and commit.

    Raises:
        UsageError: the folder is not a llama.cpp source tree, or holds what no source has: a pipe,
            a socket, a device, or a name that is not UTF-8.
    """
    tree = folder.resolve()
    if not (tree / "CMakeLists.txt").is_file() or not (tree / "tools" / "server").is_dir():
        raise UsageError(
            "SOURCE_NOT_LLAMA_CPP",
            f"{folder} is not a llama.cpp source tree (no CMakeLists.txt with tools/server)",
            hint="give the folder that holds llama.cpp's own CMakeLists.txt",
        )
    _require_readable(tree)
    build, commit = _history(tree)
    return Source(tree, read_version(tree), build, commit, f"folder:{tree.name}", None)


def _require_readable(tree: Path) -> None:
    for path in files(tree):
        plain = path.is_symlink() or path.is_file()
        if plain and os.fsencode(path).decode("utf-8", "replace") == str(path):
            continue
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        why = "a name that is not UTF-8" if plain else "neither a file, a folder nor a link"
        raise UsageError(
            "SOURCE_UNREADABLE",
            f"{shown}: {why}",
            hint="take it out of the source tree: no build needs it",
        )


def upstream_builds(remote: str = GIT_REMOTE) -> tuple[int, ...]:
    """Return the build numbers that llama.cpp's repository has tags for (``b11549``), in order.

    Raises:
        UsageError: its address is not https.
        SourceError: git is missing, or the repository cannot be reached or has no such tag.
    """
    _require_https(remote)
    listed = _git("ls-remote", "--tags", "--refs", remote, "refs/tags/b*")
    found = sorted(int(number) for number in re.findall(r"refs/tags/b(\d+)$", listed, re.MULTILINE))
    if not found:
        raise SourceError("TAGS_MISSING", f"{remote} has no tags like b11549")
    return tuple(found)


def differences(tree: Path, upstream: Path) -> tuple[str, ...]:
    """Return the files of a tree that upstream does not have, or has with other bytes.

    What only upstream has is not among them: an archive may leave things out.
    """
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(tree) for path in files]
    return tuple(str(name) for name in names if not _same(tree / name, upstream / name))


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def read_version(tree: Path) -> str | None:
    """Return upstream's release number (``0.6.0``) from its CMakeLists.txt, None before it."""
    parts = dict(_VERSION_PART.findall((tree / "CMakeLists.txt").read_text("utf-8", "replace")))
    names = ("MAJOR", "MINOR", "PATCH")
    return ".".join(parts[name] for name in names) if len(parts) == len(names) else None


def _history(tree: Path) -> tuple[int, str | None]:
    if not (tree / ".git").exists():
        return 0, None
    commit = _git("-C", str(tree), "rev-parse", "HEAD")
    if _git("-C", str(tree), "status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    shallow = _git("-C", str(tree), "rev-parse", "--is-shallow-repository") == "true"
    return (0 if shallow else int(_git("-C", str(tree), "rev-list", "--count", "HEAD"))), commit


def _require_https(remote: str) -> None:
    """Refuse what git would read as a folder, an option or a program to run."""
    try:
        address = urlsplit(remote)
    except ValueError:
        address = urlsplit("")
    if address.scheme != "https" or not address.hostname:
        raise UsageError(
            "REMOTE_NOT_HTTPS",
            f"{remote!r} is not an https:// address",
            hint="git's own url.<base>.insteadOf names a mirror of any kind",
        )


def _resolve_ref(repository: Path, ref: str) -> str:
    for candidate in (f"refs/tags/{ref}", f"refs/remotes/origin/{ref}", ref):
        verify = ("rev-parse", "--quiet", "--verify", f"{candidate}^{{commit}}")
        found = _run_git(("-C", str(repository), *verify))
        if found.returncode == 0 and _is_reachable(repository, found.stdout.strip()):
            return found.stdout.strip()
    raise UsageError(
        "REF_UNKNOWN",
        f"llama.cpp's repository has no tag, branch or commit {ref!r}",
        hint="a release tag looks like b11549",
    )


def _is_reachable(repository: Path, commit: str) -> bool:
    """Whether a branch or tag has the commit: GitHub gives a fork's commits by number, too."""
    beyond = ("rev-list", "--max-count=1", commit, "--not", "--all")
    return _git("-C", str(repository), *beyond) == ""


def _check_out(repository: Path, commit: str, tree: Path) -> None:
    with new_folder(tree) as staging:
        # A work tree, not `git archive`: checking out fetches a partial clone's blobs in one go.
        _git("-C", str(repository), "worktree", "add", "--detach", str(staging), commit)
        (staging / ".git").unlink()
        _git("-C", str(repository), "worktree", "prune")


def _git(*argv: str) -> str:
    done = _run_git(argv)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SourceError(
            "GIT_FAILED",
            f"git {argv[0] if argv[0] != '-C' else argv[2]} failed: {last[0]}",
            hint="is the repository reachable? Without it, leave --ref out: the pinned archive "
            "needs none",
        )
    return done.stdout.strip()


def _run_git(argv: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *argv], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SourceError("GIT_MISSING", "git is not installed", hint="install git") from error
