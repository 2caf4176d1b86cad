"""The parts of the binaries: llama.cpp, the code that it vendors, and the toolkit's CUB.

Names, versions, origins and licences are read from the tree: its ``vendor/`` folders, upstream's
own ``scripts/sync_vendor.py``, version lines in headers, licence files and comments. An unknown
value is None in the record, and ``invoke verify`` refuses a part without a licence. Only licence
texts that llama.cpp and its parts have are recognised; no other is guessed.

CUB is headers of the CUDA toolkit that ggml-cuda compiles in; their licence (BSD) requires its text
in every copy. They are read in the container that builds, because this machine lacks its toolkit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Final, NamedTuple

import msgspec

from farm import durable
from farm.errors import UsageError

SOURCE_SUFFIXES: Final = (".h", ".hpp", ".c", ".cpp", ".cu", ".cuh")
COMPILED: Final = (
    "common/**/*", "src/**/*", "ggml/src/*", "ggml/src/ggml-cpu/*", "ggml/src/ggml-cpu/llamafile/*",
    "ggml/src/ggml-cpu/amx/*", "ggml/src/ggml-cuda/**/*", "tools/server/*", "tools/mtmd/**/*",
    "tools/cli/*",
)  # fmt: skip
"""The folders of llama.cpp that an x86-64 build uses; single files there are of other authors."""
_LICENCE_FILES: Final = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
_HEAD: Final = 4096
"""Characters at a file's beginning in which the farm looks for a licence text."""
_MOST_TEXTS: Final = 32 << 20
"""Bytes of all licence texts of a tree; those of b11549's CPU release have 15 kB (``tar -tv``)."""
_TITLE: Final = 512
"""Characters at a header's beginning that may call its version in words."""

_QUOTED_VERSION: Final = re.compile(
    r'#define\s+(?=\w*VERSION)\w+\s+"v?([0-9]{1,9}(?:\.[0-9]{1,9}){1,4})"'
)
_NUMBERED_VERSION: Final = re.compile(
    r"#define\s+\w*VERSION_(MAJOR|MINOR|PATCH|RELEASE|REVISION)\s+([0-9]{1,9})"
)
_SPOKEN_VERSION: Final = re.compile(
    r"(?:\bversion\s+|- v)([0-9]{1,9}\.[0-9]{1,9}(?:\.[0-9]{1,9})?)\b"
)
_SYNC_CONSTANT: Final = re.compile(
    r'^([A-Z0-9_]{1,99})[ \t]*=[ \t]*"([^"\n]{1,999})"', re.MULTILINE
)
_SYNC_ROW: Final = re.compile(
    r'^[ \t]*f?"(https://[^"\n]{1,999})"[ \t]*:[ \t]*"([^"\n]{1,999})"', re.MULTILINE
)
_FILLED_IN: Final = re.compile(r"\{([A-Z0-9_]{1,99})\}")
_GITHUB: Final = re.compile(
    r"https://(?:raw\.githubusercontent|github)\.com/(?P<repository>[^/]+/[^/]+)/"
    r"(?:raw/)?(?:(?P<commit>[0-9a-f]{40})|refs/tags/(?P<tag>[^/]+))?"
)


PUBLIC_DOMAIN: Final = "LicenseRef-public-domain"
"""SPDX has no identifier for a dedication to the public domain; ``LicenseRef-`` begins our own."""

_SPDX_LINE: Final = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+(][A-Za-z0-9.+() -]*)")
_MIT_GRANT: Final = "permission is hereby granted, free of charge"
_MIT_NOTICE: Final = "the above copyright notice and this permission notice shall be included in"
_PHRASES: Final = (
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSD-3-Clause", ("redistributions in binary form must reproduce", "neither the name")),
    ("BSD-2-Clause", ("redistributions in binary form must reproduce",)),
    ("BSL-1.0", ("boost software license - version 1.0",)),
    ("MIT", (_MIT_GRANT, _MIT_NOTICE)),
    ("MIT-0", (_MIT_GRANT,)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    (PUBLIC_DOMAIN, ("public domain",)),
)
"""Words that a licence's text always has."""
_EXCLUDING: Final = (
    ("BSD-3-Clause", "BSD-2-Clause"),
    ("MIT", "MIT-0"),
    ("Unlicense", PUBLIC_DOMAIN),
)
"""If a text has the words of both, it is the first."""

_BLOCK_COMMENT: Final = re.compile(r"/\*.*?(?:\*/|\Z)", re.DOTALL)
"""The last alternative prevents a scan to the end from each ``/*`` after the last ``*/``."""
_LINE_COMMENTS: Final = re.compile(r"(?:^[ \t]*//[^\n]*\n)+", re.MULTILINE)
_MARKS: Final = re.compile(r"^[ \t]*(?:/\*+|\*+/|//+|\*+) ?|(?<!\*)\*+/[ \t]*$", re.MULTILINE)
_ENDS: Final = 16_384
"""Characters at each end of a file in which its licence is looked for; stb's fills 3,000."""

_CUB_LICENCE: Final = "cuda-include-cub.txt"
_CUB_ORIGIN: Final = "https://github.com/NVIDIA/cccl"

_CUB_SCRIPT: Final = """
for folder in "$1/include" "$1/include/cccl"; do
    if [ -f "$folder/cub/cub.cuh" ]; then
        cd "$folder" || exit 1
        cat cub/cub.cuh cub/version.cuh
        echo "=== files"
        find cub -type f | LC_ALL=C sort | xargs sha256sum
        break
    fi
done
"""
"""CUDA 13 moved the headers below ``cccl``."""
_CUB_FILES: Final = "=== files"
_CUB_VERSION: Final = re.compile(r"#define\s+CUB_VERSION\s+([0-9]{1,9})")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One author's code in the tree.

    Attributes:
        name: its name.
        path: its folder or file in the tree, ``.`` for llama.cpp itself.
        version: from its code, else upstream's tag or commit.
        origin: its repository, e.g. ``https://github.com/yhirose/cpp-httplib``.
        licence: an SPDX expression.
        licence_files: its texts' names in the tarball's ``licenses`` folder.
        sha256: ``digest`` of its files.
    """

    name: str
    path: str
    version: str | None = None
    origin: str | None = None
    licence: str | None = None
    licence_files: tuple[str, ...] = ()
    sha256: str


@dataclass(frozen=True)
class Survey:
    """The parts of a tree, and every licence text by its file name in the tarball."""

    parts: tuple[Part, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)

    def __add__(self, other: Survey) -> Survey:
        """Return the parts and texts of both."""
        return Survey((*self.parts, *other.parts), {**self.texts, **other.texts})


class _Upstream(NamedTuple):
    """Where a vendored file comes from, by upstream's own list."""

    path: str
    origin: str
    version: str | None


class _Texts(dict[str, bytes]):
    """A tree's licence texts by their file names in the tarball, bounded together."""

    left = _MOST_TEXTS

    def put(self, name: str, text: bytes) -> str:
        """Add a text; returns its name.

        Raises:
            UsageError: all texts together have more than ``_MOST_TEXTS``.
        """
        self.left -= len(text)
        if self.left < 0:
            why = f"with it the tree's licences have more than {_MOST_TEXTS >> 20} MiB"
            raise UsageError("SOURCE_UNREADABLE", shown=name, why=why)
        if self.get(name, text) != text:  # a-b/LICENSE, and a/b/LICENSE
            name += f"-{hashlib.sha256(text).hexdigest()}"
        self[name] = text
        return name

    def expression(self, names: Iterable[str]) -> str | None:
        """Return the SPDX expression of some of the texts, None if none is known."""
        told = {identify(self[name].decode("utf-8", "replace")) for name in names}
        known = sorted(name for name in told if name)
        return " AND ".join(f"({n})" if " " in n and known[1:] else n for n in known) or None


class _Licence(NamedTuple):
    """A part's licence, and its texts' names."""

    expression: str | None
    files: Iterable[str]


def survey(tree: Path, *, version: str | None = None) -> Survey:
    """Read the parts of a source tree.

    ``version`` is its own release number, if it is known.

    Raises:
        UsageError: ``SOURCE_UNREADABLE``: a licence's text is larger than 8 MiB, or all of them
            together are than 32 MiB.
    """
    upstreams, texts = _upstreams(tree), _Texts()
    for path in tree.glob("licenses/*"):  # also those that belong to no folder of vendor/
        if path.is_file():
            texts.put(f"licenses-{path.name}", _bytes(path))
    own = _licence_in(tree, _licence_files(tree), tree, texts)
    origin = "https://github.com/ggml-org/llama.cpp"
    found = [_part(tree, _files(tree), "llama.cpp", ".", own, version, origin)]
    for folder in filter(Path.is_dir, _plain(tree / "vendor")):
        # of a folder of several parts, its folders
        inner = [path for path in _plain(folder) if path.is_dir() and _sources(path)]
        found += [_vendored(tree, one, upstreams, texts) for one in inner or [folder]]
    found += _single_files(tree, texts)
    return Survey(tuple(found), texts)


def _part(
    tree: Path,
    files: Iterable[Path],
    name: str,
    path: str,
    licence: _Licence,
    version: str | None = None,
    origin: str | None = None,
) -> Part:
    return Part(
        name=name,
        path=path,
        version=version,
        origin=origin,
        licence=licence.expression,
        licence_files=tuple(sorted(licence.files)),
        sha256=digest(tree, files),
    )


def digest(tree: Path, files: Iterable[Path]) -> str:
    """Return one sha256 for several files: that of the lines that ``sha256sum`` prints for them.

    The paths are those below ``tree``, sorted by bytes. A link is hashed as its target's name.
    """
    lines = hashlib.sha256()
    named = sorted((str(path.relative_to(tree)).encode(), path) for path in files)
    for name, path in named:
        if path.is_symlink():
            content = hashlib.sha256(str(path.readlink()).encode()).hexdigest()
        else:
            content = durable.sha256(path)
        lines.update(content.encode() + b"  " + name + b"\n")
    return lines.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return every file and link below a folder, without ``.git``."""
    return [path for path in durable.files(folder) if path.is_symlink() or path.is_file()]


def _vendored(tree: Path, folder: Path, upstreams: Iterable[_Upstream], texts: _Texts) -> Part:
    path = str(folder.relative_to(tree))
    upstream = next((row for row in upstreams if row.path.startswith(f"{path}/")), None)
    licence = _licence_of(tree, folder, texts)
    name = folder.name if not upstream else upstream.origin.rpartition("/")[2]
    version = _version(folder) or (upstream.version if upstream else None)
    origin = upstream.origin if upstream else None
    return _part(tree, _files(folder), name, path, licence, version, origin)


def _single_files(tree: Path, texts: _Texts) -> list[Part]:
    """Find files among llama.cpp's own that begin with a licence text of their own."""
    found: list[Part] = []
    for path in sorted({path for pattern in COMPILED for path in tree.glob(pattern)}):
        if path.suffix not in SOURCE_SUFFIXES or not path.is_file():
            continue
        text = in_comments(durable.head(path, 4 * _HEAD)[:_HEAD])
        if text is None:
            continue
        name = str(path.relative_to(tree))
        licence = _Licence(identify(text), [texts.put(_text_name(name), text.encode())])
        found.append(_part(tree, [path], path.name, name, licence))
    return found


def _licence_of(tree: Path, folder: Path, texts: _Texts) -> _Licence:
    """Read a part's licence: its own files, the tree's ``licenses/``, else its comments."""
    beside = _licence_files(folder)
    names = {re.sub(r"[^a-z0-9]", "", path.name.lower()) for path in _sources(folder)}
    by_name = (tree / "licenses" / f"LICENSE-{name}" for name in sorted(names))
    named = [path for path in by_name if path.is_file()]
    if beside or named:
        return _licence_in(tree, [*beside, *named], folder, texts)
    found: dict[bytes, str] = {}
    for path in _sources(folder):
        text = (in_comments(durable.head(path)) or "").encode()
        if text and text not in found:
            found[text] = texts.put(_text_name(str(path.relative_to(tree))), text)
    return _Licence(texts.expression(found.values()), found.values())


def _licence_in(tree: Path, files: Iterable[Path], folder: Path, texts: _Texts) -> _Licence:
    names = [
        texts.put(str(path.relative_to(tree)).replace("/", "-"), _bytes(path)) for path in files
    ]
    said = (declared(durable.head(path)) for path in _sources(folder))
    expression = texts.expression(names)
    return _Licence(expression or next((one for one in said if one), None), names)


def _bytes(licence: Path) -> bytes:
    try:
        return durable.read_small(licence)
    except OSError as error:
        raise UsageError("SOURCE_UNREADABLE", shown=licence, why=error.strerror) from error


def _licence_files(folder: Path) -> list[Path]:
    found = {path for pattern in _LICENCE_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def _sources(folder: Path) -> list[Path]:
    return [path for path in _plain(folder) if path.suffix in SOURCE_SUFFIXES]


def _plain(folder: Path) -> list[Path]:
    """Return what a folder has, without links: many may lead to one large file."""
    return sorted(path for path in folder.glob("*") if not path.is_symlink())


def _text_name(path: str) -> str:
    return f"{path.replace('/', '-')}.txt"


def _version(folder: Path) -> str | None:
    """Read a version from a folder's headers: in the first words, quoted, or in numbers."""
    for path in _sources(folder):
        text = durable.head(path)
        told = _SPOKEN_VERSION.search(text[:_TITLE]) or _QUOTED_VERSION.search(text)
        if told:
            return told[1]
        numbers = dict(_NUMBERED_VERSION.findall(text))
        last = numbers.get("PATCH") or numbers.get("RELEASE") or numbers.get("REVISION")
        if {"MAJOR", "MINOR"} <= numbers.keys() and last:
            return f"{numbers['MAJOR']}.{numbers['MINOR']}.{last}"
    return None


def _upstreams(tree: Path) -> list[_Upstream]:
    """Read upstream's list of the origins of vendored files; empty if the tree has none."""
    script = tree / "scripts" / "sync_vendor.py"
    if not script.is_file():
        return []
    text = durable.head(script, 1 << 16)  # each row may name many constants
    constants = dict(_SYNC_CONSTANT.findall(text))
    rows: list[_Upstream] = []
    for url, path in _SYNC_ROW.findall(text):
        match = _GITHUB.match(_FILLED_IN.sub(lambda name: constants.get(name[1], name[0]), url))
        if match:
            origin = f"https://github.com/{match['repository']}"
            version = match["commit"] or match["tag"]
            rows.append(_Upstream(str(PurePosixPath(path)), origin, version))
    return rows


def cub_command(cuda: PurePath) -> tuple[str, ...]:
    """Return the command that prints CUB's first headers and the digest of each of its files."""
    return ("sh", "-c", _CUB_SCRIPT, "sh", str(cuda))


def parse_cub(lines: list[str]) -> Survey:
    """Turn what ``cub_command`` printed into a part and its licence's text; none without CUB."""
    if _CUB_FILES not in lines:
        return Survey()
    at = lines.index(_CUB_FILES)
    headers, files = "\n".join(lines[:at]), lines[at + 1 :]
    text, version = in_comments(headers) or "", None
    if match := _CUB_VERSION.search(headers):  # its digits: major, minor (3), patch (2)
        number = int(match[1])
        version = f"{number // 100_000}.{number // 100 % 1000}.{number % 100}"
    part = Part(
        name="CUB",
        path="cuda/include/cub",
        version=version,
        origin=_CUB_ORIGIN,
        licence=identify(text),
        licence_files=(_CUB_LICENCE,) if text else (),
        sha256=hashlib.sha256("".join(f"{line}\n" for line in files).encode()).hexdigest(),
    )
    return Survey((part,), {_CUB_LICENCE: text.encode()} if text else {})


def identify(text: str) -> str | None:
    """Return the SPDX expression of a licence text, None if it is unknown.

    Several licences to choose from are joined by ``OR``.
    """
    words = " ".join(_MARKS.sub(" ", text).lower().split())
    found = [name for name, phrases in _PHRASES if all(phrase in words for phrase in phrases)]
    for first, second in _EXCLUDING:
        if first in found and second in found:
            found.remove(second)
    return " OR ".join(found) or None


def declared(source: str) -> str | None:
    """Return a source file's ``SPDX-License-Identifier``, or None."""
    match = _SPDX_LINE.search(source[:_ENDS])
    return match[1].rstrip(" -(") if match else None


def in_comments(source: str) -> str | None:
    """Return the licence text in the comments at a source file's two ends, None without one.

    Comment marks are removed; the words are not changed. A licence's text takes precedence over a
    mention of the public domain.
    """
    ends = (source,) if len(source) <= 2 * _ENDS else (source[:_ENDS], source[-_ENDS:])
    comments = [
        comment
        for end in ends
        for pattern in (_BLOCK_COMMENT, _LINE_COMMENTS)
        for comment in pattern.findall(end)
    ]
    whole = (one for one in comments if one.endswith("*/") or not one.startswith("/*"))
    known = [comment for comment in whole if identify(comment)]
    known.sort(key=lambda comment: identify(comment) == PUBLIC_DOMAIN)
    if not known:
        return None
    lines = [line.rstrip() for line in _MARKS.sub("", known[0]).strip("\n").split("\n")]
    return "\n".join(lines).strip() + "\n"
