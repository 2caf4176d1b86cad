"""`invoke rebuild`: a tarball is built again from its record, or an error names what is missing."""

import io
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from releases import artifact, runtime
from releases import manifest as manifest_of
from rich.console import Console
from verbs import invoke

from farm import execute, pipeline, preflight, release, reproduce, source, targets
from farm.engines.local import LocalEngine
from farm.errors import EngineError, FarmError
from farm.inputs import images, pins
from farm.inputs.images import ImageFacts
from farm.options import BuildRequest, RebuildRequest
from farm.pack import read_inventory
from farm.plan import BuildPlan
from farm.reproduce import choose
from farm.serve import ReleaseServer
from farm.tarball import build_record
from farm.tarball.build_record import BuildRecord
from farm.terminal.progress import BuildReport
from llama_loader import manifest as schema
from tests.rigs.refusals import refused
from tests.rigs.tiny_release import TINY

LOCAL = BuildRequest(arch_set="cpu", line="cpu", engine="local", source=TINY, patches="none")
NAME = "llama-server-b0-cpu-cpu-linux-x86_64.tar.zst"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A release of the small source tree, as `invoke build-cpu --engine local` makes it."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(pipeline, "STATE", folder / "state")
        request = replace(LOCAL, out=folder / "dist")
        preflight.build(request, BuildReport(Console(file=io.StringIO())))
        yield folder / "dist"


@pytest.fixture
def record(published: Path) -> BuildRecord:
    return build_record.decode(read_inventory(published / NAME).build_json, what="test")


def again(published: Path | str, **options: object) -> list[str]:
    told = io.StringIO()
    asked = replace(RebuildRequest(str(published), source=TINY, engine="local"), **options)
    try:
        reproduce.rebuild(asked, BuildReport(Console(file=told, width=200)))
    except FarmError as error:
        return [*told.getvalue().splitlines(), *error.render().splitlines()]
    return told.getvalue().splitlines()


def plan_of(record: BuildRecord) -> BuildPlan:
    return reproduce.plan_of(record, source.from_folder(TINY), "tar.zst")


def repacked(folder: Path, change: Callable[[Path], object]) -> Path:
    """Pack the tree that was kept once more, with a change, as if it had been built so."""
    kept = pipeline.STATE / "trees" / "cpu-cpu"
    tree = Path(shutil.copytree(kept, folder.with_name("tree"), symlinks=True))
    change(tree)
    release.pack_tree(tree, folder, "tar.zst")
    release.write(folder)
    return folder


def another_server(tree: Path) -> None:
    server = tree / "bin" / "llama-server"
    content = server.read_bytes()
    assert content.count(b"version: %d") == 1
    server.write_bytes(content.replace(b"version: %d", b"Version: %d"))


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "rebuilt")
    monkeypatch.setattr(reproduce, "KEPT", tmp_path / "kept")


def test_the_same_comes_out_from_a_folder_a_file_and_over_http_without_a_compiler_cache(
    published: Path, record: BuildRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    for place in (published, published / "manifest.json"):
        said = again(place)
        assert said[-1].startswith(f"identical: {NAME}, ")
    newer = record.line.glibc != targets.load().line("cpu").glibc
    assert any(one.startswith("note[GLIBC_OF_RECORD]: ") for one in said) == newer
    with ReleaseServer(published) as server:
        assert again(f"{server.url}manifest.json", artifact=NAME)[-1].startswith("identical: ")
    assert (tmp_path / "rebuilt" / NAME).read_bytes() == (published / NAME).read_bytes()
    assert not (tmp_path / "ccache").exists()


@pytest.mark.usefixtures("published")
def test_another_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose server was not made of what its record says."""
    out = repacked(tmp_path / "dist", another_server)
    monkeypatch.setenv("COLUMNS", "300")
    done = invoke("rebuild", str(out), "--source", str(TINY), "--engine", "local")
    said = done.stderr.splitlines()
    (line,) = (line for line in said if "differs" in line)
    assert "runtime/llama-server: other bytes, sha256 " in line
    assert said[-2].startswith(f"error[NOT_IDENTICAL]: {NAME}: 1 of its ")
    assert done.returncode == 1


def test_a_changed_byte_of_the_tarball_is_refused_before_anything_is_built(
    published: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "dist"))
    content = bytearray((folder / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / NAME).write_bytes(content)
    said = again(folder)
    assert said[0].startswith(("error[ARCHIVE_DAMAGED]", "error[RELEASE_MISMATCH]"))
    assert not any("configure" in line for line in said)


def test_a_pinned_manifest_is_checked(published: Path) -> None:
    assert again(published, sha256="0" * 64)[0].startswith("error[RELEASE_MISMATCH]")


def test_a_folder_that_only_its_builder_has_is_asked_for(published: Path) -> None:
    said = again(published, source=None)
    assert said[-2].startswith("error[SOURCE_NOT_PUBLISHED]: it was built from folder:tiny_llama")
    assert "--source DIR" in said[-1]


def test_another_source_is_refused_by_its_parts(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))
    choose = reproduce.source_of

    def changed(*of: Any, **more: Any) -> source.SourceTree:
        found = choose(*of, **more)
        (tree / "plugin.c").write_text("int changed(void) { return 1; }\n", "utf-8")
        return found

    with monkeypatch.context() as patch:  # after it was hashed, before it is looked at
        patch.setattr(reproduce, "source_of", changed)
        assert again(published, source=tree)[-2].startswith("error[SOURCE_CHANGED]: ")
    assert again(published, source=tree)[-2].startswith("error[SOURCE_DIFFERS]: ")


def with_source(record: BuildRecord, **fields: object) -> schema.Source:
    return msgspec.structs.replace(record.source, **fields)


def test_an_archive_is_fetched_by_the_recorded_digest(
    record: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fetch(pin: pins.SourcePin) -> source.SourceTree:
        asked.append(pin)
        return replace(source.from_folder(TINY), build=pin.build, sha256=pin.sha256)

    monkeypatch.setattr(source, "from_archive", fetch)
    origin = "pypi:xllamacpp-2025.1.9000.tar.gz#thirdparty/llama.cpp"
    named = with_source(record, origin=origin, sha256="ab" * 32, build=9000)
    found = reproduce.source_of(named, None)
    assert (found.origin, found.build, found.version) == (origin, 9000, "0.6.1")
    lies = {"build": 9001, "version": "0.5.0", "commit": "c" * 40, "project": "evil"}
    for name, told in lies.items():
        with refused("SOURCE_DIFFERS", FarmError, f"its {name} differ"):
            reproduce.source_of(msgspec.structs.replace(named, **{name: told}), None)
    lie = msgspec.structs.replace(named, build=9001, build_assumed=True)
    assert "the number b9001; the source has b9000" in str(reproduce.source_of(lie, None).note)
    person = reproduce.source_of(named, TINY)
    assert person.build == 9000
    assert str(person.note).startswith("note[SOURCE_AS_RECORDED]")
    pin = msgspec.to_builtins(asked[0])
    wanted = {"package": "xllamacpp", "version": "2025.1.9000", "sha256": "ab" * 32}
    assert {name: pin[name] for name in wanted} == wanted
    assert pin["subdir"] == "thirdparty/llama.cpp"


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        ("pypi:xllamacpp-2025.1.9000.tar.gz#thirdparty/llama.cpp", "SOURCE_NOT_PINNED"),
        ("git+https://example.org/llama.cpp@b1", "SOURCE_NOT_PUBLISHED"),
        ("folder:mine", "SOURCE_NOT_PUBLISHED"),
        ("pypi:xllamacpp-2025.1.9000.tar.gz#.", "SOURCE_NOT_PUBLISHED"),
        ("pypi:xllamacpp-\0.1.tar.gz#x", "SOURCE_NOT_PUBLISHED"),
    ],
)
def test_a_source_without_a_digest_is_not_to_be_had(
    record: BuildRecord, origin: str, code: str
) -> None:
    with refused(code, FarmError):
        reproduce.source_of(with_source(record, origin=origin), None)


@pytest.mark.parametrize("package", ["evil-llama", "xllamacpp-evil", "XLLAMACPP"])
def test_package_that_only_the_record_names_is_not_fetched(
    record: BuildRecord, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "from_archive", lambda _: pytest.fail("it was fetched"))
    named = with_source(record, origin=f"pypi:{package}-1.0.tar.gz#ll", sha256="ab" * 32)
    with refused("REMOTE_NOT_TRUSTED", FarmError, package, hint="--source DIR"):
        reproduce.source_of(named, None)


def test_record_alone_does_not_choose_the_local_engine(published: Path) -> None:
    """Its build scripts would run on this machine, as its user."""
    said = again(published, engine=RebuildRequest("").engine)
    assert said[-2].startswith("error[ENGINE_DIFFERS]: ")
    assert "--engine local" in said[-1]
    assert not any("configure" in line for line in said)


def test_a_repository_that_only_the_record_names_is_not_fetched(
    record: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(ref: str, *, remote: str) -> source.SourceTree:
        asked.append(f"{remote} {ref}")
        return replace(source.from_folder(TINY), commit=ref)

    monkeypatch.setattr(source, "from_ref", fetch)
    evil = "https://evil.example/llama.cpp"
    foreign = with_source(record, origin=f"git+{evil}@b1", commit="c" * 40)
    for named in (None, "https://other.example"):
        with refused("REMOTE_NOT_TRUSTED", FarmError, evil, hint="--remote"):
            reproduce.source_of(foreign, None, remote=named)
        assert asked == []
    reproduce.source_of(foreign, None, remote=evil)
    own = with_source(record, origin=f"git+{source.GIT_REMOTE}@b1", commit="d" * 40)
    reproduce.source_of(own, None)
    assert asked == [f"{evil} {'c' * 40}", f"{source.GIT_REMOTE} {'d' * 40}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("defines", {"CMAKE_BUILD_TYPE": "Debug"}),
        ("commands", (("cmake", "--build", "/build", "--target", "llama-server", "llama-cli"),)),
        ("environment", {"LC_ALL": "C"}),
        ("recipe_sha256", "0" * 64),
    ],
)
def test_another_recipe_than_this_checkout_s_is_named(
    record: BuildRecord, field: str, value: object
) -> None:
    with refused("RECIPE_DIFFERS", match=rf"\b{field} of BUILD\.json"):
        plan_of(msgspec.structs.replace(record, **{field: value}))


@pytest.mark.parametrize(
    ("defined", "code"),
    [
        ({"CMAKE_C_COMPILER_LAUNCHER": "/bin/sh;-c;id"}, "DEFINE_CONTRADICTS"),
        ({"CMAKE_C_LINKER_LAUNCHER": "/bin/sh"}, "DEFINE_CONTRADICTS"),
        ({"GIT_EXECUTABLE": "/bin/sh"}, "DEFINE_CONTRADICTS"),
        ({"GGML_GIT": "/bin/sh"}, "RECIPE_DIFFERS"),
        ({"GGML_MORE": "$(id)"}, "RECIPE_DIFFERS"),
        ({"FARM_CPU_VARIANTS": "x64;$(id)"}, "RECIPE_DIFFERS"),
        ({"FARM_CPU_VARIANTS": "x64;haswell", "GGML_RPC": "ON", "GGML_RPC_RDMA": "OFF"}, None),
    ],
)
def test_record_alone_defines_nothing_that_names_a_program(
    record: BuildRecord, defined: dict[str, str], code: str | None
) -> None:
    plan = replace(plan_of(record), defined=tuple(defined.items()))
    other = build_record.of(plan, record.toolchain)
    if code is None:
        assert plan_of(other).defined == plan.defined
        return
    with refused(code, FarmError, next(iter(defined))):
        plan_of(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arch_set", "../../evil"),
        ("archs", "86 -ccbin=/tmp/evil"),
        ("archs", "86" * 501),
        ("line.toolkit", "x.y"),
        ("source.commit", 'abc-"[0]?(system("id"),""):"'),  # a string of the server's C++
    ],
)
def test_record_names_no_path_no_option_and_no_code(
    record: BuildRecord, field: str, value: str
) -> None:
    changed = msgspec.to_builtins(record)
    place, _, name = field.rpartition(".")
    (changed[place] if place else changed)[name] = value
    with refused("BUILD_RECORD_INVALID", FarmError, rf"\$\.{field}"):
        build_record.decode(msgspec.json.encode(changed), what="x")


@pytest.mark.parametrize("lie", [{"min_driver": "1.0"}, {"toolkit": "13.9"}])
def test_record_promises_no_other_driver_than_its_line(
    record: BuildRecord, lie: dict[str, str]
) -> None:
    with refused("RECIPE_DIFFERS", match=": line of BUILD.json"):
        plan_of(msgspec.structs.replace(record, line=msgspec.structs.replace(record.line, **lie)))


@pytest.mark.parametrize("many", ["parts", "inputs", "programs", "bytes"])
def test_record_of_more_than_a_build_has_is_refused(record: BuildRecord, many: str) -> None:
    names = {f"{number}": "0" * 64 for number in range(1001)}
    content = build_record.encode(record)
    if many == "bytes":
        content += b" " * (8 << 20)
    else:
        changed = msgspec.to_builtins(record)
        place = changed["toolchain"] if many == "programs" else changed
        place[many] = changed["parts"][:1] * 1001 if many == "parts" else names
        content = msgspec.json.encode(changed)
    with refused("BUILD_RECORD_INVALID", FarmError, "more than"):
        build_record.decode(content, what="x")


def test_record_alone_builds_no_target_that_no_tarball_has(record: BuildRecord) -> None:
    plan = replace(plan_of(record), targets=("llama-server", "evil"))
    with refused("RECIPE_DIFFERS", FarmError, "evil"):
        plan_of(build_record.of(plan, record.toolchain))


def test_tarball_that_is_replaced_after_it_was_verified_is_not_called_identical(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listed one has a changed server; the genuine one takes its place before it is read."""
    folder = repacked(tmp_path / "dist", another_server)
    verify = release.verify_artifact

    def then_swap(*given: object) -> None:
        verify(*given)
        shutil.copy(published / NAME, tmp_path / NAME)
        (tmp_path / NAME).replace(folder / NAME)

    monkeypatch.setattr(release, "verify_artifact", then_swap)
    assert again(folder)[-2].startswith(f"error[RELEASE_MISMATCH]: {NAME} was replaced")


def test_other_files_in_the_builder_s_image_are_another_recipe(record: BuildRecord) -> None:
    other = msgspec.structs.replace(
        record,
        toolchain=replace(record.toolchain, engine="docker"),
        inputs={"builder.Dockerfile": "0" * 64},
    )
    with pytest.raises(FarmError, match=r"inputs\.builder\.Dockerfile"):
        plan_of(other)


def test_targets_that_were_built_beside_the_server_are_built_again(record: BuildRecord) -> None:
    *others, compile_ = record.commands
    more = msgspec.structs.replace(record, commands=(*others, (*compile_, "llama-bench")))
    assert plan_of(more).targets == ("llama-server", "llama-cli", "llama-bench")


def test_another_compiler_is_refused_before_anything_is_compiled(
    record: BuildRecord, tmp_path: Path
) -> None:
    programs = record.toolchain.programs | {"cc1plus": "0" * 64}
    other = msgspec.structs.replace(record, toolchain=replace(record.toolchain, programs=programs))
    written = build_record.encode(other)
    folder = repacked(tmp_path / "dist", lambda tree: (tree / "BUILD.json").write_bytes(written))
    lines = again(folder)
    assert lines[-2].startswith("error[COMPILER_DIFFERS]: another compiler is here: cc1plus of ")
    assert not any("configure" in line for line in lines)


def test_which_artifact_is_asked_where_there_are_several() -> None:
    one, two = artifact("cu128", "sm90", "90"), artifact("cu128", "sm120", "120a")
    libraries = runtime("cu128")
    several = manifest_of(one, two, libraries)
    assert choose(several, two.name) == two
    assert choose(manifest_of(one, libraries), None) == one
    for name, code in ((None, "NEEDED"), ("x.tar.zst", "UNKNOWN"), (libraries.name, "NOT_BUILT")):
        with refused(f"ARTIFACT_{code}", FarmError, status=2):
            choose(several, name)


def test_no_engine_for_what_a_container_built(
    record: BuildRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    docker = replace(record.toolchain, engine="docker", image="a:b")
    report = BuildReport(Console(file=io.StringIO()))
    with refused("ENGINE_NOT_RUNNING", EngineError):
        reproduce._image(docker, RebuildRequest("x"), report)


def test_record_alone_chooses_no_image_that_is_neither_pinned_nor_ours(
    record: BuildRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its author chooses its label and its names, and writes what he likes for its digest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours, theirs = ImageFacts("sha256:e"), ImageFacts("sha256:f", {"llama-farm": "base"})
    there: dict[str | None, ImageFacts] = {}
    asked: list[str] = []

    class Images:
        def __init__(self, client: object) -> None:
            """No engine is asked."""

        def find(self, name: str) -> ImageFacts | None:
            asked.append(name)
            return there.get(name)

        pull = find

    monkeypatch.setattr(reproduce, "connect", io.BytesIO)
    monkeypatch.setattr(reproduce, "DockerImages", Images)
    report = BuildReport(Console(file=io.StringIO()))
    evil, pinned = "evil.example/devel@sha256:f", pins.load().images[0].reference
    built = replace(record.toolchain, engine="docker", image=evil, image_digest="sha256:e")
    images.keep(ours)
    for digest, found, code in (
        ("sha256:e", None, "NOT_TRUSTED"), ("sha256:f", theirs, "NOT_TRUSTED"),
        ("base:1", ours, "DIFFERS"),
    ):  # fmt: skip
        there = {digest: found} if found else {}
        other = replace(built, image_digest=digest)
        with refused(f"IMAGE_{code}", EngineError, evil, hint="--image IMG"):
            reproduce._image(other, RebuildRequest("x"), report)
    assert evil not in asked
    there = {built.image_digest: ours}
    assert reproduce._image(built, RebuildRequest("x"), report) == "sha256:e"
    there = {pinned: theirs}
    of_pin = replace(built, image=pinned, image_digest="sha256:f")
    assert reproduce._image(of_pin, RebuildRequest("x"), report) == "sha256:f"


def test_with_an_image_of_one_s_own_another_compiler_is_only_noted(
    record: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = io.StringIO()
    with BuildReport(Console(file=told, width=200)) as report:
        built = (plan_of(record), LocalEngine(), record.toolchain)
        look = partial(reproduce._require_same_compilers, *built, report)
        look(strict=True)
        monkeypatch.setattr(execute, "programs", lambda *_: {"ld": "1" * 64})
        look(strict=False)
    assert re.match(r"note\[COMPILER_DIFFERS\]: .*\bld\b.* of GNU", told.getvalue())
    assert told.getvalue().count("COMPILER_DIFFERS") == 1
