"""The gate with a real release and a real model; its measuring on this machine's CPU."""

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
    (tmp_path / "gate.json").unlink(missing_ok=True)
    return tmp_path


def test_a_real_release_is_started_and_measured(
    folder: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the same is done; this proves the way, not the figures."""
    monkeypatch.setenv("YAKULINGO_SPACES_ALLOW_CPU", "1")
    found = gate.measure(folder, real_model, "this CPU", rounds=1)
    assert found.gpu == "this CPU"
    assert 0 < found.first_token < 120
    assert found.prompt_tokens_per_second > found.tokens_per_second > 0


def test_a_real_release_passes(
    folder: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.publish.gate._model", lambda: real_model)
    monkeypatch.setattr("farm.publish.gate.gpu", lambda: None)
    made = gate.run(folder, lambda _: None)
    assert made.failed == ()
    assert [check.passed for check in made.checks] == [True, True, True, True, None]
    assert made.checks[3].detail == "The capital of France is Paris"
    manifest = (folder / "manifest.json").read_bytes()
    gate.require_passed((folder / "gate.json").read_bytes(), manifest, what="it")
