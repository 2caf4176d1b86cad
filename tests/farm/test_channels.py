"""Channels at published places: signed pointers, and the loader that follows them."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import verbs

from farm import trust
from farm.errors import FarmError, PublishError, SourceError, UsageError
from farm.publish import channels, pin_space, places, publishing
from farm.publish.places import Destination
from farm.terminal import show
from farm.terminal import status as overview
from tests.rigs import published, tiny_release
from tests.rigs.heard import heard
from tests.rigs.published import Place, edited, publish
from tests.rigs.refusals import refused

FOLLOW = (
    "import pathlib, sys; from llama_loader import trust, __main__;"
    "trust.RELEASE_FILE = pathlib.Path(sys.argv.pop(1)); sys.exit(__main__.main())"
)


@dataclass(frozen=True)
class Signed:
    """A place with two releases, the key that signs channels there, and the store of a Space.

    Attributes:
        own: the channel ``stable``.
        root: the place's folder, where it is one; ``stable`` is that channel's below it.
    """

    to: Destination
    signer: trust.Signer
    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "published"

    @property
    def stable(self) -> Path:
        return self.root / "channels" / "stable"

    @property
    def own(self) -> channels.Channel:
        return self.channel("stable")

    def channel(self, name: str, project: str | None = None) -> channels.Channel:
        return channels.Channel(self.to, name, self.signer, project)

    def promote(self, *builds: int) -> channels.Promotion:
        """Promote the releases of these builds, one after the other; return the last promotion."""
        return [self.own.promote(f"b{build}-1") for build in builds][-1]

    def pin(self, project: str | None = None) -> dict[str, Any]:
        return pin_space.channel(self.to, "stable", self.signer.public_key, project).content

    def ask(self, pin: dict[str, Any], store: str = "store") -> subprocess.CompletedProcess[str]:
        """Fetch as a copy of ``spaces/`` does, by its ``release.json``."""
        file = self.folder / "release.json"
        pin_space.write(pin, file)
        return heard(
            [
                *(sys.executable, "-c", FOLLOW, str(file), "fetch"),
                *("--json", "--allow-cpu", "--no-test-run", "--store", str(self.folder / store)),
            ],
            env=published.environment(),
        )

    def follow(self, pin: dict[str, Any]) -> str:
        """Return the release that a Space gets."""
        done = self.ask(pin)
        assert done.returncode == 0, done.stderr
        name: str = json.loads(done.stdout)["release"]
        return name


@pytest.fixture
def two(place: Place, kept: Path, tmp_path: Path, signer: trust.Signer) -> Signed:
    return published_twice(place.open(), kept, tmp_path, signer)


@pytest.fixture
def signed(kept: Path, tmp_path: Path, signer: trust.Signer) -> Signed:
    """A folder: signing is the same for every kind of place."""
    return published_twice(places.parse(str(tmp_path / "published")), kept, tmp_path, signer)


def published_twice(to: Destination, kept: Path, tmp_path: Path, signer: trust.Signer) -> Signed:
    for build in (11549, 11550):
        publish(to, tiny_release.of_build(kept, build, tmp_path / "two"))
    return Signed(to, signer, tmp_path)


def replay(channel: Path, serial: int, over: str = "manifest") -> None:
    """Put an older signed pair back in place, as somebody does who may write there.

    It is the place's own copy of it, kept under its serial; nobody needs the key for that.
    """
    for end in ("", ".minisig"):
        shutil.copy(channel / f"{serial}.json{end}", channel / f"{over}.json{end}")


@pytest.mark.parametrize("place", ["github"], indirect=True)
@pytest.mark.parametrize("may_ask", [True, False])
def test_a_channel_of_before_goes_on_beside_immutable_releases_and_a_new_one_is_refused(
    two: Signed, place: Place, *, may_ask: bool
) -> None:
    two.promote(11549)
    place.server.immutable, place.server.may_ask = True, may_ask
    assert two.promote(11550).serial == 2
    with refused("CHANNEL_IMMUTABLE", PublishError, "channel-late of github:owner/name"):
        two.channel("late").promote("b11550-1")
    assert ("channel-late" in {one.tag for one in place.server.releases}) == (not may_ask)


def test_promote_then_roll_back_and_the_loader_follows(two: Signed) -> None:
    first = two.promote(11549)
    assert (first.serial, first.before) == (1, None)
    assert two.follow(two.pin()) == "b11549-1"
    second = two.promote(11550)
    assert (second.serial, second.before) == (2, "b11549-1")
    assert two.follow(two.pin()) == "b11550-1"
    back = two.own.rollback()
    assert (back.serial, back.release) == (3, "b11549-1")
    assert two.follow(two.pin()) == "b11549-1"
    assert two.to.channel_serials("stable") == (1, 2, 3)
    assert two.to.channels() == ("stable",)


def test_a_rollback_is_accepted_and_the_older_pointer_that_is_put_back_is_not(
    signed: Signed,
) -> None:
    """The Space was pinned once, with the serial of that day; only its store has seen more."""
    signed.promote(11549)
    pin = signed.pin()
    assert pin["min_serial"] == 1
    assert signed.follow(pin) == "b11549-1"
    signed.promote(11550)
    assert signed.follow(pin) == "b11550-1"

    replay(signed.stable, 1)
    answered = signed.ask(pin)
    assert answered.returncode == 4
    assert "error[SERIAL_TOO_LOW]" in answered.stderr
    assert "Traceback" not in answered.stderr

    # The farm is not taken in either: the next serial is above all that the place has.
    back = signed.promote(11549)
    assert (back.release, back.serial) == ("b11549-1", 3)
    assert signed.follow(pin) == "b11549-1"  # the same release, rolled back to on purpose

    replay(signed.stable, 2)
    assert signed.ask(pin).returncode == 4
    signed.promote(11550)
    newer = signed.own.rollback()
    assert (newer.release, newer.serial) == ("b11549-1", 5)
    assert signed.follow(pin) == "b11549-1"
    # A machine that never saw the channel knows only what its pin says.
    replay(signed.stable, 4)
    now = {**pin, "min_serial": 5}
    assert signed.ask(now, "fresh-store").returncode == 4


def test_a_channel_whose_history_is_lost_begins_above_what_spaces_have_seen(signed: Signed) -> None:
    signed.promote(11549, 11550, 11549)
    pin = signed.pin()
    assert signed.follow(pin) == "b11549-1"
    shutil.rmtree(signed.root / "channels")
    assert signed.promote(11550).serial == 1
    assert signed.ask(pin).returncode == 4
    again = signed.own.promote("b11550-1", at_least=4)
    assert again.serial == 4
    assert signed.follow(pin) == "b11550-1"
    assert signed.own.promote("b11549-1", at_least=2).serial == 5


def test_an_expired_channel_is_refused_and_comes_back_with_a_promotion(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=91)
    with monkeypatch.context() as patch:
        patch.setattr(channels, "_now", lambda: past)
        signed.promote(11549)
    pin = signed.pin()
    expired = signed.ask(pin)
    assert expired.returncode == 4
    assert "expired" in expired.stderr.lower()
    (row,) = overview.of(signed.to).channels
    assert row.left is not None
    assert row.left < timedelta(0)
    signed.promote(11549)
    assert signed.follow(pin) == "b11549-1"


def test_a_channel_that_ends_soon_is_renewed_with_the_same_release(signed: Signed) -> None:
    signed.own.promote("b11549-1", days=20)
    signed.channel("candidate").promote("b11550-1", days=90)
    due, _ = channels.due(signed.to, 30)
    assert {name: one.serial for name, one in due.items()} == {"stable": 1}
    assert channels.due(signed.to, 30, "candidate") == ({}, [])
    with refused("CHANNEL_MISSING", PublishError, "stabel", hint="there is candidate, stable"):
        channels.due(signed.to, 30, "stabel")
    with refused("DESTINATION_MISSING", UsageError):
        channels.due(places.parse(str(signed.root / "no-such-folder")), 30)
    renewed = signed.own.renew()
    assert (renewed.release, renewed.before, renewed.serial) == ("b11549-1", "b11549-1", 2)
    assert channels.due(signed.to, 30) == ({}, [])
    pin = signed.pin()
    assert signed.follow(pin) == "b11549-1"
    with refused("CHANNEL_MISSING", PublishError):
        signed.channel("missing").renew()


def test_a_channel_that_is_not_there_or_not_named_is_answered_with_those_that_are(
    signed: Signed,
) -> None:
    with refused("CHANNEL_MISSING", PublishError, hint="invoke promote makes one"):
        signed.pin()
    signed.channel("candidate").promote("b11549-1")
    with refused("CHANNEL_MISSING", PublishError, hint="there is candidate"):
        signed.pin()
    with refused("CHANNEL_MISSING", PublishError, hint="there is candidate"):
        signed.own.rollback()
    with refused("OPTION_MISSING", UsageError, "--channel", hint="there is candidate"):
        places.require_given("channel", None, signed.to)
    with refused("OPTION_MISSING", UsageError, "--release", hint="there is b11550-1, b11549-1"):
        places.require_given("release", None, signed.to)
    with refused("NOTHING_BEFORE", PublishError, hint="publish another one"):
        signed.channel("candidate").rollback()


def test_a_channel_s_manifest_is_not_pinned_by_its_digest(signed: Signed) -> None:
    signed.promote(11549)
    assert pin_space.url(signed.to.manifest_url("b11549-1")).content["manifest_sha256"]
    for url, name in (
        (signed.to.channel_url("stable"), "stable"),
        ((signed.stable / "1.json").as_uri(), "stable"),
        (shutil.copy(signed.stable / "1.json", signed.folder / "m.json").as_uri(), "NAME"),
    ):
        with refused("PIN_IS_CHANNEL", UsageError, hint=f"--channel {name} --to PLACE"):
            pin_space.url(url)
    with refused("RELEASE_UNREACHABLE", SourceError, hint="FOLDER/manifest.json"):
        pin_space.url(signed.folder.as_uri())


def test_a_clock_that_is_behind_promotes_nothing(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed.promote(11549)
    past = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=365)
    monkeypatch.setattr(channels, "_now", lambda: past)
    with refused("CLOCK_BEHIND", PublishError):
        signed.promote(11550)
    assert signed.to.channel_serials("stable") == (1,)


def test_a_promotion_that_another_one_overtook_is_refused(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed.promote(11549)
    # both looked when serial 1 was the last one
    monkeypatch.setattr(signed.to, "channel_serials", lambda _: (1,))
    signed.promote(11550)
    replayed = signed.to.channel_file("stable", "1.json")
    signature = signed.to.channel_file("stable", "1.json.minisig")
    read = {"manifest.json": replayed, "manifest.json.minisig": signature}
    real = signed.to.channel_file
    monkeypatch.setattr(signed.to, "channel_file", lambda c, n: read.get(n) or real(c, n))
    with refused("CHANNEL_MOVED", PublishError):
        signed.promote(11549)
    monkeypatch.undo()


def test_a_channel_of_another_key_is_left_alone(signed: Signed, tmp_path: Path) -> None:
    signed.promote(11549)
    trust.generate(tmp_path / "other")
    other = channels.Channel(signed.to, "stable", trust.signer(tmp_path / "other"))
    with refused("SIGNED_BY_ANOTHER_KEY", PublishError):
        other.promote("b11550-1")
    assert signed.to.channel_serials("stable") == (1,)


def test_a_changed_history_is_not_rolled_back_to(signed: Signed) -> None:
    signed.promote(11549, 11550)
    past = signed.stable / "1.json"
    past.write_bytes(past.read_bytes().replace(b"11549", b"11551"))
    with refused("SIGNATURE_DAMAGED", PublishError):
        signed.own.rollback()


def test_older_files_that_were_put_back_are_neither_renewed_nor_rolled_back_from(
    signed: Signed,
) -> None:
    """Whoever may write there puts older signed pairs in the place of newer ones."""
    own, channel = signed.own, signed.stable
    signed.promote(11549, 11550, 11549, 11550)
    replay(channel, 2)
    for use in (own.renew, own.rollback, signed.pin):
        with refused("CHANNEL_NOT_NEWEST", PublishError, "serial 4"):
            use()
    replay(channel, 2, over="4")
    with refused("CHANNEL_NOT_NEWEST", PublishError, "serial 4"):
        own.renew()
    with refused("CHANNEL_MISMATCH", PublishError, "serial 4"):
        signed.promote(11550)
    remove(channel, 4)
    assert signed.promote(11550).serial == 4
    assert signed.to.channel_serials("stable") == (1, 2, 3, 4)


def remove(channel: Path, serial: int) -> None:
    for end in ("", ".minisig"):
        (channel / f"{serial}.json{end}").unlink()


def change_a_byte(channel: Path, serial: int) -> None:
    signature = channel / f"{serial}.json.minisig"
    signature.write_bytes(b"x" + signature.read_bytes()[1:])


def change_a_byte_and_put_the_older_one_back(channel: Path, serial: int) -> None:
    change_a_byte(channel, serial)
    replay(channel, serial - 1)


@pytest.mark.parametrize(
    ("damage", "serial"),
    [(change_a_byte, 1)]
    + [(remove, serial) for serial in (2, 3)]
    + [(change_a_byte_and_put_the_older_one_back, serial) for serial in (2, 3)],
)
def test_history_that_was_damaged_disarms_no_comparison_with_it(
    signed: Signed, serial: int, damage: Any
) -> None:
    """The release changes, and what was signed for it is damaged or removed."""
    signed.promote(11549, 11550, 11549)
    damage(signed.stable, serial)
    change(signed.root / ("b11550-1" if serial == 2 else "b11549-1"))
    for build in (11549, 11550):
        with pytest.raises(PublishError) as caught:
            signed.promote(build)
        assert caught.value.code in {"SIGNATURE_DAMAGED", "RELEASE_CHANGED"}
    assert not (signed.stable / "4.json").exists()


@pytest.mark.parametrize("content", [b"", b"a manifest", None])
def test_file_under_a_number_that_was_not_given_yet_raises_no_serial(
    signed: Signed, content: bytes | None
) -> None:
    """Whoever may write there puts a file without a signature there, or an older pair."""
    own, channel = signed.own, signed.stable
    signed.promote(11549)
    last = 2**53 - 2
    for end in ("", ".minisig"):
        found = (channel / f"1.json{end}").read_bytes()
        (channel / f"{last}.json{end}").write_bytes(found if content is None else content)
    for use in (own.renew, own.rollback):
        with refused("CHANNEL_NOT_NEWEST", PublishError, f"serial {last}"):
            use()
    for at_least in (1, 5):
        with refused(
            "CHANNEL_MISMATCH" if content is None else "SIGNATURE_DAMAGED",
            PublishError,
            f"serial {last}",
            hint=f"{last}.json",
        ):
            own.promote("b11550-1", at_least=at_least)
    remove(channel, last)
    assert signed.promote(11550).serial == 2


def test_place_that_lost_a_promotion_begins_above_by_an_option(signed: Signed) -> None:
    signed.promote(11549, 11550, 11549)
    remove(signed.stable, 2)
    with refused("SIGNATURE_DAMAGED", PublishError, "serial 2", hint="--serial"):
        signed.promote(11550)
    assert signed.own.promote("b11550-1", at_least=2).serial == 4


@pytest.mark.parametrize("field", ["artifact", "sbom", "mirror"])
def test_address_elsewhere_is_not_signed(signed: Signed, field: str) -> None:
    """A published manifest names files of another server under the names that were signed."""
    signed.promote(11549, 11550)
    with edited(signed.root / "b11549-1") as found:
        entry = found["artifacts"][0]
        foreign = f"https://evil.invalid/{entry['name']}"
        if field == "sbom":
            entry["sbom"]["url"] = f"{foreign}.cdx.json"
        else:
            entry["urls"] = [foreign] if field == "artifact" else [entry["name"], foreign]
    for use in (signed.own.rollback, lambda: signed.promote(11549)):
        with refused("MANIFEST_POINTS_ELSEWHERE", PublishError, "evil.invalid"):
            use()


def test_reader_who_locks_the_folder_is_named_and_not_awaited_for_ever(
    signed: Signed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("farm.publish.directory._PATIENCE", 0.2)
    folder = signed.root
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    with refused("DESTINATION_LOCKED", PublishError, f"process {os.getpid()} has locked {folder}"):
        signed.promote(11549)
    assert f"note[DESTINATION_LOCKED]: waiting: process {os.getpid()}" in capsys.readouterr().err
    os.close(handle)
    assert signed.promote(11549).serial == 1


def bad_content(channel: Path) -> None:
    (channel / "manifest.json").write_text("{}")


def bad_name(channel: Path) -> None:
    channel.rename(channel.with_name("a\nerror[X]: fake"))


def bad_signature(channel: Path) -> None:
    (channel / "manifest.json.minisig").write_text("none")


def far_end(channel: Path) -> None:
    manifest = channel / "manifest.json"
    manifest.write_text(re.sub(r'("expires": ?")\d+', r"\g<1>2099", manifest.read_text()))
    assert "2099-" in manifest.read_text()


def no_manifest(channel: Path) -> None:
    (channel / "manifest.json").unlink()


def unreadable(channel: Path) -> None:
    (channel / "manifest.json.minisig").unlink()
    (channel / "manifest.json.minisig").symlink_to("/proc/self/mem")


def zeros_without_end(channel: Path) -> None:
    """Of 4 TiB: hashing them takes an hour."""
    (*_, tarball) = (channel.parents[1] / "b11550-1").glob("*.tar.zst")
    for place in (tarball, tarball.with_name("more")):
        with place.open("wb") as file:
            file.truncate(1 << 42)


DAMAGES = [bad_content, bad_name, bad_signature, far_end, no_manifest, unreadable]


def test_promotion_to_a_mistyped_channel_names_those_that_are_there(
    signed: Signed, tmp_path: Path
) -> None:
    told = []
    for name in ("stable", "stabel", "stabel"):
        where = ("--to", signed.to.where, "--channel", name, "--key", str(tmp_path / "key"))
        done = verbs.invoke("promote", "b11549-1", *where)
        assert f"channel {name} → b11549-1" in done.stdout
        told += re.findall(r"note\[CHANNEL_NEW\].*", done.stderr)
    assert told == ["note[CHANNEL_NEW]: stabel is a new channel; the other ones: stable"]


def test_renewal_signs_the_promotion_that_a_person_approved_alone(
    signed: Signed, tmp_path: Path, here: verbs.Here
) -> None:
    """Between the workflow's two jobs the newer promotion is removed."""
    asked = ("renew", "--to", signed.to.where, "--key", str(tmp_path / "key"), "--within", "100")
    signed.promote(11549)
    assert verbs.invoke(*asked[:3], "--dry-run").stdout == ""
    before = {path.name: path.read_bytes() for path in signed.stable.iterdir()}
    signed.promote(11550)
    approved = verbs.invoke(*asked, "--dry-run").stdout.strip()
    newer = [(path, path.read_bytes()) for path in signed.stable.iterdir()]
    for path, _ in newer:
        path.unlink()
    for name, content in before.items():
        (signed.stable / name).write_bytes(content)
    assert "error[CHANNEL_NOT_APPROVED]" in here(*asked, "--sha256", approved)[2]
    with refused("CHANNEL_NOT_APPROVED", PublishError):
        signed.own.renew(checked=approved.partition("=")[2])
    assert signed.to.channel_serials("stable") == (1,)
    for path, content in newer:
        path.write_bytes(content)
    assert "b11550-1" in verbs.succeed(*asked, "--sha256", approved)
    assert signed.to.channel_serials("stable") == (1, 2, 3)


@pytest.mark.parametrize("damage", [*DAMAGES, zeros_without_end])
def test_bad_channel_keeps_no_other_one_from_being_renewed(
    signed: Signed,
    tmp_path: Path,
    damage: Any,
    here: verbs.Here,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``invoke status`` warns of it, too, unless only the release behind it was changed."""
    for name, release in (("bad", "b11550-1"), ("stable", "b11549-1")):
        signed.channel(name).promote(release, days=20)
    damage(signed.root / "channels" / "bad")
    where, key = signed.to.where, str(tmp_path / "key")
    status, stdout, stderr = here("renew", "--to", where, "--key", key)
    assert status == 1
    assert "channel stable" in stdout
    assert re.search(r"^error\[\w+\]: .*(bad|fake|b11550-1)", stderr, re.MULTILINE)
    assert "error[X]: fake" not in stderr.splitlines()
    again = verbs.invoke("renew", "--to", where, "--dry-run")
    assert again.stdout != "\n"
    assert "nothing to renew" not in again.stderr
    assert ("stable" in channels.due(signed.to, 30)[0]) is False
    show.overview(overview.of(signed.to))
    said = capsys.readouterr().out
    assert re.findall(r"^warning\[(CHANNEL_(?:NOT|UN)\w+)\]", said, re.MULTILINE) == re.findall(
        r"^error\[(CHANNEL_(?:NOT|UN)\w+)\]", stderr, re.MULTILINE
    )
    assert ("no channels" in said) is False
    assert ("invoke promote RELEASE --channel bad" in said) is (
        damage not in (bad_name, zeros_without_end)
    )


def change(folder: Path) -> None:
    """Give a published release other bytes, and a manifest that lists them."""
    with edited(folder) as found:
        entry = found["artifacts"][0]
        data = (folder / entry["name"]).read_bytes() + b"x"
        (folder / entry["name"]).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entry |= {"size": len(data), "sha256": digest, "chunk_size": len(data), "chunks": [digest]}


def add(folder: Path) -> None:
    """Give a published release one more tarball, which its manifest lists."""
    with edited(folder) as found:
        first = found["artifacts"][0]
        more = json.loads(json.dumps(first).replace("linux-x86_64", "linux-x86-64"))
        shutil.copy(folder / first["name"], folder / more["name"])
        found["artifacts"].insert(0, more)


def of_256_gib(folder: Path) -> None:
    """Let a published manifest list a sparse file, which takes minutes to hash."""
    with edited(folder) as found:
        entry, size = found["artifacts"][0], 256 << 30
        entry |= {"size": size, "chunk_size": 8 << 20, "chunks": ["0" * 64] * (size >> 23)}
    os.truncate(folder / entry["name"], size)


def say_less(folder: Path) -> None:
    """Leave out of a published manifest what keeps hosts from choosing a tarball."""
    with edited(folder) as found:
        found["artifacts"][0]["platform"]["glibc"] = "2.1"


def describe_otherwise(folder: Path) -> None:
    """Let a published manifest list another SBOM."""
    with edited(folder) as found:
        found["artifacts"][0]["sbom"]["sha256"] = "0" * 64


@pytest.mark.parametrize("tamper", [change, add, say_less, describe_otherwise, of_256_gib])
def test_release_that_was_changed_since_it_was_signed_is_neither_promoted_nor_rolled_back_to(
    signed: Signed, tamper: Any
) -> None:
    """Whoever may write there changes a tarball, adds one of his own, or changes the manifest."""
    signed.promote(11549, 11550)
    tamper(signed.root / "b11549-1")
    another = signed.channel("another")
    for again in (
        signed.own.rollback,
        lambda: signed.promote(11549),
        lambda: another.promote("b11549-1"),
    ):
        with refused("RELEASE_CHANGED", PublishError, "serial 1"):
            again()
    assert signed.to.channel_serials("stable") == (1, 2)
    assert signed.to.channels() == ("stable",)


def test_place_of_many_manifests_takes_the_memory_of_one(signed: Signed, tmp_path: Path) -> None:
    """Another user makes one file, and as many hard links to it as he likes."""
    signed.promote(11549)
    text = json.loads((signed.stable / "1.json").read_bytes())
    entry = text["artifacts"][0]
    entry |= {"size": 20_000, "chunk_size": 1, "chunks": [f"{at:064x}" for at in range(20_000)]}
    (tmp_path / "large").write_text(json.dumps(text | {"expires": text["created"]}))
    for folder in (signed.root / f"{kind}b{at}" for kind in ("", "channels/") for at in range(8)):
        folder.mkdir()
        for name in ("manifest.json", "1.json"):
            os.link(tmp_path / "large", folder / name)
    tracemalloc.start()
    (signed.root / "b8").mkdir()
    (signed.root / "b8" / "manifest.json").write_bytes(b"{}")
    found = overview.of(signed.to)
    assert (len(found.channels), found.failed[-1].code) == (9, "RELEASE_UNREADABLE")
    assert len(channels.due(signed.to, 30)[0]) == 8
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()


def test_release_is_compared_with_the_newest_promotions_of_other_channels(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user makes thousands of numbered hard links, each of which is verified."""
    read, pair = [], channels._pair
    for release in ("b11549-1", "b11550-1"):
        signed.channel("candidate").promote(release)
    monkeypatch.setattr(channels, "_ELSEWHERE", 1)
    monkeypatch.setattr(channels, "_pair", lambda *asked: read.append(asked[1:]) or pair(*asked))
    signed.promote(11549)
    assert ("candidate", "2") in read
    assert ("candidate", "1") not in read


def test_links_where_releases_lie_cost_no_person_a_file(
    signed: Signed, kept: Path, tmp_path: Path
) -> None:
    """Whoever may write there puts links where the farm is about to write or to clean up."""
    root, mine = signed.root, tmp_path / "mine"
    (root / "channels" / "stable").mkdir(parents=True)
    mine.mkdir()
    for name in ("letter", "photo"):
        (mine / name).write_text(name)
    (root / "channels" / "stable" / ".manifest.json.part").symlink_to(mine / "letter")
    signed.promote(11549)
    (root / "channels" / "beta").symlink_to(mine)
    with refused("DESTINATION_NOT_WRITABLE", PublishError):
        signed.channel("beta").promote("b11549-1")
    gathered = root / ".b11551-1.publishing"
    gathered.symlink_to(mine)
    folder = tiny_release.of_build(kept, 11551, tmp_path / "third")
    plan = publishing.prepare(folder, signed.to, lambda _: None)
    with refused("DESTINATION_NOT_WRITABLE", PublishError):
        signed.to.publish(plan, lambda _: None)
    gathered.unlink()

    def replace_the_folder(_: str) -> None:
        if not gathered.is_symlink():
            gathered.rename(tmp_path / "aside")
            gathered.symlink_to(mine)

    signed.to.publish(plan, replace_the_folder)
    found = {path.name: path.read_text() for path in mine.iterdir()}
    assert found == {"letter": "letter", "photo": "photo"}


def test_tarball_that_is_not_what_the_manifest_lists_is_neither_promoted_nor_renewed(
    signed: Signed,
) -> None:
    signed.promote(11549)
    for release in ("b11549-1", "b11550-1"):
        tarball = next((signed.root / release).glob("*.tar.zst"))
        tarball.write_bytes(tarball.read_bytes() + b"x")
    with refused("RELEASE_CHANGED", PublishError, tarball.name):
        signed.promote(11550)
    with refused("RELEASE_CHANGED", PublishError):
        signed.own.renew()
    assert signed.to.channel_serials("stable") == (1,)


def test_manifest_that_changed_after_the_gate_is_not_signed(signed: Signed) -> None:
    """Manifest and tarball agree, and nothing was signed before: only the digest tells."""
    manifest = signed.root / "b11549-1" / "manifest.json"
    checked = hashlib.sha256(manifest.read_bytes()).hexdigest()
    change(manifest.parent)
    with refused("RELEASE_CHANGED", PublishError):
        signed.own.promote("b11549-1", checked=checked)
    assert signed.to.channels() == ()


def test_only_what_is_published_is_promoted(two: Signed) -> None:
    with pytest.raises(PublishError):
        two.promote(9)
    assert two.to.channels() == ()


def test_the_status_of_a_place(two: Signed) -> None:
    two.promote(11549)
    found = overview.of(two.to, "capability=9.0,driver=580,glibc=2.36,torch=cu128")
    assert [row.name for row in found.releases] == ["b11549-1", "b11550-1"]
    (stable,) = found.channels
    found_of = (stable.name, stable.release, stable.serial)
    assert found_of == ("stable", "b11549-1", 1)
    assert stable.left is not None
    assert timedelta(days=89) < stable.left <= timedelta(days=90)
    for row in (*found.channels, *found.releases):
        # a GPU is there, and the release has the CPU's set alone: the loader's own word for it
        assert row.gets == "nothing: NO_ARTIFACT"


def test_the_status_of_no_place(place: Place) -> None:
    """A missing place is an error, not an empty table; an empty repository is an empty table."""
    if place.kind == "github":
        assert overview.of(place.open()).releases == ()
        return
    with pytest.raises(FarmError) as caught:
        overview.of(place.open())
    assert caught.value.code in {"DESTINATION_MISSING", "HUB_REFUSED"}


def test_manifest_of_another_channel_of_the_same_key_is_refused_by_loader_and_farm(
    signed: Signed,
) -> None:
    signed.promote(11549)
    pin = signed.pin()
    assert (pin["project"], pin["channel"]) == ("local/published", "stable")
    signed.channel("candidate").promote("b11550-1")
    for name in ("manifest.json", "manifest.json.minisig"):
        shutil.copy(signed.stable.with_name("candidate") / name, signed.stable / name)
    answered = signed.ask(pin)
    assert (answered.returncode, "error[CHANNEL_MISMATCH]" in answered.stderr) == (4, True)
    for use in (lambda: signed.promote(11550), signed.own.rollback, signed.pin):
        with refused("CHANNEL_MISMATCH", PublishError):
            use()


def test_project_of_a_mirror_is_named_by_an_option(signed: Signed) -> None:
    own = signed.channel("stable", "me/builds")
    for release in ("b11549-1", "b11550-1"):
        own.promote(release)
    with refused("CHANNEL_MISMATCH", PublishError):
        signed.pin()
    pin = signed.pin("me/builds")
    assert signed.follow(pin) == "b11550-1"
    assert own.rollback().release == signed.follow(pin) == "b11549-1"


def test_channel_of_an_older_farm_is_promoted_again_before_it_is_pinned_or_renewed(
    signed: Signed,
) -> None:
    own, channel = signed.own, signed.stable
    signed.promote(11549)

    def sign_as_an_older_farm(name: str) -> None:
        content = (channel / "1.json").read_bytes()
        old = signed.signer.sign(content, f"channel {name} serial 1 release b11549-1")
        for file in ("1.json.minisig", "manifest.json.minisig"):
            (channel / file).write_bytes(old)

    sign_as_an_older_farm("nightly")  # its files were put here
    with refused("CHANNEL_MISMATCH", PublishError, "nightly"):
        signed.promote(11550)
    sign_as_an_older_farm("stable")  # perhaps another project's
    for use in (signed.pin, own.renew, own.rollback):
        with refused("CHANNEL_NOT_SIGNED_FOR", PublishError):
            use()
    signed.promote(11550)
    with refused("CHANNEL_NOT_SIGNED_FOR", PublishError, "serial 1"):
        own.rollback()
    signed.promote(11549)
    pin = signed.pin()
    assert signed.follow(pin) == "b11549-1"
