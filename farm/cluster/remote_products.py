"""What came back from a host: checked by rules of our own before a byte of it is written."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from farm.errors import BuildError

if TYPE_CHECKING:
    from pathlib import Path

    from farm.cluster.remote_build import Outcome

MOST_BYTES: Final = 8 << 30
"""Of all files together, unpacked; a set's products are 80 to 200 MB."""
MOST_MEMBERS: Final = 20_000
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
"""Ends every tar; of one that is cut between two files ``tarfile`` says nothing."""


def check(outcome: Outcome) -> None:
    """Refuse what is not a folder of files as the host has packed it.

    Raises:
        BuildError: ``PRODUCTS_DAMAGED``, ``PRODUCTS_UNSAFE``.
    """
    if hashlib.sha256(outcome.products).hexdigest() != outcome.sha256:
        raise _damaged(outcome, "the sha256 is another")
    try:
        with tarfile.open(fileobj=io.BytesIO(outcome.products), mode="r:") as tar:
            _check_members(tar, outcome)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise _damaged(outcome, str(error)) from error


def unpack(outcome: Outcome, into: Path) -> None:
    """Check and unpack what came back.

    Raises:
        BuildError: ``PRODUCTS_DAMAGED``, ``PRODUCTS_UNSAFE``.
    """
    check(outcome)
    with tarfile.open(fileobj=io.BytesIO(outcome.products), mode="r:") as tar:
        try:
            tar.extractall(into, filter="data")
        except tarfile.TarError as error:
            raise _unsafe(outcome, str(error)) from error


def _check_members(tar: tarfile.TarFile, outcome: Outcome) -> None:
    seen: set[str] = set()
    size, end = 0, 0
    for member in tar:
        said = _unsafe_member(member, seen)
        seen.add(member.name)
        size += member.size
        if said is None and (size > MOST_BYTES or len(seen) > MOST_MEMBERS):
            said = f"more than {MOST_BYTES} bytes or {MOST_MEMBERS} files"
        if said is not None:
            raise _unsafe(outcome, said)
        end = member.offset_data + (member.size if member.isfile() else 0)
    end += -end % tarfile.BLOCKSIZE
    if outcome.products[end : end + len(_END)] != _END:
        raise _damaged(outcome, "its end is cut off")
    if not seen:
        raise _damaged(outcome, "there is no file in it")


def _unsafe_member(member: tarfile.TarInfo, seen: set[str]) -> str | None:
    """Say what is wrong with a member. A link may only name its neighbour, as a library's does."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in member.name:
        return f"a file is called {member.name!r}"
    if member.name in seen:
        return f"{member.name} is there twice"
    if member.issym() and (member.linkname in {"", ".", ".."} or "/" in member.linkname):
        return f"{member.name} is a link to {member.linkname!r}"
    if member.islnk() and member.linkname not in seen:
        return f"{member.name} is a link to {member.linkname!r}, which is not there"
    kinds = (member.type in tarfile.REGULAR_TYPES and not member.issparse()) or member.isdir()
    if not (kinds or member.issym() or member.islnk()):
        return f"{member.name} is neither a file nor a folder nor a link"
    return None


def _damaged(outcome: Outcome, why: str) -> BuildError:
    return BuildError("PRODUCTS_DAMAGED", f"what {outcome.host} built arrived damaged: {why}")


def _unsafe(outcome: Outcome, why: str) -> BuildError:
    return BuildError(
        "PRODUCTS_UNSAFE",
        f"what {outcome.host} sent is not what a build makes: {why}",
        hint="nothing of it was used; look at that host",
    )
