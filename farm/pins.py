"""``build/pins.toml``: every byte that comes from outside, with its digest → frozen rows.

The file is written by a program (``invoke update-pins``). A row without a digest is refused when
it is read, so nothing can be fetched that is not pinned.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from farm import PROJECT_ROOT
from farm.errors import UsageError

PINS_FILE: Final = PROJECT_ROOT / "build" / "pins.toml"

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
Text = Annotated[str, Meta(min_length=1)]


class PackagePin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a package on the Python package index; ``size`` in bytes."""

    package: Text
    version: Text
    filename: Text
    size: Annotated[int, Meta(gt=0)]
    sha256: Sha256


class SourcePin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source archive with llama.cpp under ``subdir``; ``build`` is upstream's build number."""

    subdir: Text
    build: Annotated[int, Meta(gt=0)]
    llama_version: Text
    commit: Text | None = None


class ModelPin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GGUF file inside a package: the archive's digest and the file's own."""

    name: Text
    member: Text
    member_sha256: Sha256


class ToolkitPin(PackagePin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One wheel of NVIDIA's CUDA toolkit; ``line`` says which line it belongs to."""

    line: Text


class ImagePin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container image: the tag for people, the digest for the engine."""

    tag: Text
    digest: Digest
    seen: Text

    @property
    def reference(self) -> str:
        """What the engine pulls: the repository at exactly this digest."""
        return f"{self.tag.partition(':')[0]}@{self.digest}"


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows of ``build/pins.toml``."""

    source: SourcePin
    models: tuple[ModelPin, ...]
    toolkit: tuple[ToolkitPin, ...] = ()
    images: tuple[ImagePin, ...] = ()

    def model(self, name: str) -> ModelPin:
        """Return the model called ``name``.

        Raises:
            UsageError: there is none.
        """
        for pin in self.models:
            if pin.name == name:
                return pin
        known = ", ".join(pin.name for pin in self.models)
        raise UsageError("MODEL_UNKNOWN", f"there is no model {name!r}", hint=f"there is: {known}")

    def image(self, tag: str) -> ImagePin:
        """Return the pin of an image.

        Raises:
            UsageError: it has none; nothing is pulled by its tag alone.
        """
        for pin in self.images:
            if pin.tag == tag:
                return pin
        raise UsageError(
            "IMAGE_NOT_PINNED",
            f"image {tag} has no digest in build/pins.toml",
            hint="`invoke update-pins` looks it up; or name another image with --image, such as "
            "one that `invoke base-image` made",
        )


def load(path: Path = PINS_FILE) -> Pins:
    """Read the pins.

    Raises:
        UsageError: the file is missing or malformed, or a row has no digest; names the row.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Pins)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            "PINS_INVALID",
            f"{path.name}: {error}",
            hint="the file is written by `invoke update-pins`, not by hand",
        ) from error
