"""Publishing to GitHub: limits and faults of its REST API, drafts, tokens."""

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.errors import PublishError, UsageError
from farm.publish import places, publishing
from tests.farm.test_publishing import NAMES
from tests.rigs import github_releases, http_served, published
from tests.rigs.http_served import Answer, Request
from tests.rigs.published import publish
from tests.rigs.refusals import refused


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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[github_releases.GitHub]:
    with published.serving("github", tmp_path, monkeypatch) as place:
        yield place.server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that a real run would wait; the test does not wait."""
    waited: list[float] = []
    clock = {"sleep": waited.append, "now": lambda: 0.0}
    monkeypatch.setattr("farm.publish.github.Api.__init__.__kwdefaults__", clock)
    return waited


def publish_to_github(folder: Path) -> None:
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
    publish_to_github(released)
    assert server.uploads == NAMES
    assert waits == waited


def test_a_release_is_a_draft_until_it_is_whole_and_its_token_follows_no_redirect(
    server: github_releases.GitHub, released: Path
) -> None:
    publish_to_github(released)
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
    server: github_releases.GitHub,
    released: Path,
    monkeypatch: pytest.MonkeyPatch,
    running_for: str,
    commit: str | None,
) -> None:
    monkeypatch.setenv("GITHUB_SHA", "c0ffee" * 6 + "c0ff")
    monkeypatch.setenv("GITHUB_REPOSITORY", running_for)
    publish_to_github(released)
    assert server.release("b11549-1").commit == commit


def test_what_was_cut_off_is_sent_again_and_nothing_else(
    server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.publish.github._TRIES", 1)
    server.break_upload_of = "SHA256SUMS"
    with refused("GITHUB_UNREACHABLE", PublishError):
        publish_to_github(released)
    assert server.release("b11549-1").draft
    publish_to_github(released)
    assert sorted(server.uploads) == sorted(NAMES)
    assert not server.release("b11549-1").draft


def test_assets_without_a_digest_are_read(server: github_releases.GitHub, released: Path) -> None:
    server.digests = False
    publish_to_github(released)
    assert publishing.prepare(released, places.parse("github:owner/name")).new == ()


def test_a_wrong_token_is_said(
    server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "wrong")
    with refused("GITHUB_REFUSED", PublishError, "Bad credentials") as caught:
        publish_to_github(released)
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
    server: github_releases.GitHub,
    released: Path,
    limit: dict[str, str | None],
    code: str,
    words: str,
) -> None:
    said = {"message": "Resource not accessible by integration"}
    server.limited, server.limit = 9, Answer(403, said, limit)
    with refused(code, PublishError, words):
        publish_to_github(released)
    assert server.limited == 8


def test_a_verb_waits_for_limits_a_quarter_of_an_hour_in_all(
    server: github_releases.GitHub, released: Path, waits: list[float]
) -> None:
    server.limited, server.limit = 9, Answer(429, {}, {"Retry-After": "400"})
    with refused("GITHUB_LIMIT", PublishError, "minutes"):
        publish_to_github(released)
    assert waits == [400.0, 400.0]


def test_a_draft_whose_answer_was_lost_is_not_made_twice(
    server: github_releases.GitHub, released: Path, waits: list[float]
) -> None:
    server.cut_at, server.cut_after = 1, True
    publish_to_github(released)
    assert [(one.tag, one.draft) for one in server.releases] == [("b11549-1", False)]
    assert waits == [1.0]


def test_of_several_drafts_the_oldest_is_used_and_a_published_one_before_them(
    server: github_releases.GitHub, released: Path
) -> None:
    for number in (901, 902):
        server.releases.append(
            github_releases.Release(number, "b11549-1", draft=True, prerelease=False)
        )
    publish_to_github(released)
    assert [one.draft for one in server.releases] == [False, True]
    assert places.parse("github:owner/name").releases() == ("b11549-1",)
    assert publishing.prepare(released, places.parse("github:owner/name")).new == ()


@pytest.mark.parametrize("token", ["s3cret\nX-Evil: 1", "s3cret t", "s3cret→", "s3\x00cret"])
def test_a_token_that_is_none_is_not_repeated(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, to in (("GITHUB_TOKEN", "github:owner/name"), ("HF_TOKEN", "hf:owner/name")):
        # what cannot be in an environment at all can still be handed in by a test
        monkeypatch.setattr("os.environ", {**os.environ, variable: token})
        with refused("TOKEN_INVALID", UsageError) as caught:
            places.parse(to)
        assert "s3" not in caught.value.render()


def test_a_token_out_of_a_file_with_its_line_break(
    server: github_releases.GitHub, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", f"{github_releases.TOKEN}\n")
    publish_to_github(released)
    assert server.uploads == NAMES
