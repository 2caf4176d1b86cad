"""An archive on its whole way into a store, and what must hold whatever it is.

It goes from a ``file://`` URL through the chunks' digests, the unpacker and the store. The error is
the loader's own, nothing outside the store is touched, and the store holds the runtime as it is
listed, or nothing.
"""

import hashlib
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final
from unittest import mock

from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact
from llama_loader.store import Store
from tests.rigs import writes
from tests.rigs.archives import GOOD, Entry

_SERVER: Final = GOOD[0]
LISTINGS: Final = (
    *[GOOD] * 6,
    *(
        (other, *GOOD[1:])
        for other in (
            replace(_SERVER, data=_SERVER.data[::-1] + b"x"),
            replace(_SERVER, data=_SERVER.data + b"x"),
            replace(_SERVER, mode=0o644),
            replace(_SERVER, path="runtime/another"),
        )
    ),
    GOOD[:-1],
    (*GOOD, Entry("runtime/more", b"more")),
)
"""What a manifest may say is in an archive: what is, or something else."""


def install_listed(packed: bytes, artifact: Artifact) -> None:
    """Install it as its manifest's entry says; what comes to lie there is what the entry lists."""

    def install(store: Store, url: str) -> None:
        installed = store.install(artifact, [url], Fetcher(sleep=lambda _: None))
        place = installed.root / "files"
        found = {
            (str(path.relative_to(place)), hashlib.sha256(path.read_bytes()).hexdigest(),
             bool(path.stat().st_mode & 0o100))
            for path in place.glob("**/*")
            if path.is_file()
        }  # fmt: skip
        assert found == {(one.path, one.sha256, one.executable) for one in artifact.files}

    _install(packed, install)


def install_by_url(packed: bytes) -> None:
    """Install it by its URL alone."""
    _install(
        packed, lambda store, url: store.install_archive(url, None, Fetcher(sleep=lambda _: None))
    )


def _install(packed: bytes, install: Callable[[Store, str], object]) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        root, source = Path(folder) / "store", Path(folder) / "archive"
        source.write_bytes(packed)
        installed = False
        with writes.watched() as changed:
            try:
                install(Store(root), source.as_uri())
                installed = True
            finally:
                assert changed, "the watch sees nothing"
                assert writes.outside(root, changed) == []
                assert sorted(path.name for path in Path(folder).iterdir()) == ["archive", "store"]
                _require_clean(root, installed=installed)


def _require_clean(root: Path, *, installed: bool) -> None:
    """One runtime of plain files and folders, or none; nothing in the making."""
    assert len(list((root / "runtimes").iterdir())) == installed
    assert [path for path in (root / "staging").iterdir() if path.is_dir()] == []
    for place in root.rglob("*"):
        status = place.lstat()
        assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        assert not status.st_mode & 0o7000
