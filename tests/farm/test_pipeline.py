"""Which image is pulled for a request, and which compiler is accepted."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from farm import pipeline, source, targets
from farm.engines.docker import DockerEngine
from farm.errors import BuildError, EngineError
from farm.inputs import pins
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.terminal.progress import BuildReport
from tests.rigs.refusals import refused

TABLE = targets.load()
IMAGE = "nvidia/cuda:12.4.1-devel-ubuntu22.04"


def reference(image: str | None, line: str = "cu124") -> tuple[str, list[str]]:
    stream = io.StringIO()
    report = BuildReport(Console(file=stream, width=300))
    found = pipeline._reference(BuildRequest(image=image), TABLE.line(line), report)
    return found, stream.getvalue().splitlines()


def test_a_pinned_image_that_is_named_by_its_tag_is_pulled_by_its_digest() -> None:
    pinned = pins.load().image(IMAGE).reference
    assert "@sha256:" in pinned
    assert reference(IMAGE) == (pinned, [])
    assert reference(None) == (pinned, [])


def test_an_image_without_a_pin_is_taken_as_it_is_named_and_said() -> None:
    found, said = reference("nvidia/cuda:12.4.0-devel-ubuntu22.04")
    assert found == "nvidia/cuda:12.4.0-devel-ubuntu22.04"
    assert [line.partition(":")[0] for line in said] == ["note[IMAGE_NOT_PINNED]"]
    digest = f"own/image@sha256:{'0' * 64}"
    assert reference(digest) == (digest, [])


@pytest.mark.parametrize(
    ("line", "image", "archs", "told"),
    [
        ("cpu", "typo", "", "--line cpu; then the same command with --image bookworm"),
        ("cu124", None, "90", "--line cu124; then the same command with --image bookworm-cu124"),
        ("cu128", "typo", "90", "then the same command with --line cu130 --image bookworm-cu130"),
        ("cu128", None, "70", "then the same command with --line cu124 --image bookworm-cu124"),
        (None, "typo", "70", "then the same command with --line cu124 --image bookworm-cu124"),
        ("cu128", None, "70;120", "then build with --line LINE --image NAME"),
    ],
)
def test_the_hint_of_an_image_out_of_reach_names_a_line_that_builds_what_was_asked_for(
    line: str | None, image: str | None, archs: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tools(_: object) -> None:
        raise EngineError("IMAGE_UNAVAILABLE", reference="x", error="no registry")

    monkeypatch.setattr(DockerEngine, "tools", tools)
    engine, report = DockerEngine.__new__(DockerEngine), BuildReport(Console(quiet=True))
    with refused("IMAGE_UNAVAILABLE", EngineError) as caught:
        request, named = BuildRequest(line=line, image=image), TABLE.line(line) if line else None
        sets = (TABLE.custom(archs) if archs else TABLE.sets["cpu"],)
        pipeline.settled(engine, request, named, report, sets)
    assert caught.value.hint.replace("llama-farm-base:", "").endswith(told)


def plan(line: str, tree: Path) -> BuildPlan:
    llama = source.SourceTree(tree, None, 1, None, "x", None)
    return BuildPlan(TABLE.sets["cpu" if line == "cpu" else "sm90"], TABLE.line(line), llama)


@pytest.mark.parametrize(
    ("line", "nvcc"),
    [
        ("cu124", "NVIDIA 12.4.131"),
        ("cu130", "NVIDIA 13.0.88 with host compiler GNU 12.2.0"),
        ("cpu", None),
    ],
)
def test_a_compiler_of_the_line_is_accepted(line: str, nvcc: str | None, tmp_path: Path) -> None:
    pipeline._check_nvcc(plan(line, tmp_path), nvcc)


@pytest.mark.parametrize(
    "nvcc", ["NVIDIA 12.6.20 with host compiler GNU 12.4.0", "NVIDIA 12.40.1", None]
)
def test_a_compiler_of_another_toolkit_is_refused(nvcc: str | None, tmp_path: Path) -> None:
    with refused("TOOLKIT_NOT_OF_LINE", BuildError, r"line cu124 is CUDA 12\.4"):
        pipeline._check_nvcc(plan("cu124", tmp_path), nvcc)
