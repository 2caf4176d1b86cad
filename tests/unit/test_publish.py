"""Publishing to each kind of place: complete, never half visible, never twice, read back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from farm import channels, gate, pin_space, promotion, trust
from farm.errors import FarmError, PublishError, UsageError
from farm.publish import destination, places, publishing
from farm.publish.parts import Known, Part, plan
from tests.rigs import github_releases, hub_repository, tiny_release

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.publish.destination import Destination

SPACES = Path(__file__).parent.parent.parent / "spaces"
NAMES = [
    "llama-server-b11549-cpu-cpu-linux-x86_64.tar.zst",
    "llama-server-b11549-cpu-cpu-linux-x86_64.tar.zst.cdx.json",
    "manifest.schema.json",
    "SHA256SUMS",
    "manifest.json",
]
ZSTD = b"\x28\xb5\x2f\xfd"
KINDS = ("folder", "github", "hub")


@dataclass
class Place:
    """A place to publish to, the server behind it, and what a loader there needs to see."""

    kind: str
    to: str
    server: Any
    root: Path

    def open(self) -> Destination:
        return places.parse(self.to)

    def large_files_sent(self) -> int:
        """How many tarballs were sent whole."""
        if self.kind == "github":
            return sum(name.endswith(".tar.zst") for name in self.server.uploads)
        if self.kind == "hub":
            return sum(self.server.large[one].startswith(ZSTD) for one in self.server.sent)
        return len(list(self.root.rglob("*.tar.zst")))


@pytest.fixture(autouse=True)
def _small_tarballs_are_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through LFS, as its documentation has it; Xet's protocol is a program of the Hub's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_repository, "LARGE", 3000)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_release.tree(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def released(kept: Path, tmp_path: Path) -> Path:
    return tiny_release.of_build(kept, 11549, tmp_path)


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    root = tmp_path / "published"
    if request.param == "folder":
        yield Place("folder", str(root), None, root)
        return
    if request.param == "github":
        with github_releases.GitHub().serve() as server:
            monkeypatch.setenv("GITHUB_TOKEN", github_releases.TOKEN)
            monkeypatch.setenv("GITHUB_API_URL", server.url)
            monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
            yield Place("github", f"github:{github_releases.REPOSITORY}", server, root)
        return
    with hub_repository.Hub().serve() as hub:
        monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield Place("hub", "hf:owner/name", hub, root)


def publish(place: Place, folder: Path) -> str:
    there = place.open()
    return publishing.publish(publishing.prepare(folder, there), there, lambda _: None)


def fetch(url: str, store: Path, *options: str, **variables: str) -> dict[str, Any]:
    """What a Space does with it: the loader as a process of its own, with an empty store."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llama_loader", "fetch", "--json", "--allow-cpu"),
            *("--no-test-run", "--store", str(store), "--manifest", url, *options),
        ],
        env={**os.environ, "PYTHONPATH": str(SPACES), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_what_is_published_is_what_a_loader_gets(
    place: Place, released: Path, tmp_path: Path
) -> None:
    url = publish(place, released)
    pin = pin_space.release(place.open(), "b11549-1")
    assert pin["manifest_url"] == url
    told = fetch(url, tmp_path / "store", "--manifest-sha256", pin["manifest_sha256"])
    assert (told["artifact"], told["release"]) == (NAMES[0], "b11549-1")
    assert place.open().releases() == ("b11549-1",)


def test_nothing_is_sent_twice(place: Place, released: Path) -> None:
    publish(place, released)
    again = publishing.prepare(released, place.open())
    assert ([part.name for part in again.there], again.new) == (NAMES, ())
    publishing.publish(again, place.open(), lambda _: None)
    assert place.large_files_sent() == 1


def test_other_bytes_under_a_published_name_are_refused(
    place: Place, released: Path, kept: Path, tmp_path: Path
) -> None:
    publish(place, released)
    (kept / "licenses" / "NOTICE").write_text("another tarball\n")
    try:
        other = tiny_release.of_build(kept, 11549, tmp_path / "other")
    finally:
        (kept / "licenses" / "NOTICE").unlink()
    with pytest.raises(PublishError) as refused:
        publishing.prepare(other, place.open())
    assert refused.value.code == "PUBLISHED_DIFFERS"
    assert "b11549-1" in refused.value.message


def test_nothing_to_read_is_not_an_empty_release(place: Place) -> None:
    with pytest.raises(FarmError) as refused:
        b"".join(place.open().read("b1-1", "manifest.json"))
    assert refused.value.code in {"NOT_PUBLISHED", "HUB_REFUSED"}
    assert place.open().releases() == place.open().channels() == ()


def test_a_folder_appears_with_one_rename(released: Path, tmp_path: Path) -> None:
    to = places.parse(str(tmp_path / "published"))
    planned = publishing.prepare(released, to)

    def refuse(part: Part, _: object) -> None:
        if part.name == "manifest.json":
            raise PublishError("READ_BACK_DIFFERS", "a bad disk")

    with pytest.raises(PublishError):
        to.publish(planned, refuse, lambda _: None)
    assert to.releases() == ()
    assert not (tmp_path / "published" / "b11549-1").exists()
    again = publishing.prepare(released, to)
    assert again.new == ()  # gathered already
    publishing.publish(again, to, lambda _: None)
    assert to.releases() == ("b11549-1",)
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["b11549-1"]


class TestGitHub:
    """Limits and faults of the REST API."""

    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[github_releases.GitHub]:
        with github_releases.GitHub().serve() as server:
            monkeypatch.setenv("GITHUB_TOKEN", github_releases.TOKEN)
            monkeypatch.setenv("GITHUB_API_URL", server.url)
            monkeypatch.setenv("GITHUB_SERVER_URL", server.url)
            yield server

    def publish(self, folder: Path) -> None:
        to = places.parse("github:owner/name")
        publishing.publish(publishing.prepare(folder, to), to, lambda _: None)

    def test_a_limit_in_the_middle_of_the_uploads_is_waited_for(
        self, server: github_releases.GitHub, released: Path
    ) -> None:
        server.limited_uploads = 3
        self.publish(released)
        assert server.uploads == NAMES

    def test_a_release_is_a_draft_until_it_is_whole(
        self, server: github_releases.GitHub, released: Path
    ) -> None:
        self.publish(released)
        published = server.calls.index("PATCH /repos/owner/name/releases/1")
        uploads = [at for at, call in enumerate(server.calls) if call.startswith("POST /uploads/")]
        reads = [at for at, call in enumerate(server.calls) if "/releases/assets/" in call]
        assert len(uploads) == len(NAMES)
        assert max(uploads) < min(reads) <= max(reads) < published
        assert server.uploads == NAMES

    def test_what_was_cut_off_is_sent_again_and_nothing_else(
        self, server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("farm.publish.github_api._TRIES", 1)
        server.break_upload_of = "SHA256SUMS"
        with pytest.raises(PublishError) as broken:
            self.publish(released)
        assert broken.value.code == "GITHUB_UNREACHABLE"
        assert server.release("b11549-1").draft
        self.publish(released)
        assert sorted(server.uploads) == sorted(NAMES)
        assert not server.release("b11549-1").draft

    def test_a_limit_is_waited_for(self, server: github_releases.GitHub, released: Path) -> None:
        server.limited = 3
        self.publish(released)
        assert server.uploads == NAMES

    def test_assets_without_a_digest_are_read(
        self, server: github_releases.GitHub, released: Path
    ) -> None:
        server.digests = False
        self.publish(released)
        assert publishing.prepare(released, places.parse("github:owner/name")).new == ()

    def test_a_wrong_token_is_said(
        self, server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GITHUB_TOKEN", "wrong")
        with pytest.raises(PublishError) as refused:
            self.publish(released)
        assert refused.value.code == "GITHUB_REFUSED"
        assert "Bad credentials" in refused.value.message
        assert "wrong" not in refused.value.render()
        assert server.releases == []

    def test_no_token_is_usage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("GITHUB_TOKEN", raising=False)
        with pytest.raises(UsageError) as refused:
            places.parse("github:owner/name")
        assert refused.value.code == "TOKEN_MISSING"


class TestHub:
    """One commit and one tag."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_repository.Hub]:
        with hub_repository.Hub().serve() as hub:
            monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            yield hub

    def publish(self, folder: Path) -> None:
        to = places.parse("hf:owner/name")
        publishing.publish(publishing.prepare(folder, to), to, lambda _: None)

    def test_a_release_is_one_commit_and_its_tag(
        self, hub: hub_repository.Hub, released: Path
    ) -> None:
        self.publish(released)
        repository = hub.repositories["owner/name"]
        assert len(repository.commits) == 2
        assert sorted(repository.commits[1]) == sorted(f"b11549-1/{name}" for name in NAMES)
        assert repository.tags == {"b11549-1": hub_repository.oid(1)}

    def test_what_was_cut_off_before_the_commit_is_not_visible(
        self, hub: hub_repository.Hub, released: Path
    ) -> None:
        hub.refuse = "/commit/"
        with pytest.raises(PublishError) as broken:
            self.publish(released)
        assert broken.value.code == "HUB_REFUSED"
        assert places.parse("hf:owner/name").releases() == ()
        hub.refuse = ""
        self.publish(released)
        assert len(hub.sent) == len(set(hub.sent))

    def test_a_missing_tag_is_made_up_for(self, hub: hub_repository.Hub, released: Path) -> None:
        hub.refuse = "POST .*/tag/"
        with pytest.raises(PublishError):
            self.publish(released)
        hub.refuse = ""
        self.publish(released)
        assert hub.repositories["owner/name"].tags == {"b11549-1": hub_repository.oid(1)}


class TestGate:
    """A release comes into a channel with a report of its checks, or not at all."""

    def report(self, folder: Path, *, passed: bool = True) -> None:
        content = (folder / "manifest.json").read_bytes()
        made = gate.Report(
            "b11549-1",
            hashlib.sha256(content).hexdigest(),
            "2026-11-23T00:00:00+00:00",
            (gate.Check("starts", passed, "it does"), gate.Check("is fast", None, "no GPU")),
        )
        (folder / "gate.json").write_bytes(msgspec.json.encode(made))

    def test_a_report_of_these_bytes_lets_it_through(self, place: Place, released: Path) -> None:
        self.report(released)
        publish(place, released)
        assert "gate.json" in place.open().present("b11549-1")
        promotion.require_gate(place.open(), "b11549-1", lambda _: None)

    def test_a_failed_check_does_not(self, place: Place, released: Path) -> None:
        self.report(released, passed=False)
        publish(place, released)
        with pytest.raises(PublishError) as refused:
            promotion.require_gate(place.open(), "b11549-1", lambda _: None)
        assert refused.value.code == "GATE_FAILED"
        assert "starts" in refused.value.message

    def test_a_second_report_does_not_stand_in_the_way(self, place: Place, released: Path) -> None:
        self.report(released)
        publish(place, released)
        (released / "gate.json").write_bytes((released / "gate.json").read_bytes() + b" ")
        assert publishing.prepare(released, place.open()).new == ()

    def test_a_report_of_nothing_does_not(self, released: Path) -> None:
        manifest = (released / "manifest.json").read_bytes()
        empty = gate.Report("b11549-1", hashlib.sha256(manifest).hexdigest(), "", ())
        with pytest.raises(PublishError) as refused:
            gate.require_passed(msgspec.json.encode(empty), manifest, what="it")
        assert refused.value.code == "GATE_FAILED"

    def test_a_report_of_other_bytes_does_not(self, released: Path) -> None:
        self.report(released)
        report = (released / "gate.json").read_bytes()
        with pytest.raises(PublishError) as refused:
            gate.require_passed(report, b"another manifest", what="it")
        assert refused.value.code == "GATE_OF_OTHER_BYTES"

    def test_without_a_report_it_is_checked_then_and_there(
        self, released: Path, tmp_path: Path
    ) -> None:
        """The tiny tree's llama-server is none: the check finds that, and nothing is promoted."""
        to = places.parse(str(tmp_path / "published"))
        publishing.publish(publishing.prepare(released, to), to, lambda _: None)
        made: list[gate.Check] = []
        with pytest.raises(PublishError) as refused:
            promotion.require_gate(to, "b11549-1", made.append)
        assert refused.value.code == "GATE_FAILED"
        assert [check.passed for check in made[:3]] == [True, True, False]
        assert "gate.json" not in to.present("b11549-1")

    @pytest.mark.parametrize(
        ("now", "last", "passed"),
        [
            ((1.0, 100.0), (1.0, 100.0), True),
            ((1.04, 96.0), (1.0, 100.0), True),
            ((1.06, 100.0), (1.0, 100.0), False),
            ((1.0, 94.0), (1.0, 100.0), False),
            ((9.0, 1.0), None, None),
        ],
    )
    def test_figures(
        self, now: tuple[float, float], last: tuple[float, float] | None, passed: bool | None
    ) -> None:
        before = last and gate.Figures("H200", *last)
        assert gate.compare(gate.Figures("H200", *now), before or None).passed is passed

    def test_figures_of_another_gpu_are_not_compared(self) -> None:
        now, last = gate.Figures("H200", 9.0, 1.0), gate.Figures("L4", 1.0, 9.0)
        assert gate.compare(now, last).passed is None


class TestPlan:
    """What is new, and what must not be touched. Pure."""

    PARTS = tuple(Part(name, Path(name), size, "0" * 64) for name, size in (("a", 1), ("b", 2)))

    def test_what_is_missing_is_new(self) -> None:
        planned = plan("r", "there", self.PARTS, {"a": Known(1, "0" * 64), "else": Known(9, "")})
        assert ([p.name for p in planned.there], [p.name for p in planned.new]) == (["a"], ["b"])
        assert planned.size == 2

    @pytest.mark.parametrize("known", [Known(2, "0" * 64), Known(1, "1" * 64)])
    def test_other_bytes(self, known: Known) -> None:
        with pytest.raises(PublishError) as refused:
            plan("r", "there", self.PARTS, {"a": known})
        assert refused.value.code == "PUBLISHED_DIFFERS"


def test_a_build_with_a_known_hole_is_refused(kept: Path, tmp_path: Path) -> None:
    old = tiny_release.of_build(kept, 11392, tmp_path)
    with pytest.raises(PublishError) as refused:
        publishing.prepare(old, places.parse(str(tmp_path / "published")))
    assert refused.value.code == "KNOWN_ADVISORY"
    assert "CVE-2026-107183" in refused.value.message
    assert "b11393" in refused.value.hint
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    "text", ["github:owner", "hf:a/b/c", "hf:../x", "s3:bucket/x", "https://x.invalid", ""]
)
def test_a_place_that_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        places.parse(text)


@pytest.mark.parametrize("name", [None, "", "../x", "a/b", "-x", "x" * 65, "a b"])
def test_a_name_that_is_none(name: str | None) -> None:
    with pytest.raises(UsageError):
        destination.require_name("channel", name)


class TestChannels:
    """Signed pointers, and the loader that follows them."""

    @pytest.fixture
    def signer(self, tmp_path: Path) -> trust.Signer:
        trust.generate(tmp_path / "key")
        return trust.signer(tmp_path / "key")

    @pytest.fixture
    def two(self, place: Place, kept: Path, tmp_path: Path) -> Destination:
        """Two releases are published."""
        for build in (11549, 11550):
            publish(place, tiny_release.of_build(kept, build, tmp_path / "two"))
        return place.open()

    def follow(self, to: Destination, key: str, store: Path) -> dict[str, Any]:
        """Follow the channel as a copy of ``spaces/`` does, by its ``release.json``."""
        space = store.parent / "space"
        if not space.exists():
            space.mkdir()
            (space / "llama_loader").symlink_to(SPACES / "llama_loader")
        pin_space.write(pin_space.channel(to, "stable", key), store.parent / "release.json")
        script = (
            "import pathlib, sys; from llama_loader import trust, __main__;"
            "trust.RELEASE_FILE = pathlib.Path(sys.argv.pop(1)); sys.exit(__main__.main())"
        )
        done = subprocess.run(
            [
                *(sys.executable, "-c", script, str(store.parent / "release.json"), "fetch"),
                *("--json", "--allow-cpu", "--no-test-run", "--store", str(store)),
            ],
            env={**os.environ, "PYTHONPATH": str(SPACES)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def test_promote_then_roll_back_and_the_loader_follows(
        self, two: Destination, signer: trust.Signer, tmp_path: Path
    ) -> None:
        store = tmp_path / "store"
        first = channels.promote(two, "b11549-1", "stable", signer)
        assert (first.serial, first.before) == (1, None)
        assert self.follow(two, signer.public_key, store)["release"] == "b11549-1"
        second = channels.promote(two, "b11550-1", "stable", signer)
        assert (second.serial, second.before) == (2, "b11549-1")
        assert self.follow(two, signer.public_key, store)["release"] == "b11550-1"
        back = channels.rollback(two, "stable", signer)
        assert (back.serial, back.release) == (3, "b11549-1")
        assert self.follow(two, signer.public_key, store)["release"] == "b11549-1"
        assert two.channel_serials("stable") == (1, 2, 3)
        assert two.channels() == ("stable",)

    def test_a_channel_of_another_key_is_left_alone(
        self, two: Destination, signer: trust.Signer, tmp_path: Path
    ) -> None:
        channels.promote(two, "b11549-1", "stable", signer)
        trust.generate(tmp_path / "other")
        with pytest.raises(PublishError) as refused:
            channels.promote(two, "b11550-1", "stable", trust.signer(tmp_path / "other"))
        assert refused.value.code == "SIGNED_BY_ANOTHER_KEY"
        assert two.channel_serials("stable") == (1,)

    def test_there_must_be_something_before(self, two: Destination, signer: trust.Signer) -> None:
        with pytest.raises(PublishError) as missing:
            channels.rollback(two, "stable", signer)
        assert missing.value.code == "CHANNEL_MISSING"
        channels.promote(two, "b11549-1", "stable", signer)
        with pytest.raises(PublishError) as nothing:
            channels.rollback(two, "stable", signer)
        assert nothing.value.code == "NOTHING_BEFORE"

    def test_a_promotion_that_was_cut_off_can_be_done_again(
        self, kept: Path, signer: trust.Signer, tmp_path: Path
    ) -> None:
        """The signature is the new one already, the manifest still the old one."""
        two = places.parse(str(tmp_path / "published"))
        for build in (11549, 11550):
            folder = tiny_release.of_build(kept, build, tmp_path / "two")
            publishing.publish(publishing.prepare(folder, two), two, lambda _: None)
        channels.promote(two, "b11549-1", "stable", signer)
        channel = tmp_path / "published" / "channels" / "stable"
        before = (channel / "manifest.json").read_bytes()
        channels.promote(two, "b11550-1", "stable", signer)
        (channel / "manifest.json").write_bytes(before)
        assert channels.promote(two, "b11550-1", "stable", signer).serial == 3

    def test_a_changed_history_is_not_rolled_back_to(
        self, kept: Path, signer: trust.Signer, tmp_path: Path
    ) -> None:
        two = places.parse(str(tmp_path / "published"))
        for build in (11549, 11550, 11551):
            folder = tiny_release.of_build(kept, build, tmp_path / "three")
            publishing.publish(publishing.prepare(folder, two), two, lambda _: None)
        for build in (11549, 11550):
            channels.promote(two, f"b{build}-1", "stable", signer)
        past = tmp_path / "published" / "channels" / "stable" / "1.json"
        past.write_bytes(past.read_bytes().replace(b"11549", b"11551"))
        with pytest.raises(PublishError) as refused:
            channels.rollback(two, "stable", signer)
        assert refused.value.code == "SIGNED_BY_ANOTHER_KEY"

    def test_only_what_is_published_is_promoted(
        self, two: Destination, signer: trust.Signer
    ) -> None:
        with pytest.raises(PublishError):
            channels.promote(two, "b9-1", "stable", signer)
        assert two.channels() == ()
