"""A changed file becomes a pull request; run again, it completes what was begun."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from github_api import TOKEN, GitHub

from farm import source
from farm.errors import FarmError, UsageError
from farm.inputs import patches, pins
from farm.publish import github_actions
from farm.publish.github_actions import propose_pins
from farm.publish.github_api import Api
from farm.update_pins import Step, Update
from tests.rigs.refusals import refused

PINS = "build/pins.toml"
BRANCH = f"llama.cpp-b{pins.load().source.build}"


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    with GitHub().serve() as served:
        monkeypatch.setenv("GITHUB_API_URL", served.url)
        monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
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
    propose(github)
    text = github.pulls[0]["body"]
    assert text.endswith(
        "2 files of the archive are not as there.\n\n- `new.cpp`\n- `src/llama.cpp`"
    )


def test_patches_that_do_not_fit_stand_in_the_text(
    github: GitHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "FOLDER", tmp_path / "patches")
    assert propose(github)[0] == BRANCH
    assert "Every patch of `build/patches` fits it." in github.pulls[0]["body"]
    github.pulls.clear()
    (tmp_path / "patches" / "more").mkdir(parents=True)
    (tmp_path / "patches" / "more" / "patch.toml").write_text(
        'why = "x"\nupstream = "x"\nlicence = "MIT"\n[[insert]]\nfile = "src/llama.cpp"\n'
        'anchor = "int more;"\nplace = "after"\ntext = "int less;"\n'
    )
    propose(github)
    assert (
        "built without the patches that do not fit it:\n\n"
        "- patch more: src/llama.cpp has the anchor 'int more;' 0 times, not once\n"
    ) in github.pulls[0]["body"]


def test_a_long_list_of_differences_is_cut(github: GitHub, trees: dict[str, Path]) -> None:
    for number in range(github_actions._SHOWN + 3):
        (trees["archive"] / f"{number}.cpp").write_text("")
    propose(github)
    assert github.pulls[0]["body"].endswith("- and 3 more")


NEWER = Step("llama.cpp: b1 → b2", ("llama.cpp: b1 → b2",), "the pins of llama.cpp")
IMAGES = Step(
    "Images: 1 pins changed",
    ("nvidia/cuda:12.8.1-devel-ubuntu22.04: sha256:0 → sha256:1",),
    pins.PINS_FILE.read_text("utf-8"),
)
BOTH = Update((NEWER, IMAGES), pins.load().source.build)


def propose(github: GitHub, update: Update = BOTH) -> tuple[str, str]:
    del github  # it is found by its address
    return propose_pins("owner/name", Api("owner/name", sleep=lambda _: None), update)


def test_the_pins_are_proposed_on_a_branch_of_their_own(github: GitHub) -> None:
    assert propose(github) == (BRANCH, "https://github.test/pull/1")
    assert github.branches[BRANCH][PINS] == pins.PINS_FILE.read_bytes()
    assert github.branches["main"][PINS] == b"the pins of before"
    (pull,) = github.pulls
    assert (pull["base"], pull["head"]) == ("main", BRANCH)
    assert pins.load().source.sha256 in pull["body"]


def test_a_second_run_makes_no_second_commit_and_no_second_pull_request(github: GitHub) -> None:
    first = propose(github)
    github.calls.clear()
    assert propose(github) == first
    assert [call for call in github.calls if not call.startswith("GET")] == []


def test_each_kind_of_change_is_a_commit_and_stands_in_the_text(github: GitHub) -> None:
    propose(github)
    assert github.commits == [NEWER.title, IMAGES.title]
    for line in (*NEWER.changes, *IMAGES.changes):
        assert line in github.pulls[0]["body"]


def test_a_change_of_pins_alone_is_no_newer_llama_cpp(github: GitHub) -> None:
    branch, _ = propose(github, Update((IMAGES,)))
    assert branch.startswith("pins-")
    assert github.commits == [IMAGES.title]
    (pull,) = github.pulls
    assert pull["title"] == f"Change pins: {IMAGES.title}"
    assert "llama.cpp stays as it is" in pull["body"]
    assert IMAGES.changes[0] in pull["body"]


@pytest.mark.parametrize("done", [1, 2])
def test_commits_that_are_there_are_not_made_again(github: GitHub, done: int) -> None:
    github.branches[BRANCH] = {PINS: BOTH.steps[done - 1].text.encode()}
    propose(github)
    assert github.commits == [step.title for step in BOTH.steps[done:]]


@pytest.mark.parametrize("stopped", ["POST /git/refs", f"PUT /contents/{PINS}", "POST /pulls"])
def test_what_was_stopped_half_way_is_completed_by_the_next_run(
    github: GitHub, stopped: str
) -> None:
    github.refuse = stopped
    with refused("GITHUB_REFUSED", match="not accessible"):
        propose(github)
    github.refuse = ""
    assert propose(github) == (BRANCH, "https://github.test/pull/1")
    assert len(github.pulls) == 1


def test_a_wrong_token_is_refused_and_never_shown(
    github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "s3cret")
    with pytest.raises(FarmError, match="401: Bad credentials") as caught:
        propose(github)
    assert "s3cret" not in caught.value.render()


def test_another_branch_that_begins_alike_is_not_taken_for_it(github: GitHub) -> None:
    github.branches[f"{BRANCH}0"] = {}
    propose(github)
    assert github.branches[BRANCH][PINS] == pins.PINS_FILE.read_bytes()
    assert github.branches[f"{BRANCH}0"] == {}


def test_a_runner_without_a_repository_is_a_wrong_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    with pytest.raises(UsageError, match="GITHUB_REPOSITORY"):
        github_actions.repository()
