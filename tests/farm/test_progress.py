"""A run as a person sees it: lines of a file, rows of a terminal, and the estimated end."""

import io
from typing import Any

import pytest
from rich.console import Console

from farm.terminal.progress import BuildReport, Fleet
from tests.rigs import terminal

LONG = "note[LONG]: " + "word " * 40 + "end"
KEYS = {"cu130-seed": 2000.0, "cu130-sm90": 600.0, "cu130-sm120": 300.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fleet(written: io.StringIO, clock: Clock, **options: Any) -> Fleet:
    made = Fleet(BuildReport(Console(file=written, **options), clock), KEYS)
    made.hosts = 2
    return made


def drive(made: Fleet, clock: Clock) -> None:
    made.begin("cu130-seed", "builder-1.example.org:40001")
    made.begin("cu130-sm90", "builder-2.example.org:40001")
    made.step("cu130-seed", "configure")
    clock.now = 20
    made.step("cu130-seed", "compile")
    for done in range(1, 101):
        clock.now = 20 + done
        made.counted("cu130-seed", done, 400)
    made.end("cu130-sm90", "built")


def test_markup_in_a_line_is_shown_as_it_is(written: io.StringIO) -> None:
    with BuildReport(Console(file=written)) as report:
        report.say("error[X]: [red]not red[/red]\x1b[2J\nline")
    assert written.getvalue() == "error[X]: [red]not red[/red]\\x1b[2J\n    line\n"


def test_terminal_gets_long_lines_broken_between_words(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, force_terminal=True, width=80)) as report:
        report.say(LONG)
    lines = [line.strip() for line in written.getvalue().splitlines() if "word" in line]
    assert len(lines) > 2
    assert all(len(line) <= 80 and line.endswith(("word", "end")) for line in lines)


def test_file_gets_long_lines_whole(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, width=80)) as report:
        report.say(LONG)
    assert written.getvalue() == f"{LONG}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_activity_is_shown_on_a_terminal_only(written: io.StringIO, *, terminal: bool) -> None:
    with BuildReport(Console(file=written, force_terminal=terminal, width=100)) as report:
        report.activity("base image cu130: unpacking [/etc/apt]\x1b]0;")
    assert "\x1b]" not in written.getvalue()
    assert ("cu130: unpacking [/etc/apt]" in written.getvalue()) is terminal


@pytest.mark.parametrize("width", [80, 200])
def test_terminal_has_one_row_for_each_set_at_any_width(
    written: io.StringIO, clock: Clock, width: int
) -> None:
    made = fleet(written, clock, width=width)
    drive(made, clock)
    made.report.console.print(made.report.rows)
    title, *rows = written.getvalue().splitlines()[-4:]
    assert max(map(len, rows)) <= width
    assert [row.split()[0] for row in rows] == [*KEYS]
    assert "100/400" in rows[0]
    assert "built" in rows[1]
    assert "waiting" in rows[2]
    assert title == "1 of 3 sets, 2 hosts, about 5:00 left"


def test_low_terminal_shows_what_is_built(written: io.StringIO, clock: Clock) -> None:
    made = fleet(written, clock, width=80, height=3)
    drive(made, clock)
    made.report.console.print(made.report.rows)
    assert [row.split()[0] for row in written.getvalue().splitlines()[-2:]] == ["1", "cu130-seed"]


def test_low_terminal_has_the_whole_table_at_the_end(written: io.StringIO, clock: Clock) -> None:
    with fleet(written, clock, width=80, height=3, force_terminal=True) as made:
        drive(made, clock)
    rows = [line for line in terminal.lines(written.getvalue()) if line]
    assert [row.split()[0] for row in rows[-3:]] == [*KEYS]


def test_end_is_estimated_from_ninjas_counter_and_what_waits(
    written: io.StringIO, clock: Clock
) -> None:
    made = fleet(written, clock)
    drive(made, clock)
    assert made.left() == 300  # the set that waits takes as long, on the host that is free
    made.hosts = 1
    assert made.left() == 600
    made.end("cu130-seed", "failed")
    assert made.left() == 300


def test_nothing_is_estimated_where_nothing_is_known(written: io.StringIO, clock: Clock) -> None:
    made = Fleet(BuildReport(Console(file=written), clock), {"a": None, "b": None})
    assert made.left() is None
    made.begin("a", "here")
    clock.now = 30.0
    made.end("a", "built")
    assert made.left() == 30.0


def test_nothing_is_left_of_an_only_set_when_ninja_is_done(
    written: io.StringIO, clock: Clock
) -> None:
    made = Fleet(BuildReport(Console(file=written), clock), {"a": 900.0})
    made.begin("a", "here")
    made.step("a", "compile")
    for done in (3, 4):
        clock.now = 30.0 * done
        made.counted("a", done, 4)
    *_, before, last = written.getvalue().splitlines()
    assert before.endswith("[3/4] on here, about 13:30 left")
    assert last.endswith("[4/4] on here")


def test_set_is_slow_after_three_times_its_usual_length(written: io.StringIO, clock: Clock) -> None:
    made = fleet(written, clock)
    made.begin("cu130-sm120", "here")
    for clock.now, slow in ((899.0, False), (901.0, True)):
        assert made.is_slow("cu130-sm120") is slow
    assert not made.is_slow("cu130-sm90"), "it has not begun"


def test_longest_set_comes_first_and_an_unknown_one_counts_as_the_median() -> None:
    report = BuildReport(Console(quiet=True))
    recorded = {"a": 10.0, "b": 30.0, "c": 20.0, "d": None}
    assert [*Fleet.longest_first(report, recorded).expected.items()] == [
        ("b", 30.0),
        ("c", 20.0),
        ("d", 20.0),
        ("a", 10.0),
    ]


def test_file_gets_plain_lines_and_not_one_for_every_object(
    written: io.StringIO, clock: Clock
) -> None:
    made = fleet(written, clock, width=80)
    with made:
        drive(made, clock)
    lines = written.getvalue().splitlines()
    assert "\x1b" not in written.getvalue()
    assert lines[0] == "cu130-seed: to builder-1.example.org:40001"
    assert lines[-1] == (
        "cu130-sm90: built on builder-2.example.org:40001 in 2:00, about 5:00 left"
    )
    assert len([line for line in lines if "/400]" in line]) == 6


def test_set_that_a_second_host_has_too_took_as_long_as_it_did(
    written: io.StringIO, clock: Clock
) -> None:
    made = fleet(written, clock, width=200)
    with made:
        made.begin("cu130-sm90", "slow")
        clock.now = 100.0
        made.begin("cu130-sm90", "quick")
        clock.now = 160.0
        made.end("cu130-sm90", "built")
    assert "cu130-sm90: built on quick in 2:40" in written.getvalue()
