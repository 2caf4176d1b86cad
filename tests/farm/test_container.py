"""What a container sends back: products of a build, and nothing else."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm import durable
from farm.engines.docker import container
from farm.engines.docker.container import DockerWorkspace
from farm.errors import SourceError
from farm.inputs import archives
from farm.plan import CONTAINER_LAYOUT
from tests.rigs.archives import Entry, compress, link, tar
from tests.rigs.refusals import refused


class HostileHost:
    """A container of an engine whose author is the attacker."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def pause(self) -> None:
        """Go on."""

    def get_archive(self, path: str) -> tuple[Iterator[bytes], dict[str, str]]:
        return iter([self.archive]), {"name": path}


def collect(archive: bytes, into: Path) -> None:
    """Copy products out of a container, as ``docker cp`` does."""
    host = DockerWorkspace(
        layout=CONTAINER_LAYOUT, jobs=1, image=None, ccache_dir=None, container=HostileHost(archive)
    )
    into.mkdir()
    host.collect(CONTAINER_LAYOUT.products, into)


@pytest.mark.parametrize("kind", ["FIFO", "hard link", "no end", "cut off"])
def test_products_that_no_build_leaves_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    entry = Entry("bin/pipe", kind=tarfile.FIFOTYPE)
    archive = tar([entry if kind == "FIFO" else link("bin/two", "bin/one", hard=True)])
    monkeypatch.setattr(container, "_MOST_PRODUCTS", 600 if kind == "no end" else 1 << 20)
    with refused("ARCHIVE_UNSAFE", SourceError, "/farm/build/bin is not unpacked: "):
        collect(archive[:500] if kind == "cut off" else archive, tmp_path / "bin")
    assert list((tmp_path / "bin").iterdir()) == []


def test_negative_size_does_not_raise_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = bytearray(tar([Entry("top/folder", kind=tarfile.DIRTYPE)])[:512])
    head[124:136] = tarfile.itn(-(1 << 60), 12, tarfile.GNU_FORMAT)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(compress(bytes(head) + tar([Entry("top/sub/a", b"1234")])))
    monkeypatch.setattr(durable, "MOST_BYTES", 3)
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
