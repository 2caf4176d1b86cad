from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from farm import targets
from farm.plan import BuildPlan, Step
from farm.report import PLAIN_SECONDS, BuildReport
from farm.source import Source

PLAN = BuildPlan(
    targets.load().sets["cpu"],
    targets.load().line("cpu"),
    Source(Path(), None, 1, None, "test", None),
)
COMPILE = Step("compile", ("true",), counts=True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


def test_elsewhere_than_on_a_terminal_there_are_few_plain_lines(written: io.StringIO) -> None:
    clock = Clock()
    with BuildReport(Console(file=written, force_terminal=False), clock=clock) as report:
        report.step(PLAN, COMPILE)
        for done in range(1, 101):
            report.count(done, 100)
            clock.now += PLAIN_SECONDS / 20
    lines = written.getvalue().splitlines()
    assert lines[0] == "cpu-cpu compile …"
    assert lines[-1] == "cpu-cpu compile [100/100]"
    assert 6 <= len(lines) <= 9
    assert not [line for line in lines if "\x1b" in line]


def test_a_terminal_gets_a_bar_with_the_counter(written: io.StringIO) -> None:
    console = Console(file=written, force_terminal=True, width=100)
    with BuildReport(console) as report:
        report.step(PLAN, COMPILE)
        report.count(37, 470)
        report.note("note[NO_CCACHE]: no ccache")
    assert "37/470" in written.getvalue()
    assert "note[NO_CCACHE]: no ccache" in written.getvalue()


def test_what_looks_like_markup_is_shown_as_it_is(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, force_terminal=False)) as report:
        report.say("error[X]: [red]not red[/red]")
    assert written.getvalue() == "error[X]: [red]not red[/red]\n"
