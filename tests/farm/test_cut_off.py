"""Packing, publishing and promoting, cut off at every single effect: whole or not there, and done
again."""

import errno
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farm import release, trust
from farm.errors import PublishError
from farm.publish import channels, publishing
from farm.publish.places import Destination
from llama_loader import manifest as schema
from tests.rigs import published, tiny_release
from tests.rigs.published import Place, publish
from tests.rigs.refusals import refused

EFFECTS = [
    ("folder", False),
    ("github", False),
    ("github", True),
    ("hub", False),
    ("hub", True),
]
"""A place, and whether a request is carried out before its answer is lost."""


def cut_off(place: Place, number: int, work: Callable[[], object]) -> tuple[bool, bool]:
    """Do something whose n-th effect fails: a request, or a file on a disk that is full then.

    Says whether there were as many effects, and whether that was the end of it: the Hub's client
    asks some things again.
    """
    left, sync, patch = [number], os.fsync, pytest.MonkeyPatch()

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    if place.kind == "folder":
        patch.setattr("farm.publish.directory.os.fsync", fsync)
    else:
        patch.setattr("farm.publish.github._TRIES", 1)
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        place.server.cut_at = number
    code = ""
    try:
        work()
    except PublishError as error:
        code = error.code
    assert code in {"", "DESTINATION_NOT_WRITABLE", "GITHUB_UNREACHABLE", "HUB_REFUSED"}
    patch.undo()
    if place.server is None:
        return left[0] <= 0, bool(code)
    reached = place.server.cut_at <= 0
    place.server.cut_at = 0
    return reached, bool(code)


def whole(to: Destination, folder: Path) -> bool:
    """Say whether a release is visible; if it is, every part must be there, byte for byte."""
    if not to.releases():
        return False
    assert publishing.prepare(folder, to, lambda _: None).new == ()
    return True


@pytest.fixture(params=EFFECTS, ids=lambda one: f"{one[0]}-{one[1]}")
def cut_place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Place, bool]]:
    """Give a place, and whether what is cut off there is carried out."""
    kind, after = request.param
    with published.serving(kind, tmp_path / "place", monkeypatch) as place:
        if kind == "github":
            place.server.page = 100  # effects are cut off, not questions
        yield place, after


def attempts(place: Place, *, after: bool) -> Iterator[int]:
    """Count; each time, give the place back the content that it had at first."""
    back = place.kept()
    for number in itertools.count(1):
        back()
        if place.server is not None:
            place.server.cut_after = after
        yield number


def test_a_publication_cut_off_anywhere_is_whole_or_not_there_and_the_next_run_finishes_it(
    cut_place: tuple[Place, bool], released: Path
) -> None:
    place, after = cut_place
    for number in attempts(place, after=after):
        reached, ended = cut_off(place, number, lambda: publish(place, released))
        assert whole(place.open(), released) or ended
        publish(place, released)
        assert whole(place.open(), released)
        # the Hub's client itself asks again where an answer is lost
        assert place.large_files_sent() <= (2 if place.kind == "hub" and after else 1)
        if not reached:
            break
    assert number > 4


def test_a_promotion_cut_off_anywhere_is_finished_by_the_next_one_and_can_be_rolled_back(
    cut_place: tuple[Place, bool], kept: Path, signer: trust.Signer, tmp_path: Path
) -> None:
    place, after = cut_place
    for build in (11549, 11550):
        publish(place, tiny_release.of_build(kept, build, tmp_path))
    channels.Channel(place.open(), "stable", signer).promote("b11549-1")
    for number in attempts(place, after=after):
        to = place.open()

        def promote(to: Destination = to) -> None:
            channels.Channel(to, "stable", signer).promote("b11550-1")

        reached, ended = cut_off(place, number, promote)
        shown = present(to, signer)
        assert shown in {"b11549-1", "b11550-1"} or (ended and shown is None)
        if shown != "b11550-1" and 2 in to.channel_serials("stable"):
            for use in ("rollback", "renew"):  # nobody has to guess which one is meant
                with refused("CHANNEL_NOT_NEWEST", PublishError, "serial 2"):
                    getattr(channels.Channel(to, "stable", signer), use)()
        promote()
        assert present(to, signer) == "b11550-1"
        assert channels.Channel(to, "stable", signer).rollback().release == "b11549-1"
        assert present(to, signer) == "b11549-1"
        if not reached:
            break
    assert number > (1 if place.kind == "hub" else 4)


def present(to: Destination, signer: trust.Signer) -> str | None:
    """Return the release that the channel says now to a loader; None where it says nothing."""
    content = to.channel_file("stable", "manifest.json")
    signature = to.channel_file("stable", "manifest.json.minisig")
    try:
        trust.require_signed(content or b"", signature or b"", signer.public_key, what="it")
    except PublishError:
        return None
    return schema.parse(content or b"").release


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}


def killed(number: int, work: Callable[[], object]) -> bool:
    """Do something in a process that is killed before its n-th change of the disk, if any."""
    if not (child := os.fork()):
        count = itertools.count(1)

        def hook(event: str, of: tuple[object, ...]) -> None:
            writes = event == "open" and int(str(of[2] or 0)) & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in {0, signal.SIGKILL}
    return status != 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_packing_that_is_killed_anywhere_leaves_a_tarball_that_other_runs_list(
    kept: Path, tmp_path: Path
) -> None:
    start, now = tmp_path / "start", tmp_path / "now"
    tree = Path(shutil.copytree(kept, tmp_path / "tree"))
    release.pack_tree(tree, start, "tar.gz")
    (tree / "licenses" / "OTHER").write_text("other")

    def work() -> str:
        made = release.pack_tree(tree, now, "tar.gz")
        release.write(now)
        return made.sha256

    for number in itertools.count(1):
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(start, now)
        done = not killed(number, work)
        release.write(now)
        assert work() == release.load(now).artifacts[0].sha256
        if done:
            break
    assert number > 8
