"""Advice by code: what to set for a trouble."""

import dataclasses

import pytest

from llama_loader import settings
from llama_loader.doctor import Check, Examination
from llama_space.values import Failure, Status
from tests.translator.test_panels import RUNNING, WORDS
from translator import advice, panels


def test_each_line_to_set_names_a_variable_that_is_read() -> None:
    lines = [line for one in advice.ADVICES.values() for line in one.settings]
    found = settings.load(environ=dict(line.split("=") for line in lines if "…" not in line))
    assert (found.unknown, found.startup_timeout) == ((), 300.0)


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ((), ()),
        ((("gpu", "NO_GPU"), ("devices", "NO_DEVICE")), ("slow", "devices")),
        ((("devices", "LIST_TIMEOUT"),), ("devices",)),
        ((("test run", "MODEL_ON_CPU"),), ("slow",)),
        ((("model", "MODEL_GATED"),), ("gated",)),
        ((("model", "MODEL_MISSING"),), ("model",)),
        ((("model", "HUB_UNREACHABLE"),), ()),
        ((("runtime", "RELEASE_NOT_CHOSEN"),), ("release",)),
    ],
)
def test_a_failed_check_and_a_failure_are_advised_on_by_code(
    failed: tuple[tuple[str, str], ...], expected: tuple[str, ...]
) -> None:
    checks = [Check(name, ok=False, detail="any words", code=code) for name, code in failed]
    report = Examination([Check("store", ok=True, detail="good", code="NO_DEVICE"), *checks])
    assert advice.of_report(report) == expected
    for (_, code), name in zip(failed, expected, strict=False):
        if code != "LIST_TIMEOUT":
            shown = panels.failure(Failure(code, "it broke", "do this", 5), WORDS)
            assert WORDS[f"advice_{name}_title"] in shown
            assert "do this" in shown


def test_a_model_on_the_cpu_is_said_only_where_it_is() -> None:
    on_cpu = dataclasses.replace(RUNNING, devices=())
    assert advice.of_status(on_cpu) == ("cpu",)
    assert advice.of_status(RUNNING) == ()
    assert advice.of_status(Status("preparing")) == ()
