"""A release comes into a channel with a report of its checks, or not at all."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from farm import loader, release
from farm.errors import FarmError, PublishError, UsageError
from farm.publish import figures, gate, last_report, parts, places, promotion, publishing
from farm.publish.figures import Figures
from llama_loader import manifest as schema
from tests.rigs import fake_nvml, github_releases, published, tiny_release
from tests.rigs.published import Place, publish

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


H200 = Figures("H200", 0.6, 20000.0, 400.0)
SLOW = Figures("H200", 0.6, 20000.0, 300.0)
NO_GPU = gate.Check("not slower than the last release", passed=None, detail="no GPU")


def report(
    folder: Path, *, passed: bool = True, measured: Figures | None = None, moment: str = "00"
) -> bytes:
    """Write a report beside a release, as a machine with or without a GPU would; returns it."""
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    checks = (gate.Check("starts", passed, "it does"), NO_GPU)
    name = schema.parse((folder / "manifest.json").read_bytes()).release
    made = gate.Report(name, manifest, f"2026-11-23T00:00:{moment}+00:00", checks, measured)
    content = msgspec.json.encode(made)
    (folder / "gate.json").write_bytes(content)
    return content


def require_gate(place: Place, released: Path) -> str:
    """Ask for the manifest that was checked, as the next job of a workflow does."""
    digest = hashlib.sha256((released / "manifest.json").read_bytes()).hexdigest()
    return promotion.require_gate(place.open(), "b11549-1", lambda _: None, checked=digest)


def test_a_report_of_these_bytes_lets_it_through(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    assert "gate.json" in place.open().present("b11549-1")
    require_gate(place, released)


def test_report_that_lies_at_the_place_counts_for_no_manifest_that_was_not_named(
    place: Place, released: Path
) -> None:
    """The tiny tree's llama-server is none: only a report that is not signed says it passed."""
    report(released)
    publish(place, released)
    with pytest.raises(PublishError) as refused:
        promotion.require_gate(place.open(), "b11549-1", lambda _: None)
    assert refused.value.code == "GATE_FAILED"


def test_another_manifest_than_was_checked_does_not_pass(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    with pytest.raises(PublishError) as refused:
        promotion.require_gate(place.open(), "b11549-1", lambda _: None, checked="0" * 64)
    assert refused.value.code == "RELEASE_CHANGED"


def test_own_report_of_a_folder_vouches_for_what_is_published_of_it(
    released: Path, tmp_path: Path
) -> None:
    to = places.parse(str(tmp_path / "published"))
    plan = publishing.prepare(released, to, lambda _: None)
    assert publishing.passed(released, plan) is None
    report(released)
    assert publishing.passed(released, plan) == plan.parts[-1].sha256
    report(released, passed=False)
    with pytest.raises(PublishError) as refused:
        publishing.passed(released, plan)
    assert refused.value.code == "GATE_FAILED"


def test_a_failed_check_does_not(place: Place, released: Path) -> None:
    report(released, passed=False)
    publish(place, released)
    with pytest.raises(PublishError) as refused:
        require_gate(place, released)
    assert refused.value.code == "GATE_FAILED"
    assert "starts" in refused.value.message


def test_a_second_report_does_not_stand_in_the_way(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    (released / "gate.json").write_bytes((released / "gate.json").read_bytes() + b" ")
    assert publishing.prepare(released, place.open()).new == ()


def test_a_report_of_nothing_does_not(released: Path) -> None:
    manifest = (released / "manifest.json").read_bytes()
    empty = gate.Report("b11549-1", hashlib.sha256(manifest).hexdigest(), "", ())
    with pytest.raises(PublishError) as refused:
        gate.require_passed(msgspec.json.encode(empty), manifest, what="it")
    assert refused.value.code == "GATE_FAILED"


def test_a_report_of_other_bytes_does_not(released: Path) -> None:
    content = report(released)
    with pytest.raises(PublishError) as refused:
        gate.require_passed(content, b"another manifest", what="it")
    assert refused.value.code == "GATE_OF_OTHER_BYTES"


def test_a_report_that_is_left_over_from_another_manifest_is_not_published(
    released: Path, tmp_path: Path
) -> None:
    report(released)
    release.write(released, serial=8)
    with pytest.raises(PublishError) as refused:
        publishing.prepare(released, places.parse(str(tmp_path / "published")), lambda _: None)
    assert refused.value.code == "GATE_OF_OTHER_BYTES"
    assert "invoke gate" in refused.value.hint


def test_without_a_report_it_is_checked_then_and_there(released: Path, tmp_path: Path) -> None:
    """The tiny tree's llama-server is none: the check finds that, and nothing is promoted."""
    to = places.parse(str(tmp_path / "published"))
    publishing.publish(publishing.prepare(released, to), to, lambda _: None)
    made: list[gate.Check] = []
    with pytest.raises(PublishError) as refused:
        promotion.require_gate(to, "b11549-1", made.append)
    assert refused.value.code == "GATE_FAILED"
    assert [check.passed for check in made[:3]] == [True, True, False]
    assert "gate.json" not in to.present("b11549-1")


# one more report of a published release


def test_a_machine_with_a_gpu_adds_its_report_to_the_published_one(
    place: Place, released: Path
) -> None:
    first = report(released)
    publish(place, released)
    second = report(released, measured=H200, moment="01")
    publish(place, released)
    to = place.open()
    assert parts.reports(to.present("b11549-1")) == ("gate-2.json", "gate.json")
    assert b"".join(to.read("b11549-1", "gate.json")) == first  # as it was
    assert b"".join(to.read("b11549-1", "gate-2.json")) == second
    assert place.large_files_sent() == 1
    assert publishing.prepare(released, to, lambda _: None).new == ()
    assert list(last_report.figures(to, "b11550-1")) == [H200]
    assert list(last_report.figures(to, "b11549-1")) == []  # its own is no measure for it


def test_the_newest_report_decides(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    require_gate(place, released)
    report(released, passed=False, moment="01")
    publish(place, released)
    with pytest.raises(PublishError) as refused:
        require_gate(place, released)
    assert refused.value.code == "GATE_FAILED"
    assert "--release" in refused.value.hint
    report(released, moment="02")
    publish(place, released)
    require_gate(place, released)
    assert parts.reports(place.open().present("b11549-1"))[0] == "gate-3.json"


def test_a_report_without_figures_does_not_hide_the_figures(released: Path, tmp_path: Path) -> None:
    to = places.parse(str(tmp_path / "published"))

    def send() -> tuple[str, ...]:
        publishing.publish(publishing.prepare(released, to, lambda _: None), to, lambda _: None)
        return parts.reports(to.present("b11549-1"))

    report(released, measured=H200)
    assert send() == ("gate.json",)
    report(released, moment="01")  # the same verdict, nothing measured
    assert send() == ("gate.json",)
    report(released, passed=False, moment="02")
    assert send() == ("gate-2.json", "gate.json")
    assert list(last_report.figures(to, "later")) == [H200]


def test_a_published_release_is_checked_where_it_lies_and_the_report_added(
    place: Place, released: Path
) -> None:
    """The tiny tree's llama-server is none: the added report says so, and stands in the way."""
    report(released)
    publish(place, released)
    made = promotion.check(place.open(), "b11549-1", lambda _: None)
    assert made.failed
    published = b"".join(place.open().read("b11549-1", "gate-2.json"))
    assert gate.decode(published, what="it") == made
    with pytest.raises(PublishError) as refused:
        require_gate(place, released)
    assert refused.value.code == "GATE_FAILED"


def test_only_what_the_manifest_names_is_fetched_to_be_checked(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with published.serving("github", tmp_path, monkeypatch) as place:
        publish(place, released)
        evil = github_releases.Asset(999, "../../escaped", b"x")
        place.server.release("b11549-1").assets.append(evil)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        (tmp_path / "a").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a"))
        promotion.check(place.open(), "b11549-1", lambda _: None)
        assert not list(tmp_path.rglob("escaped"))
        evil.name = "SHA256SUMS"
        place.server.release("b11549-1").assets[:] = [
            one for one in place.server.release("b11549-1").assets if one.name != "SHA256SUMS"
        ]
        with pytest.raises(PublishError) as refused:
            promotion.check(place.open(), "b11549-1", lambda _: None)
        assert refused.value.code == "RELEASE_INCOMPLETE"
        assert "SHA256SUMS" in refused.value.message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "gate.json"),
        (["manifest.json", "gate-x.json", "gate-0.json", "gate-01.json"], "gate.json"),
        (["gate.json"], "gate-2.json"),
        (["gate-10.json", "gate-9.json", "gate.json"], "gate-11.json"),
    ],
)
def test_the_name_of_the_next_report(names: list[str], expected: str) -> None:
    assert parts.next_report(names) == expected


# figures of a GPU


def figures_of(seconds: float, read: float, written: float, gpu: str = "H200") -> Figures:
    return Figures(gpu, seconds, read, written)


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        ((1.0, 1000.0, 100.0), ()),
        ((0.5, 2000.0, 200.0), ()),
        ((1.05, 950.0, 95.0), ()),  # five per cent are allowed
        ((1.051, 1000.0, 100.0), ("first token",)),
        ((1.0, 949.0, 100.0), ("tokens read",)),
        ((1.0, 1000.0, 94.9), ("tokens written",)),
        ((1.2, 10.0, 1.0), ("first token", "tokens read", "tokens written")),
    ],
)
def test_what_is_worse(now: tuple[float, float, float], worse: tuple[str, ...]) -> None:
    last = figures_of(1.0, 1000.0, 100.0)
    assert figures.worse(figures_of(*now), last) == worse
    check = gate.compare(figures_of(*now), [last])
    assert check.passed is not bool(worse)
    assert all(name in check.detail for name in worse)


def test_figures_are_compared_with_the_newest_of_the_same_gpu() -> None:
    earlier = [figures_of(1, 1, 1, "L4"), figures_of(1.0, 1000.0, 100.0), figures_of(9, 9, 9)]
    assert figures.last_on("H200", earlier) == earlier[1]
    assert gate.compare(figures_of(1.2, 1000.0, 100.0), earlier).passed is False
    assert gate.compare(figures_of(9.0, 1.0, 1.0, "RTX Pro 6000"), earlier).passed is None


def test_the_first_release_has_nothing_to_be_compared_with() -> None:
    check = gate.compare(H200, [])
    assert check.passed is None
    assert "no earlier release" in check.detail
    assert "0.60 s to the first token, 20000 tokens/s read, 400 tokens/s written" in check.detail


@pytest.mark.parametrize(
    ("rounds", "passed", "best"),
    [
        ([(0.9, 1100.0, 110.0)], True, (0.9, 1100.0, 110.0)),
        ([(1.2, 1000.0, 80.0), (1.0, 900.0, 100.0)], True, (1.0, 1000.0, 100.0)),
        ([(1.2, 1000.0, 80.0), (1.2, 1000.0, 90.0), (1.0, 9.0, 96.0)], True, (1.0, 1000.0, 96.0)),
        ([(1.2, 1000.0, 100.0)] * 3, False, (1.2, 1000.0, 100.0)),
    ],
)
def test_figures_that_are_worse_are_measured_again_and_the_best_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rounds: list[tuple[float, float, float]],
    passed: bool,
    best: tuple[float, float, float],
) -> None:
    to_come = [figures_of(*one) for one in rounds]
    monkeypatch.setattr("farm.publish.figures.gpu", lambda: "H200")
    monkeypatch.setattr("farm.publish.figures.measure", lambda *_: to_come.pop(0))
    monkeypatch.setattr("farm.publish.gate._model", lambda: tmp_path)
    kept: list[Figures] = []
    earlier = iter([figures_of(9, 9, 9, "L4"), figures_of(1.0, 1000.0, 100.0)])
    check = gate._on_the_gpu(tmp_path, earlier, kept)
    assert (check.passed, kept, to_come) == (passed, [figures_of(*best)], [])


@pytest.mark.parametrize("field", ["first_token", "prompt_tokens_per_second", "tokens_per_second"])
def test_a_figure_that_is_nothing_is_no_report(field: str, released: Path) -> None:
    content = report(released, measured=H200)
    value = getattr(H200, field)
    broken = content.replace(f'"{field}":{value}'.encode(), f'"{field}":0.0'.encode())
    assert broken != content
    with pytest.raises(PublishError) as refused:
        gate.decode(broken, what="it")
    assert refused.value.code == "GATE_INVALID"


def test_a_release_that_was_too_slow_is_no_measure_for_the_next_one(
    kept: Path, tmp_path: Path
) -> None:
    to = places.parse(str(tmp_path / "published"))
    for build, measured, passed in ((9999, H200, True), (11549, SLOW, False)):
        folder = tiny_release.of_build(kept, max(build, 11500), tmp_path, name=f"b{build}-1")
        report(folder, measured=measured, passed=passed)
        publishing.publish(publishing.prepare(folder, to, lambda _: None), to, lambda _: None)
    assert to.releases() == ("b9999-1", "b11549-1")
    assert list(last_report.figures(to, "b11550-1")) == [H200]


def test_the_place_of_earlier_releases_is_looked_at_before_the_checks(tmp_path: Path) -> None:
    """Figures are read when they are needed; a place that cannot be read is said at once."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        last_report.figures(places.parse(str(tmp_path / "file")), "b1-1")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand for the loader: three servers, each slower than the one before; returns the calls."""
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

    monkeypatch.setattr("farm.loader.told", lambda *argv: calls.clear() or {"argv": argv})
    monkeypatch.setattr("farm.loader.serving", serving)
    monkeypatch.setattr("farm.loader.complete", complete)
    return calls


def test_what_is_measured_is_the_median_of_cold_starts(
    measured: list[dict[str, Any]], released: Path
) -> None:
    found = figures.measure(released, Path("model.gguf"), "H200", rounds=3)
    assert found == Figures("H200", 0.75, 5000.0, 500.0)
    assert [(len(one["prompt"]), one["tokens"]) for one in measured] == [(512, 128)] * 3
    compiled = {one["CUDA_CACHE_PATH"] for one in measured}
    assert len(compiled) == 3  # an empty cache each: code for the driver to compile shows
    assert all(f"file://{released}/manifest.json" in one["options"] for one in measured)


def test_the_gate_measures_where_the_loader_sees_a_gpu(
    measured: list[dict[str, Any]], released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.publish.gate._model", lambda: Path("model.gguf"))
    monkeypatch.setattr("farm.publish.figures.gpu", lambda: "H200")
    made = gate.run(released, [figures_of(9.0, 1.0, 1.0)], lambda _: None)
    assert len(measured) == 5
    assert made.figures is not None
    assert made.figures.first_token == 1.0
    assert round(made.figures.tokens_per_second) == 333
    assert made.checks[-1].passed is True
    assert gate.decode((released / "gate.json").read_bytes(), what="it") == made
    again = gate.run(released, [figures_of(0.1, 1.0, 1.0)], lambda _: None)
    assert again.checks[-1].passed is False
    assert again.failed[-1] == "not slower than the last release"


@pytest.mark.parametrize(
    "trouble",
    [FarmError("LOADER_FAILED", "ended"), OSError("no route"), KeyError("timings"), ValueError()],
)
def test_a_measurement_that_fails_is_a_check_that_failed(
    trouble: Exception, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Figures:
        raise trouble

    monkeypatch.setattr("farm.publish.gate._model", lambda: Path("model.gguf"))
    monkeypatch.setattr("farm.publish.figures.gpu", lambda: "H200")
    monkeypatch.setattr("farm.publish.figures.measure", fail)
    made = gate.run(released, [], lambda _: None)
    assert made.checks[-1].passed is False
    assert made.figures is None


def test_the_gpu_is_the_one_that_the_loader_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_nvml.compiled(tmp_path)))
    assert figures.gpu() == "NVIDIA H200"
    monkeypatch.setattr("farm.loader._COMMAND", ("sh", "-c", "echo broken >&2; exit 3"))
    with pytest.raises(FarmError, match="broken"):  # "none" would be a guess
        figures.gpu()


def test_no_secret_comes_to_the_programs_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FARM_SIGNING_KEY", "FARM_SIGNING_PASSWORD", "GITHUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    assert "s3cret" not in loader.environment({}).values()
    assert loader.environment({"A": "b"})["A"] == "b"
