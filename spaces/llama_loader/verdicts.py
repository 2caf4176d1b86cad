"""What test runs found, as it is kept in the store: a file each, which may hold anything."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from llama_loader import disk, strict_json
from llama_loader.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FOLDER: Final = "test-runs"
"""Where verdicts are kept in the store, a file each."""
_MAX_BYTES: Final = 64 * 1024
_LONGEST: Final = 86_400.0
"""Seconds; a start may be given at most a day."""


@dataclass(frozen=True)
class Verdict:
    """What a test run found.

    Attributes:
        ok: the right answer came, from the devices that were meant.
        devices: which they were; empty for the CPU.
        seconds: what it cost.
        by: ``tiny model``, or ``model`` where a start of the user's own was the proof.
        kept: it was read from the store; nothing ran now.
        code, message, hint: of the error, where it is not ok.
    """

    ok: bool
    devices: tuple[str, ...]
    seconds: float
    by: str = "tiny model"
    kept: bool = False
    code: str = ""
    message: str = ""
    hint: str = ""


class _Kept(msgspec.Struct, frozen=True):
    """A good verdict, as it is read again."""

    ok: Literal[True]
    devices: tuple[Annotated[str, Meta(pattern=r"\A\w{1,64}\Z")], ...]
    seconds: Annotated[float, Meta(ge=0, le=_LONGEST)]
    by: Literal["tiny model", "model"]


def read(path: Path) -> Verdict | None:
    """Read a good verdict; anything else counts as none."""
    try:
        data = disk.read_if_there(path)
        tree = strict_json.loads(data or b"", what=path.name, max_bytes=_MAX_BYTES)
        found = msgspec.convert(tree, _Kept)
    except (OSError, IntegrityError, msgspec.ValidationError):
        return None
    return Verdict(ok=True, devices=found.devices, seconds=found.seconds, by=found.by, kept=True)


def write(path: Path, verdict: Verdict, facts: Mapping[str, Any]) -> None:
    """Write a verdict with what it holds for; a store that is read-only keeps none."""
    document = {
        **asdict(verdict),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }
    del document["kept"]
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        data = json.dumps(document, indent=1).encode()
        disk.write_whole(path, data, staging=path.parents[1] / "staging")
