"""A changed file becomes a pull request; run again, it completes what was begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from github_api import TOKEN, GitHub

from farm import pins
from farm.errors import FarmError, UsageError
from farm.pull_request import Repository, propose_pins

if TYPE_CHECKING:
    from collections.abc import Iterator

PINS = "build/pins.toml"
BRANCH = f"llama.cpp-b{pins.load().source.build}"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub().serve() as served:
        served.branches["main"][PINS] = b"the pins of before"
        yield served


def repository(github: GitHub, token: str = TOKEN) -> Repository:
    return Repository("owner/name", token, github.url)


def test_the_pins_are_proposed_on_a_branch_of_their_own(github: GitHub) -> None:
    assert propose_pins(repository(github)) == (BRANCH, "https://github.test/pull/1")
    assert github.branches[BRANCH][PINS] == pins.PINS_FILE.read_bytes()
    assert github.branches["main"][PINS] == b"the pins of before"
    (pull,) = github.pulls
    assert (pull["base"], pull["head"]) == ("main", BRANCH)
    assert pins.load().source.sha256 in pull["body"]


def test_a_second_run_makes_no_second_commit_and_no_second_pull_request(github: GitHub) -> None:
    first = propose_pins(repository(github))
    github.calls.clear()
    assert propose_pins(repository(github)) == first
    assert [call for call in github.calls if not call.startswith("GET")] == ["POST /git/refs"]


@pytest.mark.parametrize("stopped", ["POST /git/refs", f"PUT /contents/{PINS}", "POST /pulls"])
def test_what_was_stopped_half_way_is_completed_by_the_next_run(
    github: GitHub, stopped: str
) -> None:
    github.refuse = stopped
    with pytest.raises(FarmError, match="not accessible") as refused:
        propose_pins(repository(github))
    assert refused.value.code == "GITHUB_REFUSED"
    github.refuse = ""
    assert propose_pins(repository(github)) == (BRANCH, "https://github.test/pull/1")
    assert len(github.pulls) == 1


def test_a_wrong_token_is_refused_and_never_shown(github: GitHub) -> None:
    wrong = repository(github, "s3cret")
    with pytest.raises(FarmError, match="401 Bad credentials") as refused:
        propose_pins(wrong)
    assert "s3cret" not in refused.value.render() + repr(wrong)


def test_nobody_there_is_one_clear_error() -> None:
    nobody = Repository("owner/name", TOKEN, "http://127.0.0.1:9")
    with pytest.raises(FarmError) as failed:
        propose_pins(nobody)
    assert failed.value.code == "GITHUB_UNREACHABLE"


@pytest.mark.parametrize("missing", ["GITHUB_REPOSITORY", "GITHUB_TOKEN"])
def test_a_missing_variable_is_named(missing: str) -> None:
    environment = {"GITHUB_REPOSITORY": "owner/name", "GITHUB_TOKEN": TOKEN}
    del environment[missing]
    with pytest.raises(UsageError, match=missing):
        Repository.of_environment(environment)
