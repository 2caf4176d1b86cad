"""Publishing to the Hub: one commit and one tag; an imitation of the Hub learns nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.errors import PublishError
from farm.publish import deploy_space, places, publishing
from farm.publish.hub import api
from tests.farm.test_publishing import NAMES
from tests.rigs import http_served, hub_repository, published
from tests.rigs import hub as loader_hub
from tests.rigs.http_served import Answer, Request
from tests.rigs.published import publish
from tests.rigs.refusals import refused

RECORD = {"files": {"app.py": ["0" * 40, "0" * 64]}}


def small_file_of_the_hub() -> bytes:
    return places.parse("hf:owner/name").small("b1-1", "manifest.json")


def record_of_a_space() -> bytes:
    found = deploy_space._record(api(), "owner/name", "main")
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
        client = api()
        client.create_repo("me/builds")
        client.upload_file(
            path_or_fileobj=tmp_path / "large", path_in_repo="large", repo_id="me/builds"
        )
        assert served.sent
    assert seen == {"/verify": None}


def test_cookies_of_the_hub_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str | None] = []

    def answer(asked: Request) -> Answer:
        sent.append(asked.headers.get("Cookie"))
        return Answer(200, {"id": "me/builds"}, {"Set-Cookie": "name=value"})

    with http_served.serving(answer) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        client = api()
        client.model_info("me/builds")
        client.model_info("me/builds")
    assert sent == [None, None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_repository.Hub]:
    with published.serving("hub", tmp_path, monkeypatch) as place:
        yield place.server


def publish_to_hub(folder: Path) -> None:
    publish(places.parse("hf:owner/name"), folder)


def test_a_release_is_one_commit_and_its_tag_which_never_moves(
    hub: hub_repository.Hub, released: Path, tmp_path: Path
) -> None:
    publish_to_hub(released)
    repository = hub.repositories["owner/name"]
    assert len(repository.commits) == 2
    assert sorted(repository.commits[1]) == sorted(f"b11549-1/{name}" for name in NAMES)
    to, wheel = places.parse("hf:owner/name"), tmp_path / "llama_space-1-py3-none-any.whl"
    wheel.write_bytes(b"what is added later")
    to.publish(publishing.prepare(released, to, wheel=wheel), lambda _: None)
    assert len(repository.commits) == 3
    assert repository.tags == {"b11549-1": hub_repository.oid(1)}
    assert not any(call.startswith("DELETE") for call in hub.calls)


def test_a_tag_of_something_else_is_said(hub: hub_repository.Hub, released: Path) -> None:
    hub.repositories["owner/name"] = hub_repository.Repository()
    hub.repositories["owner/name"].tags["b11549-1"] = hub_repository.oid(0)
    with refused("TAG_IS_ANOTHER_S", PublishError, "b11549-1"):
        publish_to_hub(released)


def test_a_commit_in_between_is_not_overwritten(
    hub: hub_repository.Hub, released: Path, monkeypatch: pytest.MonkeyPatch
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
        to.publish(planned, lambda _: None)
    monkeypatch.undo()
