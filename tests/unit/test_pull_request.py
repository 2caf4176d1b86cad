"""A changed file becomes a pull request; run again, it completes what was begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from github_api import TOKEN, GitHub

from farm import pins, pull_request, source
from farm.errors import FarmError, UsageError
from farm.pull_request import Repository, propose_pins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PINS = "build/pins.toml"
BRANCH = f"llama.cpp-b{pins.load().source.build}"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub().serve() as served:
        served.branches["main"][PINS] = b"the pins of before"
        yield served


@pytest.fixture(autouse=True)
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The archive's tree and the tag's, in place of what is fetched for them."""
    found = {name: tmp_path / name for name in ("archive", "tag")}
    for tree in found.values():
        (tree / "src").mkdir(parents=True)
        (tree / "src" / "llama.cpp").write_text("int main;")

    def of(name: str) -> Callable[..., source.Source]:
        return lambda *_, **__: source.Source(found[name], None, 1, "c" * 40, "x", None)

    monkeypatch.setattr(source, "from_archive", of("archive"))
    monkeypatch.setattr(source, "from_ref", of("tag"))
    return found


def test_what_is_not_as_upstream_has_it_stands_in_the_text(
    github: GitHub, trees: dict[str, Path]
) -> None:
    (trees["archive"] / "src" / "llama.cpp").write_text("int evil;")
    (trees["archive"] / "new.cpp").write_text("")
    (trees["tag"] / "left_out.cpp").write_text("")
    propose_pins(repository(github))
    text = github.pulls[0]["body"]
    assert text.endswith(
        "2 files of the archive are not as there.\n\n- `new.cpp`\n- `src/llama.cpp`"
    )


def test_a_long_list_of_differences_is_cut(github: GitHub, trees: dict[str, Path]) -> None:
    for number in range(pull_request._SHOWN + 3):
        (trees["archive"] / f"{number}.cpp").write_text("")
    propose_pins(repository(github))
    assert github.pulls[0]["body"].endswith("- and 3 more")


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
