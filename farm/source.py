"""llama.cpp's source: a hash-pinned archive, a git ref, or a folder → one ``SourceTree``.

Each kind of source brings the build number and the commit; ``llama-server --version`` and the
manifest show them. Patches change a copy, which is kept in the cache. What is copied is hashed
again: a person may change a folder during a build.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from farm import durable, run_lock
from farm.durable import files, folder_digest, new_folder
from farm.errors import SourceError, UsageError, remark
from farm.inputs import git, patches
from farm.inputs.archives import extract_subtree
from farm.inputs.packages import cache_folder, fetch_package
from farm.inputs.patches import Change
from farm.inputs.pins import SourcePin
from llama_loader.manifest import Patch

GIT_REMOTE: Final = "https://github.com/ggml-org/llama.cpp"
"""A mirror is named with git's own ``url.<base>.insteadOf`` setting."""

SHORT_COMMIT: Final = 9
"""Digits of the commit in ``llama-server --version``, as llama.cpp's own releases have."""

_VERSION_PART: Final = re.compile(r"set\(LLAMA_VERSION_(MAJOR|MINOR|PATCH)\s+([0-9]{1,9})\)")

_CURL_OPTION: Final = re.compile(r"^[ \t]*option\(LLAMA_CURL\s", re.MULTILINE)
"""llama.cpp of 2025 downloads with libcurl; newer trees have no such option and would warn."""
_UPSTREAM: Final = re.compile(r"[/:](?:ggml-org|ggerganov)/llama\.cpp(?:\.git)?/?")
"""The end of the address of llama.cpp's own repository, under its present and former owner."""
_COMMIT: Final = re.compile("[0-9a-fA-F]{40}")
_BUILD_TAG: Final = ("--tags", "--match", "b[0-9]*", "--abbrev=0")
_NEEDED_OPTIONS: Final = ("GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS")
"""ggml's options in a plan; CMake ignores an unknown option without an error."""


@dataclass(frozen=True)
class SourceTree:
    """A source tree and the facts about it.

    ``build`` is llama.cpp's build number, 0 if it is unknown; ``build_assumed``: the person gave
    it; ``commit`` has 40 digits (followed by ``-dirty`` for a changed work tree);
    ``sha256`` is the archive's; ``note`` is a line that a person must see; ``defines`` are CMake's
    cache entries that this tree needs beside those of the plan; ``patches`` were applied to it;
    ``place`` is the folder or repository that it is from; ``digest`` is the tree's
    (``folder_digest``), before anything else was read of it; ``ignored`` is what is no part of the
    source: what git ignores, such as models and build folders. No link is on the way to ``tree``.
    """

    tree: Path
    version: str | None
    build: int
    commit: str | None
    origin: str
    sha256: str | None
    project: str = "llama.cpp"
    note: str | None = None
    build_assumed: bool = False
    defines: tuple[tuple[str, str], ...] = ()
    patches: tuple[Patch, ...] = ()
    place: str = ""
    digest: str = ""
    ignored: frozenset[Path] = frozenset()

    def files(self) -> Iterator[Path]:
        """Yield what is part of the source; errors are those of ``durable.files``."""
        return files(self.tree, durable.MOST_BYTES, self.ignored)

    @contextmanager
    def private(self) -> Iterator[SourceTree]:
        """Yield the source with a copy of its tree that no other user can write to.

        Raises:
            SourceError: ``SOURCE_CHANGED``: the tree is not the one that was chosen.
            UsageError: ``SOURCE_UNREADABLE``: the copy holds what no source has.
            PackError: ``WRITE_FAILED``.
        """
        with tempfile.TemporaryDirectory(prefix="llama-farm-source-") as folder:
            tree = Path(folder).resolve() / "source"
            self.copy(tree)
            yield replace(self, tree=tree)

    def copy(self, folder: Path) -> None:
        """Copy the tree, without ``.git``, to a folder that no other user can write to."""
        with durable.writing(folder):
            folder.mkdir(exist_ok=True)
            for path in self.files():
                place = folder / path.relative_to(self.tree)
                place.parent.mkdir(parents=True, exist_ok=True)
                durable.copy(path, place)
        if folder_digest(folder) != self.digest:
            raise SourceError("SOURCE_CHANGED", tree=self.tree)
        _require_own(folder, files(folder))

    @property
    def cache(self) -> str:
        """The compiler cache that only this folder's or repository's builds use.

        Empty for the pinned archive, whose cache machines may share. A source's
        author can write wrong objects into the cache.
        """
        if self.sha256 is not None:
            return ""
        return hashlib.sha256(os.fsencode(self.place or self.tree)).hexdigest()[:16]

    @property
    def short_commit(self) -> str:
        """The commit as ``llama-server --version`` shows it, or ``unknown``."""
        if self.commit is None:
            return "unknown"
        digits, _, dirty = self.commit.partition("-")
        return digits[:SHORT_COMMIT] + (f"-{dirty}" if dirty else "")


def from_archive(pin: SourcePin) -> SourceTree:
    """Fetch the pinned archive (a verified cached copy is used again) and unpack its tree.

    Raises:
        SourceError: no network and no cached copy, or the bytes are not those of the pin.
    """
    archive = fetch_package(pin)
    key = hashlib.sha256(f"{pin.sha256}#{pin.subdir}".encode()).hexdigest()
    tree, digest, note = _kept(key, partial(extract_subtree, archive, pin.subdir))
    origin = f"pypi:{pin.filename}#{pin.subdir}"
    names = ", ".join(pin.without_patches)
    left_out = remark("PATCHES_LEFT_OUT", names=names, build=pin.build)
    note = _joined(note, left_out if names else None)
    facts = (tree, pin.llama_version, pin.build, None, origin, pin.sha256)
    return _read(SourceTree(*facts, note=note, digest=digest))


def from_ref(ref: str, *, remote: str = GIT_REMOTE) -> SourceTree:
    """Fetch a tag, branch or commit of a repository; it is resolved again each time.

    Objects of one repository are never used for another one.

    Raises:
        UsageError: the repository has no such ref, its address is not https, or what the ref
            names is older than what the farm builds.
        SourceError: git is missing or the repository cannot be reached.
    """
    _require_https(remote)
    repository = cache_folder("git") / f"{hashlib.sha256(remote.encode()).hexdigest()}.git"
    if not (repository / "HEAD").is_file():
        git.call("init", "--quiet", "--bare", str(repository))
    fetch = ("fetch", "--quiet", "--prune", "--force", "--filter=blob:none", remote)
    at = ("-C", str(repository))
    # tags, too, by name: `--tags` would keep those that the repository has no more
    git.call(*fetch, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*", at=at)
    # 40 digits are never a tag's name
    names = () if _COMMIT.fullmatch(ref) else (f"refs/tags/{ref}", f"refs/remotes/origin/{ref}")
    for candidate in (*names, ref):
        verify = ("rev-parse", "--quiet", "--verify", f"{candidate}^{{commit}}")
        resolved = git.run(*verify, at=at)
        commit = resolved.stdout.strip()
        # of a branch or tag: GitHub gives a fork's commits by number, too
        beyond = ("rev-list", "--max-count=1", commit, "--not", "--all")
        if resolved.returncode == 0 and git.call(*beyond, at=at) == "":
            break
    else:
        raise UsageError("REF_UNKNOWN", ref=ref)

    def check_out(folder: Path) -> None:
        # A work tree, not `git archive`: checking out fetches a partial clone's blobs in one go.
        git.call("worktree", "add", "--detach", str(folder), commit, at=at)
        (folder / ".git").unlink()
        git.call("worktree", "prune", at=at)

    tree, digest, note = _kept(commit, check_out)
    _require_layout(tree, ref)
    count = git.call("rev-list", "--count", commit, at=at)
    facts = (tree, None, int(count), commit, f"git+{remote}@{ref}", None)
    return _read(SourceTree(*facts, note=note, place=remote, digest=digest))


def from_folder(folder: Path) -> SourceTree:
    """Use a folder unchanged; its own git history, if any, gives build number and commit.

    A history that does not tell its build of llama.cpp (none, a shallow one, a fork's) gives the
    number of the newest build that it is known to contain, else 0, and a note.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``: another user can change it.
        UsageError: the folder is not a llama.cpp source tree, is older than what the farm builds,
            or holds what no source has (``_require_own``).
    """
    durable.require_own_out(folder, "FOLDER_NOT_OWN/source")
    tree = folder.resolve()
    _require_layout(tree, str(folder))
    ignored = frozenset(git.ignored(tree) if (tree / ".git").exists() else ())
    digest = folder_digest(tree, durable.MOST_BYTES, ignored)
    build, commit, note = _history(tree)
    facts = (tree, None, build, commit, f"folder:{tree.name}", None)
    return _read(SourceTree(*facts, note=note, place=str(tree), digest=digest, ignored=ignored))


def _read(found: SourceTree) -> SourceTree:
    """Add to a source what is read from its tree.

    A tree of 2025 looks for libcurl; with it the server would need libcurl on the host, too.
    """
    tree = found.tree
    _require_own(tree, files(tree, None, found.ignored))
    needs = _CURL_OPTION.search(durable.head(tree / "CMakeLists.txt"))
    defines = (("LLAMA_CURL", "OFF"),) if needs else ()
    return replace(found, version=found.version or read_version(tree), defines=defines)


def assume_build(found: SourceTree, build: int) -> SourceTree:
    """Return a source with the build number that the person gave; ``BUILD.json`` records that."""
    own = f"b{found.build}" if found.build else "no build number"
    note = remark("BUILD_ASSUMED", build=build, own=own)
    kept = found.note if found.build else None  # the note was about the missing number
    return replace(found, build=build, build_assumed=True, note=_joined(kept, note))


def patched(found: SourceTree, chosen: tuple[Change, ...]) -> SourceTree:
    """Return a source with patches applied to a copy of its tree; the tree is not changed.

    Raises:
        UsageError: ``PATCH_DOES_NOT_FIT``; nothing is kept.
        SourceError: ``SOURCE_CHANGED``.
        PackError: ``WRITE_FAILED``: the disk of the cache is full.
    """
    if not chosen:
        return found
    whole = replace(found, patches=tuple(one.patch for one in chosen))
    key = hashlib.sha256(msgspec.json.encode([found.digest, whole.patches])).hexdigest()

    def apply(folder: Path) -> None:
        found.copy(folder)
        changed = patches.changed(folder, chosen)
        with durable.writing(folder):
            for name, content in changed.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                mode = place.stat().st_mode & 0o777 if place.exists() else 0o644
                durable.replace(place, content, mode)

    tree, digest, note = _kept(key, apply)
    return replace(whole, tree=tree, digest=digest, note=_joined(found.note, note))


def _joined(*notes: str | None) -> str | None:
    return "\n".join(filter(None, notes)) or None


def _kept(key: str, make: Callable[[Path], None]) -> tuple[Path, str, str | None]:
    """Return a tree of the cache; a missing or changed one is made again."""
    sources = cache_folder("sources").resolve()
    tree, record = sources / key, sources / f"{key}.sha256"
    with run_lock.turn(sources, key):
        note = None
        if tree.is_dir():
            recorded = record.read_bytes() if record.is_file() else None
            if recorded == (digest := folder_digest(tree)).encode():
                return tree, digest, None
            if recorded is not None:  # else it was cut off between the two
                note = remark("SOURCE_CHANGED/kept", tree=tree)
            durable.remove(tree)
        with durable.writing(record):
            with new_folder(tree) as staging:
                make(staging)
                digest = folder_digest(staging)
            durable.replace(record, digest.encode())
    return tree, digest, note


def _require_layout(tree: Path, named: str) -> None:
    """Refuse a tree that is no llama.cpp, or older than the farm's options."""
    old = (tree / "examples" / "server").is_dir() and not (tree / "tools").is_dir()
    if not (tree / "CMakeLists.txt").is_file() or not (old or (tree / "tools/server").is_dir()):
        raise UsageError("SOURCE_NOT_LLAMA_CPP", named=named)
    options = tree / "ggml" / "CMakeLists.txt"
    told = durable.head(options) if options.is_file() else ""
    lacking = [name for name in _NEEDED_OPTIONS if told and name not in told]
    if old or lacking:
        reason = "its server lies in examples/server" if old else f"it has no {lacking[0]}"
        raise UsageError("SOURCE_TOO_OLD", named=named, reason=reason)


def _require_own(tree: Path, paths: Iterable[Path]) -> None:
    """Refuse a tree with pipes, sockets, devices, names that are not UTF-8, or links out of it.

    A link could bring a private file of the builder's into the tarball, also out of ``.git``, or
    through links there, which are not checked. One that cannot be followed, or has more names than
    a path, leads out, too, and so does an absolute one: out of any copy of the tree.
    """
    root = tree.resolve()
    for path in paths:
        inside = _leads_inside(path, root)
        plain = path.is_symlink() or path.is_file()
        if plain and inside and os.fsencode(path).decode("utf-8", "replace") == str(path):
            continue
        why = "a name that is not UTF-8" if plain else "neither a file, a folder nor a link"
        why = why if inside else "a link that leads out of the tree"
        raise durable.unreadable(path, why)


def _leads_inside(path: Path, root: Path) -> bool:
    leads_to = durable.followed(path)
    way = path.readlink() if path.is_symlink() else Path()
    if way.is_absolute() or len(way.parts) > durable.MOST_NAMES:
        return False
    if leads_to is None or not leads_to.is_relative_to(root):
        return False
    return ".git" not in (*way.parts, *leads_to.relative_to(root).parts)


def upstream_builds(remote: str = GIT_REMOTE) -> tuple[int, ...]:
    """Return the build numbers that llama.cpp's repository has tags for (``b11549``), in order.

    Raises:
        UsageError: its address is not https.
        SourceError: git is missing, or the repository cannot be reached or has no such tag.
    """
    _require_https(remote)
    listed = git.call("ls-remote", "--tags", "--refs", remote, "refs/tags/b*")
    found = sorted(map(int, re.findall(r"refs/tags/b([0-9]{1,9})$", listed, re.MULTILINE)))
    if not found:
        raise SourceError("TAGS_MISSING", remote=remote)
    return tuple(found)


def read_version(tree: Path) -> str | None:
    """Return upstream's release number (``0.6.0``) from its CMakeLists.txt, None if it has none."""
    parts = dict(_VERSION_PART.findall(durable.head(tree / "CMakeLists.txt")))
    names = ("MAJOR", "MINOR", "PATCH")
    return ".".join(parts[name] for name in names) if len(parts) == len(names) else None


def _history(tree: Path) -> tuple[int, str | None, str | None]:
    """Return the build number that a work tree's history proves, its commit, and a note."""
    if not (tree / ".git").exists():
        return 0, None, remark("BUILD_NUMBER_UNKNOWN", tree=tree, why="has no git history")
    with git.foreign(tree) as at:
        commit = git.call("rev-parse", "HEAD", at=at)
        build, note = _proven_build(tree, at)
        # `dirty`: of a submodule only its HEAD is read, not its settings
        changes = ("--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
        changed = git.call("status", *changes, at=at)
        return build, commit + ("-dirty" if changed else ""), note


def _proven_build(tree: Path, at: tuple[str, ...]) -> tuple[int, str | None]:
    """Return the number of the newest build of llama.cpp that HEAD contains, and a note."""
    if git.call("rev-parse", "--is-shallow-repository", at=at) == "true":
        if build := _newest_tag(at, "--exact-match"):
            return build, None
        return 0, remark(
            "BUILD_NUMBER_UNKNOWN",
            tree=tree,
            why="is a shallow clone, so its commits cannot be counted",
        )
    count = int(git.call("rev-list", "--count", "HEAD", at=at))
    asked = ("config", "--file", git.SETTINGS, "--no-includes", "--get-regexp")
    listed = git.run(*asked, r"^remote\..*\.url$", at=at)
    remotes = dict(line.partition(" ")[::2] for line in listed.stdout.splitlines())
    own = [name for name, url in remotes.items() if _UPSTREAM.search(url)]
    if own:
        known = [f"--remotes={name.removeprefix('remote.').removesuffix('.url')}" for name in own]
        base = count - int(git.call("rev-list", "--count", "HEAD", "--not", *known, at=at))
    elif remotes:
        base = _newest_tag(at)  # which counts if it has as many commits
        counted = base and int(git.call("rev-list", "--count", f"b{base}", at=at))
        base = base if base == counted else 0
    else:
        base = count  # as llama.cpp's own CMake counts
    if base == 0:
        return 0, remark(
            "BUILD_NUMBER_UNKNOWN",
            tree=tree,
            why="is a fork that no build of llama.cpp is known of",
        )
    fork = remark("SOURCE_IS_FORK", tree=tree, base=base, own=count - base)
    return base, fork if count > base else None


def _newest_tag(at: tuple[str, ...], *options: str) -> int:
    tag = git.run("describe", *options, *_BUILD_TAG, at=at).stdout.strip()
    return int(tag[1:]) if re.fullmatch("b[1-9][0-9]{0,8}", tag) else 0


def _require_https(remote: str) -> None:
    """Refuse an address that git would read as a folder, an option or a program to run."""
    try:
        address = urlsplit(remote)
    except ValueError:
        address = urlsplit("")
    if address.scheme != "https" or not address.hostname:
        raise UsageError("REMOTE_NOT_HTTPS", remote=remote)
