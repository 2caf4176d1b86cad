"""What came back from a host: checked before a byte of it is written, then unpacked."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from farm.errors import BuildError

if TYPE_CHECKING:
    from pathlib import Path

    from farm.cluster.host import Outcome

MOST_BYTES: Final = 8 << 30
"""Of all files together, unpacked; a set's products are 80 to 200 MB."""
MOST_MEMBERS: Final = 20_000
_ANYWHERE: Final = "/nowhere"
"""A folder for the filter to look whether a name or a link leads out of it."""
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
"""Ends every tar; of one that is cut between two files ``tarfile`` says nothing."""


def check(outcome: Outcome) -> None:
    """Refuse what is not a folder of files as the host has packed it.

    Raises:
        BuildError: ``PRODUCTS_DAMAGED``: it is not what the host has packed, or no tar;
            ``PRODUCTS_UNSAFE``: it is nothing that a build makes.
    """
    if hashlib.sha256(outcome.products).hexdigest() != outcome.sha256:
        raise _damaged(outcome, "the sha256 is another")
    try:
        with _opened(outcome) as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise _damaged(outcome, str(error)) from error
    if not members or not outcome.products.endswith(_END):
        raise _damaged(outcome, "there is no file in it, or its end is cut off")
    if said := _unsafe(members):
        raise BuildError(
            "PRODUCTS_UNSAFE",
            f"what {outcome.host} sent is not what a build makes: {said}",
            hint="nothing of it was used; look at that host",
        )


def unpack(outcome: Outcome, into: Path) -> None:
    """Check and unpack what came back.

    Raises:
        BuildError: as ``check`` does.
    """
    check(outcome)
    with _opened(outcome) as tar:
        tar.extractall(into, filter="data")


def _opened(outcome: Outcome) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(outcome.products), mode="r:")


def _unsafe(members: list[tarfile.TarInfo]) -> str | None:
    """Say what no build makes: the filter's own refusals, absolute names, names twice, a bomb."""
    if len(members) > MOST_MEMBERS or sum(member.size for member in members) > MOST_BYTES:
        return f"more than {MOST_BYTES} bytes or {MOST_MEMBERS} files"
    names = {member.name for member in members}
    if len(names) < len(members):
        return "a file is there twice"
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            return f"a file is called {member.name!r}"
        if member.islnk() and member.linkname not in names:
            return f"{member.name} is a link to {member.linkname!r}, which is not there"
        try:
            tarfile.data_filter(member, _ANYWHERE)
        except tarfile.FilterError as error:
            return str(error)
    return None


def _damaged(outcome: Outcome, why: str) -> BuildError:
    return BuildError("PRODUCTS_DAMAGED", f"what {outcome.host} built arrived damaged: {why}")
