"""What a place holds, in a terminal of 80 columns; and `invoke status` of a bare machine."""

import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from msgspec import structs
from verbs import PROJECT

from farm import release
from farm.errors import PublishError, UsageError
from farm.publish import pin_space, places
from farm.publish.gate import GateCheck, Report
from farm.terminal import show, status
from farm.terminal.status import Overview, Row
from llama_loader.manifest import Cuda, Manifest
from tests.rigs.heard import heard
from tests.rigs.refusals import refused

NAME = "llama-server-b11549-cu130-sm90-linux-x86_64.tar.zst"
PLACE = "/srv/farm"


def row(manifest: Manifest, name: str, gets: str | None, left: timedelta | None = None) -> Row:
    now = datetime.now(timezone.utc)
    end = None if left is None else now + left
    made = now - timedelta(hours=30)
    held = manifest.artifacts
    size = sum(artifact.size for artifact in held)
    return Row(name, manifest.release, manifest.serial, made, end, len(held), size, gets)


@pytest.fixture
def manifest(released: Path) -> Manifest:
    return structs.replace(release.load(released), release="b11549-1", serial=7)


def test_what_a_host_gets_is_named_in_one_piece(
    manifest: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stable = row(manifest, "stable", f"{NAME}, {NAME}", timedelta(days=89, minutes=5))
    show.overview(Overview(PLACE, (stable,), (row(manifest, "b11549-1", NAME),)))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == PLACE
    size = f"{manifest.artifacts[0].size / 1e3:.1f}"
    assert said[2].split() == f"stable b11549-1 7 30 h 90 days 1 {size} kB".split()
    assert said[4].split() == f"b11549-1 7 30 h 1 {size} kB".split()
    assert said[-3:] == ["that host gets", f" stable: {NAME}, {NAME}", f" b11549-1: {NAME}"]


def test_status_of_a_release_folder_as_a_place_names_what_it_takes(released: Path) -> None:
    place = places.parse(str(released))
    with refused("DESTINATION_INVALID", UsageError, "is a release folder") as caught:
        status.of(place)
    assert f"invoke status --folder {released}" in caught.value.hint


def test_pin_of_a_release_without_cuda_is_told_with_the_file_that_was_written(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    code = Cuda(toolkit="13.0", min_driver="580.65", sass=("90",), ptx=())
    for backend, cuda in (("cpu", None), ("cuda", code)):
        artifacts = (structs.replace(manifest.artifacts[0], cuda=cuda, backend=backend),)
        held = structs.replace(manifest, artifacts=artifacts)
        pin = pin_space.CheckedPin({"manifest_url": f"file://{PLACE}"}, held)
        show.pin(pin, Path("spaces/release.json"))
        told = capsys.readouterr().err
        assert "only this machine can read" in told
        assert told.startswith("wrote spaces/release.json")
        assert ("YAKULINGO_SPACES_ALLOW_CPU=1" in told) is (cuda is None)


def test_nothing_is_said_of_a_host_that_nobody_supposed(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    show.overview(Overview(PLACE, (), (row(manifest, "b11549-1", None),)))
    said = capsys.readouterr().out
    assert "no channels" in said
    assert "host" not in said
    bad = PublishError("RELEASE_UNREADABLE", "release 'b2'", hint="repair it")
    show.overview(Overview(PLACE, (), (), (bad,)))
    said = capsys.readouterr().out
    assert all(f"no {title} that can be read" in said for title in ("channel", "release"))


@pytest.mark.parametrize(("days", "warned"), [(20, True), (22, False), (-1, False)])
def test_a_channel_that_expires_within_21_days_is_warned_of(
    manifest: Manifest, days: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (row(manifest, "stable", None, timedelta(days=days, minutes=59)),)
    show.overview(Overview(PLACE, rows, ()))
    said = capsys.readouterr().out
    assert "no releases" in said
    assert ("expired" in said) is (days < 0)
    assert ("warning[CHANNEL_EXPIRES]: channel stable expires in 21 days" in said) is warned
    assert ("invoke renew --channel stable" in said) is (days < 21)


def test_the_verbs_are_listed_without_an_import_of_the_work() -> None:
    """`invoke --list` and every refusal wait for these imports."""
    script = (
        "import sys; sys.path.insert(0, 'spaces'); import tasks\n"
        "print(*{name.partition('.')[0] for name in sys.modules},"
        " *(name for name in sys.modules if name.startswith(('farm.', 'rich.'))))"
    )
    done = heard([sys.executable, "-c", script], cwd=PROJECT, check=True)
    imported = set(done.stdout.split())
    assert not imported & {"docker", "distributed", "requests", "huggingface_hub", "msgspec"}
    assert "rich.console" not in imported
    assert not imported & {"farm.pipeline", "farm.release", "farm.pack", "farm.engines"}
    assert len([name for name in imported if name.startswith("farm.")]) < 15


@pytest.mark.parametrize(
    ("to", "place"), [(None, "PLACE"), ("hf:a/b", "hf:a/b"), ("my place", "'my place'")]
)
def test_the_gate_ends_with_a_promotion_and_its_digest(
    to: str | None, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workflows take the digest from the end of the last line."""
    show.gate(Report("b1-1", "0" * 64, ()), to)
    wanted = f"invoke promote b1-1 --channel NAME --to {place} --key FILE --sha256 {'0' * 64}"
    assert capsys.readouterr().out.endswith(f"{wanted}\n")


def test_texts_from_outside_are_shown_without_terminal_codes(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest's texts, and what a server answered to the gate; rich would read ``[/x]``."""
    evil = "[/x] \x1b[2J\x9b\u202e"
    lying = structs.replace(manifest, source=structs.replace(manifest.source, version=evil))
    show.status(lying)
    show.check(GateCheck("answers", passed=True, detail=f"Paris{evil}\nsecond"))
    named = row(lying, evil, evil)
    show.overview(Overview(evil, (named,), (named,)))
    show.note(evil)
    told = capsys.readouterr()
    assert not {"\x1b", "\x9b", "\u202e"} & {*told.out, *told.err}
    assert told.out.count("[/x]") == 9
    assert "\n    second\n" in told.out
