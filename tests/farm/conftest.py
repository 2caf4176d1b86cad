"""A small release, and the places that it can be published to."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_disk
import verbs
from binaries import FATBINS, compile_c, library, program
from invoke.collection import Collection
from invoke.program import Program

import tasks
from farm import source, trust
from tests.rigs import hub_repository, published, tiny_release
from tests.rigs.heard import HOSTILE, repository
from tests.rigs.package_index import PackageIndex


@pytest.fixture(autouse=True)
def hub_client_of_others() -> Iterator[None]:
    """Take back what the farm set for this process: its client sends one address the token."""
    yield
    http = sys.modules.get("huggingface_hub.utils._http")
    if http is not None:
        http.set_client_factory(http.default_client_factory)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a built tree, to be packed as many releases as are needed."""
    return tiny_release.tree(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def released(kept: Path, tmp_path: Path) -> Path:
    """Return a release folder of b11549."""
    return tiny_release.of_build(kept, 11549, tmp_path)


@pytest.fixture(params=published.KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[published.Place]:
    """Give each kind of place in turn, empty."""
    with published.serving(request.param, tmp_path / "published", monkeypatch) as served:
        yield served


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the farm's cache lie in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def index(private_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    """Serve a package index, empty; the cache is empty too."""
    del private_cache
    with PackageIndex().serve() as served:
        monkeypatch.setenv("PIP_INDEX_URL", served.url)
        yield served


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_repository.Hub]:
    """Serve a Hub, and point the farm at it."""
    with hub_repository.Hub().serve() as served:
        monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield served


@pytest.fixture
def signer(tmp_path: Path) -> trust.Signer:
    """Give a channel's new key."""
    trust.generate(tmp_path / "key")
    return trust.signer(tmp_path / "key")


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[verbs.Here]:
    """Run a verb in this process; gives its exit status and what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(verbs.PROJECT)

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            Program(namespace=Collection.from_module(tasks)).run(["invoke", *argv])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk with 16 KiB left, and a file of a few bytes on it."""
    if os.geteuid() != 0:
        pytest.skip("small disks are mounted by root")
    with small_disk.mounted(tmp_path / "disk", "32k"):
        (tmp_path / "disk" / "file").write_bytes(b"old")
        (tmp_path / "disk" / "other").write_bytes(bytes(12 << 10))
        yield tmp_path / "disk"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CPU library, a CUDA one, a program and an object file."""
    folder = tmp_path_factory.mktemp("made")
    library(folder, "libbase.so.0", soname="libbase.so.0")
    library(folder, "libcuda90.so", "libbase.so.0", fatbin=FATBINS / "sass-90.fatbin")
    library(folder, "libcuda120a.so", fatbin=FATBINS / "both-120a.fatbin")
    library(folder, "libcudaboth.so", fatbin=FATBINS / "both-90-size.fatbin")
    library(folder, "liblto.so", fatbin=FATBINS / "lto-and-sass-90.fatbin")
    program(folder, "prog", "libbase.so.0", source='#include <stdio.h>\nint main(){puts("x");}\n')
    compile_c(folder / "object.o", "int x;", "-c")
    return folder


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's own setting: folders here are what these addresses lead to."""
    places = {source.GIT_REMOTE: "upstream", HOSTILE: "hostile"}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(places)))
    for number, (address, name) in enumerate(places.items()):
        base = f"url.{(tmp_path / name).as_uri()}.insteadOf"
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", base)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", address)


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A repository of three commits; the second carries the tag b2."""
    return repository(tmp_path / "upstream")
