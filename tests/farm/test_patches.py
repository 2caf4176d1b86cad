"""Patches: what is read, where it fits, and that every record of a build names it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console

from farm import kept, pipeline, preflight, release, reproduce, source, targets, update_pins
from farm.durable import folder_digest
from farm.errors import SourceError, UsageError
from farm.inputs import patches, pins
from farm.options import BuildRequest, RebuildRequest
from farm.plan import BuildPlan
from farm.request import choose_source
from farm.terminal.progress import BuildReport
from tests.rigs.refusals import refused
from tests.rigs.tiny_release import TINY

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "llama-server-b0-cpu-cpu-linux-x86_64.tar.zst"
ANCHOR = "add_library(llama SHARED llama.cpp)"
HEAD = """\
why = "A test needs it."
upstream = "not proposed"
licence = "MIT"
"""
INSERT = f"""\
[[insert]]
file = "CMakeLists.txt"
anchor = "{ANCHOR}"
place = "after"
text = '''
target_sources(llama PRIVATE src/more.cpp)
'''
"""
ADD = """\
[[add]]
file = "src/more.cpp"
from = "more.cpp"
"""
CODE = "int llama_more() { return 1; }\n"


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The patches of a checkout, none at first."""
    monkeypatch.setattr(pipeline, "STATE", tmp_path / "state")
    monkeypatch.setattr(patches, "FOLDER", tmp_path / "patches")
    return tmp_path / "patches"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))


def write(folder: Path, name: str = "more", text: str = HEAD + INSERT + ADD) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "patch.toml").write_text(text, "utf-8")
    (place / "more.cpp").write_text(CODE, "utf-8")
    return place


def chosen(tree: Path, asked: str = "auto") -> source.SourceTree:
    return choose_source(BuildRequest(source=tree, patches=asked))


def test_a_patch_changes_a_copy_and_leaves_the_folder_as_it_is(folder: Path, tree: Path) -> None:
    write(folder)
    (tree / "tools" / ".git").mkdir()
    before = folder_digest(tree)
    found = chosen(tree)
    lines = (found.tree / "CMakeLists.txt").read_text("utf-8").splitlines()
    at = lines.index(ANCHOR)
    assert lines[at : at + 2] == [ANCHOR, "target_sources(llama PRIVATE src/more.cpp)"]
    assert (found.tree / "src" / "more.cpp").read_text("utf-8") == CODE
    assert not (found.tree / "tools" / ".git").exists()
    assert update_pins.differences(found.tree, tree) == ("CMakeLists.txt", "src/more.cpp")
    assert (folder_digest(tree), found.tree == tree) == (before, False)
    assert [one.name for one in found.patches] == ["more"]


def test_none_and_a_checkout_without_patches_build_the_folder_itself(
    folder: Path, tree: Path
) -> None:
    assert chosen(tree).tree == tree
    write(folder)
    found = chosen(tree, "none")
    assert (found.tree, found.patches) == (tree, ())


def test_lines_go_before_the_anchor_too_and_patches_follow_one_another_by_name(
    folder: Path, tree: Path
) -> None:
    before = INSERT.replace('"after"', '"before"').replace("target_sources(llama PRIVATE", "# (")
    write(folder, "b", HEAD + before.replace(ANCHOR, "# first"))
    write(folder, "a", HEAD + before.replace("# ( src/more.cpp)", "# first"))
    found = chosen(tree)
    lines = (found.tree / "CMakeLists.txt").read_text("utf-8").splitlines()
    at = lines.index(ANCHOR)
    assert lines[at - 2 : at] == ["# ( src/more.cpp)", "# first"]
    assert [one.name for one in found.patches] == ["a", "b"]


def test_what_the_pins_leave_out_is_not_applied_to_the_pinned_archive_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder)
    write(folder, "other", HEAD + INSERT.replace(ANCHOR, "no such line"))
    archive = tmp_path / "llama-1.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(TINY, "llama-1/src")
    own, digest = pins.load(), hashlib.sha256(archive.read_bytes()).hexdigest()
    pin = msgspec.structs.replace(
        own.source, filename=archive.name, sha256=digest, subdir="src", without_patches=("other",)
    )
    changed = msgspec.structs.replace(own, source=pin)
    monkeypatch.setattr(pins, "load", lambda: changed)
    monkeypatch.setattr(source, "fetch_package", lambda _: archive)
    found = choose_source(BuildRequest())
    assert [one.name for one in found.patches] == ["more"]
    assert "note[PATCHES_LEFT_OUT]: by build/pins.toml, other does not fit" in (found.note or "")
    assert found.sha256 == pin.sha256


def cmake_lists(text: str) -> Callable[[Path], object]:
    return lambda tree: (tree / "CMakeLists.txt").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cmake_lists(""), rf"'{ANCHOR}' 0 times"),
        (cmake_lists(f"{ANCHOR}\n{ANCHOR}\n"), rf"'{ANCHOR}' 2 times"),
        (cmake_lists(f" {ANCHOR}\n"), rf"'{ANCHOR}' 0 times"),
        (lambda tree: (tree / "CMakeLists.txt").unlink(), r"no CMakeLists\.txt with .* 0 times"),
        (
            lambda tree: (tree / "src").mkdir() or (tree / "src" / "more.cpp").touch(),
            r"adds src/more\.cpp, which the source has",
        ),
        (lambda tree: (tree / "src").symlink_to("."), r"adds src/more\.cpp"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    folder: Path, tree: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    write(folder)
    spoil(tree)
    found = source.SourceTree(tree, None, 1, None, "folder:x", None, digest=folder_digest(tree))
    said = said.replace("(", r"\(").replace(")", r"\)") if ANCHOR in said else said
    with refused("PATCH_DOES_NOT_FIT", UsageError, f"^patch more: .*{said}", hint="--patches none"):
        source.patched(found, patches.load())
    assert not (tmp_path / "cache" / "llama-farm" / "sources").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD.replace("why", "because") + INSERT, "because"),
        (HEAD + INSERT.replace('"after"', '"beside"'), "beside"),
        (HEAD + INSERT.replace(ANCHOR, "two\\nlines"), "anchor"),
        (HEAD + ADD.replace("src/more.cpp", "../more.cpp"), "add"),
        (HEAD + ADD.replace('from = "more', 'from = "less'), "less.cpp"),
        (HEAD.replace("MIT", "BSL-1.0") + INSERT, "the text of BSL-1.0"),
        ("why", "Expected '='"),
    ],
)
def test_a_patch_that_says_nothing_sensible_is_named(folder: Path, text: str, said: str) -> None:
    place = write(folder, text=text)
    with refused("PATCH_INVALID", UsageError, f"{place}/patch.toml(.|\n)*{said}"):
        patches.load()


def test_only_what_decides_the_result_decides_the_digest(folder: Path) -> None:
    def digest(text: str) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, text=text)
        return patches.load()[0].patch.sha256

    first = digest(HEAD + INSERT + ADD)
    assert digest(HEAD.replace("A test needs it.", "For fun.") + INSERT + ADD) == first
    others = {
        digest(HEAD + INSERT),
        digest(HEAD + INSERT.replace("after", "before") + ADD),
        digest(HEAD + INSERT.replace("PRIVATE", "PUBLIC") + ADD),
        digest(HEAD + INSERT + ADD.replace("src/more", "src/less")),
    }
    assert len(others | {first}) == 5


def test_a_patched_source_is_another_source_and_another_plan(folder: Path, tree: Path) -> None:
    write(folder)
    plain, found = chosen(tree, "none"), chosen(tree)
    assert plain.digest != found.digest
    sources = (plain, found, replace(plain, patches=found.patches))
    cpu, line = targets.load().sets["cpu"], targets.load().line("cpu")
    assert len({kept.digest(BuildPlan(cpu, line, one), "gcc") for one in sources}) == 3


def build(tree: Path, out: Path, asked: str = "auto") -> str:
    told = io.StringIO()
    request = BuildRequest(
        arch_set="cpu", line="cpu", engine="local", source=tree, out=out, patches=asked
    )
    with BuildReport(Console(file=told, width=200)) as report:
        preflight.build(request, report)
    return told.getvalue()


def test_every_record_of_a_build_names_its_patches_and_it_can_be_built_again(
    folder: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dist"
    licensed = HEAD.replace("MIT", "BSL-1.0") + INSERT + ADD
    licence = '[[add]]\nfile = "licenses/LICENSE-more"\nfrom = "more.cpp"\n'
    write(folder, text=licensed + licence)
    assert "patches: more\n" in build(tree, out)
    (named,) = [{"name": one.patch.name, "sha256": one.patch.sha256} for one in patches.load()]
    record = release.record_of(out / NAME)
    assert [one.name for one in record.source.patches] == ["more"]
    assert json.loads((out / "manifest.json").read_bytes())["source"]["patches"] == [named]
    properties = json.loads((out / f"{NAME}.cdx.json").read_bytes())["metadata"]["component"]
    wanted = {"name": "llama-farm:source-patch:more", "value": named["sha256"]}
    assert wanted in properties["properties"]
    packed = {entry.path for entry in release.load(out).artifacts[0].files}
    assert "runtime/licenses/licenses-LICENSE-more" in packed
    release.verify(out)

    monkeypatch.setattr(reproduce, "OUT", tmp_path / "rebuilt")
    told = io.StringIO()
    report = BuildReport(Console(file=told, width=200))
    asked = RebuildRequest(str(out), source=tree, engine="local")
    reproduce.rebuild(asked, report)
    assert f"identical: {NAME}" in told.getvalue()

    (folder / "more" / "more.cpp").write_text("int other;")
    with refused("PATCHES_DIFFER", SourceError, match=f"more {named['sha256']}; .* has [0-9a-f]"):
        reproduce.rebuild(asked, report)
    shutil.rmtree(folder)
    with refused("PATCHES_DIFFER", SourceError, match="has none"):
        reproduce.rebuild(asked, report)


def test_one_release_holds_one_set_of_patches(folder: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    assert "patches: none\n" in build(tree, out)
    assert "patches" not in json.loads((out / "manifest.json").read_bytes())["source"]
    other = out / NAME.replace("cpu-cpu", "cpu-other")
    write(folder)
    (out / NAME).rename(other)
    with refused("SOURCES_MIXED", UsageError, match=r"folder:llama\.cpp, patch more [0-9a-f]{12}"):
        build(tree, out)
