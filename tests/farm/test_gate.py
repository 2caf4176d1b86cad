"""A release comes into a channel with a report of its checks, or not at all."""

import hashlib
from pathlib import Path

import pytest

from farm import loader
from farm.errors import PublishError
from farm.publish import gate
from tests.rigs import github_releases, published
from tests.rigs.published import Place, publish
from tests.rigs.refusals import refused


def require_gate(place: Place, checked: str | None) -> None:
    gate.require_gate(place.open(), "b11549-1", lambda _: None, checked=checked)


def digest(released: Path) -> str:
    return hashlib.sha256((released / "manifest.json").read_bytes()).hexdigest()


def test_digest_that_the_gate_printed_counts_for_that_manifest_alone(
    place: Place, released: Path
) -> None:
    publish(place, released)
    require_gate(place, digest(released))
    with refused("RELEASE_CHANGED", PublishError):
        require_gate(place, "0" * 64)


def test_release_is_checked_then_and_there_without_a_digest(place: Place, released: Path) -> None:
    """The tiny tree's llama-server is none: the check finds that, and nothing is promoted."""
    publish(place, released)
    made: list[gate.Check] = []
    with refused("GATE_FAILED", PublishError, match="computes on the CPU"):
        gate.require_gate(place.open(), "b11549-1", made.append)
    assert [check.passed for check in made[:3]] == [True, True, False]


def test_only_what_the_manifest_names_is_fetched_to_be_checked(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with published.serving("github", tmp_path, monkeypatch) as place:
        publish(place, released)
        assets = place.server.release("b11549-1").assets
        evil = github_releases.Asset(999, "../../escaped", b"x")
        assets.append(evil)
        (tmp_path / "a").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a"))
        gate.check_published(place.open(), "b11549-1", lambda _: None)
        assert not list(tmp_path.rglob("escaped"))
        assets[:] = [one for one in assets if one.name not in {"SHA256SUMS", evil.name}]
        with refused("RELEASE_INCOMPLETE", PublishError, match="SHA256SUMS"):
            gate.check_published(place.open(), "b11549-1", lambda _: None)


def test_no_secret_comes_to_the_programs_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FARM_SIGNING_KEY", "FARM_SIGNING_PASSWORD", "GITHUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    assert "s3cret" not in loader.environment({}).values()
    assert loader.environment({"A": "b"})["A"] == "b"
