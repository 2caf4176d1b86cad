"""Devel images of many CUDA versions, made here: a Debian with an nvcc that tells a version."""

from collections.abc import Callable

import pytest
from docker import DockerClient
from verbs import PROJECT, invoke

from farm import plan
from farm.engines.docker import DockerEngine
from farm.errors import EngineError
from tests.rigs.refusals import refused

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"


def check(*argv: str) -> tuple[int, str]:
    done = invoke(
        *("build-cuda", "--check", "--engine", "docker", "--archs", "90-real"),
        *("--source", str(TINY), "--patches", "none", *argv),
    )
    return done.returncode, done.stderr + done.stdout


@pytest.mark.parametrize(
    ("version", "line"),
    [("12.0", "cu120"), ("13.4", "cu134")],
)
def test_line_follows_from_the_image_s_own_nvcc(
    cuda_image: Callable[..., str], version: str, line: str
) -> None:
    status, told = check("--image", cuda_image(version))
    assert status == 0, told
    assert f"has CUDA {version}, glibc 2.36" in told
    assert f"b0-{line}-sm90-linux" in told


def test_nvcc_elsewhere_is_found_and_tells_its_architectures(
    cuda_image: Callable[..., str],
) -> None:
    status, told = check("--image", cuda_image("13.9", "/opt/cuda", "sm_100 sm_120"))
    assert status == 2
    assert "note[CUDA_MINOR_UNCHECKED]: CUDA 13.9" in told
    assert "error[ARCH_NOT_IN_LINE]" in told
    assert "it builds 100, 120;" in told


def test_everything_that_contradicts_the_line_is_told_before_a_compiler_starts(
    cuda_image: Callable[..., str],
) -> None:
    newer = "RUN printf '#!/bin/sh\\necho glibc 2.41\\n' > /usr/bin/getconf"
    status, told = check("--image", cuda_image("12.6", more=newer), "--line", "cu128")
    assert status == 2
    assert "error[TOOLKIT_NOT_OF_LINE]: line cu128 is CUDA 12.8" in told
    assert "error[IMAGE_GLIBC_TOO_NEW]" in told
    assert "compile" not in told.replace("compiled", "")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ("RUN printf '#!/bin/sh\\nexec seq 400000\\n' > /usr/bin/getconf", "ANSWER_ENDLESS"),
        ("RUN printf '#!/bin/sh\\nexec sleep 99\\n' > /usr/bin/getconf", "ANSWER_ENDLESS"),
        ("ONBUILD RUN touch /ran", "IMAGE_ONBUILD"),
    ],
    ids=["prints", "sleeps", "onbuild"],
)
def test_image_that_answers_without_end_or_runs_programs_with_a_network_is_refused(
    client: DockerClient,
    cuda_image: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    code: str,
) -> None:
    monkeypatch.setattr(plan, "ANSWER_SECONDS", 5.0)
    image = cuda_image("12.6", more=more)
    with refused(code, EngineError):
        DockerEngine(client, reference=image).tools()


def test_image_without_nvcc_and_one_of_another_major_are_refused(
    cuda_image: Callable[..., str], base_image: str
) -> None:
    status, told = check("--image", base_image)
    assert (status, "error[NVCC_MISSING]" in told) == (2, True), told
    status, told = check("--image", cuda_image("11.8"))
    assert (status, "error[LINE_OF_IMAGE_UNKNOWN]" in told) == (2, True), told
