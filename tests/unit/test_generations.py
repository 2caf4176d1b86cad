"""Several versions side by side: the current one, the one before, and what is collected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import __main__ as cli
from llama_loader import generations, prepare, settings
from llama_loader.errors import StoreError
from llama_loader.events import Event, Note
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
from tests.rigs import archives, installer
from tests.rigs.archives import GOOD, Entry

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.manifest import Artifact
    from llama_loader.prepare import Prepared


class Releases:
    """Releases in folders, and a store that goes from one to the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "store"
        self.events: list[Event] = []

    def publish(self, name: str) -> Artifact:
        packed, artifact = archives.release((*GOOD, Entry("runtime/version", name.encode())))
        place = self.folder / name
        place.mkdir()
        (place / artifact.urls[0]).write_bytes(packed)
        (place / "manifest.json").write_bytes(archives.manifest(artifact, release=name))
        return artifact

    def settings(self, name: str, **options: str) -> settings.Settings:
        url = (self.folder / name / "manifest.json").as_uri()
        given = {"manifest_url": url, "store": str(self.root), "allow_cpu": "1", **options}
        return settings.load(given, {})

    def start(self, name: str, **options: str) -> Prepared:
        return prepare.prepare(self.settings(name, **options), sink=self.events.append)

    @property
    def record(self) -> generations.Record:
        found = generations.read(self.root)
        assert found is not None
        return found

    def installed(self) -> set[str]:
        return {path.name for path in (self.root / "runtimes").iterdir()}


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path)


def test_a_new_release_stands_beside_the_old_one(releases: Releases) -> None:
    one, two = releases.publish("b1-1"), releases.publish("b2-1")
    releases.start("b1-1")
    assert (releases.record.current.release, releases.record.previous) == ("b1-1", None)
    releases.start("b2-1")
    assert releases.record.current.release == "b2-1"
    assert releases.record.previous is not None
    assert releases.record.previous.release == "b1-1"
    assert releases.record.runtimes == releases.installed() == {one.sha256, two.sha256}
    before = (releases.root / "current").read_bytes()
    releases.start("b2-1")
    assert (releases.root / "current").read_bytes() == before


def test_a_rollback_needs_nothing_but_the_store(releases: Releases) -> None:
    releases.publish("b1-1")
    releases.publish("b2-1")
    releases.start("b1-1")
    releases.start("b2-1")
    for name in ("b1-1", "b2-1"):
        shutil.rmtree(releases.folder / name)
    for _ in range(2):  # the same one however often
        went_back = releases.start("b2-1", previous="1", offline="1")
        assert went_back.installed.release == "b1-1"
        assert (went_back.runtime / "version").read_bytes() == b"b1-1"
    assert releases.record.current.release == "b2-1"
    notes = [event for event in releases.events if isinstance(event, Note)]
    assert [note.code for note in notes].count("PREVIOUS_RELEASE") == 2


def test_a_previous_release_is_hashed_again_like_any_other(releases: Releases) -> None:
    releases.publish("b1-1")
    releases.publish("b2-1")
    folder = releases.start("b1-1").runtime
    releases.start("b2-1")
    (folder / "version").write_bytes(b"b1-2")
    again = releases.start("b2-1", previous="1")
    assert (again.runtime / "version").read_bytes() == b"b1-1"
    assert "RUNTIME_DAMAGED" in [e.code for e in releases.events if isinstance(e, Note)]


def test_the_command_line_goes_back(releases: Releases, capsys: pytest.CaptureFixture[str]) -> None:
    releases.publish("b1-1")
    releases.publish("b2-1")
    folder = releases.start("b1-1").runtime
    argv = ["fetch", "--previous", "--store", str(releases.root), "--allow-cpu", "--no-test-run"]
    assert cli.main(argv) == 6
    assert "error[NO_PREVIOUS_RELEASE]" in capsys.readouterr().err
    releases.start("b2-1")
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(folder)
    assert "warning[PREVIOUS_RELEASE]" in printed.err


@pytest.mark.parametrize("text", [b"", b"{", b'{"current": 1}', b"\xff\xfe", b"[]"])
def test_a_pointer_that_cannot_be_read_is_none(releases: Releases, text: bytes) -> None:
    releases.publish("b1-1")
    releases.start("b1-1")
    (releases.root / "current").write_bytes(text)
    with pytest.raises(StoreError, match="no release before"):
        Store(releases.root).previous()
    releases.start("b1-1")
    assert releases.record.current.release == "b1-1"


def test_a_previous_manifest_that_was_changed_is_not_believed(releases: Releases) -> None:
    releases.publish("b1-1")
    releases.publish("b2-1")
    releases.start("b1-1")
    releases.start("b2-1")
    assert releases.record.previous is not None
    kept = releases.root / "manifests" / f"{releases.record.previous.manifest}.json"
    document = json.loads(kept.read_bytes())
    document["artifacts"][0]["urls"] = ["https://example.org/evil"]
    kept.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="no release before"):
        Store(releases.root).previous()


# what is collected


def age(place: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(place, (then, then))


OLD = generations.MAX_AGE_SECONDS + 60
IDLE = generations.RECENT_SECONDS + 60


def install(releases: Releases, name: str, seconds: float) -> Path:
    artifact = releases.publish(name)
    url = (releases.folder / name / artifact.urls[0]).as_uri()
    place = Store(releases.root).install(artifact, [url], Fetcher(), release=name).root
    age(place, seconds)
    return place


def test_what_nobody_used_for_long_goes_with_the_next_release(releases: Releases) -> None:
    old, idle = install(releases, "b1-1", OLD), install(releases, "b2-1", IDLE)
    releases.publish("b3-1")
    current = releases.start("b3-1").installed.root
    assert releases.installed() == {idle.name, current.name}
    assert not old.exists()
    assert [place for place in (releases.root / "staging").iterdir() if place.is_dir()] == []


def test_a_start_is_a_use(releases: Releases) -> None:
    place = install(releases, "b1-1", OLD)
    assert Store(releases.root).find(place.name) is not None
    assert time.time() - place.stat().st_mtime < 60


def test_the_previous_release_stays_however_old(releases: Releases) -> None:
    releases.publish("b1-1")
    releases.publish("b2-1")
    first = releases.start("b1-1").installed.root
    age(first, OLD)
    releases.start("b2-1")
    assert first.exists()


def test_too_many_bytes_go_the_longest_unused_first(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [install(releases, f"b{n}-1", IDLE * (9 - n)) for n in range(1, 5)]
    size = sum(path.lstat().st_size for path in places[0].rglob("*"))
    monkeypatch.setattr(generations, "MAX_BYTES", int(size * 3.5))
    releases.publish("b9-1")
    current = releases.start("b9-1").installed.root
    assert releases.installed() == {places[2].name, places[3].name, current.name}


def test_what_was_asked_for_just_now_stays(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = install(releases, "b1-1", 1)
    monkeypatch.setattr(generations, "MAX_BYTES", 1)
    releases.publish("b2-1")
    releases.start("b2-1")
    assert place.exists()


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from llama_loader import generations
generations.hold(Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_process_holds_is_never_collected(releases: Releases) -> None:
    place = install(releases, "b1-1", OLD)
    argv = [sys.executable, "-c", HOLDER, str(installer.SPACES), str(place)]
    gone: list[Any] = []
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert generations.collect(place.parent, (), gone.append) == []
        holder.kill()
    assert generations.collect(place.parent, (), gone.append) == [place.name]
    assert gone == [place]


def test_a_release_that_was_prepared_is_held(releases: Releases) -> None:
    releases.publish("b1-1")
    place = releases.start("b1-1").installed.root
    age(place, OLD)
    assert generations.collect(place.parent, (), shutil.rmtree) == []
    assert place.exists()


def test_where_locks_do_not_work_nothing_is_collected(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(38, "no locks here")

    place = install(releases, "b1-1", OLD)
    monkeypatch.setattr(generations.fcntl, "flock", failing)
    assert generations.collect(place.parent, (), shutil.rmtree) == []
    assert place.exists()


def generation(release: str, *runtimes: str) -> generations.Generation:
    return generations.Generation(
        release=release, url="https://x/", manifest=release * 64, runtimes=runtimes
    )


def test_runtimes_for_two_gpus_are_one_generation() -> None:
    """ZeroGPU: both likely ones are fetched, a worker takes one, and the release before stays."""
    record = generations.following(None, generation("a", "0" * 64))
    for runtime in ("1" * 64, "2" * 64, "1" * 64):
        record = generations.following(record, generation("b", runtime))
    assert record.current.release == "b"
    assert set(record.current.runtimes) == {"1" * 64, "2" * 64}
    assert record.previous is not None
    assert record.previous.release == "a"


def test_the_same_runtimes_again_keep_the_release_before() -> None:
    one, two = generation("a", "1" * 64), generation("b", "2" * 64)
    record = generations.following(generations.following(None, one), two)
    assert (record.current, record.previous) == (two, one)
    renamed = generation("c", "2" * 64)
    after = generations.following(record, renamed)
    assert (after.current, after.previous) == (renamed, one)
    assert after.runtimes == {"1" * 64, "2" * 64}


@pytest.mark.parametrize("kind", ["age", "size", "recent"])
def test_limits_are_kept_to_the_second_and_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now = 2_000_000_000.0
    place = tmp_path / ("a" * 64)
    place.mkdir()
    (place / "file").write_bytes(bytes(100))
    monkeypatch.setattr(time, "time", lambda: now)
    size = sum(path.lstat().st_size for path in place.rglob("*"))

    def goes(unused: float, most: int) -> bool:
        os.utime(place, (now - unused, now - unused))
        monkeypatch.setattr(generations, "MAX_BYTES", most)
        gone: list[Path] = []
        generations.collect(tmp_path, (), gone.append)
        return gone == [place]

    if kind == "age":
        outcomes = [goes(14 * 86400 - 1, size), goes(14 * 86400, size)]
    elif kind == "size":
        outcomes = [goes(7200, size), goes(7200, size - 1)]
    else:
        outcomes = [goes(3599, 0), goes(3600, 0)]
    assert outcomes == [False, True]


def test_no_runtime_of_a_store_takes_more_than_one_file_handle(tmp_path: Path) -> None:
    """A worker that asks before every start must not run out of them."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, no paths
    for _ in range(5):
        generations.hold(tmp_path)
        generations.collect(tmp_path.parent, (), lambda _: None)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208


def test_folders_are_opened_as_such_and_for_this_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "runtimes" / ("a" * 64)
    place.mkdir(parents=True)
    os.utime(place, (0, 0))
    flags: list[int] = []
    original = os.open

    def watched(path: Path, how: int, *rest: int, **where: int) -> int:
        flags.append(how)
        return original(path, how, *rest, **where)

    monkeypatch.setattr(os, "open", watched)
    generations.hold(place)
    generations.collect(place.parent, (), lambda _: None)
    folder = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    assert flags == [folder, folder | os.O_NOFOLLOW]


def test_limits_that_the_documents_name() -> None:
    assert generations.MAX_AGE_SECONDS == 14 * 24 * 3600
    assert generations.MAX_BYTES == 8 * 1024**3
    assert generations.RECENT_SECONDS == 3600
