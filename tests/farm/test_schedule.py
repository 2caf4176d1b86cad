"""Longest first: against the best schedule there can be, and as a person sees it."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from farm import targets
from farm.plan import BuildPlan, Step
from farm.source import Source
from farm.terminal import schedule
from farm.terminal.fleet import Fleet, SetReporter
from farm.terminal.report import BuildReport


@given(
    st.lists(st.floats(1.0, 1e4), min_size=1, max_size=40),
    st.integers(1, 16),
)
def test_longest_first_keeps_grahams_bound(durations: list[float], hosts: int) -> None:
    ordered = sorted(durations, reverse=True)
    end = schedule.finish(ordered, [0.0] * hosts)
    least = schedule.lower_bound(durations, hosts)
    assert end >= least * (1 - 1e-9)
    # Of any order: no host is idle while a set waits (Graham 1966).
    assert end <= (sum(durations) / hosts + (1 - 1 / hosts) * max(durations)) * (1 + 1e-9)


def test_grahams_own_worst_case_for_two_hosts() -> None:
    assert schedule.finish([3, 3, 2, 2, 2], [0, 0]) == 7
    assert schedule.lower_bound([3, 3, 2, 2, 2], 2) == 6


def test_a_busy_host_gets_less() -> None:
    assert schedule.finish([5, 5], [0, 100]) == 100
    assert schedule.finish([5, 5], [0, 7]) == 10


def test_what_is_not_recorded_is_taken_as_the_median() -> None:
    seconds = schedule.expected(["a", "b", "c", "d"], {"a": 10, "b": 30, "c": 20})
    assert seconds == {"a": 10, "b": 30, "c": 20, "d": 20}
    assert schedule.longest_first(seconds) == ["b", "c", "d", "a"]
    assert set(schedule.expected(["x"], {}).values()) == {schedule.UNKNOWN_SECONDS}


_TABLE = targets.load()
PLAN = BuildPlan(
    _TABLE.sets["cpu"], _TABLE.line("cpu"), Source(Path(), None, 0, None, "test", None)
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet(console: Console) -> tuple[Fleet, Clock]:
    clock = Clock()
    keys = {"cu130-seed": 2000.0, "cu130-sm90": 600.0, "cu130-sm120": 300.0}
    made = Fleet(BuildReport(console), keys, clock=clock)
    made.hosts = 2
    return made, clock


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


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("colour", [True, False])
def test_a_table_has_one_line_for_each_set_at_any_width(width: int, *, colour: bool) -> None:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=True, no_color=not colour, color_system="standard"
    )
    made, clock = fleet(console)
    drive(made, clock)
    stream.truncate(0)
    stream.seek(0)
    console.print(made.table())
    plain = Console(file=io.StringIO(), width=width)
    plain.print(made.table())
    assert isinstance(plain.file, io.StringIO)
    lines = plain.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("1 of 3 sets, 2 hosts, 2:00 passed, about ")
    assert [line.split()[0] for line in lines[2:]] == ["cu130-seed", "cu130-sm90", "cu130-sm120"]
    assert "100/400" in lines[2]
    assert ("\x1b[32m" in stream.getvalue()) is colour


@pytest.mark.parametrize("height", [5, 24, 25])
def test_a_low_terminal_shows_what_runs_and_what_has_failed(height: int) -> None:
    keys = {f"cu130-{number:02}": 60.0 for number in range(23)}
    made = Fleet(BuildReport(Console(file=io.StringIO())), keys, clock=Clock())
    for key in list(keys)[:11]:
        made.begin(key, "here")
        made.end(key, "failed" if key == "cu130-04" else "built")
    made.begin("cu130-11", "here")
    plain = Console(file=io.StringIO(), width=80)
    plain.print(made.table(height))
    assert isinstance(plain.file, io.StringIO)
    title, _, *rows = plain.file.getvalue().splitlines()
    assert title.startswith("11 of 23 sets")
    names = [row.split()[0] for row in rows]
    assert names == (list(keys) if height >= 25 else ["cu130-04", "cu130-11"])


def test_the_end_is_estimated_from_ninjas_counter_and_what_waits() -> None:
    made, clock = fleet(Console(file=io.StringIO()))
    drive(made, clock)
    assert made.rows["cu130-seed"].left(120) == 300
    assert made.left() == 300  # the set that waits takes 300, on the host that is free
    made.hosts = 1
    assert made.left() == 600


def build(clock: Clock, *, hits: int, jobs: int, known: float | None = None) -> Fleet:
    """Let a set of 470 edges come to 12 s: hits of 10 ms first, then compilers of 2 s an edge."""
    made = Fleet(BuildReport(Console(file=io.StringIO())), {"cpu": known}, clock)
    made.begin("cpu", "here")
    SetReporter(made, "cpu").step(PLAN, Step("compile", ("cmake", "-j", str(jobs)), counts=True))
    for done in range(1, hits + 1):
        clock.now = done * 0.01 / jobs
        made.counted("cpu", done, 470)
    began, done = clock.now, hits
    while done < 470 and clock.now < began + 12 * 2:
        done += 1
        clock.now = began + (done - hits) * 2 / jobs
        made.counted("cpu", done, 470)
    return made


@pytest.mark.parametrize("jobs", [1, 2, 16, 64])
def test_the_estimate_counts_no_hits_of_a_compiler_cache_as_speed(jobs: int) -> None:
    made = build(Clock(), hits=300, jobs=jobs)
    done = made.rows["cpu"].count
    assert done is not None
    left = made.left()
    assert left == pytest.approx((470 - done[0]) * 2 / jobs, rel=0.15, abs=1)


def test_hits_that_a_busy_machine_makes_slow_are_forgotten_when_compilers_take_longer() -> None:
    clock = Clock()
    made = build(clock, hits=0, jobs=2)
    row, began = made.rows["cpu"], clock.now
    for done in range(1, 101):  # half a second of a compiler each: as fast as they are, they count
        clock.now = began + done / 4
        made.counted("cpu", 24 + done, 470)
    told = [row.left(clock.now)]
    for minute in range(1, 6):  # now one every ten seconds
        for step in range(6):
            clock.now += 10
            made.counted("cpu", 124 + 6 * minute - 5 + step, 470)
        told.append(row.left(clock.now))
    assert told == sorted(told), told
    assert told[-1] == pytest.approx((470 - 154) * 10, rel=0.3)


def test_silence_makes_the_estimate_longer() -> None:
    clock = Clock()
    made = build(clock, hits=0, jobs=2)
    before = made.left()
    clock.now += 60
    after = made.left()
    assert before is not None
    assert after is not None
    assert after > before + 60


def test_as_long_as_there_were_hits_alone_what_was_recorded_is_told() -> None:
    clock = Clock()
    assert build(clock, hits=470, jobs=2).left() is None
    clock.now = 0.0
    whole = build(clock, hits=470, jobs=2, known=600.0).left()
    assert whole == pytest.approx(600 - clock.now)


def test_piped_it_is_plain_lines_and_not_one_for_every_object() -> None:
    stream = io.StringIO()
    made, clock = fleet(Console(file=stream, width=80))
    with made:
        drive(made, clock)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "cu130-seed: to builder-1.example.org:40001"
    assert lines[-1] == (
        "cu130-sm90: built on builder-2.example.org:40001 in 2:00, about 5:00 left"
    )
    assert len([line for line in lines if "/400]" in line]) == 6


def test_a_set_that_a_second_host_has_too_took_as_long_as_it_did() -> None:
    stream = io.StringIO()
    made, clock = fleet(Console(file=stream, width=200))
    with made:
        made.begin("cu130-sm90", "slow")
        clock.now = 100.0
        made.begin("cu130-sm90", "quick")
        clock.now = 160.0
        made.end("cu130-sm90", "built")
    assert "cu130-sm90: built on quick in 2:40" in stream.getvalue()
