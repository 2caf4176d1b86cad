"""A release comes into a channel with a report of its checks, or not at all."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from farm import loader, release
from farm.errors import FarmError, PublishError
from farm.publish import gate, places, publishing
from farm.publish.gate import Figures
from tests.rigs import fake_nvml, github_releases, published
from tests.rigs.published import Place, publish, report
from tests.rigs.refusals import refused


def require_gate(place: Place, checked: str | None) -> None:
    gate.require_gate(place.open(), "b11549-1", lambda _: None, checked=checked)


def digest(released: Path) -> str:
    return hashlib.sha256((released / "manifest.json").read_bytes()).hexdigest()


def test_report_counts_for_the_very_manifest_that_was_named(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    assert "gate.json" in place.open().present("b11549-1")
    require_gate(place, digest(released))
    with refused("RELEASE_CHANGED", PublishError):
        require_gate(place, "0" * 64)


def test_report_that_lies_at_the_place_counts_for_no_manifest_that_was_not_named(
    place: Place, released: Path
) -> None:
    """The tiny tree's llama-server is none: only a report that is not signed says it passed."""
    report(released)
    publish(place, released)
    with refused("GATE_FAILED", PublishError):
        require_gate(place, None)


def test_a_failed_check_stands_in_the_way_at_the_place_and_in_the_folder(
    place: Place, released: Path
) -> None:
    report(released, passed=False)
    publish(place, released)
    with refused("GATE_FAILED", PublishError, match="starts"):
        require_gate(place, digest(released))
    plan = publishing.prepare(released, place.open(), lambda _: None)
    with pytest.raises(PublishError, match="starts"):
        publishing.passed(released, plan)
    report(released)
    assert publishing.passed(released, plan) == plan.parts[-1].sha256
    (released / "gate.json").unlink()
    assert publishing.passed(released, plan) is None


def test_a_report_of_nothing_or_of_other_bytes_lets_nothing_through(released: Path) -> None:
    manifest = (released / "manifest.json").read_bytes()
    empty = msgspec.json.encode(gate.Report("b11549-1", digest(released), "", ()))
    for content, of, code in (
        (empty, manifest, "GATE_FAILED"),
        (report(released), b"another manifest", "GATE_OF_OTHER_BYTES"),
        (b"{}", manifest, "GATE_INVALID"),
    ):
        with pytest.raises(PublishError) as caught:
            gate.require_passed(content, of, what="it")
        assert caught.value.code == code


def test_a_report_that_is_left_over_from_another_manifest_is_not_published(
    released: Path, tmp_path: Path
) -> None:
    report(released)
    release.write(released, serial=8)
    with refused("GATE_OF_OTHER_BYTES", PublishError) as caught:
        publishing.prepare(released, places.parse(str(tmp_path / "published")), lambda _: None)
    assert "invoke gate" in caught.value.hint


def test_without_a_report_it_is_checked_then_and_there(released: Path, tmp_path: Path) -> None:
    """The tiny tree's llama-server is none: the check finds that, and nothing is promoted."""
    to = places.parse(str(tmp_path / "published"))
    publish(to, released)
    made: list[gate.Check] = []
    with refused("GATE_FAILED", PublishError):
        gate.require_gate(to, "b11549-1", made.append, checked=digest(released))
    assert [check.passed for check in made[:3]] == [True, True, False]
    assert "gate.json" not in to.present("b11549-1")


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


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand for the loader: servers, each slower than the one before; returns the calls."""
    calls: list[dict[str, Any]] = []

    @contextmanager
    def serving(*options: str, variables: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        calls.append({"options": options, **variables})
        stages = [{"name": "fetch", "seconds": 0.25}, {"name": "ready", "seconds": len(calls) / 4}]
        yield {"url": "http://server", "timeline": stages}

    def complete(served: Mapping[str, Any], prompt: list[int], tokens: int) -> dict[str, Any]:
        calls[-1].update(url=served["url"], prompt=prompt, tokens=tokens)
        speed = 1000.0 / len(calls)
        return {"timings": {"prompt_per_second": speed * 10, "predicted_per_second": speed}}

    def told(*_: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
        del variables
        calls.clear()
        return {"test_run": None}

    monkeypatch.setattr("farm.loader.told", told)
    monkeypatch.setattr("farm.loader.serving", serving)
    monkeypatch.setattr("farm.loader.complete", complete)
    monkeypatch.setattr("farm.publish.gate._model", lambda: Path("model.gguf"))
    monkeypatch.setattr("farm.publish.gate.gpu", lambda: "H200")
    return calls


def test_the_gate_keeps_medians_of_cold_starts_where_the_loader_sees_a_gpu(
    measured: list[dict[str, Any]], released: Path
) -> None:
    made = gate.run(released, lambda _: None)
    assert made.figures == Figures("H200", 1.0, 1000 / 3 * 10, 1000 / 3)
    assert made.checks[-1].passed is True
    assert made.checks[-1].detail == (
        "H200: 1.00 s to the first token, 3333 tokens/s read, 333 tokens/s written"
    )
    assert msgspec.json.decode((released / "gate.json").read_bytes(), type=gate.Report) == made
    assert [(len(one["prompt"]), one["tokens"]) for one in measured] == [(512, 128)] * 5
    compiled = {one["CUDA_CACHE_PATH"] for one in measured}
    assert len(compiled) == 5  # an empty cache each: code for the driver to compile shows
    assert all(f"file://{released}/manifest.json" in one["options"] for one in measured)


@pytest.mark.usefixtures("measured")
def test_where_no_gpu_is_nothing_is_measured_and_the_report_says_so(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.publish.gate.gpu", lambda: None)
    made = gate.run(released, lambda _: None)
    assert (made.figures, made.checks[-1].passed) == (None, None)
    assert "no NVIDIA GPU" in made.checks[-1].detail


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "trouble",
    [FarmError("LOADER_FAILED", "ended"), OSError("no route"), KeyError("timings"), ValueError()],
)
def test_a_measurement_that_fails_is_a_check_that_failed(
    trouble: Exception, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Figures:
        raise trouble

    monkeypatch.setattr("farm.publish.gate.measure", fail)
    made = gate.run(released, lambda _: None)
    assert made.checks[-1].passed is False
    assert made.figures is None


def test_the_gpu_is_the_one_that_the_loader_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_nvml.compiled(tmp_path)))
    assert gate.gpu() == "NVIDIA H200"
    monkeypatch.setattr("farm.loader._COMMAND", ("sh", "-c", "echo broken >&2; exit 3"))
    with pytest.raises(FarmError, match="broken"):  # "none" would be a guess
        gate.gpu()


def test_no_secret_comes_to_the_programs_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FARM_SIGNING_KEY", "FARM_SIGNING_PASSWORD", "GITHUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    assert "s3cret" not in loader.environment({}).values()
    assert loader.environment({"A": "b"})["A"] == "b"
