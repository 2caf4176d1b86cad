"""Two machines (two caches) that share compiled objects: Redis, HTTP, a folder, for real."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import redis_server
from needs import must_or_skip
from object_storage import ObjectStorage
from rich.console import Console
from tiny_release import Person
from verbs import PROJECT

from farm import preflight, source, targets
from farm.engines import shared_cache
from farm.engines.local import LocalEngine
from farm.errors import UsageError
from farm.execute import execute
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.terminal.progress import BuildReport
from tests.rigs.heard import heard

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


@pytest.fixture
def storage() -> Iterator[ObjectStorage]:
    if shutil.which("ccache") is None:
        must_or_skip("no ccache")
    with ObjectStorage().serve() as made:
        yield made


def build(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    person: Person | None = None,
    *,
    sha256: str | None = "0" * 64,
) -> shared_cache.Statistics:
    machine.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(machine / "ccache"))
    tree = replace(source.from_folder(TINY), sha256=sha256)
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), tree)
    with execute(plan, LocalEngine(), logs=machine, reporter=person or Person()):
        found = shared_cache.statistics(machine / "ccache" / tree.cache)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["redis", "http", "folder"])
def test_what_one_machine_compiled_another_gets(
    storage: ObjectStorage, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as ends:
        if kind == "redis":
            address = ends.enter_context(redis_server.serving("127.0.0.1", tmp_path))
        else:
            address = storage.url() if kind == "http" else f"file:{tmp_path}/shared"
        monkeypatch.setenv(shared_cache.VARIABLE, address)
        person = Person()
        first = build(tmp_path / "one", monkeypatch, person)
        asked = first.hits + first.misses
        # Both programs have the same main.cpp: one after the other, the second is a hit at home.
        assert asked >= first.misses >= asked - 1 >= 3
        assert first.size > 0
        if kind == "http":
            assert storage.count("PUT", 201) >= 2 * first.misses, "a manifest and a result for each"
        second = build(tmp_path / "two", monkeypatch, person)
        assert (second.hits, second.misses) == (asked, 0)
        assert remote_hits(tmp_path / "two") >= first.misses - 1
        assert person.told == []


def test_source_that_is_not_pinned_gets_no_shared_storage(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its build could put wrong objects there, and send the address's password away."""
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url(**{"bearer-token": "s3cret-word"}))
    person = Person()
    assert build(tmp_path / "one", monkeypatch, person, sha256=None).misses >= 3
    assert storage.asked == []
    (told,) = person.told
    assert told.startswith("note[CACHE_NOT_SHARED]: ")
    assert "s3cret" not in told


def test_a_storage_that_gives_nothing_back_is_said(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ccache a refused GET is a miss: it would compile everything and say nothing."""
    storage.write_only = True
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url())
    person = Person()
    build(tmp_path / "one", monkeypatch, person)
    (told,) = person.told
    assert told.startswith("note[CCACHE_REMOTE_UNREADABLE]: ")


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
    assert begin.startswith("note[CCACHE_REMOTE_DOWN]: ")
    assert end.startswith("note[CCACHE_REMOTE_ERRORS]: ")
    assert "\n" not in begin + end
    assert "s3cret" not in begin + end


def test_a_storage_that_fails_in_the_middle_is_counted_at_the_end(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, storage.url())

    class Watching(Person):
        def __call__(self, what: str, *values: object) -> None:
            super().__call__(what, *values)
            storage.refuse |= (what, *values) == ("step", "compile")

    person = Watching()
    assert build(tmp_path / "one", monkeypatch, person).misses >= 3
    assert len(person.told) == 1
    assert person.told[0].startswith("note[CCACHE_REMOTE_ERRORS]: ")


def remote_hits(machine: Path) -> int:
    told = heard(
        ["ccache", "--print-stats"],
        env={**os.environ, "CCACHE_DIR": str(machine / "ccache")},
        check=True,
    ).stdout
    rows = dict(line.split("\t")[:2] for line in told.splitlines() if "\t" in line)
    return int(rows["remote_storage_hit"])


ASKS = """
execute_process(COMMAND ccache --get-config max_size OUTPUT_VARIABLE bound)
message(STATUS "ccache's bound is ${bound}")
"""


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
    tree = Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(ASKS)
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tree))
    with execute(plan, LocalEngine(), logs=tmp_path, reporter=Person()) as built:
        (told,) = re.findall(r"^-- ccache's bound is (.+)$", built.log.read_text(), re.MULTILINE)
    assert told.replace(" ", "").removesuffix("B") == bound  # 4.14 writes ``20.0 GB``


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        (shared_cache.MAXSIZE_VARIABLE, "banana", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.MAXSIZE_VARIABLE, "5GG", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.MAXSIZE_VARIABLE, "-1", "CCACHE_MAXSIZE_INVALID"),
        (shared_cache.VARIABLE, "memcached://host", "CCACHE_REMOTE_INVALID"),
        (shared_cache.VARIABLE, "redis:/host", "CCACHE_REMOTE_INVALID"),
    ],
)
def test_a_variable_that_ccache_would_not_take_is_one_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    monkeypatch.setenv(variable, value)
    request = BuildRequest(
        arch_set="cpu",
        line="cpu",
        engine="local",
        source=TINY,
        out=tmp_path / "dist",
        patches="none",
    )
    report = BuildReport(Console(quiet=True))
    with pytest.raises(UsageError) as refused, preflight.opened(request, report):
        pass
    assert refused.value.code == code
    assert refused.value.message.startswith(f"{variable} ")
    assert refused.value.hint.startswith("it ")
    assert "memcached" not in refused.value.render(), "it may hold a password"
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("size", ["0", "0G", "0.0"])
def test_no_bound_is_said(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    told: list[str] = []
    monkeypatch.setenv(shared_cache.MAXSIZE_VARIABLE, size)
    shared_cache.check(told.append)
    assert told[0].startswith(f"note[CCACHE_UNBOUNDED]: CCACHE_MAXSIZE={size} disables the limit: ")
    for bounded in ("20", "1.5G", "10GiB", "500M", "7k", ""):
        monkeypatch.setenv(shared_cache.MAXSIZE_VARIABLE, bounded)
        shared_cache.check(told.append)
    assert len(told) == 1
