"""Releases made of real, small binaries: built by the local engine from the tiny source tree."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import tiny_release
import vendored

from farm import release
from farm.errors import FarmError, InspectError, PackError, UsageError
from farm.tarball import build_record, parts
from farm.tarball.archive import Chunking
from llama_loader import manifest as schema
from tests.rigs import archives
from tests.rigs.published import edited
from tests.rigs.refusals import refused

NAME = "llama-server-b0-cpu-cpu-linux-x86_64.tar.zst"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kept tree, as `invoke build-cpu` leaves it, of a source with parts of others."""
    folder = tmp_path_factory.mktemp("tree")
    llama = vendored.add(Path(shutil.copytree(tiny_release.TINY, folder / "llama.cpp")))
    return tiny_release.tree(folder, llama, parts.survey(llama, version="0.6.1"))


@pytest.fixture
def released(tree: Path, tmp_path: Path) -> Path:
    return packed(tree, tmp_path / "dist")


def packed(tree: Path, out: Path) -> Path:
    release.pack_tree(tree, out, "tar.zst")
    release.write(out)
    return out


def changed(tree: Path, place: Path, **record: object) -> Path:
    copy = Path(shutil.copytree(tree, place, symlinks=True))
    before = build_record.decode((copy / "BUILD.json").read_bytes(), what="test")
    after = msgspec.structs.replace(before, **record)
    (copy / "BUILD.json").write_bytes(build_record.encode(after))
    return copy


def test_the_manifest_is_what_its_schema_and_its_reader_say(released: Path) -> None:
    data = (released / "manifest.json").read_bytes()
    parsed = schema.parse(data)
    assert [artifact.name for artifact in parsed.artifacts] == [NAME]
    assert (parsed.release, parsed.serial) == ("b0-1", 1)
    published = json.loads((released / "manifest.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(json.loads(data), published)


def with_changes(changes: dict[str, object]) -> dict[str, Any]:
    """Return a manifest as the loader's tests have it, with its artifact changed."""
    tree: dict[str, Any] = json.loads(archives.manifest(archives.release()[1]))
    tree["artifacts"][0].update(changes)
    return tree


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "cuda-runtime", "provides": ["libllama.so.0"]}, {"of_tomorrow": 1}]
)
def test_a_good_manifest_is_of_the_schema(changes: dict[str, object]) -> None:
    jsonschema.validate(with_changes(changes), release.json_schema())


@pytest.mark.parametrize(
    "changes", [{"size": -1}, {"sha256": "0" * 63}, {"name": "../x"}, {"files": []}]
)
def test_what_the_loader_refuses_is_not_of_the_schema(changes: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(with_changes(changes), release.json_schema())


def test_sums_are_those_of_sha256sum_and_name_everything(released: Path) -> None:
    text = (released / "SHA256SUMS").read_text("utf-8")
    named = {line.partition("  ")[2] for line in text.splitlines()}
    assert named == {path.name for path in released.iterdir()} - {"SHA256SUMS"}
    for line in (released / "SHA256SUMS").read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


def test_a_release_that_was_cut_into_other_chunks_is_verified_as_it_was_cut(
    tree: Path, tmp_path: Path
) -> None:
    """Releases outlive the farm that made them; but none has pieces of two bytes, each a digest."""
    large = changed(tree, tmp_path / "large")
    (large / "licenses" / "large").write_bytes(bytes(100_000))
    for cut_from, file_chunk_size in ((large, 1 << 16), (large, 0), (tree, 2)):
        released = packed(cut_from, tmp_path / f"dist{file_chunk_size}")
        before = release.load(released)
        found = release.read(released / NAME, Chunking(1 << 16, file_chunk_size or 1 << 16))
        cut = msgspec.structs.replace(found.artifact, file_chunk_size=file_chunk_size)
        assert any(len(entry.chunks) > 1 for entry in cut.files)
        listed = msgspec.structs.replace(before, artifacts=(cut,))
        (released / "manifest.json").write_bytes(schema.dump(listed))
        beside = ((released / name).read_bytes() for name in ("manifest.json", release.SCHEMA))
        (released / "SHA256SUMS").write_bytes(release.sums(release.digests(listed, *beside)))
        if file_chunk_size == 2:
            with refused("RELEASE_MISMATCH", PackError, "files is"):
                release.verify(released)
        else:
            assert release.verify(released) == (NAME,)


@pytest.mark.parametrize("name", ["manifest.schema.json", "manifest.json"])
def test_link_in_a_release_folder_brings_no_other_file_into_a_release(
    released: Path, tmp_path: Path, name: str
) -> None:
    """A user who may write to the folder lets it lead to a file that only this user may read."""
    private = tmp_path / "private"
    private.write_bytes((released / name).read_bytes())
    (released / name).unlink()
    (released / name).symlink_to(private)
    for read in (release.verify, release.write):
        with pytest.raises(FarmError, match="a link, not a regular file"):
            read(released)


def test_the_record_has_every_flag_and_the_digest_of_every_program(tree: Path) -> None:
    record = build_record.decode((tree / "BUILD.json").read_bytes(), what="test")
    configure, compile_ = record.commands
    assert {f"-D{name}={value}" for name, value in record.defines.items()} < set(configure)
    assert "-DCMAKE_C_FLAGS=-ffile-prefix-map=/source=llama.cpp" in " ".join(configure)
    assert compile_[-2:] == ("llama-server", "llama-cli")
    assert record.environment["SOURCE_DATE_EPOCH"] == "1577836800"
    assert str(tree) not in (tree / "BUILD.json").read_text()
    compiler = shutil.which("g++")
    assert compiler is not None
    digest = hashlib.sha256(Path(compiler).read_bytes()).hexdigest()
    assert record.toolchain.programs["g++"] == digest
    named = {"gcc", "cc1", "cc1plus", "collect2", "as", "ld", "ar", "cmake", "ninja"}
    assert named < record.toolchain.programs.keys()


def test_verify_refuses_a_changed_sbom(released: Path) -> None:
    document = released / f"{NAME}.cdx.json"
    for changed_to in (document.read_text().replace('"0.60.1"', '"0.60.2"'), "{"):
        document.write_text(changed_to)
        with refused("RELEASE_MISMATCH", PackError, "the file"):
            release.verify(released)
    document.unlink()
    with refused("RELEASE_MISMATCH", PackError, "No such file"):
        release.verify(released)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"0.60.1"', '"0.60.2"'),
        ("{", '{"components": [], '),  # what counts of two equal keys is each reader's own choice
        ("{", "[" * 200_000),
    ],
)
def test_verify_refuses_an_sbom_that_is_listed_but_says_something_else(
    released: Path, before: str, after: str
) -> None:
    document = released / f"{NAME}.cdx.json"
    lying = document.read_text().replace(before, after, 1)
    document.write_text(lying)
    with edited(released) as manifest:
        listed = manifest["artifacts"][0]["sbom"]
        listed["sha256"] = hashlib.sha256(lying.encode()).hexdigest()
    with refused("RELEASE_MISMATCH", PackError, "does not say what the tarball holds"):
        release.verify(released)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "changes",
    [
        {"sbom": {"url": f"other/{NAME}.cdx.json", "sha256": "0" * 64}},
        {"sbom": {"url": "other/manifest.json", "sha256": "0" * 64}},
        {"sbom": {"url": "a\0b", "sha256": "0" * 64}},
        {"name": "manifest.json", "urls": ["manifest.json"]},
        {"size": 33 << 30, "chunk_size": 1 << 23, "chunks": ["0" * 64] * 4224},
    ],
)
def test_manifest_that_no_release_has_is_refused_before_its_files_are_touched(
    released: Path, changes: dict[str, object]
) -> None:
    with edited(released) as manifest:
        manifest["artifacts"][0].update(changes)
    (released / NAME).unlink()
    with refused("RELEASE_MISMATCH", PackError, "is no tarball's name|its SBOM is not|more than"):
        release.verify(released)
    with edited(released) as manifest:
        manifest["artifacts"][0] |= {"name": NAME, "size": 1, "urls": ["https://[::1/x"]}
        manifest["artifacts"][0] |= {"chunk_size": 1, "chunks": ["0" * 64]}
    with refused("CHANNEL_NOT_RELEASE", UsageError):
        release.verify(released)


@pytest.mark.timeout(60)
def test_larger_tarball_than_listed_is_not_hashed(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (released / NAME).stat().st_size
    for ask in (release.verify, release.write):
        with monkeypatch.context() as patch, refused("RELEASE_MISMATCH", PackError, "unpack to"):
            patch.setattr(release, "MAX_BYTES", size)
            ask(released)
    for there in (size - 1, 1 << 42):  # of a copy that was cut off; it takes no more disk
        os.truncate(released / NAME, there)
        found = f"size is {size} in .* {there} in the tarball"
        with refused("RELEASE_MISMATCH", PackError, found, hint="fetch it again"):
            release.verify(released)
    monkeypatch.setattr(Path, "is_file", lambda _: False)  # it is another one when it is opened
    with refused("TARBALL_UNREADABLE", PackError, f"larger than {size} bytes"):
        release.verify(released)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("glibc", '"banana"'),
        ("origin", '"https://github.com/"'),
        ("line", "[" * 100_000),
        ("line", "{}"),
        ("archs", '"\\ud800"'),
        ("line", '{"name": "../../x", "toolkit": null, "min_driver": null, "glibc": "2.34"}'),
    ],
)
def test_record_with_a_value_that_none_has_is_one_error(
    tree: Path, tmp_path: Path, key: str, value: str
) -> None:
    copy = Path(shutil.copytree(tree, tmp_path / "copy", symlinks=True))
    whole = (copy / "BUILD.json").read_text("utf-8")
    at = whole.index(f'"{key}": "', whole.index('"parts"')) if key == "origin" else 0
    found = re.compile(rf'"{key}": ("[^"]*"|{{[^}}]*}})').search(whole, at)
    assert found is not None
    lying = f'{whole[: found.start()]}"{key}": {value}{whole[found.end() :]}'
    (copy / "BUILD.json").write_text(lying, "utf-8")
    with refused("BUILD_RECORD_INVALID", PackError):
        packed(copy, tmp_path / "out")


def test_licences_of_a_tree_that_lie_elsewhere_are_not_packed(tree: Path, tmp_path: Path) -> None:
    copy = changed(tree, tmp_path / "copy")
    (copy / "licenses").rename(tmp_path / "private")
    (copy / "licenses").symlink_to(tmp_path / "private")
    with refused("TREE_MISSING", UsageError, "licenses"):
        packed(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["LICENSE", "vendor-stb-stb_image.h.txt"])
def test_verify_refuses_a_tarball_that_lacks_a_licence(
    tree: Path, tmp_path: Path, missing: str
) -> None:
    lacking = changed(tree, tmp_path / "lacking")
    (lacking / "licenses" / missing).unlink()
    with refused("LICENCE_MISSING", PackError, r"stb \(vendor/stb\)|llama.cpp \(\.\)"):
        release.verify(packed(lacking, tmp_path / "out"))


def test_a_tarball_from_before_parts_were_recorded_is_accepted_and_said(
    tree: Path, tmp_path: Path
) -> None:
    old = changed(tree, tmp_path / "old", parts=None)
    said: list[str] = []
    release.verify(packed(old, tmp_path / "out"), said.append)
    assert [line.partition(":")[0] for line in said] == ["note[PARTS_UNKNOWN]"]


@pytest.mark.parametrize(
    ("path", "value", "named", "code"),
    [
        (("artifacts", 0, "platform", "glibc"), "2.17", "platform", "RELEASE_MISMATCH"),
        (("artifacts", 0, "needs"), ["libfoo.so.1"], "needs", "RELEASE_MISMATCH"),
        (("artifacts", 0, "sha256"), "0" * 64, "sha256", "RELEASE_MISMATCH"),
        (("artifacts", 0, "backend"), "rocm", "backend", "RELEASE_MISMATCH"),
        (("artifacts", 0, "sbom"), None, "has no SBOM", "SBOM_MISSING"),
        (("source", "origin"), "somewhere", "not the manifest's source", "RELEASE_MISMATCH"),
    ],
)
def test_verify_names_a_field_that_is_not_so(
    released: Path, path: tuple[Any, ...], value: object, named: str, code: str
) -> None:
    with edited(released) as manifest:
        place: Any = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    with refused(code, PackError, named):
        release.verify(released)


def test_a_tarball_whose_binaries_lack_the_asked_architecture_is_refused(
    tree: Path, tmp_path: Path
) -> None:
    line = build_record.LineRecord("cu128", "12.8", "525.60", "2.35")
    lying = changed(tree, tmp_path / "lying", arch_set="sm90", archs="90-real", line=line)
    with refused("ARCH_MISSING", InspectError, "90"):
        release.pack_tree(lying, tmp_path / "out", "tar.zst")
    assert not (tmp_path / "out").exists()


def test_one_folder_holds_one_source(tree: Path, tmp_path: Path) -> None:
    record = build_record.decode((tree / "BUILD.json").read_bytes(), what="test")
    other = changed(
        tree, tmp_path / "other", source=msgspec.structs.replace(record.source, build=7)
    )
    release.pack_tree(tree, tmp_path / "out", "tar.zst")
    release.pack_tree(other, tmp_path / "out", "tar.zst")
    with refused("SOURCES_MIXED", PackError, r"b0 .*b7 "):
        release.write(tmp_path / "out")


def test_release_and_serial_are_kept_until_told_otherwise(released: Path) -> None:
    before = (released / f"{NAME}.cdx.json").read_bytes()
    release.write(released, release="b0-2", serial=9)
    again = release.write(released)
    assert (again.release, again.serial) == ("b0-2", 9)
    assert (released / f"{NAME}.cdx.json").read_bytes() == before


def test_a_tarball_under_another_name_is_refused(released: Path) -> None:
    (released / NAME).rename(released / NAME.replace("b0", "b9"))
    with refused("TARBALL_RENAMED", PackError, f"was packed as {NAME}"):
        release.write(released)


def test_verify_misses_the_sums_and_names_what_is_not_listed(released: Path) -> None:
    shutil.copy(released / NAME, released / f"x-{NAME}")
    with pytest.raises(PackError, match=f"x-{NAME} is not in the manifest"):
        release.verify(released)
    (released / f"x-{NAME}").unlink()
    (released / "SHA256SUMS").unlink()
    with pytest.raises(PackError, match="SHA256SUMS: No such file"):
        release.verify(released)


def test_schema_of_another_farm_is_noted_and_what_is_none_is_refused(released: Path) -> None:
    notes: list[str] = []
    described, content = released / release.SCHEMA, (released / "manifest.json").read_bytes()
    older = {**release.json_schema(), "description": "older"}
    large = json.dumps({**older, "large": [[]] * 300_000})
    for text in (json.dumps(older), "<html>", "[]", large):
        described.write_text(text)
        found = release.digests(release.load(released), content, text.encode())
        (released / "SHA256SUMS").write_bytes(release.sums(found))
        if text.startswith("{") and text != large:
            release.verify(released, notes.append)
            assert any(re.search(r"\[SCHEMA_ANOTHER\].*harmless", note) for note in notes)
        else:
            with refused("RELEASE_MISMATCH", PackError, "is no schema"):
                release.verify(released)


def test_a_foreign_tarball_is_refused(released: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "x"
    foreign.mkdir()
    (foreign / "README").write_text("hello", "utf-8")
    shutil.make_archive(str(released / "foreign"), "gztar", foreign)
    with pytest.raises(FarmError, match="foreign"):
        release.write(released)
