"""Two machines (two caches) that share compiled objects: Redis, HTTP, S3, a folder, for real."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ccache_bound
import pytest
import redis_server
import s3_server
from needs import must_or_skip
from object_storage import ObjectStorage
from s3_server import S3Server
from verbs import PROJECT, invoke

from farm import source, targets
from farm.engines import shared_cache
from farm.engines.local import LocalEngine
from farm.errors import UsageError
from farm.execute import execute
from farm.plan import BuildPlan, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


@dataclass
class Person:
    """Sees only the coded lines."""

    told: list[str] = field(default_factory=list)

    def step(self, plan: BuildPlan, step: Step) -> None: ...
    def count(self, done: int, total: int) -> None: ...
    def note(self, line: str) -> None:
        self.told.append(line)


@pytest.fixture
def storage() -> Iterator[ObjectStorage]:
    if shutil.which("ccache") is None:
        must_or_skip("no ccache")
    with ObjectStorage() as made:
        yield made


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    if shutil.which("ccache") is None:
        must_or_skip("no ccache")
    with redis_server.serving("127.0.0.1", tmp_path) as address:
        yield address


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    if shutil.which("ccache") is None:
        must_or_skip("no ccache")
    with s3_server.serving(tmp_path) as server:
        yield server


def build(
    machine: Path, monkeypatch: pytest.MonkeyPatch, person: Person | None = None
) -> shared_cache.Statistics:
    machine.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(machine / "ccache"))
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(TINY))
    with execute(plan, LocalEngine(), logs=machine, reporter=person or Person()):
        found = shared_cache.statistics(machine / "ccache")
    assert found is not None
    return found


def assert_another_gets_all(
    first: shared_cache.Statistics,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    person: Person,
) -> None:
    second = build(machine, monkeypatch, person)
    assert (second.hits, second.misses) == (first.hits + first.misses, 0)
    assert remote_hits(machine) >= first.misses - 1, "the same main.cpp is in it twice"
    assert person.told == []


def test_what_one_machine_compiled_another_gets_from_redis(
    redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, redis)
    first = build(tmp_path / "one", monkeypatch)
    asked = first.hits + first.misses
    # Both programs have the same main.cpp: built after one another, the second is a hit at home.
    assert asked >= first.misses >= asked - 1 >= 3
    assert first.size > 0
    second = build(tmp_path / "two", monkeypatch)
    assert (second.hits, second.misses) == (asked, 0)
    assert remote_hits(tmp_path / "two") >= asked - 1
    monkeypatch.delenv(shared_cache.VARIABLE)
    assert build(tmp_path / "alone", monkeypatch).misses >= asked - 1


def test_what_one_machine_compiled_another_gets_over_http(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url())
    person = Person()
    first = build(tmp_path / "one", monkeypatch, person)
    assert first.misses >= 3
    assert storage.count("PUT", 201) >= 2 * first.misses, "a manifest and a result for each"
    assert_another_gets_all(first, tmp_path / "two", monkeypatch, person)


def test_what_one_machine_compiled_another_gets_from_a_folder(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del storage  # that ccache is there
    monkeypatch.setenv(shared_cache.VARIABLE, f"file:{tmp_path}/shared")
    person = Person()
    first = build(tmp_path / "one", monkeypatch, person)
    assert first.misses >= 3
    assert_another_gets_all(first, tmp_path / "two", monkeypatch, person)


def test_what_one_machine_compiled_another_gets_from_s3(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, s3.bucket("cache"))
    person = Person()
    first = build(tmp_path / "one", monkeypatch, person)
    assert first.misses >= 3
    assert len(s3.keys("cache")) >= 2 * first.misses - 1, "a manifest and a result for each"
    assert_another_gets_all(first, tmp_path / "two", monkeypatch, person)


def test_a_bucket_that_gives_nothing_back_or_is_not_there_is_said(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ccache a refused GET is a miss: it would compile everything and say nothing."""
    monkeypatch.setenv(shared_cache.VARIABLE, s3.bucket("write-only", readable=False))
    person = Person()
    build(tmp_path / "one", monkeypatch, person)
    (told,) = person.told
    assert told == (
        "note[CCACHE_REMOTE_UNREADABLE]: the shared compiler cache takes objects and gives none "
        "back; the build goes on with this machine's own cache"
    )
    monkeypatch.setenv(shared_cache.VARIABLE, s3.address("no-such-bucket"))
    assert build(tmp_path / "two", monkeypatch, person).misses >= 3
    assert person.told[1].startswith("note[CCACHE_REMOTE_DOWN]: ")


def test_a_storage_that_wants_a_token_gets_it_and_says_no_without(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.token = "s3cret-word"
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url(**{"bearer-token": "s3cret-word"}))
    person = Person()
    build(tmp_path / "one", monkeypatch, person)
    assert person.told == []
    assert storage.count("PUT", 201) >= 4
    stored = len(storage.objects)
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url(**{"bearer-token": "wrong"}))
    assert build(tmp_path / "two", monkeypatch, person).misses >= 3, "nothing came from there"
    assert len(storage.objects) == stored
    assert person.told[0].startswith("note[CCACHE_REMOTE_DOWN]: ")
    assert "wrong" not in "".join(person.told), "an address may hold a password"


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}/cache/", "redis://:s3cret@127.0.0.1:{}"])
def test_a_storage_that_is_down_is_said_in_one_line_and_the_build_goes_on(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    del storage  # that ccache is there
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv(shared_cache.VARIABLE, address.format(port))
    person = Person()
    first = build(tmp_path / "one", monkeypatch, person)
    again = build(tmp_path / "one", monkeypatch)
    assert again.misses == first.misses, "its own cache works"
    begin, end = person.told
    assert begin == (
        "note[CCACHE_REMOTE_DOWN]: the shared compiler cache does not answer, or refuses; "
        "the build goes on with this machine's own cache"
    )
    assert end.startswith("note[CCACHE_REMOTE_ERRORS]: the shared compiler cache failed ")
    assert "\n" not in begin + end
    assert "s3cret" not in begin + end


def test_a_storage_that_fails_in_the_middle_is_counted_at_the_end(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url())
    person = Person()

    def step(plan: BuildPlan, step: Step) -> None:
        del plan
        storage.refuse = step.name == "compile"

    monkeypatch.setattr(person, "step", step)
    assert build(tmp_path / "one", monkeypatch, person).misses >= 3
    assert len(person.told) == 1
    assert person.told[0].startswith("note[CCACHE_REMOTE_ERRORS]: ")


def remote_hits(machine: Path) -> int:
    told = subprocess.run(
        ["ccache", "--print-stats"],
        env={**os.environ, "CCACHE_DIR": str(machine / "ccache")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = dict(line.split("\t")[:2] for line in told.splitlines() if "\t" in line)
    return int(rows["remote_storage_hit"])


def test_an_address_that_ccache_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, "memcached://host")
    with pytest.raises(UsageError) as refused:
        shared_cache.environment()
    assert refused.value.code == "CCACHE_REMOTE_INVALID"
    assert "memcached" not in refused.value.render(), "it may hold a password"


@pytest.mark.parametrize(("given", "bound"), [(None, "20.0G"), ("7G", "7.0G"), ("0", "0")])
def test_ccache_is_told_the_bound_that_was_given(
    storage: ObjectStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    bound: str,
) -> None:
    del storage  # that ccache is there
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    monkeypatch.delenv(shared_cache.MAXSIZE_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(shared_cache.MAXSIZE_VARIABLE, given)
    tree = ccache_bound.tree(tmp_path)
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tree))
    with execute(plan, LocalEngine(), logs=tmp_path, reporter=Person()) as built:
        assert ccache_bound.told(built.log) == bound


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        (shared_cache.MAXSIZE_VARIABLE, "banana", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.MAXSIZE_VARIABLE, "5GG", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.MAXSIZE_VARIABLE, "-1", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.VARIABLE, "memcached://host", "CCACHE_REMOTE_INVALID"),
    ],
)
def test_a_variable_that_ccache_would_not_take_is_one_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    monkeypatch.setenv(variable, value)
    options = ("--engine", "local", "--source", str(TINY), "--out", str(tmp_path / "dist"))
    refused = invoke("build-cpu", *options)
    assert refused.returncode == 2
    *_, error, hint = refused.stderr.splitlines()
    assert error.startswith(f"error[{code}]: {variable} ")
    assert hint.startswith("hint: it ")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("size", ["0", "0G", "0.0"])
def test_no_bound_is_said(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    told: list[str] = []
    monkeypatch.setenv(shared_cache.MAXSIZE_VARIABLE, size)
    shared_cache.check(told.append)
    assert told[0].startswith(f"note[CCACHE_UNBOUNDED]: CCACHE_MAXSIZE={size} is no bound: ")
    for bounded in ("20", "1.5G", "10GiB", "500M", "7k", ""):
        monkeypatch.setenv(shared_cache.MAXSIZE_VARIABLE, bounded)
        shared_cache.check(told.append)
    assert len(told) == 1
