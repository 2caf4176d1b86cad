"""Places by their names: what is none, and servers that answer without end or as none does."""

from pathlib import Path

import fault_server
import pytest

from farm.errors import FarmError, PublishError, UsageError
from farm.publish import places, publishing
from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request
from tests.rigs.published import Place
from tests.rigs.refusals import refused


def test_nothing_to_read_is_not_an_empty_release(place: Place) -> None:
    with pytest.raises(FarmError) as caught:
        b"".join(place.open().read("b1-1", "manifest.json"))
    assert caught.value.code in {"NOT_PUBLISHED", "HUB_REFUSED", "DESTINATION_MISSING"}
    assert place.open().releases() == place.open().channels() == ()


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
                plan = publishing.prepare(released, places.parse(place), lambda _: None)
                places.parse(place).publish(plan, lambda _: None)
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


@pytest.mark.parametrize(
    "text",
    [
        *("github:owner", "hf:a/b/c", "hf:../x", "hf:a/..", "github:a/b?c=d", "github:a/b\n"),
        *("s3:bucket/x", "https://x.invalid", "HTTPS://x.invalid", "file:///srv", ""),
        *("owner/name", "/nowhere/at/all", str(Path(__file__))),
    ],
)
def test_text_that_names_no_place_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        places.parse(text)


def test_a_home_folder_that_no_shell_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.parse("~/releases").manifest_url("r").startswith(tmp_path.as_uri())


@pytest.mark.parametrize("name", [None, "", "../x", "a/b", "-x", "x" * 65, "a b"])
def test_text_that_is_no_name_of_a_channel_is_wrong_usage(name: str | None) -> None:
    with pytest.raises(UsageError):
        places.require_name("channel", name)
