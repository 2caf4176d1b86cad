"""CUDA's libraries of a release: when the loader fetches them, and that a server finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farm import cuda_runtime, release, targets
from llama_loader import loader, report, selection
from llama_loader.errors import HostError, IntegrityError, NetworkError
from llama_loader.events import Event, Note, Stage, ignore
from llama_loader.fetch import Fetcher
from llama_loader.gpus import Gpu
from llama_loader.manifest import Artifact, Manifest
from llama_loader.settings import Settings, load
from llama_loader.store import Store
from tests.rigs.releases import BARE, artifact, libraries, manifest, runtime

sys.path.append(str(Path(__file__).parents[1] / "rigs"))
from typing import TYPE_CHECKING

import cuda_wheels
from cuda_wheels import SONAMES

if TYPE_CHECKING:
    from llama_loader.host import HostFacts

H200 = replace(BARE, gpus=(Gpu("NVIDIA H200", "90"),), driver="580.159", gpu_source="nvml")
"""No CUDA library on it."""
SM90 = artifact("cu130", "sm90", "90")
RUNTIME = runtime("cu130")
RELEASE = manifest(RUNTIME, SM90, artifact("cpu", "cpu", size=6_000_000))


def choose(
    document: Manifest,
    host: HostFacts = H200,
    *,
    allow_cpu: bool = False,
) -> selection.Choice:
    return selection.select(document, host, allow_cpu=allow_cpu)


def brought(choice: selection.Choice) -> str | None:
    return choice.runtime_libraries.name if choice.runtime_libraries else None


# The choice


def test_what_the_host_lacks_comes_with_the_server() -> None:
    choice = choose(RELEASE)
    assert (choice.artifact.name, choice.runtime_libraries) == (SM90.name, RUNTIME)
    assert choice.missing == SONAMES
    selection.require_libraries(choice, H200)
    verdicts = {one.name: one for one in choice.verdicts}
    assert len(verdicts) == 3
    assert verdicts[RUNTIME.name].fits
    assert verdicts[RUNTIME.name].reason == "fetched too: libraries; 400.0 MB"
    assert f"brought by {RUNTIME.name}" in verdicts[SM90.name].reason
    told = report.choice(choice)
    assert told["runtime_libraries"] == RUNTIME.name
    assert told["missing"] == list(SONAMES)


def test_nothing_is_brought_to_a_host_that_has_them() -> None:
    choice = choose(RELEASE, replace(H200, libraries=libraries(13)))
    assert (choice.runtime_libraries, choice.missing) == (None, ())
    verdict = next(one for one in choice.verdicts if one.name == RUNTIME.name)
    assert (verdict.fits, verdict.reason) == (False, "holds CUDA libraries, no server")


def test_one_missing_library_is_enough() -> None:
    here = tuple(one for one in libraries(13) if "cudart" in one.soname)
    choice = choose(RELEASE, replace(H200, libraries=here))
    assert choice.missing == ("libcublas.so.13", "libcublasLt.so.13")
    assert choice.runtime_libraries == RUNTIME


@pytest.mark.parametrize(
    "host", [H200, BARE, replace(H200, gpus=(Gpu("old", "70"),))], ids=["gpu", "bare", "old"]
)
def test_for_the_cpu_nothing_is_brought(host: HostFacts) -> None:
    choice = choose(RELEASE, host, allow_cpu=True)
    assert choice.runtime_libraries is None
    assert choice.artifact.name != RUNTIME.name


@pytest.mark.parametrize("allow_cpu", [False, True])
@pytest.mark.parametrize("host", [H200, BARE], ids=["gpu", "bare"])
def test_libraries_are_never_taken_for_a_server(host: HostFacts, *, allow_cpu: bool) -> None:
    with pytest.raises(HostError) as caught:
        choose(manifest(RUNTIME), host, allow_cpu=allow_cpu)
    assert caught.value.code in {"NO_ARTIFACT", "NO_GPU"}
    assert RUNTIME.name not in caught.value.message
    if caught.value.code == "NO_ARTIFACT":
        assert "none is a server (there is: nothing at all)" in caught.value.message


def test_a_kind_of_a_newer_farm_is_passed_over() -> None:
    fields = {name: getattr(SM90, name) for name in SM90.__struct_fields__}
    strange = Artifact(**{**fields, "name": "a", "kind": "cuda-profiler"})
    choice = choose(manifest(strange, SM90, RUNTIME))
    assert choice.artifact.name == SM90.name
    assert choice.verdicts[0].reason == "its kind cuda-profiler is unknown to this loader"


@pytest.mark.parametrize(
    "unfit",
    [
        runtime("cu124"),
        runtime("cu130", glibc="2.38"),
        runtime("cu130", machine="aarch64"),
        runtime("cu130", system="windows"),
    ],
)
def test_libraries_that_cannot_serve_leave_the_error_as_it_was(unfit: Artifact) -> None:
    choice = choose(manifest(SM90, unfit))
    assert choice.runtime_libraries is None
    with pytest.raises(HostError) as caught:
        selection.require_libraries(choice, H200)
    assert caught.value.code == "CUDA_LIBRARY_MISSING"
    assert caught.value.hint.endswith(": nvidia-cublas nvidia-cuda-runtime")


def test_libraries_for_a_newer_driver_are_not_brought() -> None:
    older = replace(H200, driver="550.54")
    newer = runtime("cu130")
    fields = {name: getattr(newer, name) for name in newer.__struct_fields__}
    twelve = tuple(name.replace(".13", ".12") for name in newer.provides)
    files = tuple(
        type(entry)(**{**_fields(entry), "path": entry.path.replace(".13", ".12")})
        for entry in newer.files
    )
    lying = Artifact(**{**fields, "provides": twelve, "files": files})
    assert choose(manifest(artifact("cu124", "sm90", "90"), lying), older).runtime_libraries is None
    assert choose(manifest(artifact("cu124", "sm90", "90"), lying)).runtime_libraries == lying


def _fields(entry: object) -> dict[str, object]:
    return {name: getattr(entry, name) for name in entry.__struct_fields__}  # type: ignore[attr-defined]


def test_libraries_that_need_others_of_the_host() -> None:
    fields = _fields(RUNTIME)
    needy = Artifact(**{**fields, "needs": ("libnvrtc.so.13",)})  # type: ignore[arg-type]
    assert choose(manifest(SM90, needy)).runtime_libraries is None


def test_never_of_an_older_toolkit_and_rather_of_its_own() -> None:
    server = artifact("cu128", "sm90", "90")
    assert choose(manifest(server, runtime("cu124"))).runtime_libraries is None
    newer = manifest(artifact("cu124", "sm90", "90"), runtime("cu128", size=1))
    assert brought(choose(newer)) == runtime("cu128").name
    both = manifest(
        artifact("cu124", "sm90", "90"), runtime("cu128", size=1), runtime("cu124", size=2)
    )
    assert brought(choose(both)) == runtime("cu124").name
    two = manifest(server, runtime("cu128", size=2), runtime("cu128", size=1, name="small"))
    assert brought(choose(two)) == runtime("cu128", name="small").name


def test_here_before_brought_before_missing() -> None:
    older, newer = artifact("cu124", "sm90", "90"), artifact("cu130", "sm90", "90", size=1)
    document = manifest(older, newer, runtime("cu130", size=2))
    has_12 = replace(H200, libraries=libraries(12))
    assert choose(document, has_12).artifact.name == older.name
    verdict = next(one for one in choose(document, has_12).verdicts if one.name == newer.name)
    assert "the libraries of" in verdict.reason
    assert "are here" in verdict.reason
    smaller = manifest(older, artifact("cu130", "sm90", "90", size=10**9), runtime("cu130"))
    assert "cu130" in choose(smaller).artifact.name
    verdict = next(one for one in choose(smaller).verdicts if one.name == older.name)
    assert "are in this release" in verdict.reason


def test_of_two_that_are_brought_the_smaller_download() -> None:
    document = manifest(
        artifact("cu124", "sm90", "90", size=30),
        artifact("cu130", "sm90", "90", size=20),
        runtime("cu124", size=100),
        runtime("cu130", size=200),
    )
    assert "cu124" in choose(document).artifact.name


def test_on_zerogpu_before_a_gpu_is_attached_the_driver_is_unknown() -> None:
    assert choose(RELEASE, replace(H200, driver=None)).runtime_libraries == RUNTIME


# From wheels to a started server


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder with a server that needs the three libraries, and the libraries."""
    work = tmp_path_factory.mktemp("work")
    out = work / "dist"
    cuda_wheels.server(work, out)
    wheels = cuda_wheels.contents(cuda_wheels.libraries(work / "made"))
    paths = {package: cuda_wheels.wheel(work, package, one) for package, one in wheels.items()}
    pinned = [(cuda_wheels.pin(package, path), path) for package, path in paths.items()]
    cuda_runtime.pack(pinned, targets.load().line("cu130"), out, "tar.zst")
    release.write(out)
    release.verify(out)
    return out


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "dist"))


class Space:
    """A loader on a machine whose facts are given, and what it told."""

    def __init__(self, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, store
        self.host = H200
        self.events: list[Event] = []
        monkeypatch.setattr(loader.host, "detect", lambda _: self.host)

    def settings(self, **options: str) -> Settings:
        url = (self.folder / "manifest.json").as_uri()
        environ = {"PATH": os.environ["PATH"], "HOME": "/home/user"}
        return load({"manifest_url": url, "store": str(self.store), **options}, environ)

    def prepare(self, **options: str) -> loader.Prepared:
        self.events.clear()
        return loader.prepare(self.settings(**options), sink=self.events.append)

    def notes(self) -> dict[str, Note]:
        return {one.code: one for one in self.events if isinstance(one, Note)}

    def stages(self) -> list[str]:
        return [one.name for one in self.events if isinstance(one, Stage)]


@pytest.fixture
def space(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    return Space(folder, tmp_path / "store", monkeypatch)


def started(ready: loader.Prepared, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the little server: it prints the CUDA libraries that the linker gave it."""
    program = ready.runtime / "llama-server"
    return subprocess.run([program], env=environ, capture_output=True, text=True, check=False)


def test_a_server_finds_what_was_brought(space: Space) -> None:
    ready = space.prepare()
    assert ready.runtime_libraries is not None
    place = ready.runtime_libraries.folder
    assert place == space.store / "runtimes" / ready.runtime_libraries.sha256 / (
        "files/cuda-runtime"
    )
    assert ready.missing == ()
    assert [(one.soname, one.folder, one.origin) for one in ready.libraries] == [
        (soname, place, "release") for soname in SONAMES
    ]
    loader.require_libraries(space.settings(), ready)
    assert loader.choose_devices(space.settings(), ready, None).names == ("CUDA0",)
    environ = loader.environment(space.settings(), ready)
    assert environ["LD_LIBRARY_PATH"] == f"$ORIGIN:{place}"
    done = started(ready, environ)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [str(place / soname) for soname in SONAMES]
    del environ["LD_LIBRARY_PATH"]
    assert "libcu" in started(ready, environ).stderr


def test_it_is_said_once_when_it_is_fetched(space: Space) -> None:
    space.prepare()
    note = space.notes()["CUDA_RUNTIME_FETCHED"]
    assert "lacks libcublas.so.13, libcublasLt.so.13, libcudart.so.13" in note.message
    assert "MB of CUDA libraries (cuda-runtime-13.0.2.14-cu130" in note.message
    assert "\n" not in note.message + note.hint
    assert note.hint.endswith(": nvidia-cublas nvidia-cuda-runtime")
    assert space.stages().count("fetch") == 2
    again = space.prepare()
    assert "CUDA_RUNTIME_FETCHED" not in space.notes()
    assert space.stages() == ["verify", "verify"]
    assert again.runtime_libraries is not None
    told = report.fetched(space.settings(), again)
    assert told["libraries"] == dict.fromkeys(SONAMES, str(again.runtime_libraries.folder))
    assert report.notes(again) == []


def test_what_the_host_has_is_not_mixed_with_what_is_brought(space: Space, tmp_path: Path) -> None:
    cublas = replace(libraries(13)[0], folder=tmp_path / "old")
    other = replace(cublas, soname="libnvrtc.so.13", folder=tmp_path / "other")
    space.host = replace(H200, libraries=(cublas, other))
    ready = space.prepare()
    assert {one.origin for one in ready.libraries} == {"release"}
    assert (
        str(tmp_path / "old") not in loader.environment(space.settings(), ready)["LD_LIBRARY_PATH"]
    )


def test_a_host_that_has_them_fetches_nothing_more(space: Space) -> None:
    space.host = replace(H200, libraries=libraries(13))
    ready = space.prepare()
    assert ready.runtime_libraries is None
    assert ready.libraries == libraries(13)
    assert len(list((space.store / "runtimes").iterdir())) == 1


@pytest.mark.parametrize("options", [{"allow_cpu": "1"}, {"n_gpu_layers": "0"}])
def test_for_the_cpu_nothing_is_fetched(space: Space, options: dict[str, str]) -> None:
    ready = space.prepare(**options)
    assert ready.runtime_libraries is None
    assert "CUDA_RUNTIME_FETCHED" not in space.notes()
    assert len(list((space.store / "runtimes").iterdir())) == 1


def test_without_such_an_artifact_the_error_stays(space: Space) -> None:
    next(space.folder.glob("cuda-runtime-*")).unlink()
    release.write(space.folder)
    ready = space.prepare()
    assert ready.missing == SONAMES
    with pytest.raises(HostError) as caught:
        loader.require_libraries(space.settings(), ready)
    assert caught.value.code == "CUDA_LIBRARY_MISSING"
    assert [note.code for note in report.notes(ready)] == ["CUDA_LIBRARY_MISSING"]


def test_a_damaged_download_is_refused(space: Space) -> None:
    tarball = next(space.folder.glob("cuda-runtime-*"))
    data = bytearray(tarball.read_bytes())
    data[len(data) // 2] ^= 1
    tarball.write_bytes(data)
    with pytest.raises(IntegrityError):
        space.prepare()
    tarball.unlink()
    with pytest.raises(NetworkError):
        space.prepare()
    assert len(list((space.store / "runtimes").iterdir())) == 1


def test_damaged_libraries_in_the_store_are_fetched_again(space: Space) -> None:
    ready = space.prepare()
    assert ready.runtime_libraries is not None
    library = ready.runtime_libraries.folder / "libcudart.so.13"
    before = library.read_bytes()
    library.write_bytes(before[:-1] + b"x")
    again = space.prepare()
    assert {"RUNTIME_DAMAGED", "CUDA_RUNTIME_FETCHED"} <= space.notes().keys()
    assert again.runtime_libraries == ready.runtime_libraries
    assert library.read_bytes() == before
    assert Store(space.store).verify(library.parent) == ready.runtime_libraries


def test_the_libraries_are_no_server_by_url(space: Space) -> None:
    """Neither fetched by URL, nor found in the store by their digest."""
    url = next(space.folder.glob("cuda-runtime-*")).as_uri()
    found = space.prepare().runtime_libraries
    assert found is not None
    store = Store(space.store)
    with pytest.raises(IntegrityError) as caught:
        store.install_archive(url, found.sha256, Fetcher(sink=ignore))
    assert caught.value.code == "NO_SERVER_IN_ARCHIVE"
    shutil.rmtree(space.store)
    with pytest.raises(IntegrityError) as caught:
        store.install_archive(url, found.sha256, Fetcher(sink=ignore))
    assert caught.value.code == "NO_SERVER_IN_ARCHIVE"
