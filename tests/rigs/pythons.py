"""The loader's own tests in containers whose distribution brings another Python.

The root file systems come from the distributions, signed; the packages from
requirements-loader.lock, chosen for that Python and put into the container by this host. Inside
there is no network, and none of the farm's packages.

    PYTHONPATH=.:spaces:tests/rigs python tests/rigs/pythons.py 3.10
"""

import io
import sys
import tarfile
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from docker import DockerClient

from farm.engines.docker.connection import connect
from farm.engines.docker.inventory import DockerImages
from farm.inputs import images
from tests.rigs.heard import heard

PROJECT: Final = Path(__file__).parents[2]
LOCK: Final = PROJECT / "requirements-loader.lock"
TESTS: Final = (
    "client", "console", "devices", "disk", "doctor", "errors", "events", "fetch", "foreign",
    "host", "http_transport", "loader", "locations", "main", "manifest", "processes", "receipt",
    "resume", "selection", "server", "server_log", "server_plan", "server_restarts",
    "setting_kinds", "settings", "store", "trust", "unpack",
)  # fmt: skip
"""Those of tests/loader that need nothing but the loader."""
LEFT_OUT: Final = (
    "eight_installers",
    "test_help_is_there_at_once",
    # no compiler, no FUSE and no release are there
    *("own_libraries_come_before", "driver_that", "no_plugin_of_the_callers", "disk_that_keeps_no"),
    *("disk_that_shows_all_files", "another_folder_than_its_program"),
)
"""What takes long, measures time or needs more, and does not depend on the Python."""
PACKAGES: Final = "--include=ca-certificates,openssl,python3"
DISTRIBUTIONS: Final = {
    "3.11": (PACKAGES, "bookworm"),
    "3.13": (PACKAGES, "trixie"),
}
"""Debian's, as everything else here."""
BY_HAND: Final = {
    "3.10": (PACKAGES, "--components=main,universe", "jammy"),
}
"""Ubuntu's: its mirror has to be in reach, and its keys (Debian: ubuntu-archive-keyring)."""
SECONDS: Final = 900

_LABEL: Final = "llama-farm.python"
_INSIDE: Final = "project"


@dataclass(frozen=True)
class Run:
    """How the tests ended, and what pytest said."""

    status: int
    log: str


def run(python: str) -> Run:
    """Run the loader's tests with that Python (``3.10``) in a container of its own."""
    with closing(connect()) as client:
        return _run(client, python)


def _run(client: DockerClient, python: str) -> Run:
    container = client.containers.create(
        image_of(client, f"llama-farm-python:{python}", (DISTRIBUTIONS | BY_HAND)[python]),
        [
            *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", "not docker and not model", "-k", f"not ({' or '.join(LEFT_OUT)})"),
            *(f"tests/loader/test_{name}.py" for name in TESTS),
        ],
        working_dir=f"/{_INSIDE}",
        environment={
            "FARM_REQUIRE_ALL": "1",
            "PYTHONPATH": f"/{_INSIDE}:/{_INSIDE}/spaces",
        },
        network_mode="none",
        cap_add=["SYS_ADMIN"],  # small disks are mounted, to be filled
        security_opt=["apparmor=unconfined"],
        init=True,
    )
    try:
        container.put_archive("/", _contents(python))
        container.start()
        status: int = container.wait(timeout=SECONDS)["StatusCode"]
        return Run(status, container.logs().decode("utf-8", "replace"))
    finally:
        container.remove(force=True)


def image_of(client: DockerClient, tag: str, wanted: tuple[str, ...], *paths: str) -> str:
    """Return the image of a distribution, made as ``wanted`` tells mmdebstrap unless it is here.

    ``paths`` are options that decide nothing: where this host has something.
    """
    inputs = repr(wanted)
    store = DockerImages(client)
    there = store.find(tag)
    if there is not None and there.labels.get(_LABEL) == inputs:
        return there.id
    lines: list[str] = []
    with images.root_tar(lines.append, (*paths, *wanted)) as root:
        return store.import_root(root, tag, {_LABEL: inputs}).id


def _contents(python: str) -> bytes:
    """Make a tar of the project and of its packages, at their places in the container."""
    stream = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        heard(
            [
                *("uv", "pip", "install", "--quiet", "--require-hashes", "--only-binary=:all:"),
                *(f"--target={folder}", f"--python-version={python}"),
                *("--python-platform=x86_64-manylinux_2_28", "-r", str(LOCK)),
            ],
            check=True,
        )
        archive.add(folder, f"usr/local/lib/python{python}/dist-packages")
        for name in ("pyproject.toml", "spaces", "tests"):
            archive.add(PROJECT / name, f"{_INSIDE}/{name}", filter=_source)
    return stream.getvalue()


def _source(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") else entry


if __name__ == "__main__":
    known = (*BY_HAND, *DISTRIBUTIONS)
    if unknown := {*sys.argv[1:]} - {*known}:
        sys.exit(f"{', '.join(unknown)}: there are {', '.join(known)}")
    for version in sys.argv[1:] or known:
        done = run(version)
        print(f"Python {version}: {done.log}")
        if done.status:
            sys.exit(done.status)
