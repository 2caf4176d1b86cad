"""Publishing to each kind of place: complete, never half visible, never twice, read back."""

import itertools
import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec
import pytest

from farm import release
from farm.errors import FarmError, PublishError, UsageError
from farm.publish import pin_space, places, publishing
from farm.publish.publishing import ReleaseFile, in_order
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError
from tests.rigs import published, tiny_release
from tests.rigs.published import Place, publish
from tests.rigs.refusals import refused

NAMES = [
    "llama-server-b11549-cpu-cpu-linux-x86_64.tar.zst",
    "llama-server-b11549-cpu-cpu-linux-x86_64.tar.zst.cdx.json",
    "manifest.schema.json",
    "SHA256SUMS",
    "manifest.json",
]


def test_what_is_published_is_what_a_loader_gets(
    place: Place, released: Path, tmp_path: Path
) -> None:
    url = publish(place, released)
    pin = pin_space.release(place.open(), "b11549-1").content
    assert pin["manifest_url"] == url
    told = published.fetch(url, tmp_path / "store", "--manifest-sha256", pin["manifest_sha256"])
    assert (told["artifact"], told["release"]) == (NAMES[0], "b11549-1")
    assert place.open().releases() == ("b11549-1",)


def test_release_that_is_written_again_from_the_same_tarballs_is_the_published_one(
    released: Path, tmp_path: Path
) -> None:
    to = places.parse(f"{tmp_path}/dist-11549/../published")
    url = publish(to, released)
    assert ".." not in url
    before = (released / "manifest.json").read_bytes()
    other = json.loads(before)
    other["created"] = "2026-01-01T00:00:00Z"
    (released / "manifest.json").write_text(json.dumps(other))
    assert release.write(released).created.year == 2026
    assert json.loads((released / "manifest.json").read_bytes())["created"] == other["created"]
    (released / "manifest.json").write_bytes(before)
    release.write(released)
    assert publishing.prepare(released, to).new == ()


def test_release_that_an_older_farm_published_keeps_its_schema_when_it_is_written_again(
    released: Path, tmp_path: Path
) -> None:
    older = json.dumps({**release.json_schema(), "description": "as an older farm had it"}).encode()
    (released / "manifest.schema.json").write_bytes(older)
    release.write(released)
    assert (released / "manifest.schema.json").read_bytes() == older
    to = places.parse(str(tmp_path / "published"))
    publish(to, released)
    release.write(released)
    assert publishing.prepare(released, to).new == ()


def test_wheel_is_published_beside_the_manifest_for_pip_and_stays_as_it_is(
    place: Place, released: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "llama_space-1.0.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    plan_ = publishing.prepare(released, place.open(), wheel=wheel)
    assert [part.name for part in plan_.new] == [*NAMES[:-1], wheel.name, NAMES[-1]]
    place.open().publish(plan_, lambda _: None)
    line = publishing.requirement(plan_, place.open())
    assert line is not None
    url, _, digest = line.removeprefix("llama-space @ ").partition("#sha256=")
    with urlopen(url) as answer:
        assert sha256(answer.read()).hexdigest() == digest
    assert release.load(released).artifacts[0].name == NAMES[0]  # the manifest knows nothing of it
    wheel.write_bytes(b"of a later checkout")
    said: list[str] = []
    assert publishing.prepare(released, place.open(), said.append, wheel=wheel).new == ()
    (told,) = [line for line in said if not line.startswith("note[")]
    assert wheel.name in told


def test_other_bytes_under_a_published_name_are_refused(
    place: Place, released: Path, kept: Path, tmp_path: Path
) -> None:
    publish(place, released)
    changed = Path(shutil.copytree(kept, tmp_path / "changed", symlinks=True))
    (changed / "licenses" / "NOTICE").write_text("another tarball\n")
    other = tiny_release.of_build(changed, 11549, tmp_path / "other")
    with refused("PUBLISHED_DIFFERS", PublishError, "b11549-1"):
        publishing.prepare(other, place.open())


@pytest.mark.parametrize(
    "name", ["*.tar.zst", "*.cdx.json", "manifest.schema.json", "SHA256SUMS", "manifest.json"]
)
def test_file_that_changes_after_it_was_verified_is_not_published(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who may write to the folder puts a link to a private file, a TiB or other bytes there."""
    verify, place = release.verify, places.parse(str(tmp_path / "published"))
    path = next(released.glob(name))
    genuine = tmp_path / path.name

    def verify_then_change(*given: Any) -> tuple[str, ...]:
        names = verify(*given)
        shutil.copy2(path, genuine)
        path.write_bytes(genuine.read_bytes()[:-1] + b" ")
        return names

    def verify_then_grow(*given: Any) -> tuple[str, ...]:
        names = verify(*given)
        os.truncate(path, 1 << 40)
        return names

    def verify_then_link(*given: Any) -> tuple[str, ...]:
        names = verify(*given)
        path.unlink()
        path.symlink_to(genuine)
        return names

    monkeypatch.setattr(release, "verify", verify_then_change)
    with refused("RELEASE_CHANGED", PublishError):
        publishing.prepare(released, place, lambda _: None)
    path.write_bytes(genuine.read_bytes())
    monkeypatch.setattr(release, "verify", verify_then_grow)
    with refused("RELEASE_INCOMPLETE", PublishError, "larger than"):
        publishing.prepare(released, place, lambda _: None)
    path.write_bytes(genuine.read_bytes())
    monkeypatch.setattr(release, "verify", verify_then_link)
    with refused("RELEASE_INCOMPLETE", PublishError, "a link"):
        publishing.prepare(released, place, lambda _: None)
    path.unlink()
    shutil.copy2(genuine, path)
    monkeypatch.setattr(release, "verify", verify)
    plan = publishing.prepare(released, place, lambda _: None)
    path.unlink()
    path.symlink_to("/etc/hostname")
    place.publish(plan, lambda _: None)
    assert (tmp_path / "published" / plan.release / path.name).read_bytes() == genuine.read_bytes()


def test_foreign_files_beside_a_release_are_not_read(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be a request: a user who may write there can put thousands there."""
    with published.serving("hub", tmp_path, monkeypatch) as place:
        publish(place, released)
        files = place.server.repositories["owner/name"].commits[-1]
        files |= {f"b11549-1/{number}.txt": b"x" for number in range(9)}
        answer, asked = place.server.answer, []

        def record(method: str, path: str, body: bytes) -> Any:
            asked.append(path)
            return answer(method, path, body)

        monkeypatch.setattr(place.server, "answer", record)
        assert publishing.prepare(released, place.open(), lambda _: None).new == ()
        # nor does a file in a folder below answer for the one that is gone
        files[f"b11549-1/z/{NAMES[0]}"] = files.pop(f"b11549-1/{NAMES[0]}")
        (new,) = publishing.prepare(released, place.open(), lambda _: None).new
        assert new.name == NAMES[0]
    assert any("/resolve/" in path for path in asked)
    assert not [path for path in asked if ".txt" in path]


def test_release_of_a_name_with_a_space_is_prepared(kept: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(kept, tmp_path / "tree", symlinks=True)
    record = json.loads((tree / "BUILD.json").read_bytes())
    record["source"]["build"] = 11549
    (tree / "BUILD.json").write_text(json.dumps(record | {"arch_set": "a b"}))
    (tmp_path / "out").mkdir()
    release.pack_tree(tree, tmp_path / "out", "tar.zst")
    release.write(tmp_path / "out")
    planned = publishing.prepare(tmp_path / "out", places.parse(str(tmp_path / "to")))
    assert "cpu-a b-linux" in planned.parts[0].name


def test_two_publishers_of_one_release_send_it_once(place: Place, released: Path) -> None:
    first, second = (publishing.prepare(released, place.open()) for _ in range(2))
    assert first.new == second.new
    for planned in (first, second):
        place.open().publish(planned, lambda _: None)
    again = publishing.prepare(released, place.open())
    assert ([part.name for part in again.there], again.new) == (NAMES, ())
    place.open().publish(again, lambda _: None)
    assert place.large_files_sent() == 1
    assert place.open().releases() == ("b11549-1",)


def test_of_two_publishers_with_other_bytes_the_second_is_refused(
    place: Place, released: Path, tmp_path: Path
) -> None:
    first = publishing.prepare(released, place.open())
    other = tmp_path / "SHA256SUMS"
    other.write_text("other\n")
    changed = replace(first.new[-2], path=other, size=6, sha256=sha256(b"other\n").hexdigest())
    assert changed.name == "SHA256SUMS"
    second = replace(first, new=(*first.new[:-2], changed, first.new[-1]))
    place.open().publish(first, lambda _: None)
    with refused("PUBLISHED_DIFFERS", PublishError):
        place.open().publish(second, lambda _: None)
    assert b"".join(place.open().read("b11549-1", "SHA256SUMS")) != b"other\n"


def test_what_nobody_saw_is_replaced(place: Place, released: Path, tmp_path: Path) -> None:
    """A publication was cut off, the release was assembled again, and is published then."""
    if place.kind == "hub":
        return  # a commit is visible as a whole: there is no such state
    cut_off_before_the_end(place, released)
    again = tiny_release.of_build(released.parent / "tree-11549", 11549, tmp_path / "again")
    release.write(again, serial=8)
    url = publish(place, again)
    assert json.loads(b"".join(place.open().read("b11549-1", "manifest.json")))["serial"] == 8
    assert published.fetch(url, tmp_path / "store")["release"] == "b11549-1"


def test_file_without_end_is_read_back_to_the_size_that_was_sent() -> None:
    blocks = itertools.repeat(bytes(8))
    with refused("READ_BACK_DIFFERS", PublishError):
        publishing.compare(ReleaseFile("SHA256SUMS", Path("/"), 20, ""), blocks)


def cut_off_before_the_end(place: Place, folder: Path) -> None:
    """Send everything, but let the last comparison fail."""

    def refuse(part: ReleaseFile, _: object) -> None:
        if part.name == "manifest.json":
            raise PublishError("READ_BACK_DIFFERS", "a bad line")

    to = place.open()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(publishing, "compare", refuse)
        with pytest.raises(PublishError):
            to.publish(publishing.prepare(folder, to), lambda _: None)
    assert to.releases() == ()


@pytest.mark.parametrize(
    ("build", "said", "way_out"),
    [(11392, "CVE-2026-107183", "b11393"), (0, "b0", "--assume-build")],
)
def test_a_build_with_a_known_hole_or_without_a_number_is_refused_with_the_way_out(
    kept: Path, tmp_path: Path, build: int, said: str, way_out: str
) -> None:
    folder = tiny_release.of_build(kept, build, tmp_path)
    with refused("KNOWN_ADVISORY", PublishError) as caught:
        publishing.prepare(folder, places.parse(str(tmp_path / "published")))
    assert said in caught.value.message
    assert way_out in caught.value.hint
    assert not (tmp_path / "published").exists()
    assert b"build_assumed" not in (folder / "manifest.json").read_bytes()


def test_a_build_number_that_was_assumed_is_published_and_said(kept: Path, tmp_path: Path) -> None:
    release = tiny_release.of_build(kept, 11549, tmp_path, assumed=True)
    said: list[str] = []
    publishing.prepare(release, places.parse(str(tmp_path / "published")), said.append)
    (told,) = [line for line in said if line.startswith("note[BUILD_ASSUMED]")]
    assert "b11549" in told
    manifest = msgspec.json.decode((release / "manifest.json").read_bytes())
    assert manifest["source"]["build_assumed"] is True


@pytest.mark.parametrize("name", ["channels", "Channels", "channel-stable", "../../x"])
def test_a_release_is_not_published_where_channels_are(released: Path, name: str) -> None:
    content = (released / "manifest.json").read_bytes()
    manifest = msgspec.structs.replace(schema.parse(content), release="x")
    written = schema.dump(manifest).replace(b'"release": "x"', f'"release": "{name}"'.encode())
    assert name.encode() in written
    (released / "manifest.json").write_bytes(written)
    sums = (
        (released / "SHA256SUMS")
        .read_text()
        .replace(sha256(content).hexdigest(), sha256(written).hexdigest())
    )
    (released / "SHA256SUMS").write_text(sums)
    to = places.parse(str(released.parent / "published"))
    with pytest.raises((UsageError, IntegrityError)):
        publishing.prepare(released, to, lambda _: None)
    assert not (released.parent / "published").exists()


def test_releases_are_in_the_order_of_their_numbers() -> None:
    long = f"b{'1' * 5000}"
    expected = ("0-1", "a", "b00", "b7", "b9999-1", "b11549", "b11549-02", "b11549-10", long)
    assert in_order(reversed(expected)) == expected
    many = [f"{number:03}" + "1a" * 480 for number in range(100)]
    tracemalloc.start()
    assert in_order(reversed(many)) == tuple(many)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "tarball", "sbom"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_release_folder_with_a_fifo_or_a_device_is_refused_at_once(
    released: Path, name: str, kind: str
) -> None:
    """Another user may write where releases lie: reading must neither hang nor fill the memory."""
    patterns = {"tarball": "*.tar.zst", "sbom": "*.cdx.json"}
    path = next(released.glob(patterns.get(name, name)))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((FarmError, UsageError)) as caught:
        release.verify(released, lambda _: None)
    assert "not a regular file" in caught.value.message
    assert path.name in caught.value.message
