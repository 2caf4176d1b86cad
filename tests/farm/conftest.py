"""A small release, and the places that it can be published to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from farm import trust
from tests.rigs import published, tiny_release


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
def signer(tmp_path: Path) -> trust.Signer:
    """Give a channel's new key."""
    trust.generate(tmp_path / "key")
    return trust.signer(tmp_path / "key")
