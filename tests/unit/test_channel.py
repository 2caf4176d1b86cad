"""Faults 22 to 24: signatures, serials and expiry of a signed channel (docs/faults.md)."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import minisign
import pytest

from llama_loader import disk, trust
from llama_loader.channel import Channel
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Note, ignore
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
from llama_loader.transport import Patience
from tests.rigs import archives
from tests.rigs import fault_server as faults
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.manifest import Manifest

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
PATH = "/channels/stable/manifest.json"
KEYS, OTHER = minisign.KeyPair.generate(), minisign.KeyPair.generate()
PUBLIC = KEYS.public_key.to_base64().decode()


def manifest(serial: int = 7, **changes: Any) -> bytes:
    _, artifact = archives.release()
    words: dict[str, Any] = {
        "serial": serial,
        "created": NOW - timedelta(days=2),
        "expires": NOW + timedelta(days=30),
    }
    return archives.manifest(artifact, **(words | changes))


def sign(data: bytes, keys: minisign.KeyPair = KEYS, **options: Any) -> bytes:
    return bytes(keys.secret_key.sign(data, **options))


class Published:
    """A channel behind a server, and a machine that follows it."""

    def __init__(self, server: FaultServer, root: Path) -> None:
        self.server = server
        self.root = root
        self.notes: list[Note] = []
        self.url = self.put(manifest())

    def put(self, data: bytes, signature: bytes | None = None) -> str:
        self.server.put(f"{PATH}.minisig", sign(data) if signature is None else signature)
        return self.server.put(PATH, data)

    def follow(
        self, *, now: datetime = NOW, key: str = PUBLIC, least: int = 0, **options: Any
    ) -> Manifest:
        def listen(event: object) -> None:
            if isinstance(event, Note):
                self.notes.append(event)

        store = Store(self.root)
        wait = options.pop("between", lambda _: None)
        channel = Channel(self.url, key, least, store=store, sink=listen, now=now, sleep=wait)
        patience = Patience(attempts=1)
        return channel.manifest(Fetcher(sleep=lambda _: None, patience=patience, **options))

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("channels/*/*.json"))


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with FaultServer() as server:
        yield Published(server, tmp_path / "store")


def refused(published: Published, **options: Any) -> LoaderError:
    before = published.kept()
    with pytest.raises(LoaderError) as caught:
        published.follow(**options)
    assert published.kept() == before
    return caught.value


@pytest.mark.parametrize("prehash", [True, False])
def test_what_is_signed_is_followed(published: Published, *, prehash: bool) -> None:
    data = manifest()
    published.put(data, sign(data, prehash=prehash))
    assert published.follow().serial == 7
    assert published.kept() == ["7.json"]
    assert published.notes == []


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        (None, "SIGNATURE_MISSING"),
        (b"", "SIGNATURE_INVALID"),
        (b"untrusted comment: x\nRWQ", "SIGNATURE_INVALID"),
        (sign(manifest(), OTHER), "SIGNATURE_INVALID"),
        (sign(manifest(serial=8)), "SIGNATURE_INVALID"),
        (sign(manifest())[:-20], "SIGNATURE_INVALID"),
        (b"\xff" * 300, "SIGNATURE_INVALID"),
        (b"x" * 4096, "SIGNATURE_INVALID"),
        (b"x" * 4097, "FILE_TOO_LARGE"),
    ],
)
def test_what_is_not_signed_by_the_key_is_refused(
    published: Published, signature: bytes | None, code: str
) -> None:
    published.put(manifest(), signature or b"")
    if signature is None:
        published.server.fail(f"{PATH}.minisig", faults.status(404), always=True)
    error = refused(published)
    assert (error.code, error.exit_status) == (code, 4)


def test_a_signature_that_is_out_of_reach_is_not_one_that_is_missing(published: Published) -> None:
    published.server.fail(f"{PATH}.minisig", faults.status(500), always=True)
    error = refused(published)
    assert (type(error), error.exit_status) == (NetworkError, 3)


def test_a_trusted_comment_cannot_be_changed(published: Published) -> None:
    signature = sign(manifest(), trusted_comment="stable")
    published.put(manifest(), signature.replace(b"stable", b"edible"))
    assert refused(published).code == "SIGNATURE_INVALID"


def test_a_signature_says_nothing_about_a_manifest_that_is_none(published: Published) -> None:
    published.put(b"{}")
    assert refused(published).exit_status == 4


@pytest.mark.parametrize("key", ["RWQx", "not a key", "\u00e9", PUBLIC[:-4], "A" * 56])
def test_a_key_that_is_none_is_a_setting(published: Published, key: str) -> None:
    error = refused(published, key=key)
    assert isinstance(error, SettingError | IntegrityError)
    assert error.code in {"PUBLIC_KEY_INVALID", "SIGNATURE_INVALID"}


def test_a_key_that_is_none_is_not_shown_without_end(published: Published) -> None:
    assert f"{'x' * 80!r} is not" in refused(published, key="x" * 500).message


def test_a_serial_never_goes_back(published: Published) -> None:
    published.follow()
    published.put(manifest(serial=9))
    assert published.follow().serial == 9
    published.put(manifest(serial=8))
    error = refused(published)
    assert error.code == "SERIAL_TOO_LOW"
    assert "serial 8; 9 was accepted before" in error.message
    published.put(manifest(serial=9, release="b1-2"))  # signed anew, with another expiry
    assert published.follow().release == "b1-2"


def test_a_serial_below_the_least_on_a_fresh_machine(published: Published) -> None:
    error = refused(published, least=8)
    assert (error.code, "8 is asked for" in error.message) == ("SERIAL_TOO_LOW", True)
    assert published.follow(least=7).serial == 7


@pytest.mark.parametrize(
    ("now", "changes", "code"),
    [
        (NOW, {"expires": NOW}, "MANIFEST_EXPIRED"),
        (NOW, {"expires": None}, "MANIFEST_EXPIRED"),
        (NOW + timedelta(days=365), {}, "MANIFEST_EXPIRED"),
        (NOW - timedelta(days=365), {}, "CLOCK_WRONG"),
    ],
)
def test_a_channel_lives_in_the_present(
    published: Published, now: datetime, changes: dict[str, Any], code: str
) -> None:
    published.put(manifest(**changes))
    error = refused(published, now=now)
    assert (error.code, error.exit_status) == (code, 4)
    assert f"{now:%Y-%m-%d}" in error.message
    assert "clock" in error.hint


def test_a_clock_may_be_a_day_behind_and_no_more(published: Published) -> None:
    published.put(manifest(created=NOW + timedelta(days=1)))
    assert published.follow().serial == 7
    published.put(manifest(created=NOW + timedelta(days=1, seconds=1)))
    assert refused(published).code == "CLOCK_WRONG"


def test_out_of_reach_it_goes_on_with_what_was_accepted(published: Published) -> None:
    with pytest.raises(NetworkError):
        published.follow(offline=True)
    published.follow()
    assert published.follow(offline=True).serial == 7
    (note,) = published.notes
    assert (note.code, "serial 7" in note.message) == ("CHANNEL_OUT_OF_REACH", True)
    error = refused(published, offline=True, now=NOW + timedelta(days=31))
    assert error.code == "MANIFEST_EXPIRED"


@pytest.mark.parametrize("damage", [b"", b"{}", manifest(serial=70)])
def test_what_was_kept_is_verified_again(published: Published, damage: bytes) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    kept.write_bytes(damage)
    assert refused(published, offline=True).code == "SIGNATURE_INVALID"
    assert published.follow().serial == 7  # the channel itself mends it
    assert published.follow(offline=True).serial == 7


def test_somebody_elses_files_are_no_serials(published: Published) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    for name in ("x.json", f"{'9' * 5000}"[:200] + ".json", "\u0669.json", "-1.json"):
        (kept.parent / name).write_text("{}")
    assert published.follow().serial == 7


def test_a_few_are_kept(published: Published) -> None:
    for serial in range(7, 15):
        published.put(manifest(serial=serial))
        published.follow()
    assert published.kept() == ["12.json", "13.json", "14.json"]
    assert len(list(published.root.glob("channels/*/*.minisig"))) == 3


def test_what_is_kept_lies_where_a_later_loader_looks_for_it(published: Published) -> None:
    """The high-water mark is worth as much as the name that it is found under."""
    published.follow()
    name = hashlib.sha256(f"{PUBLIC}\n{published.url}".encode()).hexdigest()[:32]
    assert (published.root / "channels" / name / "7.json").is_file()
    assert (published.root / "channels" / name / "7.json.minisig").is_file()


def test_what_somebody_else_swept_is_not_missed(published: Published) -> None:
    published.follow()
    (signature,) = published.root.glob("channels/*/7.json.minisig")
    signature.unlink()
    for serial in range(8, 12):
        published.put(manifest(serial=serial))
        published.follow()
    assert published.kept() == ["10.json", "11.json", "9.json"]


def test_many_at_once_leave_the_highest(published: Published) -> None:
    published.put(manifest(serial=20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: published.follow().serial, range(16)))
    assert set(found) == {20}
    published.put(manifest(serial=19))
    assert refused(published).code == "SERIAL_TOO_LOW"


def test_another_key_or_place_has_its_own_serials(published: Published) -> None:
    published.put(manifest(serial=9))
    published.follow()
    data = manifest(serial=1)
    published.put(data, sign(data, OTHER))
    assert published.follow(key=OTHER.public_key.to_base64().decode()).serial == 1


def test_release_json_names_a_channel(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "release.json"
    fresh = manifest(
        created=datetime.now(timezone.utc), expires=datetime.now(timezone.utc) + timedelta(days=1)
    )
    published.put(fresh)
    place.write_text(
        json.dumps({"manifest_url": published.url, "public_key": PUBLIC, "min_serial": 7})
    )
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    words: Any = SimpleNamespace(manifest_url=None, manifest_sha256=None)
    found, url = trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert (found.serial, url) == (7, published.url)
    published.put(fresh, sign(fresh, OTHER))
    with pytest.raises(IntegrityError, match="is not signed by"):
        trust.manifest(words, Store(published.root), Fetcher(), ignore)


def test_a_promotion_between_the_two_files_is_waited_for(published: Published) -> None:
    """The signature of serial 8 is there already, its manifest a moment later."""
    later = manifest(serial=8)
    published.put(manifest(), sign(later))
    waits: list[float] = []

    def promote(seconds: float) -> None:
        waits.append(seconds)
        published.put(later)

    assert published.follow(between=promote).serial == 8
    assert len(waits) == 1


def test_a_pair_that_never_fits_is_refused_after_three_tries(published: Published) -> None:
    published.put(manifest(), sign(manifest(serial=8)))
    waits: list[float] = []
    with pytest.raises(IntegrityError) as refused:
        published.follow(between=waits.append)
    assert refused.value.code == "SIGNATURE_INVALID"
    assert len(waits) == 2
    assert published.kept() == []


def test_a_stand_in_for_the_store_counts(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store that cannot be written had to keep among the temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stand_in = Published(published.server, disk.private_folder("llama-loader"))
    stand_in.put(manifest(serial=9))
    assert stand_in.follow().serial == 9
    published.put(manifest(serial=8))
    with pytest.raises(IntegrityError) as refused:
        published.follow()
    assert refused.value.code == "SERIAL_TOO_LOW"


def test_a_stand_in_of_somebody_else_does_not(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = disk.private_folder("llama-loader")
    stand_in = Published(published.server, folder)
    stand_in.put(manifest(serial=9))
    stand_in.follow()
    folder.chmod(0o777)
    published.put(manifest(serial=8))
    assert published.follow().serial == 8


def test_what_was_accepted_meanwhile_counts(published: Published) -> None:
    """While this process waits for the network, another one accepts serial 10."""
    published.put(manifest(), sign(manifest(serial=8)))

    def other(_: float) -> None:
        published.put(manifest(serial=10))
        assert published.follow().serial == 10
        published.put(manifest(serial=9))

    with pytest.raises(IntegrityError) as refused:
        published.follow(between=other)
    assert refused.value.code == "SERIAL_TOO_LOW"


@pytest.mark.parametrize(
    ("serial", "least", "code"), [(0, None, ""), (7, 7, ""), (7, 8, "SERIAL_TOO_LOW")]
)
def test_release_json_says_the_least_serial_of_a_channel(
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serial: int,
    least: int | None,
    code: str,
) -> None:
    now = datetime.now(timezone.utc)
    published.put(manifest(serial, created=now, expires=now + timedelta(days=1)))
    place = tmp_path / "release.json"
    told = {"manifest_url": published.url, "public_key": PUBLIC, "min_serial": least}
    place.write_text(json.dumps(told))
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    words: Any = SimpleNamespace(manifest_url=None, manifest_sha256=None)
    if not code:
        found, _ = trust.manifest(words, Store(published.root), Fetcher(), ignore)
        assert found.serial == serial
        return
    with pytest.raises(IntegrityError) as caught:
        trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert caught.value.code == code


def test_a_digest_of_the_settings_pins_whatever_a_channel_says(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = manifest()
    published.put(data, b"no signature at all")
    place = tmp_path / "release.json"
    place.write_text(json.dumps({"manifest_url": published.url, "public_key": PUBLIC}))
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    digest = hashlib.sha256(data).hexdigest()
    words: Any = SimpleNamespace(manifest_url=None, manifest_sha256=digest)
    found, url = trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert (found.serial, url) == (7, published.url)
    words.manifest_sha256 = "0" * 64
    with pytest.raises(IntegrityError) as caught:
        trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert caught.value.code == "MANIFEST_PIN_MISMATCH"
