"""Which release is trusted: ``release.json``, and a channel's signatures, serials and expiry."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import minisign
import msgspec
import pytest

from llama_loader import disk, trust
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Note, ignore
from llama_loader.fetch import Fetcher
from llama_loader.locations import Patience
from llama_loader.store import Store
from llama_loader.trust import Channel, Pin
from tests.rigs import archives
from tests.rigs import fault_server as faults
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.manifest import Manifest

URL = "https://example.org/manifest.json"
SHA = "a" * 64
FOR = {"project": "me/builds", "channel": "stable"}


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
    write(place, manifest_url=URL, public_key="RWQx", min_serial=7, **FOR)
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
def pinned(server: FaultServer) -> tuple[str, str]:
    _, artifact = archives.release()
    data = archives.manifest(artifact)
    return server.put("/m.json", data), hashlib.sha256(data).hexdigest()


def resolve(tmp_path: Path, **settings: Any) -> tuple[str, str]:
    words = SimpleNamespace(**{"manifest_url": None, "manifest_sha256": None, **settings})
    found, url = trust.manifest(words, Store(tmp_path / "store"), Fetcher())  # type: ignore[arg-type]
    return found.release, url


def test_the_files_release(
    tmp_path: Path, place: Path, pinned: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = pinned
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
    tmp_path: Path, place: Path, pinned: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = pinned
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    write(place, manifest_url=URL, manifest_sha256=SHA)
    assert resolve(tmp_path, manifest_url=url) == ("b1-1", url)
    assert resolve(tmp_path, manifest_url=url, manifest_sha256=sha256) == ("b1-1", url)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path, manifest_url=url, manifest_sha256=SHA)


def test_an_installed_package_reads_the_file_beside_the_apps_script(
    tmp_path: Path, place: Path, pinned: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = pinned
    installed = tmp_path / "site-packages" / "release.json"
    monkeypatch.setattr(trust, "RELEASE_FILE", installed)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(tmp_path / "app.py")))
    with pytest.raises(SettingError, match=r"release\.json cannot be read"):
        resolve(tmp_path)
    write(place, manifest_url=url, manifest_sha256=sha256)
    assert resolve(tmp_path) == ("b1-1", url)
    installed.parent.mkdir()
    write(installed, manifest_url=url, manifest_sha256=SHA)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path)


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


# signed channels: signatures, serials and expiry

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
    """Sign a manifest for the channel stable of me/builds, unless options say otherwise."""
    told = json.loads(data) if data.startswith(b"{") else {}
    named = {"serial": told.get("serial", 0), "release": told.get("release", "none"), **FOR}
    named |= {name: options.pop(name) for name in tuple(named) if name in options}
    comment = trust.signed_for(**named)
    return bytes(keys.secret_key.sign(data, **({"trusted_comment": comment} | options)))


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
        named = {name: options.pop(name, value) for name, value in FOR.items()}
        pin = Pin(manifest_url=self.url, public_key=key, min_serial=least, **named)
        channel = Channel(pin, store=store, sink=listen, now=now, sleep=wait)
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
    signature = sign(manifest(), channel="edible")
    published.put(manifest(), signature.replace(b"edible", b"stable"))
    assert refused(published).code == "SIGNATURE_INVALID"


def test_a_signature_says_nothing_about_a_manifest_that_is_none(published: Published) -> None:
    published.put(b"{}")
    assert refused(published).exit_status == 4


NO_KEYS = {
    "short": "RWQx",
    "words": "not a key",
    "accent": "\u00e9",
    "cut": PUBLIC[:-4],
    "zeros": "A" * 56,
}


@pytest.mark.parametrize("key", NO_KEYS.values(), ids=NO_KEYS)
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
    published.put(manifest(8, created=NOW + timedelta(days=1, seconds=1)))
    assert refused(published).code == "CLOCK_WRONG"


def test_out_of_reach_it_goes_on_with_what_was_accepted(published: Published) -> None:
    with pytest.raises(NetworkError):
        published.follow(offline=True)
    published.follow()
    assert published.follow(offline=True).serial == 7
    (note,) = published.notes
    assert (note.code, "serial 7" in note.message) == ("CHANNEL_OUT_OF_REACH", True)
    error = refused(published, offline=True, now=NOW + timedelta(days=61))
    assert error.code == "MANIFEST_EXPIRED"


def kept_as(data: bytes, signature: bytes) -> bytes:
    return msgspec.json.encode((data, signature))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        manifest(serial=70),
        kept_as(manifest(serial=70), sign(manifest())),
        kept_as(manifest(), sign(manifest(), OTHER)),
        kept_as(manifest(release="b1-2"), b""),
    ],
)
def test_what_was_kept_is_verified_again(published: Published, damage: bytes) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    kept.write_bytes(damage)
    assert refused(published, offline=True).code == "OFFLINE"
    assert published.follow().serial == 7  # the channel itself mends it
    assert published.follow(offline=True).serial == 7


@pytest.mark.parametrize("kind", ["damaged", "FIFO", "folder"])
def test_mark_holds_whatever_becomes_of_what_was_kept(published: Published, kind: str) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    kept.unlink()
    {"damaged": kept.touch, "FIFO": lambda: os.mkfifo(kept), "folder": kept.mkdir}[kind]()
    published.put(manifest(serial=6))
    assert refused(published).code == "SERIAL_TOO_LOW"
    published.put(manifest(serial=7))
    assert published.follow().serial == 7
    assert kept.is_file()


def test_somebody_elses_files_are_no_serials(published: Published) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    for name in ("x.json", f"{'9' * 5000}"[:200] + ".json", "\u0669.json", "-1.json"):
        (kept.parent / name).write_text("{}")
    assert published.follow().serial == 7


def test_what_is_kept_lies_where_a_later_loader_looks_for_it(published: Published) -> None:
    """The high-water mark is worth as much as the name that it is found under."""
    published.follow()
    name = hashlib.sha256(f"{PUBLIC}\nme/builds\nstable".encode()).hexdigest()[:32]
    assert (published.root / "channels" / name / "7.json").is_file()


def test_processes_that_accept_at_once_leave_the_highest(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them has accepted serial 9, and serial 10 is kept before it has written its own."""
    write, later = Store.write, [manifest(serial=10)]

    def write_late(store: Store, *names: str, data: bytes) -> None:
        if later:
            published.put(later.pop())
            assert published.follow().serial == 10
        write(store, *names, data=data)

    monkeypatch.setattr(Store, "write", write_late)
    published.put(manifest(serial=9))
    assert published.follow().serial == 9
    assert refused(published, least=11).message.endswith("11 is asked for")
    published.put(manifest(serial=9))
    assert refused(published).code == "SERIAL_TOO_LOW"


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
        json.dumps({"manifest_url": published.url, "public_key": PUBLIC, "min_serial": 7, **FOR})
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
    folder = disk.private_folder()
    folder.mkdir(mode=0o700)
    stand_in = Published(published.server, folder)
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
    folder = disk.private_folder()
    folder.mkdir(mode=0o700)
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
    told = {"manifest_url": published.url, "public_key": PUBLIC, "min_serial": least, **FOR}
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
    place.write_text(json.dumps({"manifest_url": published.url, "public_key": PUBLIC, **FOR}))
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    digest = hashlib.sha256(data).hexdigest()
    words: Any = SimpleNamespace(manifest_url=None, manifest_sha256=digest)
    found, url = trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert (found.serial, url) == (7, published.url)
    words.manifest_sha256 = "0" * 64
    with pytest.raises(IntegrityError) as caught:
        trust.manifest(words, Store(published.root), Fetcher(), ignore)
    assert caught.value.code == "MANIFEST_PIN_MISMATCH"


def channel_refused(published: Published, code: str, *words: str, **options: Any) -> None:
    error = refused(published, **options)
    assert (error.code, error.exit_status) == (code, 4)
    assert all(word in error.message for word in words)
    assert error.hint


@pytest.mark.parametrize(
    ("signed_as", "word"),
    [
        ({"channel": "candidate"}, "channel candidate"),
        ({"project": "me/other"}, "project me/other"),
        ({"serial": 8}, "serial 8"),
        ({"release": "b1-9"}, "release b1-9"),
    ],
)
def test_manifest_signed_for_something_else_is_refused(
    published: Published, signed_as: dict[str, Any], word: str
) -> None:
    """The key is right, and yet it is not this channel's manifest: its mark stays untouched."""
    published.put(manifest(), sign(manifest(), **signed_as))
    channel_refused(published, "CHANNEL_MISMATCH", word, "project me/builds channel stable")
    published.put(manifest(serial=3))
    assert published.follow().serial == 3


@pytest.mark.parametrize(
    "comment",
    [
        "channel stable serial 7 release b1-1",
        "",
        "project x",
        trust.signed_for(**FOR, serial=7, release="b1-1") + " ",
    ],
)
def test_signature_that_names_no_project_asks_for_a_new_promotion(
    published: Published, comment: str
) -> None:
    published.put(manifest(), sign(manifest(), trusted_comment=comment))
    channel_refused(published, "CHANNEL_MISMATCH", repr(comment))
    assert "an older farm" in refused(published).hint


@pytest.mark.parametrize("missing", ["project", "channel"])
def test_release_file_that_does_not_name_its_channel_is_refused(place: Path, missing: str) -> None:
    told = {name: value for name, value in FOR.items() if name != missing}
    write(place, manifest_url=URL, public_key=PUBLIC, **told)
    with pytest.raises(IntegrityError) as caught:
        trust.read(place)
    error = caught.value
    assert (error.code, error.exit_status) == ("CHANNEL_NOT_NAMED", 4)
    assert '"project": "OWNER/REPO"' in error.hint
    assert '"channel": "stable"' in error.hint


def test_other_content_under_an_accepted_serial_is_refused(published: Published) -> None:
    published.follow()
    published.put(manifest(release="b1-2"))
    channel_refused(published, "SERIAL_REUSED", "serial 7")
    published.put(manifest(), sign(manifest(), prehash=False))  # the same bytes, signed anew
    assert published.follow().serial == 7
    published.put(manifest(serial=8, release="b1-2"))
    assert published.follow().release == "b1-2"


def test_marks_of_another_channel_or_project_do_not_count(published: Published) -> None:
    for name, value in (("channel", "candidate"), ("project", "me/other")):
        data = manifest(serial=90)
        published.put(data, sign(data, **{name: value}))
        assert published.follow(**{name: value}).serial == 90
    published.put(manifest())
    assert published.follow().serial == 7


def test_mark_is_that_of_the_channel_at_each_of_its_mirrors(published: Published) -> None:
    published.put(manifest(serial=9))
    published.follow()
    data = manifest(serial=8)
    published.server.put("/mirror.json.minisig", sign(data))
    published.url = published.server.put("/mirror.json", data)
    channel_refused(published, "SERIAL_TOO_LOW", "9 was accepted")


@pytest.mark.parametrize(
    ("days", "code"),
    [(8, None), (9, "CHANNEL_EXPIRES_SOON"), (29, "CHANNEL_EXPIRES_SOON"), (30, "CHANNEL_EXPIRED"),
     (59, "CHANNEL_EXPIRED")],
)  # fmt: skip
@pytest.mark.parametrize("offline", [False, True])
def test_accepted_release_warns_before_its_expiry_and_runs_on_after_it(
    published: Published, days: int, code: str | None, *, offline: bool
) -> None:
    """It expires 30 days from now: a note from 21 days before that until 30 days after it."""
    published.follow()
    for _ in range(2):
        published.notes.clear()
        assert published.follow(now=NOW + timedelta(days=days), offline=offline).serial == 7
        codes = [note.code for note in published.notes if note.code != "CHANNEL_OUT_OF_REACH"]
        assert codes == ([code] if code else [])
    told = [one.message for one in published.notes if one.code == code]
    assert all(f"{NOW + timedelta(days=30):%Y-%m-%d}" in message for message in told)


@pytest.mark.parametrize("offline", [False, True])
def test_accepted_release_ends_thirty_days_after_its_expiry(
    published: Published, *, offline: bool
) -> None:
    published.follow()
    error = refused(published, now=NOW + timedelta(days=60), offline=offline)
    assert (error.code, error.exit_status) == ("MANIFEST_EXPIRED", 4)


def test_new_release_is_not_accepted_after_its_expiry(published: Published) -> None:
    late = NOW + timedelta(days=31)
    assert refused(published, now=late).code == "MANIFEST_EXPIRED"
    published.follow()
    published.put(manifest(serial=8, expires=NOW + timedelta(days=30)))
    before = published.kept()
    assert published.follow(now=late).serial == 7  # the accepted one has its grace
    assert [note.code for note in published.notes] == ["CHANNEL_EXPIRED"]
    assert published.kept() == before == ["7.json"]
    published.put(manifest(serial=9, expires=late + timedelta(days=90)))
    assert published.follow(now=late).serial == 9


def test_comment_says_what_the_signature_is_for() -> None:
    found = trust.signed_for("me/builds", "stable", 7, "b1-1")
    assert found == "project me/builds channel stable serial 7 release b1-1"
