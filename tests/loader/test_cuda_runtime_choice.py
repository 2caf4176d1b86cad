"""CUDA's libraries of a release: when the loader fetches them, and that a server finds them."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farm import cuda_runtime, release, targets
from llama_loader import loader, report, selection
from llama_loader.errors import HostError, IntegrityError
from llama_loader.events import Event, Note, Stage, ignore
from llama_loader.fetch import Fetcher
from llama_loader.gpus import Gpu
from llama_loader.manifest import Artifact, FileEntry
from llama_loader.settings import Settings, load
from llama_loader.store import Store
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE, H200, artifact, libraries, manifest, runtime

sys.path.append(str(Path(__file__).parents[1] / "rigs"))
from typing import Any

import cuda_wheels
from cuda_wheels import SONAMES

from llama_loader.host import HostFacts

LACKING = replace(H200, libraries=())
SM90 = artifact("cu130", "sm90", "90")
RUNTIME = runtime("cu130")
RELEASE = manifest(RUNTIME, SM90, artifact("cpu", "cpu", size=6_000_000))


def changed(one: Artifact, **fields: Any) -> Artifact:
    kept = {name: getattr(one, name) for name in one.__struct_fields__}
    return Artifact(**kept | fields)


def lying() -> Artifact:
    """Libraries that a newer driver needs, under the names of an older toolkit's."""
    newer = runtime("cu130")
    twelve = tuple(name.replace(".13", ".12") for name in newer.provides)
    files = tuple(
        FileEntry(path=f"x/{name}", size=1, sha256="0" * 64, executable=False) for name in twelve
    )
    return changed(newer, provides=twelve, files=files)


# The choice

OLD_SERVER = artifact("cu124", "sm90", "90")
SERVER_12 = artifact("cu128", "sm90", "90")
TINY_13 = artifact("cu130", "sm90", "90", size=1)
HUGE_13 = artifact("cu130", "sm90", "90", size=10**9)
ALL_BUT_CUDART = tuple(one for one in libraries(13) if "cudart" in one.soname)
LESS = (artifact("cu124", "sm90", "90", size=30), runtime("cu124", size=100))
MORE = (artifact("cu130", "sm90", "90", size=20), runtime("cu130", size=200))
OF_ITS_OWN = runtime("cu124", size=2)
SMALL = runtime("cu128", size=1, name="small")


def lacking(**facts: Any) -> HostFacts:
    return replace(LACKING, **facts)


CHOICES = {
    "one missing library is enough": (
        lacking(libraries=ALL_BUT_CUDART), [SM90, RUNTIME], SM90, RUNTIME,
    ),
    "nothing is brought to a host that has them": (
        lacking(libraries=libraries(13)), [SM90, RUNTIME], SM90, None,
    ),
    "before a GPU is attached the driver is unknown": (
        lacking(driver=None), [SM90, RUNTIME], SM90, RUNTIME,
    ),
    "another toolkit's": (LACKING, [SM90, runtime("cu124")], SM90, None),
    "for a newer glibc": (LACKING, [SM90, runtime("cu130", glibc="2.38")], SM90, None),
    "for another machine": (LACKING, [SM90, runtime("cu130", machine="aarch64")], SM90, None),
    "for another system": (LACKING, [SM90, runtime("cu130", system="windows")], SM90, None),
    "for a newer driver": (lacking(driver="550.54"), [OLD_SERVER, lying()], OLD_SERVER, None),
    "for this driver": (LACKING, [OLD_SERVER, lying()], OLD_SERVER, lying()),
    "that need others of the host": (
        LACKING, [SM90, changed(RUNTIME, needs=("libnvrtc.so.13",))], SM90, None,
    ),
    "never of an older toolkit": (LACKING, [SERVER_12, runtime("cu124")], SERVER_12, None),
    "of a newer one": (LACKING, [OLD_SERVER, runtime("cu128")], OLD_SERVER, runtime("cu128")),
    "rather of its own": (
        LACKING, [OLD_SERVER, runtime("cu128", size=1), OF_ITS_OWN], OLD_SERVER, OF_ITS_OWN,
    ),
    "the smaller ones": (LACKING, [SERVER_12, runtime("cu128", size=2), SMALL], SERVER_12, SMALL),
    "libraries that are here before brought ones": (
        lacking(libraries=libraries(12)), [OLD_SERVER, TINY_13, RUNTIME], OLD_SERVER, None,
    ),
    "brought ones before missing ones": (LACKING, [OLD_SERVER, HUGE_13, RUNTIME], HUGE_13, RUNTIME),
    "the smaller download of both": (LACKING, [*LESS, *MORE], *LESS),
    "a kind of a newer farm": (
        LACKING, [changed(SM90, name="a", kind="cuda-profiler"), SM90, RUNTIME], SM90, RUNTIME,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_server_and_the_libraries_that_are_brought_to_it(name: str) -> None:
    host, artifacts, server, brought = CHOICES[name]
    choice = selection.select(manifest(*artifacts), host)
    assert (choice.artifact, choice.runtime_libraries) == (server, brought)
    if choice.missing and brought is None:
        with refused("CUDA_LIBRARY_MISSING", HostError, hint=": nvidia-cublas"):
            selection.require_libraries(choice, host)


def test_libraries_are_judged_once_for_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def split(needs: tuple[str, ...], there: Any) -> Any:
        judged.append(needs)
        return split_needs(needs, there)

    split_needs = selection.cuda_libraries.split_needs
    monkeypatch.setattr(selection.cuda_libraries, "split_needs", split)
    each = [changed(one, name=f"{one.name}{n}") for one in (SM90, RUNTIME) for n in range(20)]
    assert selection.select(manifest(*each), LACKING).runtime_libraries in each
    assert len(judged) == len(each)


def test_what_the_host_lacks_comes_with_the_server() -> None:
    choice = selection.select(RELEASE, LACKING)
    assert (choice.artifact.name, choice.runtime_libraries) == (SM90.name, RUNTIME)
    assert choice.missing == SONAMES
    selection.require_libraries(choice, LACKING)
    verdicts = {one.name: one for one in choice.verdicts}
    assert len(verdicts) == 3
    assert verdicts[RUNTIME.name].fits
    assert verdicts[RUNTIME.name].reason == "fetched too: libraries; 400.0 MB"
    assert f"brought by {RUNTIME.name}" in verdicts[SM90.name].reason
    told = report.choice(choice)
    assert told is not None
    assert (told.runtime_libraries, told.missing) == (RUNTIME.name, SONAMES)


@pytest.mark.parametrize(
    "host", [LACKING, BARE, replace(LACKING, gpus=(Gpu("old", "70"),))], ids=["gpu", "bare", "old"]
)
def test_for_the_cpu_nothing_is_brought_and_libraries_are_no_server(host: HostFacts) -> None:
    choice = selection.select(RELEASE, host, allow_cpu=True)
    assert choice.runtime_libraries is None
    assert choice.artifact.name != RUNTIME.name
    for allow_cpu in (False, True):
        with pytest.raises(HostError) as caught:
            selection.select(manifest(RUNTIME), host, allow_cpu=allow_cpu)
        assert caught.value.code in {"NO_ARTIFACT", "NO_GPU"}
        assert RUNTIME.name not in caught.value.message


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
        self.host = LACKING
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
    program = ready.installed.folder / "llama-server"
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
    assert space.stages() == ["resolve", "verify", "verify"]
    assert again.runtime_libraries is not None
    told = report.fetched(space.settings(), again)
    assert told["libraries"] == dict.fromkeys(SONAMES, str(again.runtime_libraries.folder))
    assert report.notes(again) == []


def test_what_the_host_has_is_not_mixed_with_what_is_brought(space: Space, tmp_path: Path) -> None:
    cublas = replace(libraries(13)[0], folder=tmp_path / "old")
    other = replace(cublas, soname="libnvrtc.so.13", folder=tmp_path / "other")
    space.host = replace(LACKING, libraries=(cublas, other))
    ready = space.prepare()
    assert {one.origin for one in ready.libraries} == {"release"}
    assert (
        str(tmp_path / "old") not in loader.environment(space.settings(), ready)["LD_LIBRARY_PATH"]
    )


@pytest.mark.parametrize("options", [{"allow_cpu": "1"}, {"n_gpu_layers": "0"}, {}])
def test_where_none_is_needed_or_there_nothing_is_fetched(
    space: Space, options: dict[str, str]
) -> None:
    if not options:  # a host that has them
        space.host = replace(LACKING, libraries=libraries(13))
    ready = space.prepare(**options)
    assert ready.runtime_libraries is None
    assert "CUDA_RUNTIME_FETCHED" not in space.notes()
    assert len(list((space.store / "runtimes").iterdir())) == 1
    next(space.folder.glob("cuda-runtime-*")).unlink()
    release.write(space.folder)
    space.host = LACKING
    ready = space.prepare()
    assert ready.missing == SONAMES
    with refused("CUDA_LIBRARY_MISSING", HostError):
        loader.require_libraries(space.settings(), ready)
    assert [note.code for note in report.notes(ready)] == ["CUDA_LIBRARY_MISSING"]


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
    with refused("NO_SERVER_IN_ARCHIVE", IntegrityError):
        store.install_archive(url, found.sha256, Fetcher(sink=ignore))
    shutil.rmtree(space.store)
    with refused("NO_SERVER_IN_ARCHIVE", IntegrityError):
        store.install_archive(url, found.sha256, Fetcher(sink=ignore))
