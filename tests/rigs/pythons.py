"""The loader's own tests in containers whose distribution brings another Python.

The root file systems come from the distributions, signed; the packages from
requirements-loader.lock, chosen for that Python and put into the container by this host. Inside
there is no network, and none of the farm's packages.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tempfile
import urllib.request
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import rootfs
from farm.engines.docker import DockerImages, connect
from farm.rootfs import Distribution

if TYPE_CHECKING:
    from docker import DockerClient

PROJECT: Final = Path(__file__).parents[2]
LOCK: Final = PROJECT / "requirements-loader.lock"
TESTS: Final = (
    "channel", "cli", "client", "devices", "doctor", "errors", "fetch", "generations", "host",
    "kept_archive", "launch", "manifest", "processes", "resume", "select", "server", "settings",
    "store", "strict_json", "supervisor", "suppose", "trust", "unpack",
)  # fmt: skip
"""Those of tests/unit that need nothing but the loader."""
LEFT_OUT: Final = (
    "killed_at_a_system_call",
    "generated",
    "eight_installers",
    "test_help_is_there_at_once",
)
"""What takes long, or measures time, and does not depend on the Python."""
PACKAGES: Final = ("ca-certificates", "openssl", "python3")
DISTRIBUTIONS: Final = {
    "3.10": Distribution(
        "jammy", PACKAGES, "http://archive.ubuntu.com/ubuntu", ("main", "universe")
    ),
    "3.13": Distribution("trixie", PACKAGES),
}
SECONDS: Final = 900

_KEYRING: Final = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg")
_KEYRING_PACKAGE: Final = (
    "http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2021.03.26_all.deb"
)
_KEYRING_SHA256: Final = "0d0e7ed6b112f5d03eabf3c7eb01ebdacf9c57714b279e90495cfc58c8c4520f"
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
        _image(client, python),
        [
            *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", "not docker and not model", "-k", f"not ({' or '.join(LEFT_OUT)})"),
            *(f"tests/unit/test_{name}.py" for name in TESTS),
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


def _image(client: DockerClient, python: str) -> str:
    """Return the image with that Python, made of its distribution unless it is here."""
    wanted = DISTRIBUTIONS[python]
    tag, inputs = f"llama-farm-python:{python}", repr(wanted)
    images = DockerImages(client)
    there = images.find(tag)
    if there is not None and there.labels.get(_LABEL) == inputs:
        return there.id
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        signed = replace(wanted, keyring=_ubuntu_keyring(Path(folder))) if wanted.mirror else wanted
        with rootfs.root_tar(lines.append, of=signed) as root:
            return images.import_root(root, tag, {_LABEL: inputs}).id


def _ubuntu_keyring(folder: Path) -> Path:
    """Return Ubuntu's keys: this system's, or out of their own package, which is pinned."""
    if _KEYRING.is_file():
        return _KEYRING
    with urllib.request.urlopen(_KEYRING_PACKAGE, timeout=60) as answer:
        data = answer.read()
    found = hashlib.sha256(data).hexdigest()
    if found != _KEYRING_SHA256:
        raise ValueError(f"{_KEYRING_PACKAGE} has sha256 {found}")
    (folder / "keyring.deb").write_bytes(data)
    subprocess.run(["dpkg-deb", "-x", folder / "keyring.deb", folder], check=True)
    return folder / _KEYRING.relative_to("/")


def _contents(python: str) -> bytes:
    """Make a tar of the project and of its packages, at their places in the container."""
    stream = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        subprocess.run(
            [
                *("uv", "pip", "install", "--quiet", "--require-hashes", "--only-binary=:all:"),
                *(f"--target={folder}", f"--python-version={python}"),
                *("--python-platform=x86_64-manylinux_2_28", "-r", str(LOCK)),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        archive.add(folder, f"usr/local/lib/python{python}/dist-packages")
        for name in ("pyproject.toml", "spaces", "tests"):
            archive.add(PROJECT / name, f"{_INSIDE}/{name}", filter=_source)
    return stream.getvalue()


def _source(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") else entry
