import io

import pytest
from rich.console import Console

from farm.terminal.report import BuildReport

LONG = "note[LONG]: " + "word " * 40 + "end"


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


def test_what_looks_like_markup_is_shown_as_it_is(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, force_terminal=False)) as report:
        report.say("error[X]: [red]not red[/red]")
    assert written.getvalue() == "error[X]: [red]not red[/red]\n"


def test_a_terminal_gets_long_lines_broken_between_words(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, force_terminal=True, width=80)) as report:
        report.say(LONG)
    lines = [line.strip() for line in written.getvalue().splitlines() if "word" in line]
    assert len(lines) > 2
    assert all(len(line) <= 80 for line in lines)
    assert all(line.endswith(("word", "end")) for line in lines)


def test_a_file_gets_long_lines_whole(written: io.StringIO) -> None:
    with BuildReport(Console(file=written, force_terminal=False, width=80)) as report:
        report.say(LONG)
    assert written.getvalue() == f"{LONG}\n"


def test_what_is_being_done_is_shown_on_a_terminal_only(written: io.StringIO) -> None:
    file = io.StringIO()
    for stream, terminal in ((written, True), (file, False)):
        with BuildReport(Console(file=stream, force_terminal=terminal, width=100)) as report:
            report.activity("base image cu130: unpacking")
    assert "base image cu130: unpacking" in written.getvalue()
    assert file.getvalue() == ""
