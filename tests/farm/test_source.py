"""Sources by folder and their build numbers, from real repositories on this machine."""

import hashlib
import os
import shutil
import socket
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_release import TINY, Silent

from farm import durable, pipeline, preflight, source, targets
from farm.durable import folder_digest
from farm.engines.local import LocalEngine
from farm.errors import SourceError, UsageError
from farm.execute import execute
from farm.inputs import patches, pins
from farm.inputs.packages import cache_folder
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.request import choose_source
from farm.terminal.progress import BuildReport
from llama_loader.manifest import Patch
from tests.rigs.heard import HOSTILE, git, heard, repository
from tests.rigs.refusals import refused

pytestmark = pytest.mark.usefixtures("private_cache", "mirrors")


def test_a_repository_without_such_tags_is_not_taken_for_one(upstream: Path) -> None:
    git(upstream, "tag", "--delete", "b2")
    with refused("TAGS_MISSING", SourceError):
        source.upstream_builds()


def test_what_one_repository_gave_is_not_taken_for_another_s(
    upstream: Path, tmp_path: Path
) -> None:
    """A recorded remote came first, as by `invoke rebuild` of another person's manifest."""
    hostile = repository(tmp_path / "hostile")
    (hostile / "NUMBER").write_text("evil", "utf-8")
    git(hostile, "commit", "--quiet", "-am", "evil")
    git(hostile, "tag", "--force", "b2")
    git(hostile, "tag", "b9")
    evil = source.from_ref("b2", remote=HOSTILE)
    assert (evil.tree / "NUMBER").read_text("utf-8") == "evil"
    found = source.from_ref("b2")
    assert (found.tree / "NUMBER").read_text("utf-8") == "2"
    assert found.commit == git(upstream, "rev-parse", "b2")
    assert found.origin == f"git+{source.GIT_REMOTE}@b2"
    for only_there in ("b9", evil.commit or ""):
        with pytest.raises(UsageError, match="no tag, branch or commit"):
            source.from_ref(only_there)


def test_a_kept_tree_that_was_changed_is_made_again_and_said(upstream: Path) -> None:
    del upstream
    first = source.from_ref("b2")
    assert source.from_ref("b2").note is None
    (first.tree / "NUMBER").write_text("changed", "utf-8")
    again = source.from_ref("b2")
    assert (again.tree / "NUMBER").read_text("utf-8") == "2"
    assert again.note == (
        f"note[SOURCE_CHANGED]: {first.tree} was changed since it was made; it is made again"
    )
    assert source.from_ref("b2").note is None
    first.tree.with_name(f"{first.tree.name}.sha256").write_bytes(b"\xff")  # a disk's damage
    assert source.from_ref("b2").note == again.note


def pin_of(archive: Path, subdir: str) -> pins.SourcePin:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    place = cache_folder("downloads") / digest / archive.name
    place.parent.mkdir(exist_ok=True)
    shutil.copyfile(archive, place)
    return pins.SourcePin(
        package="x",
        version="1",
        filename=archive.name,
        size=archive.stat().st_size,
        sha256=digest,
        subdir=subdir,
        build=1,
        llama_version="0.6.1",
    )


def test_an_archive_s_tree_is_kept_for_its_folder_and_looked_at_each_time(tmp_path: Path) -> None:
    archive = tmp_path / "x-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(TINY, "x-1/one")
        tar.add(TINY / "CMakeLists.txt", "x-1/two/CMakeLists.txt")
    one, two = (source.from_archive(pin_of(archive, name)) for name in ("one", "two"))
    assert [path.name for path in two.tree.iterdir()] == ["CMakeLists.txt"]
    (one.tree / "llama.cpp").write_text("int evil;", "utf-8")
    again = source.from_archive(pin_of(archive, "one"))
    assert (again.tree / "llama.cpp").read_bytes() == (TINY / "llama.cpp").read_bytes()
    assert "SOURCE_CHANGED" in (again.note or "")
    cut_off = one.tree.with_name(f"{one.tree.name}.sha256")
    cut_off.unlink()
    (one.tree / "llama.cpp").write_bytes(b"")
    assert source.from_archive(pin_of(archive, "one")).note is None
    assert (one.tree / "llama.cpp").read_bytes() == (TINY / "llama.cpp").read_bytes()


@pytest.mark.parametrize("hidden", ["no-assume-unchanged", "assume-unchanged", "skip-worktree"])
def test_a_folder_with_history_brings_it(upstream: Path, hidden: str) -> None:
    found = source.from_folder(upstream)
    assert (found.build, found.commit) == (3, git(upstream, "rev-parse", "HEAD"))
    git(upstream, "update-index", f"--{hidden}", "NUMBER")
    (upstream / "NUMBER").write_text("changed", "utf-8")
    assert source.from_folder(upstream).short_commit.endswith("-dirty")


@pytest.mark.parametrize("hidden", ["replace", "object", "encoding", "ident", "attributes"])
def test_changed_code_does_not_pass_for_the_commit_of_head(upstream: Path, hidden: str) -> None:
    """By an object in the place of HEAD's, or by what git makes of a file before it compares it."""
    file, told = upstream / "tools" / "a.h", "/* $Id: */ int evil; /* $ */\n"
    file.write_text("/* $Id$ */\n", "ascii")
    (upstream / ".gitattributes").write_text("*.txt eol=crlf\n", "ascii")
    git(upstream, "add", "--all")
    git(upstream, "commit", "--quiet", "-m", "honest")
    (upstream / "CMakeLists.txt").unlink()
    git(upstream, "checkout", "--quiet", ".")
    head, whole = git(upstream, "rev-parse", "HEAD"), git(upstream, "rev-parse", "HEAD:tools")
    assert source.from_folder(upstream).commit == head, "HEAD's own attributes count"
    file.write_text(told if hidden == "ident" else "/+ACo- $Id$ */\n", "ascii")
    if hidden in ("encoding", "ident"):
        attribute = "ident" if hidden == "ident" else "working-tree-encoding=UTF-7"
        (file.parent / ".gitattributes").write_text(f"a.h {attribute}\n", "ascii")
    elif hidden == "attributes":  # other bytes in the object of HEAD's own
        own, text = (
            git(upstream, "rev-parse", "HEAD:.gitattributes"),
            b"*.h working-tree-encoding=UTF-7",
        )
        place = upstream / ".git/objects" / own[:2] / own[2:]
        place.chmod(0o644)
        place.write_bytes(zlib.compress(b"blob %d\0%b" % (len(text), text)))
    else:
        git(upstream, "commit", "--quiet", "-am", "evil")
        evil = git(upstream, "rev-parse", "HEAD:tools")
        if hidden == "replace":
            git(upstream, "replace", head, "HEAD")
        git(upstream, "reset", "--quiet", "--soft", head)
    if hidden == "object":
        first, second = (upstream / ".git/objects" / one[:2] / one[2:] for one in (whole, evil))
        second.replace(first)
        with refused("GIT_UNREADABLE", SourceError, "a tree of HEAD has another digest"):
            source.from_folder(upstream)
    else:
        assert source.from_folder(upstream).commit == f"{head}-dirty"


def test_what_git_ignores_is_no_part_of_a_source(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (upstream / ".gitignore").write_text("*.gguf\n/built/\n/ first/\n", "utf-8")
    before = source.from_folder(upstream)
    for name in (" first/NUMBER", "models/big.gguf", "built/NUMBER"):
        (upstream / name).parent.mkdir()
        (upstream / name).touch()
        os.truncate(upstream / name, 8 << 40)
    found = source.from_folder(upstream)
    assert found.digest == before.digest
    with found.private() as own:
        assert set(own.files()) == {own.tree / one.relative_to(upstream) for one in found.files()}
        assert not {" first", "models", "built"} & {path.name for path in own.tree.iterdir()}
    for number in range(50):
        (upstream / f"{number}.gguf").touch()
    monkeypatch.setattr(durable, "MOST_FILES", 49)
    with refused("SOURCE_UNREADABLE", UsageError, "git ignores more than 49 files"):
        source.from_folder(upstream)


@pytest.mark.parametrize(
    ("options", "build", "note"),
    [
        ((), 0, "note[BUILD_NUMBER_UNKNOWN]"),
        (("--branch=b2",), 2, ""),  # of a release: its tag has the number
        (("--branch=b3²",), 0, "note[BUILD_NUMBER_UNKNOWN]"),
    ],
)
def test_a_shallow_history_gives_no_wrong_build_number(
    upstream: Path, tmp_path: Path, options: tuple[str, ...], build: int, note: str
) -> None:
    shallow = tmp_path / "shallow"
    git(upstream, "tag", "b3²")
    git(tmp_path, "clone", "--quiet", "--depth=1", *options, upstream.as_uri(), str(shallow))
    found = source.from_folder(shallow)
    told = found.note or ""
    assert (found.build, told.partition(":")[0]) == (build, note)
    assert ("--assume-build" in told) == bool(note)


def fork(upstream: Path, place: Path, *options: str) -> Path:
    """Clone upstream under a fork's address, with a commit of the fork's own."""
    git(place.parent, "clone", "--quiet", *options, f"file://{upstream}", str(place))
    git(place, "remote", "set-url", "origin", "https://github.com/someone/llama.cpp")
    git(place, "commit", "--quiet", "--allow-empty", "-m", "of the fork's own")
    return place


def test_a_fork_has_the_number_of_the_newest_build_in_it(upstream: Path, tmp_path: Path) -> None:
    """Its four commits are no build 4 of llama.cpp."""
    found = source.from_folder(fork(upstream, tmp_path / "fork"))
    assert found.build == 2
    assert "b2 with 2 commits of its own" in (found.note or "")


def test_a_fork_that_knows_upstream_counts_upstream_s_commits(
    upstream: Path, tmp_path: Path
) -> None:
    tree = fork(upstream, tmp_path / "fork", "--no-tags")
    git(tree, "remote", "add", "up", source.GIT_REMOTE)
    git(tree, "config", "remote.two.url", "lines\nof it")
    git(tree, "fetch", "--quiet", "up")
    found = source.from_folder(tree)
    assert found.build == 3
    assert "b3 with 1 commits of its own" in (found.note or "")


@pytest.mark.parametrize("tag", ["", "b99", "b1²", f"b{'1' * 200}"])
def test_a_fork_without_a_tag_that_counts_right_has_no_number(
    upstream: Path, tmp_path: Path, tag: str
) -> None:
    tree = fork(upstream, tmp_path / "fork", "--no-tags")
    if tag:
        git(tree, "tag", tag)
    found = source.from_folder(tree)
    assert found.build == 0
    assert "is a fork" in (found.note or "")


def test_a_clone_of_llama_cpp_s_own_repository_counts_its_commits(
    upstream: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    git(upstream, "tag", "--delete", "b2")
    git(tmp_path, "clone", "--quiet", source.GIT_REMOTE, str(clone))
    found = source.from_folder(clone)
    assert (found.build, found.note) == (3, None)


def test_an_assumed_build_is_recorded_as_such(tmp_path: Path) -> None:
    tree = Path(shutil.copytree(TINY, tmp_path / "plain"))
    found = choose_source(BuildRequest(source=tree, assume_build=11549, patches="none"))
    assert (found.build, found.build_assumed) == (11549, True)
    assert "note[BUILD_ASSUMED]" in (found.note or "")


def test_a_tree_that_looks_for_libcurl_is_configured_without_it(tmp_path: Path) -> None:
    """llama.cpp of August 2025 ends with "Could NOT find CURL" otherwise."""
    tree = Path(shutil.copytree(TINY, tmp_path / "old"))
    assert source.from_folder(tree).defines == ()
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write('option(LLAMA_CURL       "llama: use libcurl" ON)\n')
        file.write('if(LLAMA_CURL)\nmessage(FATAL_ERROR "Could NOT find CURL.")\nendif()\n')
    table = targets.load()
    plan = BuildPlan(table.sets["cpu"], table.line("cpu"), source.from_folder(tree))
    assert ("LLAMA_CURL", "OFF") in plan.defines()
    with execute(plan, LocalEngine(), logs=tmp_path, reporter=Silent()) as built:
        assert (built.folder / "llama-server").is_file()


@pytest.mark.parametrize(
    ("folder", "ggml", "reason"),
    [
        ("examples/server", "", "examples/server"),
        ("tools/server", "option(GGML_BACKEND_DL OFF)", "GGML_CPU_ALL_VARIANTS"),
    ],
)
def test_a_layout_that_is_too_old_is_refused_with_that_reason(
    tmp_path: Path, folder: str, ggml: str, reason: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text("", "utf-8")
    (tmp_path / "ggml").mkdir()
    (tmp_path / "ggml" / "CMakeLists.txt").write_text(ggml, "utf-8")
    with refused("SOURCE_TOO_OLD", UsageError, reason, status=2):
        source.from_folder(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "socket", "name", "huge", "deep", "flat", "nested"])
def test_what_no_source_has_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tree = Path(shutil.copytree(TINY, tmp_path / "plain"))
    found = source.from_folder(tree)
    place = tree / "tools" / ("n\udcff" if kind == "name" else kind)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "socket":
            listener.bind(str(place))
        elif kind == "huge":
            place.touch()
            os.truncate(place, 8 << 40)  # nothing on the disk
        elif kind in ("flat", "nested"):
            monkeypatch.setattr(durable, "MOST_FILES", 100)
            for number in range(102):
                below = ("", "0")[number % 2 if kind == "nested" else 0]
                (place / below / f"{number}").mkdir(parents=True)
        elif kind == "deep":
            heard(["mkdir", "-p", place.parent / ("d/" * 1100)], check=True)
            (place.parent / ("d/" * 1100) / "file").touch()
        else:
            place.write_text("")
        with refused("SOURCE_UNREADABLE", UsageError, status=2) as caught:
            source.from_folder(tree)
        if kind in ("huge", "deep", "flat", "nested"):  # since it was chosen
            with refused("SOURCE_UNREADABLE", UsageError), found.private():
                pass
            durable.remove(tree)
        else:
            folder_digest(tree)  # neither waits nor fails
    named = {"name": r"n\udcff", "deep": "d/" * 30 + "d", "nested": "nested/0"}
    shown = f"{tree}/tools/" + named.get(kind, kind)
    assert f": {shown}: " in caught.value.message


def test_a_folder_without_history_has_no_build_number(tmp_path: Path) -> None:
    found = source.from_folder(Path(shutil.copytree(TINY, tmp_path / "plain")))
    assert (found.build, found.commit, found.version) == (0, None, "0.6.1")


@pytest.mark.parametrize(
    "target",
    [
        "/etc/hostname",
        "../../outside",
        "../.git/config",
        "loop",
        "nowhere",
        "../part/.git/x/../..",
        "/{tree}/NUMBER",
        "../licenses/" * 16 + "inside",
        "link40",
    ],
)
def test_link_out_of_a_source_tree_is_refused_by_its_name(upstream: Path, target: str) -> None:
    (upstream.parent / "outside").write_text("a private text", "utf-8")
    (upstream / "licenses").mkdir(exist_ok=True)
    (upstream / "licenses" / "inside").symlink_to("../NUMBER")
    (upstream / "part" / ".git" / "x").mkdir(parents=True)
    found = source.from_folder(upstream)
    (upstream / "licenses" / "LICENSE-x").symlink_to(target.format(tree=upstream))
    if target == "loop":
        (upstream / "licenses" / "loop").symlink_to("LICENSE-x")
    for number in range(41) if target == "link40" else ():
        link = upstream / "licenses" / f"link{number}"
        link.symlink_to(f"link{number - 1}" if number else "inside")
    with refused("SOURCE_UNREADABLE", UsageError, "licenses/LICENSE-x: a link that leads out"):
        source.from_folder(upstream)
    with (  # it was hidden only while the tree was checked
        refused("SOURCE_UNREADABLE", UsageError, "licenses/LICENSE-x: a link that leads out"),
        replace(found, digest=folder_digest(upstream)).private(),
    ):
        pass
    git(upstream, "add", "licenses")
    git(upstream, "commit", "--quiet", "-m", "links")
    if target != "../.git/config":  # a kept tree has no .git
        with refused("SOURCE_UNREADABLE", UsageError, "a link that leads out of the tree"):
            source.from_ref("master")


def test_way_of_a_link_that_is_too_long_to_be_followed_leads_out(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links below a nested ``.git`` make a path of 4,000 bytes that the kernel follows."""
    inner = upstream / "part" / ".git"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for name in (steps := "abcdefghijklmnop"):
        Path(name).symlink_to("d" * 247)
        Path("d" * 247).mkdir()
        os.chdir("d" * 247)
    Path(up := "l" * 200).symlink_to("../" * len(steps))
    monkeypatch.chdir(upstream)
    (upstream.parent / "outside").write_text("a private text", "utf-8")
    Path("LICENSE-x").symlink_to(f"part/.git/{'/'.join(steps)}/{up}/../../../outside")
    assert Path("LICENSE-x").read_text("utf-8") == "a private text"
    with refused("SOURCE_UNREADABLE", UsageError, "LICENSE-x: a link that leads out"):
        source.from_folder(upstream)


@pytest.mark.parametrize("swapped", ["", "tools"])
def test_file_to_which_a_link_leads_by_now_is_not_copied(
    upstream: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    """What was hashed was the same: there, too, another user put the link in time."""
    found, copy, at = source.from_folder(upstream), durable.copy, upstream / swapped

    def swap(path: Path, place: Path) -> None:
        if path.is_relative_to(at) and not at.is_symlink():
            at.rename(upstream.parent / "own")
            at.symlink_to(upstream.parent / "own")
        copy(path, place)

    monkeypatch.setattr(durable, "copy", swap)
    with refused("SOURCE_UNREADABLE", UsageError, "a link leads there"), found.private():
        pass


@pytest.mark.parametrize("change", ["add", "link"])
def test_source_that_is_changed_after_it_was_hashed_is_neither_patched_nor_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "STATE", tmp_path / "state")
    tree = Path(shutil.copytree(TINY, tmp_path / "llama"))
    plain = source.from_folder(tree)
    changed, whole = tree / "llama.cpp", (tree / "llama.cpp").read_bytes()

    def write(_: BuildRequest | None = None) -> source.SourceTree:
        changed.unlink()
        if change == "add":
            changed.write_bytes(whole + b"int evil;\n")
        else:
            changed.symlink_to("CMakeLists.txt")
        return plain

    write()
    nothing = patches.Change(Patch(name="none", sha256="0" * 64), (), ())
    with refused("SOURCE_CHANGED", SourceError, str(tree)):
        source.patched(plain, (nothing,))
    assert not list((tmp_path / "cache").rglob("llama.cpp"))
    monkeypatch.setattr(preflight, "choose_source", write)
    request = BuildRequest(arch_set="cpu", line="cpu", engine="local", out=tmp_path / "out")
    with refused("SOURCE_CHANGED"), BuildReport(Console(quiet=True)) as report:
        preflight.build(request, report)
    changed.unlink()
    changed.write_bytes(whole)
    with plain.private() as own:
        write()
        assert folder_digest(own.tree) == plain.digest
        assert own.cache == plain.cache
    assert not own.tree.exists()
