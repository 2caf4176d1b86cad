"""`invoke status` on a machine that has nothing yet."""

from pathlib import Path

import pytest

from farm.errors import UsageError
from farm.terminal import status


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, no release, an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nobody.sock'}")
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))


def test_no_release_and_no_engine_are_one_calm_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status.tell(None, None)
    none, local, docker, disk = capsys.readouterr().out.splitlines()
    assert none == (
        "no release: dist is not a release folder: No such file or directory: manifest.json "
        "(invoke build-cuda or invoke build-cpu makes one)"
    )
    assert local.startswith("compiler cache, local engine: ")
    assert docker.startswith("compiler cache, docker engine: no Docker engine answers at unix://")
    assert docker.endswith("/nobody.sock (DOCKER_HOST)")
    assert disk.startswith("disk: ")


@pytest.mark.parametrize(
    ("folder", "suppose"), [(Path("elsewhere"), None), (None, "capability=9.0")]
)
def test_a_release_that_was_asked_for_is_an_error_and_nothing_else(
    folder: Path | None, suppose: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        status.tell(folder, suppose)
    assert refused.value.code == "RELEASE_MISSING"
    assert capsys.readouterr().out == ""
