"""release.json: which release is trusted, and what is refused rather than half understood."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import trust
from llama_loader.errors import IntegrityError, SettingError
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
from tests.rigs import archives
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

URL = "https://example.org/manifest.json"
SHA = "a" * 64


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "release.json"


def write(place: Path, **fields: Any) -> None:
    place.write_text(json.dumps(fields))


def test_a_pin(place: Path) -> None:
    write(place, manifest_url=URL, manifest_sha256=SHA, comment="unknown fields are ignored")
    pin = trust.read(place)
    assert (pin.manifest_url, pin.manifest_sha256) == (URL, SHA)


def test_a_channel(place: Path) -> None:
    write(place, manifest_url=URL, public_key="RWQx", min_serial=7)
    pin = trust.read(place)
    assert (pin.public_key, pin.min_serial, pin.manifest_sha256) == ("RWQx", 7, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"manifest_url": URL, "public_key": "RWQx", "manifest_sha256": SHA},
        {"manifest_url": URL, "public_key": ""},
        {"manifest_url": URL, "public_key": "RWQx", "min_serial": -1},
        {"manifest_url": URL, "public_key": "RWQx", "min_serial": 2**53},
    ],
)
def test_a_channel_that_says_two_things_is_refused(place: Path, fields: dict[str, Any]) -> None:
    write(place, **fields)
    with pytest.raises(IntegrityError) as caught:
        trust.read(place)
    assert caught.value.code == "RELEASE_INVALID"


@pytest.mark.parametrize(
    ("text", "code", "match"),
    [
        ("", "JSON_MALFORMED", "release.json is not JSON"),
        ("[]", "RELEASE_INVALID", "object"),
        ("{}", "RELEASE_INVALID", "manifest_url"),
        ('{"manifest_url": 1}', "RELEASE_INVALID", r"\$\.manifest_url"),
        ('{"manifest_url": ""}', "RELEASE_INVALID", r"\$\.manifest_url"),
        (f'{{"manifest_url": "{URL}"}}', "RELEASE_NOT_PINNED", "neither"),
        (f'{{"manifest_url": "{URL}", "manifest_sha256": null}}', "RELEASE_NOT_PINNED", "neither"),
        (
            f'{{"manifest_url": "{URL}", "manifest_sha256": "{SHA[1:]}"}}',
            "RELEASE_INVALID",
            r"\$\.manifest_sha256: must be 64 lower-case",
        ),
        (
            f'{{"manifest_url": "{URL}", "manifest_sha256": "{SHA.upper()}"}}',
            "RELEASE_INVALID",
            "64 lower-case",
        ),
        (
            f'{{"manifest_url": "{URL}", "manifest_sha256": "{SHA}", "manifest_sha256": "{SHA}"}}',
            "JSON_AMBIGUOUS",
            "twice",
        ),
        ('"' + "x" * 70_000 + '"', "JSON_TOO_LARGE", "at most 65536"),
    ],
)
def test_a_release_file_that_is_not_one(place: Path, text: str, code: str, match: str) -> None:
    place.write_text(text)
    with pytest.raises(IntegrityError, match=match) as caught:
        trust.read(place)
    assert caught.value.code == code


def test_no_release_file(place: Path) -> None:
    with pytest.raises(SettingError, match="nothing says which release to run") as caught:
        trust.read(place)
    assert caught.value.code == "RELEASE_NOT_CHOSEN"
    assert "LLAMA_CPP_MANIFEST_URL" in caught.value.hint


# what the settings say, and what the file says


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture
def published(server: FaultServer) -> tuple[str, str]:
    _, artifact = archives.release()
    data = archives.manifest(artifact)
    return server.put("/m.json", data), hashlib.sha256(data).hexdigest()


def resolve(tmp_path: Path, **settings: Any) -> tuple[str, str]:
    words = SimpleNamespace(**{"manifest_url": None, "manifest_sha256": None, **settings})
    found, url = trust.manifest(words, Store(tmp_path / "store"), Fetcher())  # type: ignore[arg-type]
    return found.release, url


def test_the_files_release(
    tmp_path: Path, place: Path, published: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = published
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    write(place, manifest_url=url, manifest_sha256=sha256)
    assert resolve(tmp_path) == ("b1-1", url)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path, manifest_sha256=SHA)
    write(place, manifest_url=url, manifest_sha256=SHA)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path)
    assert resolve(tmp_path, manifest_sha256=sha256) == ("b1-1", url)


def test_the_settings_url_has_the_settings_pin_and_not_the_files(
    tmp_path: Path, place: Path, published: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = published
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    write(place, manifest_url=URL, manifest_sha256=SHA)
    assert resolve(tmp_path, manifest_url=url) == ("b1-1", url)
    assert resolve(tmp_path, manifest_url=url, manifest_sha256=sha256) == ("b1-1", url)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path, manifest_url=url, manifest_sha256=SHA)


def test_a_serial_below_the_least(
    tmp_path: Path, place: Path, published: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = published
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    write(place, manifest_url=url, manifest_sha256=sha256, min_serial=1)
    assert resolve(tmp_path) == ("b1-1", url)
    write(place, manifest_url=url, manifest_sha256=sha256, min_serial=2)
    with pytest.raises(IntegrityError, match="serial 1") as caught:
        resolve(tmp_path)
    assert caught.value.code == "SERIAL_TOO_LOW"


def test_the_file_lies_beside_the_page() -> None:
    assert trust.RELEASE_FILE.name == "release.json"
    assert (trust.RELEASE_FILE.parent / "llama_loader" / "trust.py").samefile(trust.__file__)


def test_a_pin_never_changes(place: Path) -> None:
    write(place, manifest_url=URL, manifest_sha256=SHA)
    pin: Any = trust.read(place)
    with pytest.raises(AttributeError):
        pin.manifest_url = "https://example.org/other.json"
    with pytest.raises(TypeError, match="positional"):
        type(pin)(URL, SHA)


def test_why_there_is_no_release(place: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot be read \(No such file or directory\)$"):
        trust.read(place)
