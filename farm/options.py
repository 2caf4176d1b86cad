"""The options of the verbs that several functions pass on, and how an option's text is parsed.

An option is written once: its line under ``Attributes`` is its help (``farm.terminal.cli.verb``).
The module imports nothing of the work, so that ``invoke --list`` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

from farm.errors import UsageError

_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_FORMS: Final = {
    "--to": "--to OWNER/NAME: your account on the Hub, a slash, and the Space's name",
    "--tree": "--tree .farm/trees/NAME",
    "--public-key": "--public-key RW…: the line of base64 in the key's .pub file",
}
"""How options without a default are given."""


class Only:
    """Marks a parameter that is one of the classes below: which of its options the verb has.

    Some get a default of the verb's own.
    """

    def __init__(self, *names: str, **defaults: object) -> None:
        self.names = (*defaults, *names)
        self.defaults = defaults


def number(option: str, text: str, least: int = 1, most: int = 999_999_999) -> int:
    """Parse a whole number; the error names the option and what it takes."""
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise UsageError("NUMBER_INVALID", option=option, text=text[:40], least=least, most=most)
    return int(text)


def _sha256(option: str, text: str) -> str:
    """Parse a digest in hexadecimal."""
    if not _SHA256.fullmatch(text):
        raise UsageError("SHA256_INVALID", option=option, text=text[:80])
    return text.lower()


def given(option: str, value: str) -> str:
    """Return the value of an option that has no default, or raise ``OPTION_MISSING``."""
    if not value:
        hint = f"give {_FORMS.get(option, f'{option} VALUE')}"
        raise UsageError("OPTION_MISSING", option=option, hint=hint)
    return value


def require_known(code: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not take.

    Raises:
        UsageError: with the code; names the values that it takes.
    """
    if value not in known:
        raise UsageError(code, f"{option} {value!r}", hint=f"it is one of {', '.join(known)}")


def one_of(
    options: Mapping[str, str | None],
    takes: Mapping[str, tuple[str, ...]],
    beside: Mapping[str, object],
) -> None:
    """Require exactly one of several options, and beside it none that it does not take.

    Such an option would be ignored.

    Raises:
        UsageError: ``OPTIONS_INVALID``: names the options, and what the chosen one takes.
    """
    chosen = [name for name, value in options.items() if value is not None]
    if len(chosen) != 1:
        raise UsageError("OPTIONS_INVALID", options=", ".join(options), given=len(chosen))
    (name,) = chosen
    given = [option for option, value in beside.items() if value is not None]
    wrong = ", ".join(option for option in given if option not in takes[name])
    if wrong:
        hint = f"{name} takes {', '.join(takes[name]) or 'none of these'}"
        raise UsageError("OPTIONS_INVALID/beside", options=wrong, chosen=name, hint=hint)


Days = Annotated[int, partial(number, most=3650)]
Port = Annotated[int, partial(number, least=0, most=65535)]
Minutes = Annotated[int, partial(number, least=0)]
Sha256 = Annotated[str | None, _sha256]
Given = Annotated[str, given]


@dataclass(frozen=True)
class BuildRequest:
    """The options of a build (docs/building.md).

    Attributes:
        arch_set: a set or group of build/targets.toml, e.g. sm90, zerogpu, seed
        archs: what CMAKE_CUDA_ARCHITECTURES takes, e.g. '80;86;89;90'
        line: the CUDA line, e.g. cu128; without it the image's or the toolkit's, else cu128
        engine: auto (docker where one answers, else local), docker, local, dask
        image: the devel image to build on, instead of the line's
        toolkit: for the local engine: a folder, or 'pypi' for NVIDIA's wheels
        ref: a tag, branch or commit of llama.cpp, instead of the pinned archive
        source: a folder with llama.cpp's source, instead of the pinned archive
        assume_build: llama.cpp's build number, for a --source whose history does not tell it
        format: tar.zst or tar.gz
        jobs: compilers at a time
        out: where tarballs and manifest go
        fresh: compile everything again; the compiler cache is neither read nor written
        copy: also copy the one tarball here, under a name of its own
        also: a program more in the tarball: llama-bench, llama-quantize, rpc-server
        define: NAME=VALUE, a CMake definition more; again for more. Recorded in BUILD.json
        patches: auto (those of build/patches) or none (llama.cpp as it is upstream)
        scheduler: for dask: the cluster's address, tcp://…; without it, this machine
        workers: for dask on this machine: builds at a time
        worker_engine: for dask: what its hosts build with: auto, docker, local
    """

    arch_set: str | None = None
    archs: str | None = None
    line: str | None = None
    engine: str = "auto"
    image: str | None = None
    toolkit: str | None = None
    ref: str | None = None
    source: Path | None = None
    assume_build: int | None = None
    format: str | None = None
    jobs: int | None = None
    out: Path = Path("dist")
    fresh: bool = False
    copy: Path | None = None
    also: tuple[str, ...] = ()
    define: tuple[str, ...] = ()
    patches: str = "auto"
    scheduler: str | None = None
    workers: int | None = None
    worker_engine: str = "auto"
    this_cpu: bool = False
    """Build this machine's CPU variant, and no other (``patches.cpu_variant``). No option."""


@dataclass(frozen=True)
class Publication:
    """Where a release will go.

    Attributes:
        release: for --check: the release's name; --arch-set release means all sets of one
        to: for --check: where it will be published, as in invoke publish
        channel: for --check: the channel that it will be promoted to
        key: for --check: the file with the channel's key, else FARM_SIGNING_KEY
        check: check everything that can be known before a build, and build nothing
    """

    release: str | None = None
    to: str | None = None
    channel: str | None = None
    key: Path | None = None
    check: bool = False

    @property
    def is_asked_for(self) -> bool:
        """Whether any of it was given."""
        return any((self.release, self.to, self.channel, self.key))


@dataclass(frozen=True)
class Promoting:
    """A channel of a place, and how its next promotion is signed.

    Attributes:
        channel: e.g. stable
        to: the place: a folder, github:OWNER/REPO or hf:OWNER/REPO
        key: the file with the signing key, else FARM_SIGNING_KEY
        days: until the promotion expires
        project: OWNER/REPO that the signature names; the place's own if not given
    """

    channel: str | None = None
    to: str | None = None
    key: Path | None = None
    days: Days = 90
    project: str | None = None


@dataclass(frozen=True)
class Deploy:
    """What is deployed to which Space.

    Attributes:
        to: the Space: OWNER/NAME
        model: 4b, 12b, 27b (TranslateGemma), OWNER/REPO:FILE (or :Q4_K_M), bucket:OWNER/NAME:FILE
        mount: mount the model's repository in the Space, instead of a copy in its image
        variable: NAME=VALUE, a variable of the Space; again for more. Secrets are refused
        hardware: the Space's hardware; without it zero-a10g (ZeroGPU), or what the Space has
        adopt: also upload to a Space that holds other files; none of them is deleted
        dry_run: show what would be uploaded (and, for invoke space, built and published), and end
    """

    to: Given = ""
    model: str | None = None
    mount: bool = False
    variable: tuple[str, ...] = ()
    hardware: str | None = None
    adopt: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Wish(Deploy):
    """The options of ``invoke space`` beside those of its build.

    Attributes:
        url: a CUDA archive of llama.cpp to run; nothing is built then
        releases: where they are published, hf: or github:; without it hf:OWNER/llama-server
        release: the release there to run; without it the newest that the hardware can run
        folder: where a release is built; without it dist/SET
        wait: minutes to wait until the Space answers; 0: do not wait
    """

    url: str | None = None
    releases: str | None = None
    release: str | None = None
    folder: Path | None = None
    wait: Minutes = 40
    build: BuildRequest = BuildRequest()


@dataclass(frozen=True)
class RebuildRequest:
    """The options of ``invoke rebuild``.

    Attributes:
        release: a release folder, a manifest.json, or the URL of either
        artifact: which tarball of it; may be left out if the release has one server
        sha256: what the manifest's bytes must come to
        source: the source tree, for what was built from a folder
        remote: the repository that BUILD.json names, if you trust it and it is not llama.cpp's
        engine: docker; local for what the local engine built: its source then runs here, as you
        image: another devel image than the recorded one
        toolkit: for what the local engine built: a folder, or 'pypi'
        jobs: compilers at a time
    """

    release: str
    artifact: str | None = None
    sha256: Sha256 = None
    source: Path | None = None
    remote: str | None = None
    engine: str = "docker"
    image: str | None = None
    toolkit: str | None = None
    jobs: int | None = None
