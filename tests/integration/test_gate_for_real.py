"""The gate with a real release and a real model."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from farm.publish import gate

pytestmark = [pytest.mark.docker, pytest.mark.model]


@pytest.fixture
def folder(real_manifest: str, tmp_path: Path) -> Path:
    """Return the real release, in a folder where a report may be written beside it."""
    there = Path(unquote(urlsplit(real_manifest).path)).parent
    for file in there.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_a_real_release_passes(
    folder: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.publish.gate._model", lambda: real_model)
    made = gate.run(folder, lambda _: None)
    made.require_passed()
    assert [check.passed for check in made.checks] == [True, True, True, True]
    assert made.checks[3].detail == "The capital of France is Paris"
