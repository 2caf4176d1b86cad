"""What stands in a build's way is found before it starts, and all of it at once."""

import io
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import small_disk
import tiny_release
from rich.console import Console

from farm import preflight, release, source, targets, trust
from farm.errors import BuildError, EngineError, FarmError, UsageError, raise_all
from farm.options import BuildRequest, Publication
from farm.plan import BuildPlan
from farm.publish import places
from farm.publish.places import Signed
from farm.source import SourceTree
from farm.terminal.progress import BuildReport
from tests.rigs import http_served
from tests.rigs.archives import Entry, compress, tar
from tests.rigs.heard import script
from tests.rigs.http_served import Answer

TINY = tiny_release.TINY
TABLE = targets.load()
NOTHING = Publication()
NVCC = """#!/bin/sh
[ "$1" = --list-gpu-code ] && printf 'sm_75\\nsm_90\\n'
echo "Cuda compilation tools, release 12.6, V12.6.20"
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of this host that no table names."""
    root = tmp_path / "cuda"
    others = ("include/cuda_runtime.h", "include/cublas_v2.h", "lib64/libcublas.so")
    for name, content in (("bin/nvcc", NVCC), *((other, "") for other in others)):
        script(root / name, content)
    monkeypatch.setenv("CUDA_PATH", str(root))
    return root


def plan(build: int = 0, line: str = "cpu", arch_set: str = "cpu") -> BuildPlan:
    llama = SourceTree(TINY, "0.6.1", build, None, "folder:tiny_llama", None)
    return BuildPlan(TABLE.sets[arch_set], TABLE.line(line), llama)


def checked(
    request: BuildRequest, publication: Publication = NOTHING, *, check: bool = True
) -> str:
    told = io.StringIO()
    with BuildReport(Console(file=told, width=400)) as report:
        assert preflight.only(request, replace(publication, check=check), report)
    return told.getvalue()


def refused(request: BuildRequest, publication: Publication = NOTHING) -> FarmError:
    with pytest.raises(FarmError) as found:
        checked(request, publication)
    return found.value


def codes(error: FarmError) -> list[str]:
    return [one.code for one in (error, *error.others)]


def test_findings_are_shown_together_once_each_and_wrong_usage_decides_the_status() -> None:
    found = [BuildError("A", "a", hint="h"), UsageError("B", "b"), BuildError("A", "a")]
    with pytest.raises(FarmError) as raised:
        raise_all(found)
    assert raised.value.exit_status == 2
    assert raised.value.render() == "error[B]: b\nerror[A]: a\nhint: h"
    raise_all([])


@pytest.mark.usefixtures("toolkit")
def test_line_of_a_local_build_follows_from_this_host_s_toolkit(tmp_path: Path) -> None:
    request = BuildRequest(
        archs="90-real", engine="local", source=TINY, assume_build=7, out=tmp_path / "out",
        patches="none",
    )  # fmt: skip
    told = checked(request)
    assert "can be built: llama-server-b7-cu126-sm90-linux-x86_64.tar.zst" in told
    assert not (tmp_path / "out").exists()
    assert "HOSTS_NOT_CHECKED" not in told
    told = checked(replace(request, engine="dask", line="cu128"), Publication(to=str(tmp_path)))
    assert "note[HOSTS_NOT_CHECKED]" in told
    assert "note[RELEASE_NOT_NAMED]" in told
    linked = Path(shutil.copytree(TINY, tmp_path / "linked"))
    (linked / "text").write_text("LLAMA_BUILD_COMIT")
    (linked / "a.cmake").symlink_to("text")
    request = replace(request, source=linked)
    told = checked(
        replace(request, define=("LLAMA_BUILD_COMIT=1", "CMAKE_X=2", "LLAMA_VERSION_MINOR=3"))
    )
    assert "defined: CMAKE_X=2, LLAMA_BUILD_COMIT=1, LLAMA_VERSION_MINOR=3\n" in told
    # not in what a link leads to, which many may do
    assert told.count("note[DEFINE_UNKNOWN]") == told.count("has LLAMA_BUILD_COMIT:") == 1
    error = refused(replace(request, archs="90;77-real"))  # between those that its nvcc has
    assert (error.code, "builds 75, 90;" in error.hint) == ("ARCH_NOT_IN_LINE", True)


@pytest.mark.usefixtures("toolkit")
def test_everything_that_stands_in_the_way_is_found_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "foreign.tar.gz").write_text("no archive")
    (out / "manifest.json").write_text("{")
    request = BuildRequest(
        archs="90", line="cu128", engine="local", source=tmp_path, out=out, fresh=True
    )
    error = refused(request, Publication("no/name", "s3:x", "stable", tmp_path / "absent"))
    assert error.exit_status == 2
    assert sorted(codes(error)) == [
        "DESTINATION_INVALID",
        "KEY_MISSING",
        "NAME_INVALID",
        "OUT_HAS_FOREIGN_FILE",
        "OUT_MANIFEST_INVALID",
        "SOURCE_NOT_LLAMA_CPP",
        "TOOLKIT_NOT_OF_LINE",
    ]
    assert error.render().count("error[") == 7


def test_tarball_of_another_source_is_found(kept: Path, tmp_path: Path) -> None:
    out = tiny_release.of_build(kept, 11549, tmp_path)
    (found,) = preflight.out_findings(out, [plan(11600)])
    assert (found.code, found.exit_status) == ("SOURCES_MIXED", 2)
    assert "b11549" in found.message
    assert "b11600" in found.message


def test_tarballs_of_the_same_source_and_those_that_are_replaced_are_none(
    kept: Path, tmp_path: Path
) -> None:
    out = tiny_release.of_build(kept, 0, tmp_path)
    assert preflight.out_findings(out, [plan(0)]) == []
    (tarball,) = (path for path in out.iterdir() if release.is_tarball(path.name))
    assert tarball.name == plan(0).artifact_name
    tarball.write_bytes(b"cut off")
    assert preflight.out_findings(out, [plan(0)]) == []


def test_tarball_that_somebody_put_there_is_read_neither_for_ever_nor_as_a_whole(
    tmp_path: Path,
) -> None:
    place = tmp_path / plan(0).artifact_name
    record = Entry("runtime/BUILD.json", b" " * (256 << 20))
    place.write_bytes(compress(tar([record]), "tar.zst"))
    del record
    tracemalloc.start()
    (found,) = preflight.out_findings(tmp_path, [plan(11600)])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.code, most < 64 << 20) == ("OUT_HAS_FOREIGN_FILE", True)
    record = Entry("runtime/BUILD.json", b"x" * 9)  # which a build puts before anything else
    place.write_bytes(compress(tar([Entry("runtime/AA", b""), record]), "tar.zst"))
    (found,) = preflight.out_findings(tmp_path, [plan(11600)])
    assert "has no BUILD.json" in found.message
    place.unlink()
    os.mkfifo(place)
    (found,) = preflight.out_findings(tmp_path, [plan(11600)])
    assert "not a regular file" in found.message


def test_folder_that_is_a_file_is_found_and_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = preflight.out_findings(tmp_path / "file", [])
    assert found.code == "OUT_NOT_FOLDER"
    assert preflight.out_findings(tmp_path / "absent", []) == []


def test_folder_that_this_user_may_not_write_to_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("os.access", lambda path, _: asked.append(path))  # root may all
    (found,) = preflight.out_findings(tmp_path / "not" / "there", [])
    assert (found.code, asked) == ("OUT_NOT_WRITABLE", [tmp_path])


def test_disk_without_room_for_the_sets_is_found(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "small", "64m"):
        request = BuildRequest(out=tmp_path / "small" / "dist")
        (found,) = preflight.room_findings(request, [plan(1, "cu130", "sm90")], None)
        assert (found.code, found.exit_status) == ("DISK_TOO_SMALL", 1)
        assert f"the disk of {tmp_path / 'small'} has 0.1 GB free; about 0.2 GB" in found.message
        (pack := tmp_path / "llama" / ".git" / "pack").parent.mkdir(parents=True)
        pack.touch()
        os.truncate(pack, 8 << 40)  # nothing on the disk, and not copied
        llama = replace(plan().source, tree=tmp_path / "llama")
        assert preflight.room_findings(request, [replace(plan(), source=llama)], None) == []


LLAMA = plan(11549).source


def findings(**wanted: object) -> list[str]:
    publication = Publication(**wanted)  # type: ignore[arg-type] - its own fields
    return [one.code for one in preflight.publication_findings(publication, LLAMA)]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("b11549-1", []),
        ("nightly", []),
        ("b11550-1", ["RELEASE_NAME_WRONG"]),
        ("../x", ["NAME_INVALID"]),
        ("channel-stable", ["NAME_INVALID"]),
    ],
)
def test_release_s_name(name: str, code: list[str]) -> None:
    assert findings(release=name) == code


def test_name_that_is_published_already(tmp_path: Path) -> None:
    (tmp_path / "b11549-1").mkdir()
    (tmp_path / "b11549-1" / "manifest.json").write_text("{}")
    assert findings(release="b11549-1", to=str(tmp_path)) == ["PUBLISHED_ALREADY"]
    assert findings(release="b11549-2", to=str(tmp_path)) == []


def test_missing_token_and_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_TOKEN", trust.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    found = findings(release="b11549-1", to="github:me/it", channel="candidate")
    assert found == ["TOKEN_MISSING", "KEY_MISSING"]


def test_hub_without_a_token_and_folder_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "absent"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("farm.publish.hub.get_token", lambda: None)
    assert findings(to="hf:me/it") == ["TOKEN_MISSING"]
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert findings(to=str(tmp_path)) == ["DESTINATION_NOT_WRITABLE"]


def test_private_repository_whose_release_could_not_be_attested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "x")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    told = {"full_name": "owner/name", "private": True}
    with http_served.serving(lambda _: Answer(200, told)) as url:
        monkeypatch.setenv("GITHUB_API_URL", url)
        assert findings(to="github:owner/name") == ["ATTESTATION_UNAVAILABLE"]
        monkeypatch.setenv("FARM_ATTEST_PRIVATE", "1")
        assert findings(to="github:owner/name") == []


def test_channel_of_another_key(kept: Path, tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        trust.generate(tmp_path / name)
    place = places.parse(str(tmp_path))
    content = (tiny_release.of_build(kept, 2, tmp_path) / "manifest.json").read_bytes()
    comment = f"project {place.project} channel stable serial 1 release b2-1"
    signature = trust.signer(tmp_path / "theirs").sign(content, comment)
    place.put_channel("stable", 1, Signed(content, signature))
    wanted = {"to": str(tmp_path), "channel": "stable"}
    assert findings(**wanted, key=tmp_path / "ours") == ["SIGNED_BY_ANOTHER_KEY"]
    assert findings(**wanted, key=tmp_path / "theirs") == []


def test_known_hole_is_a_note_of_a_build_and_a_finding_of_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    tree = Path(shutil.copytree(TINY, tmp_path / "tree"))
    request = BuildRequest(source=tree, assume_build=11392, out=tmp_path / "out", patches="none")
    built = replace(request, arch_set="cpu", line="cpu", engine="local")
    assert "note[KNOWN_ADVISORY]: b11392 has CVE-2026-107183" in checked(built)
    whole = replace(request, arch_set="release", engine="docker")
    error = refused(whole, Publication(release="b1-1"))
    assert codes(error) == ["RELEASE_NAME_WRONG", "ENGINE_NOT_RUNNING", "KNOWN_ADVISORY"]
    gone = EngineError("IMAGE_UNAVAILABLE", reference="x", error="no registry")
    monkeypatch.setattr(preflight, "_require_line", lambda *_: raise_all([gone]))
    assert "check one set: --arch-set sm90 --line cu130 --image" in refused(whole).render()


def test_build_with_a_finding_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "from_archive", lambda pin: pytest.fail(f"fetched {pin}"))
    (tmp_path / "dist").touch()
    request = BuildRequest(arch_set="sm100", line="cu124", engine="local", out=tmp_path / "dist")
    error = refused(request)
    assert codes(error) == ["ARCH_NOT_IN_LINE", "OUT_NOT_FOLDER"]
