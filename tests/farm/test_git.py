"""git, asked about repositories on this machine: refs, builds, remotes, hostile work trees."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from farm import source
from farm.errors import SourceError, UsageError
from farm.inputs import git as git_program
from farm.inputs.packages import cache_folder
from tests.rigs.heard import git, repository
from tests.rigs.refusals import refused

pytestmark = pytest.mark.usefixtures("private_cache", "mirrors")


@pytest.mark.parametrize(("ref", "build"), [("b2", 2), ("master", 3)])
def test_a_ref_brings_its_build_number_and_commit(upstream: Path, ref: str, build: int) -> None:
    found = source.from_ref(ref)
    assert found.build == build
    assert found.commit == git(upstream, "rev-parse", ref)
    assert found.version == "0.6.1"
    assert (found.tree / "NUMBER").read_text("utf-8") == str(build)
    assert not (found.tree / ".git").exists()


def test_a_commit_is_a_ref_too_and_a_new_one_is_fetched(upstream: Path) -> None:
    first = git(upstream, "rev-parse", "HEAD~2")
    assert source.from_ref(first[:12]).build == 1
    git(upstream, "update-ref", f"refs/tags/{first}", "HEAD")
    assert source.from_ref(first).commit == first, "a tag's name is no commit"
    (upstream / "NUMBER").write_text("4", "utf-8")
    git(upstream, "commit", "--quiet", "-am", "commit 4")
    assert source.from_ref("master").build == 4


def test_the_tags_of_a_repository_are_its_builds_in_order(upstream: Path) -> None:
    for tag in ("b10", "b3", "b3-rc", "v1.0"):
        git(upstream, "tag", tag)
    assert source.upstream_builds() == (2, 3, 10)


def test_a_commit_that_no_branch_or_tag_has_is_not_the_repository_s(upstream: Path) -> None:
    """A fork's commits can be fetched from GitHub's upstream by their number."""
    git(upstream, "commit", "--quiet", "--allow-empty", "-m", "of a fork")
    orphan = git(upstream, "rev-parse", "HEAD")
    git(upstream, "reset", "--quiet", "--hard", "HEAD~1")
    for name in ("b4", "b5/x"):
        git(upstream, "tag", name, orphan)
    assert source.from_ref("b4").commit == orphan
    for name in ("b4", "b5/x"):  # taken back; the latter would also be in the way of b5
        git(upstream, "tag", "--delete", name)
    git(upstream, "tag", "b5")
    assert source.from_ref("b5").build == 3
    for ref in ("b4", orphan):
        with pytest.raises(UsageError, match="no tag, branch or commit"):
            source.from_ref(ref)


def test_commits_that_a_server_left_out_are_asked_for_again(upstream: Path) -> None:
    source.from_ref("b2")
    (kept,) = cache_folder("git").glob("*.git")
    first = git(upstream, "rev-parse", "HEAD~2")
    shutil.rmtree(kept / "objects")
    shutil.copytree(upstream / ".git" / "objects", kept / "objects")
    (kept / "objects" / first[:2] / first[2:]).unlink()
    assert source.from_ref("master").build == 3


@pytest.mark.parametrize(
    "remote",
    [
        *("ext::sh -c id", "--upload-pack=id", "/srv/x", "file:///srv/x"),
        *("http://a.example", "https://["),
    ],
)
def test_a_remote_that_is_not_https_is_refused(remote: str) -> None:
    with refused("REMOTE_NOT_HTTPS", UsageError):
        source.from_ref("b2", remote=remote)
    with refused("REMOTE_NOT_HTTPS", UsageError):
        source.upstream_builds(remote)


@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize("ref", ["b99", "--output=/etc/passwd"])
def test_an_unknown_ref_is_a_usage_error(ref: str) -> None:
    with pytest.raises(UsageError, match=f"no tag, branch or commit '{ref}'"):
        source.from_ref(ref)


def test_a_repository_out_of_reach_says_what_to_do(tmp_path: Path) -> None:
    assert not (tmp_path / "upstream").exists()
    with refused("GIT_FAILED", SourceError, "fetch", hint="--ref"):
        source.from_ref("master")


@pytest.mark.timeout(60)
def test_settings_of_a_foreign_work_tree_start_no_program(upstream: Path, tmp_path: Path) -> None:
    """Monitor, hook, filters under any name, submodule, and what a partial clone would fetch by.

    A pipe that is included in them is another text each time, and an answer never.
    """
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nid >> "{tmp_path}/ran"\ncat\n', "utf-8")
    program.chmod(0o755)
    (upstream / ".git" / "hooks").mkdir(exist_ok=True)
    (upstream / ".git" / "hooks" / "post-index-change").symlink_to(program)
    inner = repository(upstream / "inner")
    git(upstream, "add", "inner")
    git(upstream, "commit", "--quiet", "-m", "a submodule")
    git(inner, "config", "core.fsmonitor", str(program))
    git(inner, "config", "filter.own.clean", str(program))
    (inner / ".gitattributes").write_text("NUMBER filter=own\n", "utf-8")
    os.utime(inner / "NUMBER", (1, 1))
    names = ("clean", "a=b", "c.d", "long")
    lines = "".join(f"{name} filter={name}\n" for name in names)
    (upstream / ".gitattributes").write_text(f"{lines}NUMBER filter=clean\nllama.cpp filter=a=b\n")
    for name in names:
        git(upstream, "config", f"filter.{name}.clean", str(program))
        git(upstream, "config", f"filter.{name}.process", str(program) if name == "long" else "")
        git(upstream, "config", f"filter.{name}.required", "true")
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "diff.external", "gpg.program"):
        git(upstream, "config", key, str(program))
    git(upstream, "config", "core.hooksPath", str(upstream / ".git" / "hooks"))
    git(upstream, "config", "remote.origin.url", f"ext::{program}")
    git(upstream, "config", "remote.origin.promisor", "true")
    git(upstream, "config", "protocol.ext.allow", "always")
    git(upstream, "config", "hook.own.event", "post-index-change")
    git(upstream, "config", "hook.own.command", str(program))
    os.mkfifo(tmp_path / "pipe")
    for tree in (upstream, inner):
        git(tree, "config", "include.path", str(tmp_path / "pipe"))
    for path in upstream.iterdir():
        if path.is_file():
            os.utime(path, (1, 1))  # git must look into them
    (tmp_path / "ran").unlink(missing_ok=True)  # git's own calls above obey the settings
    found = source.from_folder(upstream)
    assert (found.build, (found.commit or "").endswith("-dirty")) == (2, False)
    shutil.rmtree(upstream / ".git" / "objects")  # now each object would be fetched
    (upstream / ".git" / "objects").mkdir()
    with refused("GIT_FAILED", SourceError):
        source.from_folder(upstream)
    assert not (tmp_path / "ran").exists()


def test_git_folder_of_a_work_tree_or_submodule_is_elsewhere(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(upstream, "worktree", "add", "--quiet", str(tmp_path / "other"), "b2")
    other = source.from_folder(tmp_path / "other")
    assert (other.build, other.commit) == (2, git(upstream, "rev-parse", "b2"))
    inner = repository(upstream / "inner")
    git(inner, "init", "--quiet", "--separate-git-dir", str(tmp_path / "modules"))
    git(upstream, "add", "inner")
    git(upstream, "commit", "--quiet", "-m", "a submodule")
    assert source.from_folder(inner).build == 3
    head = git(upstream, "rev-parse", "HEAD")
    with monkeypatch.context() as hook:  # which git sets for a hook of another repository
        for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
            hook.setenv(name, str(tmp_path / "none"))
        assert source.from_folder(upstream).commit == source.from_ref("master").commit == head
    git(inner, "commit", "--quiet", "--allow-empty", "-m", "of its own")
    assert source.from_folder(upstream).short_commit.endswith("-dirty")
    (inner / ".git").write_text("gitdir: nowhere", "utf-8")
    with refused("GIT_UNREADABLE", SourceError, "inner/.git: ", hint="without .git"):
        source.from_folder(inner)
    secret = tmp_path / "token"
    secret.write_text("a secret of the person's", "utf-8")
    for place in (inner / ".git", upstream / ".git" / "packed-refs"):
        place.unlink(missing_ok=True)
        place.symlink_to(secret)
        with refused("GIT_UNREADABLE", SourceError) as caught:
            source.from_folder(place.parents[place.parent.name == ".git"])
        assert "secret" not in caught.value.render()


@pytest.mark.parametrize("limit", ["_SILENCE", "DEADLINE"])
def test_server_that_is_silent_is_not_awaited(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(git_program, limit, 1)
    shown = git_program.run("-c", "alias.x=!echo $GIT_TERMINAL_PROMPT", "x", at=()).stdout
    assert shown == "0\n", "nor what a person would have to type"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base = f"url.http://127.0.0.1:{listener.getsockname()[1]}/.insteadOf"
        monkeypatch.setenv("GIT_CONFIG_KEY_0", base)
        with refused("GIT_FAILED", SourceError, "transport 'http' not allowed"):
            source.upstream_builds()
        monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "http")
        with refused("GIT_FAILED", SourceError, "git ls-remote failed: "):
            source.upstream_builds()


@pytest.mark.timeout(20)
def test_git_that_asks_no_server_is_awaited_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_program, "ANSWER", 0.5)
    with refused("GIT_FAILED", SourceError, "not done within 0.5 s"):
        git_program.run("-c", "alias.x=!exec sleep 60", "x", at=())


@pytest.mark.usefixtures("upstream")
def test_what_git_prints_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_program, "_MOST", 10)
    with refused("GIT_FAILED", SourceError, "git ls-remote failed: it prints more than"):
        source.upstream_builds()
