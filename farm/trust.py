"""Keys and signatures of channels: minisign, through py-minisign.

The secret key comes from ``FARM_SIGNING_KEY`` (its text) or a file, never from the command line,
which every process of the machine can read. It is never printed. ``FARM_SIGNING_PASSWORD`` opens an
encrypted key.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import minisign

from farm.errors import PublishError, UsageError, remark
from llama_loader.errors import LoaderError
from llama_loader.trust import signed_comment

VARIABLE: Final = "FARM_SIGNING_KEY"
PASSWORD: Final = "FARM_SIGNING_PASSWORD"  # noqa: S105 - the variable's name
_OTHER_KEY: Final = "incompatible key identifiers"
"""py-minisign's words for a signature that names another key."""
_LARGEST: Final = 4096
"""Bytes. A minisign key has about 250."""


@dataclass(frozen=True)
class Signer:
    """A secret key, ready to sign."""

    _key: minisign.SecretKey

    @property
    def public_key(self) -> str:
        """The line of base64 that goes into ``release.json``."""
        return str(self._key.get_public_key().to_base64(), "ascii")

    def sign(self, content: bytes, comment: str) -> bytes:
        """Return the ``.minisig`` file of some content; the comment is signed, too."""
        return bytes(self._key.sign(content, trusted_comment=comment))

    def __repr__(self) -> str:
        """Show the public key, and nothing else."""
        return f"Signer({self.public_key})"


def generate(place: Path) -> str:
    """Write a new pair of keys, ``place`` (0600) and ``place.pub``; returns the public one.

    The secret key is encrypted where ``FARM_SIGNING_PASSWORD`` is set.

    Raises:
        UsageError: there is a key already.
        PublishError: it cannot be written.
    """
    pair = minisign.KeyPair.generate()
    public = str(pair.public_key.to_base64(), "ascii")
    password = os.environ.get(PASSWORD)
    if password:
        pair.secret_key.encrypt(password)
    published = place.with_name(f"{place.name}.pub")
    try:
        # the public one first: a failure leaves no unknown secret key behind
        _write_new(published, bytes(pair.public_key), 0o644)
        try:
            _write_new(place, bytes(pair.secret_key), 0o600)
        except OSError:
            published.unlink()
            raise
    except FileExistsError as error:
        raise UsageError("KEY_EXISTS", filename=error.filename) from error
    except OSError as error:
        raise PublishError("KEY_NOT_WRITTEN", place=place, strerror=error.strerror) from error
    return public


def signer(file: Path | None) -> Signer:
    """Read the secret key from a file, else from ``FARM_SIGNING_KEY``.

    Raises:
        UsageError: no key was given, it is no key, or the password does not open it.
    """
    text = os.environb.get(VARIABLE.encode(), b"") if file is None else _read(file)
    if not text.strip():
        raise UsageError("KEY_MISSING")
    where = VARIABLE if file is None else str(file)
    try:
        lines = text.strip()
        if b"\n" in lines:
            key = minisign.SecretKey.from_bytes(lines + b"\n")
        else:  # the second line alone, which is easier to put into a variable
            key = minisign.SecretKey.from_base64(lines)
        password = os.environ.get(PASSWORD, "")
        if key.is_encrypted() and not password:
            raise UsageError("KEY_INVALID/password", where=where)
        if key.is_encrypted():
            key.decrypt(password)
        key.get_public_key()
    except (minisign.Error, ValueError) as error:
        case = "KEY_INVALID/pub" if _is_public(text) else "KEY_INVALID"
        raise UsageError(case, where=where, error=error) from error
    return Signer(key)


def require_signed(content: bytes, signature: bytes, public_key: str, *, what: str) -> str:
    """Check a signature; return its trusted comment, which is signed, too.

    Raises:
        PublishError: ``SIGNED_BY_ANOTHER_KEY``, or ``SIGNATURE_DAMAGED``: it is malformed, or
            signs other bytes.
    """
    try:
        return signed_comment(content, signature, public_key, what)
    except LoaderError as error:
        why = str(error.__cause__)
        code = "SIGNED_BY_ANOTHER_KEY" if why == _OTHER_KEY else "SIGNATURE_DAMAGED"
        raise PublishError(code, what=what, told=error.message, why=why) from error


def require_public(text: str) -> str:
    """Return a public key's line of base64, also out of the whole text of its ``.pub`` file.

    Raises:
        UsageError: ``KEY_INVALID``.
    """
    line = text.strip().splitlines()[-1].strip() if text.strip() else ""
    try:
        minisign.PublicKey.from_base64(line)
    except (minisign.Error, ValueError) as error:
        # the text is not quoted: it may be the secret key
        raise UsageError("KEY_INVALID/public", error=error) from error
    return line


def _is_public(text: bytes) -> bool:
    try:
        return bool(require_public(text.decode()))
    except (UsageError, UnicodeDecodeError):
        return False


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            content = stream.read(_LARGEST)
    except OSError as error:
        raise UsageError("KEY_MISSING/file", file=file, strerror=error.strerror) from error
    if mode & 0o077 and not _is_public(content):
        print(remark("KEY_READABLE", file=file), file=sys.stderr)
    return content


def _write_new(place: Path, content: bytes, mode: int) -> None:
    """Write a file that must not exist; it never has a wider mode, not even for a moment."""
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        place.unlink()
        raise
