"""Answer what another machine would get: a host described in words instead of examined.

``capability=12.0,driver=580,glibc=2.36,torch=cu128`` is enough to ask, on a laptop without a GPU,
what a Space will fetch before it is ever started.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader import gpus, report
from llama_loader.cuda_libraries import Library
from llama_loader.errors import SettingError, printable
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts

if TYPE_CHECKING:
    from llama_loader.manifest import Manifest
    from llama_loader.selection import Choice
    from llama_loader.settings import Settings

_STEMS: Final = ("libcublas", "libcublasLt", "libcudart")
"""CUDA libraries that come with every torch built for CUDA, and that llama-server needs."""
_VERSION: Final = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,3}")
_DEFAULTS: Final = HostFacts("linux", "x86_64", glibc="2.36", gpu_source="supposed")
"""Debian 12, as ZeroGPU's images have been; no GPU, no driver, no CUDA library."""


def host(text: str) -> HostFacts:
    """Return the machine that a list of ``name=value`` describes.

    What is not named is as on Debian 12 without a GPU; an unknown driver or GLIBCXX counts as new
    enough, as on ZeroGPU before a GPU is attached.

    Raises:
        SettingError: names the part that cannot be read, and what can be given.
    """
    facts: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",")):
        name, _, value = part.partition("=")
        field, fact = _fact(name.strip(), value.strip())
        if fact is None or field in facts:
            raise SettingError(
                "SETTING_INVALID",
                f"--suppose {part!r} cannot be read, or is given already by another part",
                hint="give each fact once, as a list such as capability=12.0,driver=580,glibc=2.36,"
                "torch=cu128; capability (or gpu=NAME), driver, glibc, glibcxx, machine and torch"
                " (cu124, cu128, cu130 … or none) can be given",
            )
        facts[field] = fact
    return replace(_DEFAULTS, **facts)


def require_no_override(settings: Settings) -> None:
    """Refuse settings that would answer another question than the supposed machine's.

    Raises:
        SettingError: one of them is set.
    """
    if settings.cuda_arch is not None or settings.url is not None:
        raise SettingError(
            "SETTING_INVALID",
            "YAKULINGO_SPACES_CUDA_ARCH (--arch) and YAKULINGO_SPACES_LLAMA_CPP_URL (--url) leave"
            " --suppose nothing to choose",
            hint="unset them; --suppose says the capability, and a manifest what there is",
        )


def _fact(name: str, value: str) -> tuple[str, Any]:
    """Return the field of the facts that one part sets, and its value; None if it is unreadable."""
    if name == "capability" and re.fullmatch(r"[0-9]{1,2}\.?[0-9]", value):
        return "gpus", (Gpu(f"compute capability {value}", value.replace(".", "")),)
    if name == "gpu" and (known := gpus.capability(value)):
        return "gpus", (Gpu(value, known),)
    if name == "torch" and (torch := re.fullmatch("cu([0-9]{2})([0-9])|none", value)):
        place, version = Path("site-packages/nvidia"), f"{torch[1]}.{torch[2]}"
        names = [f"{stem}.so.{torch[1]}" for stem in _STEMS if torch[1]]
        found = (Library(one, place, version, f"torch {value}") for one in names)
        return "libraries", tuple(found)
    if name in {"driver", "glibc", "glibcxx"} and _VERSION.fullmatch(value):
        branch = name == "driver" and "." not in value
        return name, f"{value}.999" if branch else value  # its newest driver
    return name, value if name == "machine" and re.fullmatch(r"\w+", value) else None


def as_text(release: Manifest, chosen: Choice) -> str:
    """Return the answer for people: what would be fetched, and why each other artifact not."""
    lines = [
        f"would fetch {chosen.artifact.name} of release {release.release}",
        f"  because: {chosen.reason}",
        *(f"  {verdict.name}: {verdict.reason}" for verdict in chosen.verdicts),
    ]
    return "\n".join(printable(line) for line in lines)


def as_json(release: Manifest, facts: HostFacts, chosen: Choice) -> dict[str, Any]:
    """Return the answer as plain data."""
    return {
        "release": release.release,
        "supposed": report.host(facts),
        "choice": report.choice(chosen),
    }
