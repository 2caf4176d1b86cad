"""A release comes into a channel with a report of its checks, or not at all."""

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from farm import loader, release
from farm.errors import PackError, PublishError
from farm.inputs import packages
from farm.publish import gate, places
from farm.publish.publishing import Known
from tests.rigs import github_releases, http_served, published
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
    """The tiny tree's llama-server is none: the gate finds that; where a key is, nothing starts."""
    publish(place, released)
    made: list[gate.GateCheck] = []
    report = gate.check_published(place.open(), "b11549-1", made.append)
    with refused("GATE_FAILED", PublishError, match="computes on the CPU"):
        report.require_passed()
    assert [check.passed for check in made[:3]] == [True, True, False]
    assert "(is this really a llama-server?" in made[2].detail  # the check's own hint
    made.clear()
    checked = gate.require_gate(place.open(), "b11549-1", made.append)
    assert ([check.passed for check in made], checked) == ([True, True], digest(released))


def test_no_program_is_started_of_a_release_that_is_not_what_its_manifest_says(
    released: Path,
) -> None:
    (released / "SHA256SUMS").write_bytes(b"")
    report = gate.run(released, lambda _: None)
    assert [check.passed for check in report.checks] == [False, True]


@pytest.mark.parametrize("answer", [[1], "x", {"content": 1}])
def test_answer_that_no_llama_server_gives_is_a_check_that_failed(
    released: Path, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(packages, "fetch_model", str)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # gets neither question nor key
    monkeypatch.setenv("no_proxy", "")
    with http_served.serving(lambda _: http_served.Answer(200, answer)) as url:
        served = nullcontext({"url": url, "api_key": ""})
        monkeypatch.setattr(loader, "serving", lambda *_, **__: served)
        check = gate.run(released, lambda _: None).checks[-1]
    assert (check.passed, check.detail[:9]) == (False, "Expected ")


def test_digest_is_that_of_the_manifest_that_was_checked(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder shows the checks another manifest than is to be signed."""
    manifest, verify = released / "manifest.json", release.verify
    honest = manifest.read_bytes()
    lying = json.loads(honest)
    lying["artifacts"][0]["needs"] = ["libevil.so.1"]
    manifest.write_text(json.dumps(lying))

    def show_the_honest_one(*arguments: Any) -> tuple[str, ...]:
        manifest.write_bytes(honest)
        return verify(*arguments)

    monkeypatch.setattr(release, "verify", show_the_honest_one)
    report = gate.run(released, lambda _: None)
    assert digest(released) == hashlib.sha256(honest).hexdigest() != report.manifest_sha256
    assert not report.checks[0].passed


def test_published_file_longer_than_its_manifest_says_is_not_fetched_to_its_end(
    released: Path, tmp_path: Path
) -> None:
    to = places.parse(str(tmp_path / "published"))
    publish(to, released)
    tarball = next((tmp_path / "published").rglob("*.tar.zst"))
    os.truncate(tarball, 1 << 40)
    known = {path.name: Known(1, "0" * 64) for path in tarball.parent.iterdir()}
    with (
        mock.patch.object(to, "present", return_value=known),
        refused("RELEASE_MISMATCH", PackError, "longer"),
    ):
        gate.check_published(to, "b11549-1", lambda _: None)


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
