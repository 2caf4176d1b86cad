"""The loader's own tests on other Pythons than the farm's, in containers."""

import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import pythons
from docker import DockerClient
from needs import must_or_skip

from farm.errors import UsageError

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1500)]

OTHERS = [
    python
    for python in pythons.DISTRIBUTIONS
    if python != f"{sys.version_info.major}.{sys.version_info.minor}"
]
"""This one runs the same tests, and all the others, already."""


@pytest.fixture(scope="module")
def runs(client: DockerClient) -> Iterator[dict[str, Future[pythons.Run]]]:
    """All of them side by side: they wait more than they work."""
    if shutil.which("uv") is None:
        must_or_skip("uv is not installed, which chooses the packages of another Python")
    del client  # an engine answers; each of them has a connection of its own
    with ThreadPoolExecutor() as pool:
        yield {python: pool.submit(pythons.run, python) for python in OTHERS}


@pytest.mark.parametrize("python", OTHERS)
def test_the_loaders_tests_pass(python: str, runs: dict[str, Future[pythons.Run]]) -> None:
    try:
        done = runs[python].result()
    except UsageError as error:  # no mmdebstrap
        must_or_skip(error.message)
    assert done.status == 0, done.log[-8000:]
    last = done.log.splitlines()[-1]
    passed = re.match(r"(\d+) passed", last)
    assert passed is not None, last
    assert int(passed[1]) > 1000
    assert "skipped" not in last, done.log[-2000:]
