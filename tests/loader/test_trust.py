"""Which release is trusted: ``release.json``, and a channel's signatures, serials and expiry."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import minisign
import msgspec
import pytest

from llama_loader import disk, trust
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Note, ignore
from llama_loader.fetch import Fetcher
from llama_loader.locations import Patience
from llama_loader.manifest import Manifest
from llama_loader.settings import load
from llama_loader.store import Store
from llama_loader.trust import Pin, SignedChannel
from tests.rigs import archives, refusals
from tests.rigs import fault_server as faults
from tests.rigs.fault_server import FaultServer

URL = "https://example.org/manifest.json"
SHA = "a" * 64
FOR = {"project": "me/builds", "channel": "stable"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "release.json"


def write(place: Path, **fields: Any) -> None:
    place.write_text(json.dumps(fields))


def test_a_pin_or_a_channel_is_read(place: Path) -> None:
    write(place, manifest_url=URL, manifest_sha256=SHA, comment="unknown fields are ignored")
    pin = trust.read(place)
    assert (pin.manifest_url, pin.manifest_sha256) == (URL, SHA)
    for least in (0, 2**53 - 1):
        write(place, manifest_url=URL, public_key="RWQx", min_serial=least, **FOR)
        pin = trust.read(place)
        assert (pin.public_key, pin.min_serial, pin.manifest_sha256) == ("RWQx", least, None)
    with pytest.raises(AttributeError, match="immutable"):
        pin.min_serial = 0


KEY = {"manifest_url": URL, "public_key": "RWQx", **FOR}
PINNED = {"manifest_url": URL, "manifest_sha256": SHA}


@pytest.mark.parametrize(
    ("told", "code", "match"),
    [
        ("", "JSON_MALFORMED", "release.json is not JSON"),
        ("[]", "RELEASE_INVALID", "object"),
        ({}, "RELEASE_INVALID", "manifest_url"),
        ({"manifest_url": 1}, "RELEASE_INVALID", r"\$\.manifest_url"),
        ({"manifest_url": ""}, "RELEASE_INVALID", r"\$\.manifest_url"),
        ({"manifest_url": URL}, "RELEASE_NOT_PINNED", "neither"),
        ({**PINNED, "manifest_sha256": None}, "RELEASE_NOT_PINNED", "neither"),
        ({**PINNED, "manifest_sha256": SHA[1:]}, "RELEASE_INVALID", r"sha256: must be 64 lower"),
        ({**PINNED, "manifest_sha256": SHA.upper()}, "RELEASE_INVALID", "64 lower-case"),
        (f'{{"manifest_url": "{URL}", "manifest_url": "{URL}"}}', "JSON_AMBIGUOUS", "twice"),
        ('"' + "x" * 70_000 + '"', "JSON_TOO_LARGE", "at most 65536"),
        ({**KEY, **PINNED}, "RELEASE_INVALID", "both"),
        ({**KEY, "public_key": ""}, "RELEASE_INVALID", "public_key"),
        ({**KEY, "min_serial": -1}, "RELEASE_INVALID", "min_serial"),
        ({**KEY, "min_serial": 2**53}, "RELEASE_INVALID", "min_serial"),
        ({**KEY, "project": ...}, "CHANNEL_NOT_NAMED", "name its project and channel"),
        ({**KEY, "channel": ...}, "CHANNEL_NOT_NAMED", "name its project and channel"),
    ],
)
def test_a_release_file_that_is_not_one(place: Path, told: Any, code: str, match: str) -> None:
    if isinstance(told, str):
        place.write_text(told)
    else:
        write(place, **{name: value for name, value in told.items() if value is not ...})
    with refusals.refused(code, IntegrityError, match) as caught:
        trust.read(place)
    assert code != "CHANNEL_NOT_NAMED" or '"channel": "stable"' in caught.value.hint


# what the settings say, and what the file says


@pytest.fixture
def pinned(server: FaultServer) -> tuple[str, str]:
    _, artifact = archives.release()
    data = archives.manifest(artifact)
    return server.put("/m.json", data), hashlib.sha256(data).hexdigest()


def resolve(tmp_path: Path, **settings: Any) -> tuple[str, str]:
    words = replace(load(None, {}), **settings)
    found, url = trust.manifest(words, Store(tmp_path / "store"), Fetcher())
    return found.release, url


def test_the_files_release_or_the_settings_url_with_the_settings_pin(
    tmp_path: Path, place: Path, pinned: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = pinned
    monkeypatch.setattr(trust, "RELEASE_FILE", place)
    for in_file, given, right in (
        ({"manifest_url": url, "manifest_sha256": sha256}, {}, True),
        ({"manifest_url": url, "manifest_sha256": sha256}, {"manifest_sha256": SHA}, False),
        ({"manifest_url": url, "manifest_sha256": SHA}, {}, False),
        ({"manifest_url": url, "manifest_sha256": SHA}, {"manifest_sha256": sha256}, True),
        # the file's pin is not that of another manifest
        (PINNED, {"manifest_url": url}, True),
        (PINNED, {"manifest_url": url, "manifest_sha256": sha256}, True),
        (PINNED, {"manifest_url": url, "manifest_sha256": SHA}, False),
    ):
        write(place, **in_file)
        if right:
            assert resolve(tmp_path, **given) == ("b1-1", url)
            continue
        with pytest.raises(IntegrityError, match="is pinned"):
            resolve(tmp_path, **given)


def test_an_installed_package_reads_the_file_beside_the_apps_script(
    tmp_path: Path, place: Path, pinned: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sha256 = pinned
    installed = tmp_path / "site-packages" / "release.json"
    monkeypatch.setattr(trust, "RELEASE_FILE", installed)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(tmp_path / "app.py")))
    with pytest.raises(SettingError, match=r"release\.json cannot be read \(No such") as caught:
        resolve(tmp_path)
    assert f" {tmp_path}/release.json cannot" in caught.value.message
    assert caught.value.code == "RELEASE_NOT_CHOSEN"
    for way in ("put a release.json there", "llama_cpp_manifest_url", "--manifest "):
        assert way in caught.value.hint
    assert "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL" in caught.value.hint
    write(place, manifest_url=url, manifest_sha256=sha256)
    assert resolve(tmp_path) == ("b1-1", url)
    for module in (str(Path(trust.__file__).with_name("__main__.py")), None):  # python3 -m
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=module))
        with pytest.raises(SettingError, match=re.escape(f" {installed} cannot be read")):
            resolve(tmp_path)
    installed.parent.mkdir()
    write(installed, manifest_url=url, manifest_sha256=SHA)
    with pytest.raises(IntegrityError, match="is pinned"):
        resolve(tmp_path)


# signed channels: signatures, serials and expiry

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
PATH = "/channels/stable/manifest.json"
KEYS, OTHER = minisign.KeyPair.generate(), minisign.KeyPair.generate()
PUBLIC = KEYS.public_key.to_base64().decode()


COMMENT = "project me/builds channel stable serial 7 release b1-1"
"""What the signature of the first manifest is for."""


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
        channel = SignedChannel(pin, store=store, sink=listen, now=now, sleep=wait)
        patience = Patience(attempts=1)
        return channel.manifest(Fetcher(sleep=lambda _: None, patience=patience, **options))

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("channels/*/*.json"))


@pytest.fixture
def published(server: FaultServer, tmp_path: Path) -> Published:
    return Published(server, tmp_path / "store")


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
    assert trust.signed_for(**FOR, serial=7, release="b1-1") == COMMENT


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        (404, "SIGNATURE_MISSING"),
        (410, "SIGNATURE_MISSING"),
        (b"", "SIGNATURE_INVALID"),
        (b"untrusted comment: x\nRWQ", "SIGNATURE_INVALID"),
        (sign(manifest(), OTHER), "SIGNATURE_INVALID"),
        (sign(manifest(serial=8)), "SIGNATURE_INVALID"),
        (sign(manifest())[:-20], "SIGNATURE_INVALID"),
        (sign(manifest(), channel="edible").replace(b"edible", b"stable"), "SIGNATURE_INVALID"),
        (b"\xff" * 300, "SIGNATURE_INVALID"),
        (b"x" * 4096, "SIGNATURE_INVALID"),
        (b"x" * 4097, "FILE_TOO_LARGE"),
    ],
)
def test_what_is_not_signed_by_the_key_is_refused(
    published: Published, signature: bytes | int, code: str
) -> None:
    if isinstance(signature, int):
        published.server.fail(f"{PATH}.minisig", faults.status(signature), always=True)
    else:
        published.put(manifest(), signature)
    error = refused(published)
    assert (error.code, error.exit_status) == (code, 4)


def test_neither_a_signature_out_of_reach_nor_one_of_no_manifest_counts(
    published: Published,
) -> None:
    published.put(b"{}")
    assert refused(published).exit_status == 4
    published.put(manifest())
    published.server.fail(f"{PATH}.minisig", faults.status(500), always=True)
    error = refused(published)
    assert (type(error), error.exit_status) == (NetworkError, 3)


NO_KEYS = {
    "short": "RWQx",
    "words": "not a key",
    "accent": "\u00e9",
    "cut": PUBLIC[:-4],
    "another": "A" * 56,
    "long": "x" * 500,
}


@pytest.mark.parametrize("key", NO_KEYS.values(), ids=NO_KEYS)  # a key is random: it is no id
def test_a_key_that_is_none_is_a_setting(published: Published, key: str) -> None:
    error = refused(published, key=key)
    assert isinstance(error, SettingError | IntegrityError)
    assert error.code in {"PUBLIC_KEY_INVALID", "SIGNATURE_INVALID"}
    assert len(error.message) < 300


def test_a_serial_never_goes_back(published: Published) -> None:
    published.follow()
    published.put(manifest(serial=9))
    assert published.follow().serial == 9
    data = manifest(serial=8)
    published.put(data)
    published.server.put("/mirror.json.minisig", sign(data))
    for url in (published.url, published.server.put("/mirror.json", data)):
        published.url = url
        error = refused(published)
        assert error.code == "SERIAL_TOO_LOW"
        assert "serial 8; 9 was accepted before" in error.message


def test_manifest_that_has_ended_brings_none_back_below_the_least_serial(
    published: Published,
) -> None:
    published.follow()
    published.put(manifest(serial=11, expires=NOW - timedelta(days=1)))
    assert published.follow(least=7).serial == 7  # accepted before, and current
    assert refused(published, least=11).code == "MANIFEST_EXPIRED"


@pytest.mark.parametrize(
    ("now", "changes", "code"),
    [
        (NOW, {"expires": NOW}, "MANIFEST_EXPIRED"),
        (NOW, {"expires": None}, "MANIFEST_EXPIRED"),
        (NOW + timedelta(days=365), {}, "MANIFEST_EXPIRED"),
        (NOW - timedelta(days=365), {}, "CLOCK_WRONG"),
        (NOW, {"created": NOW + timedelta(days=1, seconds=1)}, "CLOCK_WRONG"),
        (NOW, {"created": NOW + timedelta(days=1)}, ""),  # a clock may be a day behind
    ],
)
def test_a_channel_lives_in_the_present(
    published: Published, now: datetime, changes: dict[str, Any], code: str
) -> None:
    published.put(manifest(**changes))
    if not code:
        assert published.follow(now=now).serial == 7
        return
    error = refused(published, now=now)
    assert (error.code, error.exit_status) == (code, 4)
    assert f"{now:%Y-%m-%d}" in error.message
    assert "clock" in error.hint


def test_out_of_reach_it_goes_on_with_what_was_accepted(published: Published) -> None:
    with pytest.raises(NetworkError):
        published.follow(offline=True)
    published.put(manifest().ljust(schema.MAX_MANIFEST_BYTES))
    published.follow()
    assert published.follow(offline=True).serial == 7
    (note,) = published.notes
    assert note.code == "CHANNEL_OUT_OF_REACH"
    assert note.message.startswith(f"channel {published.url} cannot")
    assert "serial 7" in note.message


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{}", manifest(serial=70)),
        *(
            msgspec.json.encode(pair)
            for pair in (
                (manifest(serial=70), sign(manifest())),
                (manifest(), sign(manifest(), OTHER)),
                (manifest(release="b1-2"), b""),
            )
        ),
    ],
)
def test_what_was_kept_is_verified_again(published: Published, damage: bytes) -> None:
    published.follow()
    (kept,) = published.root.glob("channels/*/7.json")
    kept.write_bytes(damage)
    assert refused(published, offline=True).code == "OFFLINE"
    assert published.follow().serial == 7  # the channel itself mends it
    assert published.follow(offline=True).serial == 7


@pytest.mark.parametrize("kind", ["damaged", "FIFO", "folder", "foreign"])
def test_mark_holds_whatever_becomes_of_what_was_kept(published: Published, kind: str) -> None:
    published.follow()
    name = hashlib.sha256(f"{PUBLIC}\nme/builds\nstable".encode()).hexdigest()[:32]
    kept = published.root / "channels" / name / "7.json"  # a later loader looks for it there
    if kind == "foreign":
        for other in ("x.json", f"{'9' * 200}.json", "\u0669.json", "-1.json"):
            (kept.parent / other).write_text("{}")
    else:
        kept.unlink()
        {"damaged": kept.touch, "FIFO": lambda: os.mkfifo(kept), "folder": kept.mkdir}[kind]()
    published.put(manifest(serial=6))
    assert refused(published).code == "SERIAL_TOO_LOW"
    published.put(manifest(serial=7))
    assert published.follow().serial == 7
    assert kept.is_file()


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


def follow_the_file(
    published: Published, place: Path, monkeypatch: pytest.MonkeyPatch, **told: Any
) -> Callable[[str | None], Manifest]:
    """Return what reads the channel that ``release.json`` names, with a digest of the settings."""
    write(place, manifest_url=published.url, public_key=PUBLIC, **{**FOR, **told})
    monkeypatch.setattr(trust, "_BETWEEN", 0.0)
    monkeypatch.setattr(trust, "RELEASE_FILE", place)

    def followed(digest: str | None = None) -> Manifest:
        words = replace(load(None, {}), manifest_sha256=digest)
        found, url = trust.manifest(words, Store(published.root), Fetcher(), ignore)
        assert url == published.url
        return found

    return followed


@pytest.mark.parametrize(
    ("serial", "least", "code"), [(0, None, ""), (7, 7, ""), (7, 8, "SERIAL_TOO_LOW")]
)
def test_release_json_names_a_channel_and_its_least_serial(
    published: Published,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    serial: int,
    least: int | None,
    code: str,
) -> None:
    now = datetime.now(timezone.utc)
    fresh = manifest(serial, created=now, expires=now + timedelta(days=1))
    published.put(fresh)
    followed = follow_the_file(published, place, monkeypatch, min_serial=least)
    if not code:
        assert followed(None).serial == serial
        published.put(fresh, sign(fresh, OTHER))
    with pytest.raises(IntegrityError) as caught:
        followed(None)
    assert caught.value.code == (code or "SIGNATURE_INVALID")


def test_a_pair_that_does_not_fit_is_waited_for_twice(published: Published) -> None:
    """A promotion: the signature of serial 8 is there already, its manifest a moment later."""
    later = manifest(serial=8)
    published.put(manifest(), sign(later))
    waits: list[float] = []
    assert refused(published, between=waits.append).code == "SIGNATURE_INVALID"
    assert waits == [1.0, 1.0]
    assert published.follow(between=lambda _: published.put(later)).serial == 8


@pytest.mark.parametrize(("mode", "accepted"), [(0o700, False), (0o777, True)])
def test_a_stand_in_for_the_store_counts_unless_others_can_write_it(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, accepted: bool
) -> None:
    """What a store that cannot be written had to keep among the temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = disk.private_folder()
    folder.mkdir(mode=0o700)
    stand_in = Published(published.server, folder)
    stand_in.put(manifest(serial=9))
    assert stand_in.follow().serial == 9
    folder.chmod(mode)
    published.put(manifest(serial=8))
    if accepted:
        assert published.follow().serial == 8
    else:
        assert refused(published).code == "SERIAL_TOO_LOW"
    published.put(manifest(serial=10))
    assert published.follow().serial == 10
    published.put(manifest(serial=9))
    assert refused(published).code == "SERIAL_TOO_LOW"  # the higher serial of the two counts


def test_what_was_accepted_meanwhile_counts(published: Published) -> None:
    """While this process waits for the network, another one accepts serial 10."""
    published.put(manifest(), sign(manifest(serial=8)))

    def other(_: float) -> None:
        published.put(manifest(serial=10))
        assert published.follow().serial == 10
        published.put(manifest(serial=9))

    with refusals.refused("SERIAL_TOO_LOW", IntegrityError):
        published.follow(between=other)


def test_a_digest_of_the_settings_pins_whatever_a_channel_says(
    published: Published, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = manifest()
    published.put(data, b"no signature at all")
    followed = follow_the_file(published, place, monkeypatch)
    assert followed(hashlib.sha256(data).hexdigest()).serial == 7
    with refusals.refused("MANIFEST_PIN_MISMATCH", IntegrityError):
        followed("0" * 64)


@pytest.mark.parametrize(
    ("signed_as", "word"),
    [
        ({"channel": "candidate"}, "channel candidate"),
        ({"project": "me/other"}, "project me/other"),
        ({"serial": 8}, "serial 8"),
        ({"release": "b1-9"}, "release b1-9"),
        ({"trusted_comment": "channel stable serial 7 release b1-1"}, "'channel stable serial"),
        ({"trusted_comment": ""}, "''"),
        ({"trusted_comment": f"{COMMENT} "}, f"'{COMMENT} '"),
    ],
)
def test_signature_that_names_another_or_no_project_asks_for_a_new_promotion(
    published: Published, signed_as: dict[str, Any], word: str
) -> None:
    """The key is right, and yet it is not this channel's manifest: its mark stays untouched."""
    published.put(manifest(), sign(manifest(), **signed_as))
    error = refused(published)
    assert (error.code, error.exit_status) == ("CHANNEL_MISMATCH", 4)
    assert word in error.message
    assert COMMENT in error.message
    assert "an older farm" in error.hint
    published.put(manifest(serial=3))
    assert published.follow().serial == 3


def test_other_content_under_an_accepted_serial_is_refused(published: Published) -> None:
    published.follow()
    published.put(manifest(release="b1-2"))
    error = refused(published)
    assert (error.code, "serial 7" in error.message) == ("SERIAL_REUSED", True)
    published.put(manifest(), sign(manifest(), prehash=False))  # the same bytes, signed anew
    assert published.follow().serial == 7
    published.put(manifest(serial=8, release="b1-2"))
    assert published.follow().release == "b1-2"


def test_marks_of_another_channel_or_project_do_not_count(published: Published) -> None:
    data = manifest(serial=90)
    published.put(data, sign(data, OTHER))
    assert published.follow(key=OTHER.public_key.to_base64().decode()).serial == 90
    for name, value in (("channel", "candidate"), ("project", "me/other")):
        data = manifest(serial=90)
        published.put(data, sign(data, **{name: value}))
        assert published.follow(**{name: value}).serial == 90
    published.put(manifest())
    assert published.follow().serial == 7


@pytest.mark.parametrize(
    ("days", "code"),
    [(8, None), (9, "CHANNEL_EXPIRES_SOON"), (29, "CHANNEL_EXPIRES_SOON"), (30, "CHANNEL_EXPIRED"),
     (59, "CHANNEL_EXPIRED"), (60, "MANIFEST_EXPIRED"), (90, "MANIFEST_EXPIRED")],
)  # fmt: skip
@pytest.mark.parametrize("offline", [False, True])
def test_accepted_release_warns_before_its_expiry_and_runs_on_for_thirty_days_after_it(
    published: Published, days: int, code: str | None, *, offline: bool
) -> None:
    """It expires 30 days from now: a note from 21 days before that until 30 days after it."""
    published.follow()
    later: dict[str, Any] = {"now": NOW + timedelta(days=days), "offline": offline}
    if code == "MANIFEST_EXPIRED":
        assert refused(published, **later).exit_status == 4
        return
    for _ in range(2):
        published.notes.clear()
        assert published.follow(**later).serial == 7
        codes = [note.code for note in published.notes if note.code != "CHANNEL_OUT_OF_REACH"]
        assert codes == ([code] if code else [])
    told = [one.message for one in published.notes if one.code == code]
    ends = (30, 60) if code == "CHANNEL_EXPIRED" else (30,)
    dates = [f"{NOW + timedelta(days=end):%Y-%m-%d}" for end in ends]
    assert all(date in message for message in told for date in dates)


def test_new_release_is_not_accepted_after_its_expiry(published: Published) -> None:
    late = NOW + timedelta(days=31)
    assert refused(published, now=late).code == "MANIFEST_EXPIRED"
    published.follow()
    published.put(manifest(serial=8, expires=late))
    before = published.kept()
    assert published.follow(now=late).serial == 7  # the accepted one has its grace
    assert [note.code for note in published.notes] == ["CHANNEL_EXPIRED"]
    assert published.kept() == before == ["7.json"]
    published.put(manifest(serial=9, expires=late + timedelta(days=90)))
    assert published.follow(now=late).serial == 9
