"""The farm's changes to llama.cpp: patches of its source, and a file for its CMake.

A patch is a folder of ``build/patches`` with a ``patch.toml``: lines inserted beside an anchor,
which is a line that must occur exactly once in its file, and new files of our own
(docs/building.md). Nothing is written here: ``farm.source`` keeps the patched copy of a tree.

llama.cpp builds its CPU code once for each kind of x86-64 processor, and chooses the best variant
when it starts. The demo builds only the best one for this machine: of some 470 steps of a build,
190 are for the others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import tomllib
from msgspec import Meta

from farm import PROJECT_ROOT, durable
from farm.errors import SourceError, UsageError
from llama_loader.manifest import Patch, RelativePath

FOLDER: Final = PROJECT_ROOT / "build" / "patches"
CHOICES: Final = ("auto", "none")
"""The values of ``--patches``: every patch that fits the pinned source, or unpatched llama.cpp."""
_OWN_LICENCE: Final = "MIT"
"""llama.cpp's: its text is in every tarball."""
_LICENCE_TEXTS: Final = "licenses/"
"""The source's folder whose files go into the tarball's ``licenses``."""

RECIPE: Final = PROJECT_ROOT / "build" / "cmake" / "host_size.cmake"
"""The farm's addition to llama.cpp's own CMake files."""
CPU_VARIANTS: Final = "FARM_CPU_VARIANTS"
"""The CMake variable with the CPU variants to build, separated by semicolons; without it: all."""
_BASELINE: Final = "x64"
"""The variant for every x86-64 processor."""
_VARIANT: Final = re.compile(
    r"^[ \t]*ggml_add_cpu_backend_variant\((\w+)((?: +\w+)*) *\)", re.MULTILINE
)
_FLAGS: Final = {
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "SSE42": ("sse4_2",),
    "BMI2": ("bmi2",),
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_BF16": ("avx512_bf16",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile",),
    "AMX_INT8": ("amx_int8",),
}
"""llama.cpp's features, the weightier the later (its ``cpu-feats.cpp``) → what Linux calls them."""

Text = Annotated[str, Meta(min_length=1)]


class Insert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lines that go before or after the one line ``anchor`` of a file."""

    file: RelativePath
    anchor: Annotated[str, Meta(pattern=r"\A[^\r\n]*\S[^\r\n]*\Z")]
    place: Literal["before", "after"]
    text: Text


class _Add(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename={"origin": "from"},
):
    """A new file of the source, and where its content lies in the patch's folder."""

    file: RelativePath
    origin: RelativePath


class _PatchFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``patch.toml``: why the patch exists, its status upstream, and what it changes."""

    why: Text
    upstream: Text
    licence: Text
    insert: tuple[Insert, ...] = ()
    add: tuple[_Add, ...] = ()

    def __post_init__(self) -> None:
        """Check that the tarball will hold the licence's text; else raise ``ValueError``."""
        has_text = any(one.file.startswith(_LICENCE_TEXTS) for one in self.add)
        if self.licence != _OWN_LICENCE and not has_text:
            raise ValueError(f"add the text of {self.licence} as a file below {_LICENCE_TEXTS}")


@dataclass(frozen=True)
class Change:
    """One patch in memory.

    Attributes:
        patch: its name, and the digest of everything that decides its result.
        inserts: lines for files of the source, in order.
        added: new files with their content.
    """

    patch: Patch
    inserts: tuple[Insert, ...]
    added: tuple[tuple[str, bytes], ...]


def load() -> tuple[Change, ...]:
    """Read every patch of ``build/patches``, in the order of their names.

    Raises:
        UsageError: ``PATCH_INVALID``: one is malformed, a file that it adds is missing, or its
            licence is not llama.cpp's and its text is not among the files.
    """
    found = []
    for path in sorted(FOLDER.glob("*/patch.toml")):
        try:
            told = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _PatchFile)
            added = tuple((one.file, (path.parent / one.origin).read_bytes()) for one in told.add)
            digest = hashlib.sha256(msgspec.json.encode((told.insert, added))).hexdigest()
            patch = msgspec.convert({"name": path.parent.name, "sha256": digest}, Patch)
        except (OSError, ValueError) as error:
            raise UsageError("PATCH_INVALID", folder=path, error=error) from error
        found.append(Change(patch, told.insert, added))
    return tuple(found)


def recorded(wanted: tuple[Patch, ...]) -> tuple[Change, ...]:
    """Return the patches that a ``BUILD.json`` names, if this checkout has the same ones.

    Raises:
        SourceError: ``PATCHES_DIFFER``: names the patch and both digests.
        UsageError: as ``load``.
    """
    own = {one.patch.name: one for one in load()} if wanted else {}
    for patch in wanted:
        if patch.name not in own or own[patch.name].patch != patch:
            has = f"has {own[patch.name].patch.sha256}" if patch.name in own else "has none"
            raise SourceError("PATCHES_DIFFER", name=patch.name, sha256=patch.sha256, has=has)
    return tuple(own[patch.name] for patch in wanted)


def misfits(tree: Path) -> dict[str, UsageError]:
    """Try every patch on a source, each with those before it that fit; return those that do not."""
    fitting: list[Change] = []
    found = {}
    for one in load():
        try:
            changed(tree, [*fitting, one])
            fitting.append(one)
        except UsageError as error:
            found[one.patch.name] = error
    return found


def changed(tree: Path, chosen: Iterable[Change]) -> dict[str, bytes]:
    """Return the files that patches change or add, with their new content.

    Each patch applies to the files as the previous ones left them.

    Raises:
        UsageError: ``PATCH_DOES_NOT_FIT``: names patch, file and anchor, and how often it occurs.
    """
    found: dict[str, bytes] = {}
    for one in chosen:
        for insert in one.inserts:
            file = insert.file
            before = found[file] if file in found else _content(tree, one, file)
            found[file] = _inserted(one.patch.name, insert, before)
        for file, content in one.added:
            if file in found or os.path.lexists(tree / file) or _leads_through_link(tree, file):
                raise _misfit(one.patch.name, f"it adds {file}, which the source has already")
            found[file] = content
    return found


def _content(tree: Path, change: Change, file: str) -> bytes | None:
    """Return a file's bytes; None if it does not exist, or its path has a link."""
    if _leads_through_link(tree, file) or not (tree / file).is_file():
        return None
    try:
        return durable.read_small(tree / file)
    except OSError as error:
        raise _misfit(change.patch.name, f"{file}: {error.strerror}") from error


def _leads_through_link(tree: Path, file: str) -> bool:
    """Whether writing the file in a copy of the tree could change a file outside of the copy."""
    return (tree / file).resolve() != tree.resolve() / file


def _inserted(name: str, insert: Insert, before: bytes | None) -> bytes:
    lines = (before or b"").split(b"\n")
    anchor = insert.anchor.encode()
    count = lines.count(anchor)
    if count != 1:
        where = f"{insert.file} has" if before is not None else f"there is no {insert.file} with"
        raise _misfit(name, f"{where} the anchor {insert.anchor!r} {count} times, not once")
    at = lines.index(anchor) + (insert.place == "after")
    return b"\n".join(
        [*lines[:at], *insert.text.removesuffix("\n").encode().split(b"\n"), *lines[at:]]
    )


def _misfit(name: str, problem: str) -> UsageError:
    return UsageError("PATCH_DOES_NOT_FIT", name=name, problem=problem)


@cache
def recipe() -> bytes:
    """Return ``RECIPE``'s bytes, read once: the recorded bytes are those that are built with."""
    return RECIPE.read_bytes()


def recipe_sha256() -> str:
    """Return the recipe's digest for BUILD.json: it decides the bytes of a build."""
    return hashlib.sha256(recipe()).hexdigest()


def cpu_variant(tree: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the best CPU variant that this machine runs, by the kernel's file ``cpuinfo``.

    Empty if that is unknown: the processor is no x86-64, or the source has other variants.
    """
    cmake = tree / "ggml" / "src" / "CMakeLists.txt"
    if not (cmake.is_file() and cpuinfo.is_file()):
        return ""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text("utf-8", "replace"), re.MULTILINE)
    flags = frozenset(found[1].split()) if found else frozenset()  # the first processor's
    variants = {name: words.split() for name, words in _VARIANT.findall(durable.head(cmake))}
    if not flags or _BASELINE not in variants:
        return ""

    def weight(name: str) -> int:
        """Return how good a variant is here: 0 if it does not run, or is for every processor."""
        features = variants[name]
        if not all(one in _FLAGS and flags.issuperset(_FLAGS[one]) for one in features):
            return 0
        return sum(1 << list(_FLAGS).index(one) for one in features)

    best = max(variants, key=weight)
    return best if weight(best) else _BASELINE
