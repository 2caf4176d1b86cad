"""ZeroGPU's package as the engine meets it: absent, or with errors of its own."""

import sys

import pytest

from llama_loader.errors import SettingError
from llama_space import Engine, zerogpu
from tests.rigs.refusals import refused


def test_zerogpu_without_its_package_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", None)
    with refused("SPACES_MISSING", SettingError, "spaces"):
        Engine()


@pytest.mark.parametrize("error", [RuntimeError("HTTP 500"), ValueError("HTTP\n500"), OSError(5)])
def test_an_error_of_the_package_without_a_title_is_a_failure(error: Exception) -> None:
    failure = zerogpu._explained(error)
    assert (failure.code, failure.exit_status) == ("ZEROGPU_FAILED", 5)
    assert failure.message
    assert "\n" not in failure.message
    assert failure.hint
