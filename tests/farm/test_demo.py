"""The demo without a model: what it builds, where that stays, and what it says at its end."""

import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import requests
from rich.console import Console

from farm import demo, pipeline, preflight, release, source
from farm.demo import Span, rows, seconds, svg
from farm.options import BuildRequest
from farm.pipeline import Made
from farm.terminal.progress import BuildReport
from tests.farm.test_release import changed
from tests.rigs.tiny_release import TINY


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[BuildRequest]:
    """Let the demo build a tree of a few lines, and take its answer for granted."""
    asked: list[BuildRequest] = []
    real = preflight.build

    def build(request: BuildRequest, report: BuildReport) -> tuple[Made, ...]:
        asked.append(request)
        copy = tmp_path / "shared" / "copy"
        return real(replace(request, source=TINY, patches="none", copy=copy), report)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "STATE", tmp_path / "state")
    monkeypatch.setattr("farm.demo.preflight.build", build)
    monkeypatch.setattr("farm.demo.choose_source", lambda _: source.from_folder(TINY))
    monkeypatch.setattr("farm.demo.packages.fetch_model", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr(demo.Demo, "_use", lambda _, trusted, *__: use(trusted[1]))
    return asked


def use(manifest: str) -> str:
    """Answer for a server whose release is what the demo packed, alone."""
    with requests.get(manifest, timeout=60) as answer:
        (only,) = answer.json()["artifacts"]
    assert "cpu-cpu" in only["name"]
    return " Paris."


def run(tmp_path: Path, *, all_cpus: bool = False) -> str:
    said = io.StringIO()
    out = tmp_path / "dist"
    with BuildReport(Console(file=said, width=200)) as report:
        demo.Demo("cpu", "local", None, out / "timeline.svg", all_cpus, out).run(report)
    return said.getvalue()


def test_demo_keeps_its_release_says_how_to_go_on_and_reuses_it(
    asked: list[BuildRequest], tmp_path: Path
) -> None:
    out = tmp_path / "dist"
    first = run(tmp_path)
    assert asked[0].this_cpu
    assert release.load(out).artifacts[0].backend == "cpu"
    assert (out / "timeline.svg").is_file()
    last = first.splitlines()[-8:]
    assert demo.Demo("cpu", "local", None, out).out == Path("dist/demo")  # not another release's
    assert last[0] == f"  the release stays in {out}; the next commands:"
    assert f"    invoke serve-release --folder {out}" in last
    assert f"serve --allow-cpu --manifest file://{out}/manifest.json --model " in last[-3]
    assert last[-2].endswith("invoke build-cpu --engine local")
    mine, copy = tmp_path / "mine", tmp_path / "shared" / "copy"
    mine.write_text("of a person")
    for link in (out / "timeline.svg", copy):  # put there by who may write to that folder
        link.unlink()
        link.symlink_to(mine)
    assert "built already, in an earlier run" in run(tmp_path)
    assert mine.read_text() == "of a person"
    assert not copy.is_symlink()


def test_demo_starts_only_what_it_packed(asked: list[BuildRequest], tmp_path: Path) -> None:
    """Its folder may hold other sets, too."""
    run(tmp_path)
    tree = changed(tmp_path / "state" / "trees" / "cpu-cpu", tmp_path / "tree", arch_set="other")
    release.pack_tree(tree, tmp_path / "dist", "tar.zst")
    (tmp_path / "dist" / "manifest.json").unlink()
    run(tmp_path)
    assert asked
    assert len(release.load(tmp_path / "dist").artifacts) == 2


def test_demo_of_all_cpus_is_the_build_that_build_cpu_makes(
    asked: list[BuildRequest], tmp_path: Path
) -> None:
    run(tmp_path, all_cpus=True)
    assert not asked[0].this_cpu
    plain = replace(asked[0], source=TINY)
    said = io.StringIO()
    with BuildReport(Console(file=said, width=200)) as report:
        preflight.build(plain, report)
    assert "built already, in an earlier run" in said.getvalue()


SPANS = (
    Span("source", "farm", 1.5, 37_700_000),
    Span("build", "farm", 613.0),
    Span("fetch & verify", "loader", 0.04, 9_800_000),
    Span("first token", "server", 0.61),
)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "0 ms"), (0.042, "42 ms"), (0.61, "0.61 s"), (613.2, "613 s")]
)
def test_durations_have_the_digits_that_mean_something(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_table_has_a_row_for_each_span_and_the_total() -> None:
    lines = rows(SPANS)
    assert len(lines) == len(SPANS) + 1
    assert "37.7 MB" in lines[0]
    assert lines[-1].split() == ["total", "615", "s"]


def test_the_picture_has_every_name_and_figure_and_asks_for_nothing() -> None:
    picture = svg(SPANS, title="a < b")
    texts = [(element.text or "").replace("\xa0", " ") for element in ET.fromstring(picture).iter()]
    assert "a < b" in texts
    told = "\n".join(texts)
    for span in SPANS:
        assert span.name in told
        assert span.figures in told
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace(
        "https://www.textualize.io", ""
    )
