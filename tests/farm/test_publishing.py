"""Publishing to each kind of place: complete, never half visible, never twice, read back."""

import itertools
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import fault_server
import msgspec
import pytest

from farm import preflight, release
from farm.errors import FarmError, PublishError, UsageError
from farm.publish import deploy_space, hub, pin_space, places, publishing
from farm.publish.publishing import ReleaseFile, in_order
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError
from tests.rigs import github_releases, http_served, hub_repository, published, tiny_release
from tests.rigs import hub as loader_hub
from tests.rigs.http_served import Answer, Request
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
    publishing.publish(plan_, place.open(), lambda _: None)
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
    publishing.publish(plan, place, lambda _: None)
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


def test_nothing_to_read_is_not_an_empty_release(place: Place) -> None:
    with pytest.raises(FarmError) as caught:
        b"".join(place.open().read("b1-1", "manifest.json"))
    assert caught.value.code in {"NOT_PUBLISHED", "HUB_REFUSED", "DESTINATION_MISSING"}
    assert place.open().releases() == place.open().channels() == ()


def test_a_manifest_of_more_than_4_mib_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "b1-1").mkdir()
    (tmp_path / "b1-1" / "manifest.json").write_bytes(bytes((4 << 20) + 1))
    with refused("FILE_TOO_LARGE", PublishError, "manifest.json of b1-1"):
        places.parse(str(tmp_path)).small("b1-1", "manifest.json")


@pytest.mark.parametrize(
    ("to", "path", "code"),
    [
        ("github:me/builds", "/repos/me/builds", "GITHUB_UNREACHABLE"),
        ("hf:me/builds", "/api/models/me/builds", "HUB_UNREACHABLE"),
    ],
)
def test_place_that_sends_a_byte_now_and_then_is_not_awaited(
    monkeypatch: pytest.MonkeyPatch, to: str, path: str, code: str
) -> None:
    monkeypatch.setattr("farm.inputs.packages.ANSWER", 0.5)
    monkeypatch.setattr("farm.publish.github._TRIES", 1)
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    with fault_server.FaultServer() as server:
        server.put(path, bytes(100))
        server.fail(path, fault_server.drip(1, 0.1), always=True)
        for variable in ("GITHUB_API_URL", "HF_ENDPOINT"):
            monkeypatch.setenv(variable, server.url)
        with refused(code, PublishError, "not done within 0.5 s"):
            places.parse(to).require_there()
    with refused(code, PublishError, f"{server.url}.*: .Errno [0-9]+. Connection refused$"):
        places.parse(to).require_there()


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://localhost:1", "//x", "https://u@x"])
@pytest.mark.parametrize(
    ("to", "variable"), [("github:me/builds", "GITHUB_API_URL"), ("hf:me/builds", "HF_ENDPOINT")]
)
def test_token_is_sent_to_https_or_an_address_of_this_machine_only(
    monkeypatch: pytest.MonkeyPatch, to: str, variable: str, url: str
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    monkeypatch.setenv(variable, url)
    with refused("ENDPOINT_REFUSED", UsageError, variable):
        places.parse(to)


RECORD = {"files": {"app.py": ["0" * 40, "0" * 64]}}


def small_file_of_the_hub() -> bytes:
    return places.parse("hf:owner/name").small("b1-1", "manifest.json")


def record_of_a_space() -> bytes:
    found = deploy_space._record(hub.api(), "owner/name", "main")
    return json.dumps({"files": found}).encode()


@pytest.mark.parametrize("read", [small_file_of_the_hub, record_of_a_space])
@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
def test_server_that_answers_as_the_hub_names_no_file_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], bytes], header: str
) -> None:
    """The Hub's client writes to the path that the ETag names, or reads what is there already."""
    mine, new = tmp_path / "private", tmp_path / "evil.pth"
    mine.write_text("private")
    quote = '"' if header == "ETag" else ""
    content = json.dumps(RECORD).encode()
    for place in (mine, new):
        named = {"ETag": '"0"', "X-Repo-Commit": "0" * 40, header: f"{quote}{place}{quote}"}
        with http_served.serving(lambda _, told=named: Answer(200, content, told)) as url:  # type: ignore[misc]
            monkeypatch.setenv("HF_ENDPOINT", url)
            assert read() == content
    assert mine.read_text() == "private"
    assert not new.exists()


def test_server_that_answers_as_the_hub_learns_no_variable_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client tells a server which variables have the values that the server guesses."""
    asked: list[str] = []

    def answer(request: Request) -> Answer:
        asked.append(request.path)
        if request.path == loader_hub.HARNESSES:
            return Answer(200, loader_hub.GUESSES)
        return Answer(200, [] if "/tree/" in request.path else {"id": "me/builds"})

    with http_served.serving(answer) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        for name, value in (
            ("constants.HF_HUB_DISABLE_TELEMETRY", False),
            ("constants.ENDPOINT", url),
            ("constants.AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json")),
            ("utils._detect_agent._registry", None),
        ):
            monkeypatch.setattr(f"huggingface_hub.{name}", value)
        place = places.parse("hf:me/builds")
        place.require_there()
        assert place.releases() == ()
    assert asked == ["/api/models/me/builds", "/api/models/me/builds/tree/main"]


def test_address_that_the_hub_names_for_large_files_gets_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str | None] = {}

    def note(asked: Request) -> Answer:
        seen[asked.path] = asked.headers.get("Authorization")
        return Answer(200, {})

    class Elsewhere(hub_repository.Hub):
        def answer(self, method: str, path: str, body: bytes) -> tuple[int, str, Any]:
            status, code, told = super().answer(method, path, body)
            for one in told.get("objects", ()) if isinstance(told, dict) else ():
                one["actions"]["verify"] = {"href": f"{other}/verify"}
            return status, code, told

    (tmp_path / "large").write_bytes(bytes(hub_repository.LARGE))
    with http_served.serving(note) as other, Elsewhere().serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        client = hub.api()
        client.create_repo("me/builds")
        client.upload_file(
            path_or_fileobj=tmp_path / "large", path_in_repo="large", repo_id="me/builds"
        )
        assert served.sent
    assert seen == {"/verify": None}


@pytest.mark.parametrize("where", ["github-list", "github-upload", "hub-list"])
def test_token_follows_no_address_of_another_server_out_of_an_answer(
    released: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    seen: list[str] = []
    place = "hf:owner/name" if where == "hub-list" else "github:owner/name"
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    monkeypatch.setenv("HF_TOKEN", "hf_token")

    def steal(asked: Request) -> Answer:
        seen.append(asked.path)
        return Answer(200, [])

    with http_served.serving(steal, "0.0.0.0") as other:
        elsewhere = other.replace("127.0.0.1", "127.0.0.9")

        def answer(asked: Request) -> Answer:
            if asked.method == "POST":
                made = {"id": 1, "tag_name": "b11549-1", "draft": True, "assets": []}
                return Answer(201, {**made, "upload_url": f"{elsewhere}/assets{{?name}}"})
            leads = where.endswith("list")
            return Answer(200, [], {"Link": f'<{elsewhere}/x>; rel="next"' if leads else None})

        with http_served.serving(answer) as url:
            monkeypatch.setenv("GITHUB_API_URL", url)
            monkeypatch.setenv("HF_ENDPOINT", url)
            with refused("PLACE_UNUSABLE", PublishError, elsewhere):
                publishing.publish(
                    publishing.prepare(released, places.parse(place), lambda _: None),
                    places.parse(place),
                    lambda _: None,
                )
    assert seen == []


@pytest.mark.parametrize("place", ["github:owner/name", "hf:owner/name"])
@pytest.mark.parametrize(
    "body",
    [
        *({}, [1], [{"x": 1}], {"message": []}, b"<html>", b"\xff", b"[" * 99_999, b""),
        [{"type": "file", "path": "a" * 1025, "oid": ""}],
    ],
)
def test_answer_that_no_api_gives_is_an_error_of_the_place(
    monkeypatch: pytest.MonkeyPatch, place: str, body: object
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    asks = ["require_there", "releases"]
    asks += [] if isinstance(body, dict) else ["require_writable"]  # the Hub may tell no role
    with http_served.serving(lambda _: Answer(200, body)) as url:
        monkeypatch.setenv("GITHUB_API_URL", url)
        monkeypatch.setenv("HF_ENDPOINT", url)
        for ask in asks:
            with refused("PLACE_UNUSABLE", PublishError):
                getattr(places.parse(place), ask)()


@pytest.mark.parametrize("charset", ["idna", "undefined", "utf-8"])
@pytest.mark.parametrize("body", [b"\xff" * (2 << 20), b'{"message": "' + b"x" * 9999 + b'"}'])
def test_refusal_of_many_words_or_of_no_charset_is_told_in_a_few(
    monkeypatch: pytest.MonkeyPatch, charset: str, body: bytes
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    answer = Answer(403, body, {"Content-Type": f"text/html; charset={charset}"})
    with http_served.serving(lambda _: answer) as url:
        monkeypatch.setenv("GITHUB_API_URL", url)
        with refused("GITHUB_REFUSED", PublishError) as caught:
            places.parse("github:owner/name").releases()
    assert len(caught.value.message) < 400


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


def test_list_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    monkeypatch.setattr(places, "MOST_PAGES", 3)
    asked: list[str] = []

    def again(request: Request) -> Answer:
        asked.append(request.path)
        return Answer(200, [], {"Link": f'<{url}/next>; rel="next"'})

    with http_served.serving(again) as url:
        for variable in ("GITHUB_API_URL", "HF_ENDPOINT"):
            monkeypatch.setenv(variable, url)
        for place in ("github:owner/name", "hf:owner/name"):
            with refused("PLACE_UNUSABLE", PublishError, "does not end"):
                places.parse(place).releases()
    assert len(asked) == 6


def test_releases_of_one_tag_without_end_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    asset = {"id": 300, "name": "", "state": "", "size": 300}
    listed = [
        {"id": 1, "tag_name": "a", "draft": False, "upload_url": "", "assets": [asset] * 20_000}
    ]
    content = json.dumps(listed).encode()
    asked: list[str] = []

    def again(request: Request) -> Answer:
        asked.append(request.path)
        return Answer(200, content, {"Link": f'<{url}/next>; rel="next"'})

    with http_served.serving(again) as url:
        monkeypatch.setenv("GITHUB_API_URL", url)
        tracemalloc.start()
        with refused("PLACE_UNUSABLE", PublishError, "does not end"):
            places.parse("github:a/b").present("a")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert len(asked) == (32 << 20) // len(content) + 1


@pytest.mark.parametrize(
    ("bound", "most"), [("durable.MOST_ENTRIES", 8), ("publish.places.MOST_LISTED", 900)]
)
def test_list_of_more_than_any_place_has_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    entry = {"id": 1, "tag_name": "a", "draft": False, "upload_url": "", "assets": []}
    listed = [
        {"type": "file", "path": f"{at}/manifest.json", "oid": "", **entry} for at in range(9)
    ]
    with http_served.serving(lambda _: Answer(200, listed)) as url:
        for variable, place in (("GITHUB_API_URL", "github:a/b"), ("HF_ENDPOINT", "hf:a/b")):
            monkeypatch.setenv(variable, url)
            with monkeypatch.context() as patch, refused("PLACE_UNUSABLE", PublishError):
                patch.setattr(f"farm.{bound}", most)
                places.parse(place).releases()
            places.parse(place).releases()


def test_folder_of_more_than_any_place_has_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, released: Path
) -> None:
    many = tmp_path / "many"
    for name in map(str, range(9)):
        (many / name).mkdir(parents=True)
        (released / f"{name}.tar.gz").touch()
    (many / "0" / "manifest.json").touch()
    assert places.parse(str(many)).releases() == ("0",)
    for bound, most, read in (
        ("durable.MOST_ENTRIES", 9, lambda: places.parse(str(many)).releases()),  # of all together
        ("durable.MOST_ENTRIES", 8, lambda: places.parse(str(tmp_path)).present("many")),
        ("durable.MOST_ENTRIES", 8, lambda: release.verify(released)),
        ("durable.MOST_ENTRIES", 8, lambda: preflight.out_findings(many, [])),
        ("publish.directory._MOST_FOLDERS", 0, lambda: places.parse(str(many)).releases()),
    ):
        with (
            monkeypatch.context() as patch,
            refused("FOLDER_TOO_LARGE", UsageError, f"than {most}"),
        ):
            patch.setattr(f"farm.{bound}", most)
            read()


def test_two_publishers_of_one_release_send_it_once(place: Place, released: Path) -> None:
    first, second = (publishing.prepare(released, place.open()) for _ in range(2))
    assert first.new == second.new
    for planned in (first, second):
        publishing.publish(planned, place.open(), lambda _: None)
    again = publishing.prepare(released, place.open())
    assert ([part.name for part in again.there], again.new) == (NAMES, ())
    publishing.publish(again, place.open(), lambda _: None)
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
    publishing.publish(first, place.open(), lambda _: None)
    with refused("PUBLISHED_DIFFERS", PublishError):
        publishing.publish(second, place.open(), lambda _: None)
    assert b"".join(place.open().read("b11549-1", "SHA256SUMS")) != b"other\n"


def test_two_processes_publish_to_a_folder_at_the_same_time(released: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    to = places.parse(str(tmp_path / "published"))
    planned, said = publishing.prepare(released, to), []
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: publishing.publish(planned, to, said.append), range(2)):
            pass
    sent = [line for line in said if not line.startswith("waiting")]
    assert len(sent) == len(NAMES)
    assert to.releases() == ("b11549-1",)
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["b11549-1"]


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


class TestGitHub:
    """Limits and faults of the REST API."""

    @pytest.fixture
    def server(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[github_releases.GitHub]:
        with published.serving("github", tmp_path, monkeypatch) as place:
            yield place.server

    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Return the seconds that a real run would wait; the test does not wait."""
        waited: list[float] = []
        clock = {"sleep": waited.append, "now": lambda: 0.0}
        monkeypatch.setattr("farm.publish.github.Api.__init__.__kwdefaults__", clock)
        return waited

    def publish(self, folder: Path) -> None:
        publish(places.parse("github:owner/name"), folder)

    @pytest.mark.parametrize(
        ("limited", "limit", "waited"),
        [
            ({"limited": 3}, None, [0.0] * 3),
            ({"limited_uploads": 3}, None, [0.0] * 3),
            ({"limited": 1}, Answer(403, {"message": "a secondary rate limit"}), [60.0]),
        ],
    )
    def test_a_limit_is_waited_for_also_in_the_middle_of_the_uploads(
        self,
        server: github_releases.GitHub,
        released: Path,
        waits: list[float],
        limited: dict[str, int],
        limit: Answer | None,
        waited: list[float],
    ) -> None:
        server.limit = limit or server.limit
        for name, count in limited.items():
            setattr(server, name, count)
        self.publish(released)
        assert server.uploads == NAMES
        assert waits == waited

    def test_a_release_is_a_draft_until_it_is_whole_and_its_token_follows_no_redirect(
        self, server: github_releases.GitHub, released: Path
    ) -> None:
        self.publish(released)
        published = server.calls.index("PATCH /repos/owner/name/releases/1")
        uploads = [at for at, call in enumerate(server.calls) if call.startswith("POST /uploads/")]
        reads = [at for at, call in enumerate(server.calls) if "/releases/assets/" in call]
        assert len(uploads) == len(NAMES)
        assert max(uploads) < min(reads) <= max(reads) < published
        assert server.uploads == NAMES
        assert any(call.startswith("GET /blobs/") for call in server.calls)
        assert server.tokens_elsewhere == []  # a redirect leads to another host

    @pytest.mark.parametrize(
        ("running_for", "commit"),
        [(github_releases.REPOSITORY, "c0ffee" * 6 + "c0ff"), ("another/repository", None)],
    )
    def test_release_of_a_workflow_tags_the_commit_that_was_checked_out_of_this_repository(
        self,
        server: github_releases.GitHub,
        released: Path,
        monkeypatch: pytest.MonkeyPatch,
        running_for: str,
        commit: str | None,
    ) -> None:
        monkeypatch.setenv("GITHUB_SHA", "c0ffee" * 6 + "c0ff")
        monkeypatch.setenv("GITHUB_REPOSITORY", running_for)
        self.publish(released)
        assert server.release("b11549-1").commit == commit

    def test_what_was_cut_off_is_sent_again_and_nothing_else(
        self, server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("farm.publish.github._TRIES", 1)
        server.break_upload_of = "SHA256SUMS"
        with refused("GITHUB_UNREACHABLE", PublishError):
            self.publish(released)
        assert server.release("b11549-1").draft
        self.publish(released)
        assert sorted(server.uploads) == sorted(NAMES)
        assert not server.release("b11549-1").draft

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
        with refused("GITHUB_REFUSED", PublishError, "Bad credentials") as caught:
            self.publish(released)
        assert "wrong" not in caught.value.render()
        assert server.releases == []

    @pytest.mark.parametrize(
        ("limit", "code", "words"),
        [
            ({"Retry-After": "7200"}, "GITHUB_LIMIT", "minutes"),
            (
                {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "99999999999"},
                *("GITHUB_LIMIT", "minutes"),
            ),
            ({}, "GITHUB_REFUSED", "Resource not accessible by integration"),
        ],
    )
    def test_what_lasts_or_may_not_be_done_is_said_and_not_waited_for(
        self,
        server: github_releases.GitHub,
        released: Path,
        limit: dict[str, str | None],
        code: str,
        words: str,
    ) -> None:
        said = {"message": "Resource not accessible by integration"}
        server.limited, server.limit = 9, Answer(403, said, limit)
        with refused(code, PublishError, words):
            self.publish(released)
        assert server.limited == 8

    def test_a_draft_whose_answer_was_lost_is_not_made_twice(
        self, server: github_releases.GitHub, released: Path, waits: list[float]
    ) -> None:
        server.cut_at, server.cut_after = 1, True
        self.publish(released)
        assert [(one.tag, one.draft) for one in server.releases] == [("b11549-1", False)]
        assert waits == [1.0]

    def test_of_several_drafts_the_oldest_is_used_and_a_published_one_before_them(
        self, server: github_releases.GitHub, released: Path
    ) -> None:
        for number in (901, 902):
            server.releases.append(
                github_releases.Release(number, "b11549-1", draft=True, prerelease=False)
            )
        self.publish(released)
        assert [one.draft for one in server.releases] == [False, True]
        assert places.parse("github:owner/name").releases() == ("b11549-1",)
        assert publishing.prepare(released, places.parse("github:owner/name")).new == ()

    @pytest.mark.parametrize("token", ["s3cret\nX-Evil: 1", "s3cret t", "s3cret→", "s3\x00cret"])
    def test_a_token_that_is_none_is_not_repeated(
        self, token: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for variable, to in (("GITHUB_TOKEN", "github:owner/name"), ("HF_TOKEN", "hf:owner/name")):
            # what cannot be in an environment at all can still be handed in by a test
            monkeypatch.setattr("os.environ", {**os.environ, variable: token})
            with refused("TOKEN_INVALID", UsageError) as caught:
                places.parse(to)
            assert "s3" not in caught.value.render()

    def test_a_token_out_of_a_file_with_its_line_break(
        self, server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GITHUB_TOKEN", f"{github_releases.TOKEN}\n")
        self.publish(released)
        assert server.uploads == NAMES


class TestHub:
    """One commit and one tag."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_repository.Hub]:
        with published.serving("hub", tmp_path, monkeypatch) as place:
            yield place.server

    def publish(self, folder: Path) -> None:
        publish(places.parse("hf:owner/name"), folder)

    def test_a_release_is_one_commit_and_its_tag_which_never_moves(
        self, hub: hub_repository.Hub, released: Path, tmp_path: Path
    ) -> None:
        self.publish(released)
        repository = hub.repositories["owner/name"]
        assert len(repository.commits) == 2
        assert sorted(repository.commits[1]) == sorted(f"b11549-1/{name}" for name in NAMES)
        to, wheel = places.parse("hf:owner/name"), tmp_path / "llama_space-1-py3-none-any.whl"
        wheel.write_bytes(b"what is added later")
        publishing.publish(publishing.prepare(released, to, wheel=wheel), to, lambda _: None)
        assert len(repository.commits) == 3
        assert repository.tags == {"b11549-1": hub_repository.oid(1)}
        assert not any(call.startswith("DELETE") for call in hub.calls)

    def test_a_tag_of_something_else_is_said(self, hub: hub_repository.Hub, released: Path) -> None:
        hub.repositories["owner/name"] = hub_repository.Repository()
        hub.repositories["owner/name"].tags["b11549-1"] = hub_repository.oid(0)
        with refused("TAG_IS_ANOTHER_S", PublishError, "b11549-1"):
            self.publish(released)

    def test_a_commit_in_between_is_not_overwritten(
        self, hub: hub_repository.Hub, released: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        to = places.parse("hf:owner/name")
        planned = publishing.prepare(released, to)
        look = to._head  # type: ignore[attr-defined]

        def and_then_somebody_commits() -> str:
            head: str = look()
            repository = hub.repositories["owner/name"]
            repository.commits.append({**repository.commits[-1], "theirs": b"x"})
            return head

        monkeypatch.setattr(to, "_head", and_then_somebody_commits)
        with refused("HUB_REFUSED", PublishError, "412"):
            publishing.publish(planned, to, lambda _: None)
        monkeypatch.undo()


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


@pytest.mark.parametrize(
    "text",
    [
        *("github:owner", "hf:a/b/c", "hf:../x", "hf:a/..", "github:a/b?c=d", "github:a/b\n"),
        *("s3:bucket/x", "https://x.invalid", "HTTPS://x.invalid", "file:///srv", ""),
        *("owner/name", "/nowhere/at/all", str(Path(__file__))),
    ],
)
def test_a_place_that_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        places.parse(text)


def test_a_home_folder_that_no_shell_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.parse("~/releases").manifest_url("r").startswith(tmp_path.as_uri())


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


@pytest.mark.parametrize("name", [None, "", "../x", "a/b", "-x", "x" * 65, "a b"])
def test_a_name_that_is_none(name: str | None) -> None:
    with pytest.raises(UsageError):
        places.require_name("channel", name)


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
