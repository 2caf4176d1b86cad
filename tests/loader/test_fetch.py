"""Faults 1 to 17: a server that does not do what it should (docs/faults.md)."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import socket
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from llama_loader import fetch as fetch_module
from llama_loader import unpack
from llama_loader.errors import IntegrityError, LoaderError, NetworkError
from llama_loader.events import Downloading, Resolving
from llama_loader.fetch import Mirrors, backoff
from llama_loader.locations import AttemptError, Body, Patience, RangeError
from tests.rigs import fault_server as faults
from tests.rigs.downloads import (
    CHUNK,
    DATA,
    IMPATIENT,
    OTHER,
    Reader,
    closed_port,
    described,
    ranges,
    refused,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llama_loader.manifest import Artifact
    from tests.rigs.fault_server import FaultServer

pytestmark = pytest.mark.usefixtures("no_certificates_of_this_machine")


def test_a_file_comes_whole_and_says_how_far_it_is(server: FaultServer, reader: Reader) -> None:
    assert reader.fetch(server.put("/a", DATA)) == DATA
    done = [event.done for event in reader.events if isinstance(event, Downloading)]
    assert done == [*range(CHUNK, len(DATA), CHUNK), len(DATA)]
    assert server.asked("/a")[0].headers["accept-encoding"] == "identity"
    assert reader.sleeps == []


def test_chunks_are_handed_over_as_they_come(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(2 * CHUNK + 1))
    chunks = reader.fetcher.chunks(described(), [url])
    with closing(chunks):
        assert [len(next(chunks)), len(next(chunks))] == [CHUNK, CHUNK]
        assert len(server.requests) == 1


@pytest.mark.parametrize("share", [10, 50, 90])
def test_a_cut_connection_goes_on_at_the_last_verified_chunk(
    server: FaultServer, reader: Reader, share: int
) -> None:
    url = server.put("/a", DATA)
    after = len(DATA) * share // 100
    server.fail("/a", faults.cut(after))
    assert reader.fetch(url) == DATA
    assert ranges(server) == [None, f"bytes={after // CHUNK * CHUNK}-"]
    assert server.sent("/a") - len(DATA) == after % CHUNK
    assert len(reader.sleeps) == 1


def test_every_chunk_gained_forgives_what_failed(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", *[faults.cut(CHUNK * number + 1) for number in range(1, 10)])
    assert reader.fetch(url) == DATA
    assert all(0.5 <= pause <= 1.5 for pause in reader.sleeps)


def test_a_server_that_always_cuts_is_given_up(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(CHUNK // 2), always=True)
    message = refused(NetworkError, "UNREACHABLE", reader, url)
    assert url in message
    assert len(server.requests) == IMPATIENT.attempts
    low, high = zip((0.5, 1.5), (1, 3), (2, 6), strict=True)
    assert len(reader.sleeps) == 3
    assert all(a <= s <= b for a, s, b in zip(low, reader.sleeps, high, strict=True))


def test_a_cut_in_a_chunked_body_is_seen(server: FaultServer, reader: Reader) -> None:
    def cut(answer: faults.Answer) -> None:
        answer.head(length=None, Transfer_Encoding="chunked")
        answer.send(b"%x\r\n" % len(DATA) + DATA[: CHUNK + 5])

    url = server.put("/a", DATA)
    server.fail("/a", cut)
    assert reader.fetch(url) == DATA
    assert ranges(server) == [None, f"bytes={CHUNK}-"]


def test_a_server_without_ranges_sends_it_all_again(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(5 * CHUNK), faults.ignores_range)
    assert reader.fetch(url) == DATA


def test_a_server_without_ranges_that_cuts_before_what_is_here_is_asked_again(
    server: FaultServer, reader: Reader
) -> None:
    def short(answer: faults.Answer) -> None:
        answer.head()
        answer.send(answer.data[: 2 * CHUNK])

    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(5 * CHUNK), short)
    assert reader.fetch(url) == DATA
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("value", "shift"),
    [
        ("bytes 0-9/10", 0),
        ("bytes 250001-950001/950002", 1),
        ("", 0),
        ("pages 1-2/3", 0),
        ("bytes -1-5/6", 0),
    ],
)
def test_a_wrong_content_range_is_not_believed(
    server: FaultServer, reader: Reader, value: str, shift: int
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(5 * CHUNK), faults.content_range(value, shift))
    assert reader.fetch(url) == DATA
    assert ranges(server) == [None, f"bytes={5 * CHUNK}-", None]


def test_a_server_that_cannot_satisfy_a_range_starts_over(
    server: FaultServer, reader: Reader
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(5 * CHUNK), faults.status(416))
    assert reader.fetch(url) == DATA
    assert ranges(server)[-1] is None


def test_the_same_content_under_another_name_goes_on(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')

    def cut_and_renamed(answer: faults.Answer) -> None:
        faults.cut(5 * CHUNK)(answer)
        answer.file.etag = '"two"'

    server.fail("/a", cut_and_renamed)
    assert reader.fetch(url) == DATA
    assert ranges(server) == [None, f"bytes={5 * CHUNK}-"]


def test_other_content_in_the_middle_is_wrong(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')

    def cut_and_changed(answer: faults.Answer) -> None:
        faults.cut(5 * CHUNK)(answer)
        answer.file.etag, answer.file.data = '"two"', OTHER

    server.fail("/a", cut_and_changed)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)


def test_a_copy_of_a_file_that_changes_starts_over(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')

    def cut_and_changed(answer: faults.Answer) -> None:
        faults.cut(300_000)(answer)
        answer.file.etag, answer.file.data = '"two"', OTHER

    server.fail("/a", cut_and_changed)
    assert reader.copy(url) == OTHER


def test_a_copy_that_is_cut_starts_over(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", faults.cut(300_000))
    assert reader.copy(url) == DATA
    assert ranges(server) == [None, None]


def test_a_copy_that_is_always_cut_is_given_up(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", *[faults.cut(100_000 * number) for number in range(1, 6)])
    with pytest.raises(NetworkError):
        reader.copy(url)
    assert len(server.requests) == IMPATIENT.attempts


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [0, 10, CHUNK, len(DATA) - 1])
def test_a_body_that_is_too_short(
    server: FaultServer, reader: Reader, length: int, chunked: bool
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(DATA[:length], chunked=chunked), always=True)
    message = refused(NetworkError, "UNREACHABLE", reader, url)
    assert f"{length} of {len(DATA)} bytes" in message


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("more", [1, 5_000_000])
def test_a_body_that_is_too_long(
    server: FaultServer, reader: Reader, more: int, chunked: bool
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(DATA + bytes(more), chunked=chunked), always=True)
    refused(IntegrityError, "FILE_TOO_LARGE", reader, url)


def test_one_byte_too_many_is_all_that_is_read(
    server: FaultServer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib3

    sizes: list[int] = []
    original = urllib3.HTTPResponse.read1

    def counting(self: urllib3.HTTPResponse, *args: Any, **kwargs: Any) -> bytes:
        data = original(self, *args, **kwargs)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(urllib3.HTTPResponse, "read1", counting)
    url = server.put("/a", DATA)
    server.fail("/a", faults.endless, always=True)
    refused(IntegrityError, "FILE_TOO_LARGE", reader, url)
    assert sum(sizes) == len(DATA) + 1 + (len(DATA) % CHUNK + 1)  # and the last chunk once more


def test_an_endless_body_is_not_awaited(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.endless, always=True)
    refused(IntegrityError, "FILE_TOO_LARGE", reader, url)
    with pytest.raises(IntegrityError, match="larger than 2000000 bytes"):
        reader.copy(url, limit=2_000_000)
    with pytest.raises(IntegrityError, match="larger than 100 bytes"):
        reader.fetcher.read(url, limit=100)
    assert server.sent("/a") < faults.ENOUGH


def test_a_body_of_exactly_the_limit_is_taken(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    assert reader.fetcher.read(url, limit=len(DATA)) == DATA
    assert reader.copy(url, limit=len(DATA)) == DATA


@pytest.mark.parametrize("at", [0, 5 * CHUNK, len(DATA) - 1])
def test_a_flipped_bit_costs_one_chunk(server: FaultServer, reader: Reader, at: int) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.flipped(at))
    assert reader.fetch(url) == DATA
    first = at // CHUNK * CHUNK
    assert ranges(server) == [None, f"bytes={first}-" if first else None]
    assert reader.sleeps == []


def test_a_bit_flipped_twice_is_refused(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.flipped(5 * CHUNK), always=True)
    message = refused(IntegrityError, "CHUNK_MISMATCH", reader, url)
    assert f"from {5 * CHUNK} on" in message
    assert len(server.requests) == 2


def test_wrong_bytes_of_one_mirror_are_repaired_by_the_next(
    server: FaultServer, reader: Reader
) -> None:
    bad, good = server.put("/bad", OTHER), server.put("/good", DATA)
    assert reader.fetch(bad, good) == DATA
    server.fail("/good", faults.status(404), always=True)
    message = refused(IntegrityError, "CHUNK_MISMATCH", reader, bad, good)
    assert "404" in message


def test_chunks_that_are_right_do_not_make_the_whole_right(
    server: FaultServer, reader: Reader
) -> None:
    url = server.put("/a", DATA)
    got: list[bytes] = []
    with pytest.raises(IntegrityError, match="every chunk is right") as caught:
        got.extend(reader.fetcher.chunks(described(sha256="0" * 64), [url]))
    assert caught.value.code == "SHA256_MISMATCH"
    assert len(b"".join(got)) < len(DATA)


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504, 408])
def test_a_busy_server_is_asked_again(server: FaultServer, reader: Reader, code: int) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.status(code), faults.status(code))
    assert reader.fetch(url) == DATA
    assert 0.5 <= reader.sleeps[0] <= 1.5
    assert 1 <= reader.sleeps[1] <= 3


def test_retry_after_is_heeded(server: FaultServer) -> None:
    reader = Reader(patience=Patience())
    url = server.put("/a", DATA)
    server.fail("/a", faults.status(429, Retry_After="7"))
    server.fail("/a", faults.status(503, Retry_After=in_seconds(20)))
    server.fail("/a", faults.status(503, Retry_After="soon"))
    server.fail("/a", faults.cut(CHUNK + 1), faults.status(503, Retry_After=in_seconds(-50)))
    assert reader.fetch(url) == DATA
    assert reader.sleeps[0] == 7
    assert 18 <= reader.sleeps[1] <= 20
    assert 2 <= reader.sleeps[2] <= 6
    assert len(reader.sleeps) == 4  # a date that is over asks for no wait


def test_a_server_that_asks_for_too_much_is_left(server: FaultServer) -> None:
    reader = Reader(patience=Patience())
    busy, good = server.put("/busy", DATA), server.put("/good", DATA)
    server.fail("/busy", faults.status(503, Retry_After="3600"), always=True)
    assert reader.fetch(busy, good) == DATA
    assert reader.sleeps == []
    assert "3600 s" in refused(NetworkError, "UNREACHABLE", reader, busy)
    assert len(server.asked("/busy")) == 2


def test_waiting_has_an_end(server: FaultServer) -> None:
    reader = Reader(patience=Patience(deadline=30))
    url = server.put("/a", DATA)
    server.fail("/a", faults.status(503, Retry_After="50"), always=True)
    refused(NetworkError, "UNREACHABLE", reader, url)
    assert reader.sleeps == []


def test_a_download_has_an_end(server: FaultServer) -> None:
    reader = Reader(patience=Patience(deadline=0.5, rate=1))
    url = server.put("/a", DATA)
    server.fail("/a", faults.drip(10_000, every=0.05), always=True)
    assert "not done within 0.5 s" in refused(NetworkError, "UNREACHABLE", reader, url)


def test_backoff_grows_to_a_limit_and_is_jittered() -> None:
    waits = {count: [backoff(count, None, IMPATIENT) for _ in range(200)] for count in (1, 4, 50)}
    assert all(0.5 <= wait <= 1.5 for wait in waits[1])
    assert all(4 <= wait <= 12 for wait in waits[4] + waits[50])
    assert len(set(waits[1])) > 100
    assert backoff(1, 500, IMPATIENT) == IMPATIENT.longest_wait


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_asked_again(server: FaultServer, reader: Reader, code: int) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.status(code), always=True)
    assert f"HTTP status {code}" in refused(NetworkError, "UNREACHABLE", reader, url)
    assert len(server.requests) == 1


def test_the_next_mirror_is_asked_at_once(server: FaultServer, reader: Reader) -> None:
    dead = f"http://127.0.0.1:{closed_port()}/a"
    assert reader.fetch(dead, server.put("/a", DATA)) == DATA
    assert reader.sleeps == []


def test_every_url_is_named_with_its_reason(server: FaultServer, reader: Reader) -> None:
    urls = [
        f"http://127.0.0.1:{closed_port()}/a",
        "https://nowhere.invalid/a",
        f"{server.url}/missing",
        "ftp://example.org/a",
        "file:///nowhere/a",
    ]
    message = refused(NetworkError, "UNREACHABLE", reader, *urls)
    unknown = "nowhere.invalid|known|resol|proxy|tunnel"
    reasons = ("refused", unknown, "404", "not a URL", "No such")
    for url, reason in zip(urls, reasons, strict=True):
        assert re.search(f"{re.escape(url)}: [^;]*({reason})", message, re.IGNORECASE), message


@pytest.mark.parametrize("fault", [faults.drip(100, every=0.02), faults.silent(3)])
def test_a_trickle_is_left_for_the_next_mirror(
    server: FaultServer, reader: Reader, fault: Any
) -> None:
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", fault, always=True)
    assert reader.fetch(slow, good) == DATA


def test_a_trickle_after_a_good_beginning_is_found_too(server: FaultServer, reader: Reader) -> None:
    def tires(answer: faults.Answer) -> None:
        answer.head()
        answer.send(DATA[: 8 * CHUNK])
        faults.drip(100, every=0.02)(Tail(answer))

    class Tail(faults.Answer):
        def __init__(self, answer: faults.Answer) -> None:
            self.__dict__.update(answer.__dict__)

        def head(self, *_: Any, **__: Any) -> None:
            self.start = 8 * CHUNK

    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", tires, always=True)
    assert reader.fetch(slow, good) == DATA
    assert ranges(server, "/good") == [f"bytes={8 * CHUNK}-"]


def test_a_slow_consumer_is_not_the_servers_fault(server: FaultServer) -> None:
    reader = Reader(patience=Patience(window=0.2, rate=1_000_000))
    url = server.put("/a", DATA)
    got = []
    for chunk in reader.fetcher.chunks(described(), [url]):
        time.sleep(0.05)
        got.append(chunk)
    assert b"".join(got) == DATA
    assert len(server.requests) == 1


def test_compression_on_the_way_is_not_undone(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.encoded, always=True)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)
    assert gzip.decompress(reader.copy(url)) == DATA


def test_a_server_that_calls_a_tarball_encoded_is_understood(
    server: FaultServer, reader: Reader
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(DATA, Content_Encoding="gzip"), always=True)
    assert reader.fetch(url) == DATA


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [200, CHUNK + 10, 2_000_000])
def test_a_login_page_is_not_the_file(
    server: FaultServer, reader: Reader, length: int, chunked: bool
) -> None:
    page = b"<!doctype html><title>Log in</title>".ljust(length)
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(page, chunked=chunked, Content_Type="text/html"), always=True)
    with pytest.raises(IntegrityError) as caught:
        reader.fetch(url)
    assert caught.value.code in {"NOT_THE_FILE", "CHUNK_MISMATCH", "FILE_TOO_LARGE"}
    assert "login" in caught.value.hint


def test_a_login_page_is_not_a_manifest(server: FaultServer, reader: Reader) -> None:
    url = server.put("/m", b"<!doctype html><title>Log in</title>")
    with pytest.raises(IntegrityError, match="pinned") as caught:
        reader.fetcher.manifest_bytes(url, "0" * 64)
    assert caught.value.code == "MANIFEST_PIN_MISMATCH"


def test_offline_opens_nothing(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(offline=True)
    url = server.put("/a", DATA)
    (tmp_path / "a").write_bytes(DATA)

    def forbidden(*args: object, **_: object) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    message = refused(NetworkError, "OFFLINE", reader, url, "https://example.org/a")
    assert url in message
    with pytest.raises(NetworkError, match="may not open a connection"):
        reader.fetcher.manifest_bytes("hf://owner/name/manifest.json", None)
    with pytest.raises(NetworkError):
        reader.copy(url)
    assert reader.fetch(url, (tmp_path / "a").as_uri()) == DATA
    assert server.requests == []


def test_a_manifest_is_read_with_retries(server: FaultServer, reader: Reader) -> None:
    from tests.rigs import archives

    _, artifact = archives.release()
    data = archives.manifest(artifact)
    url = server.put("/m.json", data)
    server.fail("/m.json", faults.cut(100), faults.status(503))
    assert reader.fetcher.manifest_bytes(url, hashlib.sha256(data).hexdigest()) == data
    assert len(reader.sleeps) == 2


def test_a_manifest_that_is_missing_names_the_url(server: FaultServer, reader: Reader) -> None:
    with pytest.raises(NetworkError, match="404") as caught:
        reader.fetcher.manifest_bytes(f"{server.url}/m.json", None)
    assert f"{server.url}/m.json" in caught.value.message


def test_a_manifest_of_100_megabytes_is_not_read(tmp_path: Path, reader: Reader) -> None:
    with (tmp_path / "m.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(IntegrityError, match="larger than 4194304 bytes"):
        reader.fetcher.manifest_bytes((tmp_path / "m.json").as_uri(), None)


@pytest.mark.parametrize("seed", range(8))
def test_any_row_of_faults_ends_with_the_file(seed: int, server: FaultServer) -> None:
    """Whatever goes wrong and heals, what is handed over is the file, and nothing twice."""
    dice = random.Random(seed)
    url = server.put("/a", DATA, etag='"one"')
    kinds: Sequence[Any] = (
        lambda: faults.cut(dice.randrange(len(DATA))),
        lambda: faults.status(503),
        lambda: faults.ignores_range,
        lambda: faults.flipped(dice.randrange(len(DATA))),
        lambda: faults.content_range("bytes 5-6/7"),
    )
    server.fail("/a", *[dice.choice(kinds)() for _ in range(2)])
    assert Reader().fetch(url) == DATA


def test_what_is_read_first_is_said_first(server: FaultServer, reader: Reader) -> None:
    url = server.put("/m", b"{}")
    assert reader.fetcher.manifest_bytes(url, None) == b"{}"
    assert reader.events == [Resolving(url)]  # a manifest's own bytes are no progress


@pytest.mark.parametrize(
    "fault",
    [faults.silent(5), faults.drips_head(1, every=0.05), faults.drip(1, every=0.05)],
    ids=["silent", "headers", "body"],
)
def test_a_manifest_has_one_deadline_over_all_its_attempts(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    assert fetch_module.SMALL_FILE_SECONDS == 60
    monkeypatch.setattr(fetch_module, "SMALL_FILE_SECONDS", 1.0)
    server.put("/m.json", b"{}" * 1000)
    server.fail("/a", faults.redirect("/m.json"), always=True)
    server.fail("/m.json", fault, always=True)
    reader = Reader(patience=Patience(silence=0.4, headers=0.4))
    began = time.monotonic()
    with pytest.raises(NetworkError, match=r"not done within 1 s") as caught:
        reader.fetcher.manifest_bytes(f"{server.url}/a", None)
    assert time.monotonic() - began < 3
    assert f"{server.url}/a: " in caught.value.message
    assert server.asked("/m.json")


def test_a_manifest_whose_server_asks_for_too_long_a_wait_names_its_deadline(
    server: FaultServer,
) -> None:
    url = server.put("/m.json", b"{}")
    server.fail("/m.json", faults.status(503, Retry_After="60"), always=True)
    reader = Reader(patience=Patience())
    with pytest.raises(NetworkError, match=r"asked again in 60 s; not done within 60 s"):
        reader.fetcher.manifest_bytes(url, None)
    assert reader.sleeps == []


# Which mirror is asked next, and when.

ONE, TWO = "https://one.invalid/a", "https://two.invalid/a"
PATIENCE = Patience(attempts=3, longest_wait=60.0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make every wait its middle, and return the waits of ``both``."""
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    return []


@pytest.fixture
def both(waits: list[float]) -> Mirrors:
    return Mirrors("a.tar.zst", [ONE, TWO], PATIENCE, sleep=waits.append)


def test_the_first_is_asked_as_long_as_it_does_as_well_as_the_others(both: Mirrors) -> None:
    first = both.best()
    assert (first.name, first.failures, first.wait) == (ONE, 0, 0.0)
    assert first.ranges
    both.failed(first, AttemptError("cut"))
    second = both.best()
    assert second.name == TWO
    both.failed(second, AttemptError("cut"))
    assert both.best() is first


def test_what_is_gained_forgives_what_failed(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, AttemptError("wrong", wrong="CHUNK_MISMATCH"))
    assert (first.failures, first.wrong) == (1, 1)
    first.gained()
    assert (first.failures, first.wrong) == (0, 0)
    assert both.best() is first


def test_it_waits_twice_as_long_each_time_up_to_eight_seconds(waits: list[float]) -> None:
    one = Mirrors("a", [ONE], Patience(attempts=99), sleep=waits.append)
    for _ in range(7):
        one.failed(one.best(), AttemptError("busy"))
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_what_the_server_asks_for_is_waited_and_no_more_than_the_longest() -> None:
    assert backoff(1, 7.0, PATIENCE) == 7.0
    assert backoff(5, 61.0, PATIENCE) == 60.0
    assert backoff(5, 0.0, PATIENCE) == 0.0


def test_the_wait_is_jittered_by_half() -> None:
    random.seed(3)
    found = [backoff(2, None, PATIENCE) for _ in range(400)]
    assert 1.0 <= min(found) < 1.1
    assert 2.9 < max(found) <= 3.0


@pytest.mark.parametrize(("wait", "fits"), [(95.0, True), (105.0, False)])
def test_a_wait_that_fits_into_the_time_left_is_made(wait: float, fits: bool) -> None:
    waited: list[float] = []
    patience = Patience(deadline=100.0, longest_wait=500.0)
    mirrors = Mirrors("a", [ONE], patience, sleep=waited.append)
    mirrors.failed(mirrors.best(), AttemptError("busy", wait=wait))
    if fits:
        assert mirrors.best().name == ONE
    else:
        with pytest.raises(NetworkError, match="busy"):
            mirrors.best()
    assert waited == ([wait] if fits else [])


def test_nobody_waits_for_a_mirror_that_has_not_failed(both: Mirrors, waits: list[float]) -> None:
    both.best().wait = 9.0
    both.best()
    assert waits == []


def test_a_range_that_did_not_do_is_asked_for_as_a_whole_at_once(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, RangeError("changed"))
    both.failed(both.best(), AttemptError("cut"))
    again = both.best()
    assert again is first
    assert (again.ranges, again.wait) == (False, 0.0)
    assert first.failures == 1


def test_wrong_bytes_are_asked_for_once_more_at_once_then_never(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, AttemptError("wrong", wrong="CHUNK_MISMATCH"))
    assert (first.ranges, first.wait) == (True, 0.0)
    both.failed(both.best(), AttemptError("cut"))
    assert both.best() is first
    both.failed(first, AttemptError("wrong", wrong="CHUNK_MISMATCH"))
    both.failed(both.best(), AttemptError("cut"))
    assert both.best().name == TWO


def test_a_url_is_given_up_after_as_many_attempts_as_there_is_patience(waits: list[float]) -> None:
    one = Mirrors("a", [ONE], PATIENCE, sleep=waits.append)
    for _ in range(PATIENCE.attempts):
        one.failed(one.best(), AttemptError("cut"))
    with pytest.raises(NetworkError, match=r"^a cannot be fetched: https://one\.invalid/a: cut$"):
        one.best()  # the same reason once


@pytest.mark.parametrize(("second", "missing"), [(True, True), (False, False)])
def test_none_is_left(both: Mirrors, second: bool, missing: bool) -> None:
    """It is missing only where every URL says so."""
    both.failed(both.best(), AttemptError("404 Not Found", final=True, missing=True))
    both.failed(both.best(), AttemptError("no", final=True, missing=second))
    with pytest.raises(NetworkError) as caught:
        both.best()
    error = caught.value
    assert error.code == "UNREACHABLE"
    assert error.message == f"a.tar.zst cannot be fetched: {ONE}: 404 Not Found; {TWO}: no"
    assert error.missing is missing
    assert error.hint.startswith("is the address right")


@pytest.mark.parametrize("url", ["foo", TWO])
def test_a_file_is_not_missing_where_one_url_was_not_asked_to_the_end(url: str) -> None:
    mirrors = Mirrors("a", [ONE, url], Patience(deadline=5.0))
    mirrors.failed(mirrors.best(), AttemptError("404", final=True, missing=True))
    if url == TWO:
        mirrors.failed(mirrors.best(), AttemptError("busy", wait=50.0))
    with pytest.raises(NetworkError) as caught:
        mirrors.best()
    assert not caught.value.missing


def test_wrong_bytes_win_over_what_the_others_failed_of(both: Mirrors) -> None:
    first = both.best()
    for _ in range(2):
        both.failed(first, AttemptError("a login page", wrong="NOT_THE_FILE"))
    both.failed(both.best(), AttemptError("no", final=True))
    with pytest.raises(IntegrityError) as caught:
        both.best()
    error = caught.value
    assert error.code == "NOT_THE_FILE"
    assert error.message == f"a.tar.zst is not what was published: {ONE}: a login page; {TWO}: no"
    assert "open the URL in a browser" in error.hint


def test_wrong_bytes_once_are_the_networks_fault(both: Mirrors) -> None:
    both.failed(both.best(), AttemptError("wrong", wrong="CHUNK_MISMATCH"))
    for _ in range(2):
        both.failed(both.best(), AttemptError("no", final=True))
    with pytest.raises(NetworkError):
        both.best()


# Mirrors that cannot be asked are passed over, and no secret is shown.

IMPOSSIBLE = [
    "http://[::1",
    "https://[evil]/x",
    "https://[::1%eth0]:x/",
    "https://ex\u2100mple.org/x",  # NFKC makes a/c of one character of it
    "https://example.org\uff0f@evil.example/x",
    "https://\uff0e\uff0e/x",
    "https://\ud800/x",
    "https://a" + "a" * 70 + ".invalid/x",
    "https:///x",
    "hf://o/r/../../api/whoami-v2",
    "file:///a%00b",
    " https://example.org/x",
    "",
]


@pytest.mark.parametrize("url", IMPOSSIBLE)
def test_a_mirror_that_cannot_be_asked_is_passed_over(
    server: FaultServer, reader: Reader, url: str
) -> None:
    assert reader.fetch(url, server.put("/a", DATA)) == DATA
    refused(NetworkError, "UNREACHABLE", reader, url)
    assert reader.sleeps == []


@pytest.mark.parametrize("url", IMPOSSIBLE)
def test_a_manifest_with_a_mirror_that_cannot_be_asked_is_used_all_the_same(
    server: FaultServer, reader: Reader, url: str
) -> None:
    from tests.rigs import archives

    packed, artifact = archives.release()
    mirrored = msgspec.structs.replace(artifact, urls=(url, "good"))
    server.put("/good", packed)
    urls = mirrored.resolved_urls(f"{server.url}/manifest.json")
    whole = described(packed, artifact.chunk_size, format=artifact.format)
    assert b"".join(reader.fetcher.chunks(whole, urls)) == packed


@pytest.mark.parametrize("fault", [faults.status(404), faults.flipped(0), faults.endless])
def test_the_query_of_a_signed_url_is_never_shown(server: FaultServer, fault: Any) -> None:
    server.put("/a", DATA)
    server.fail("/a", fault, always=True)
    reader, url = Reader(), f"{server.url}/a?X-Signature=s3cret#s3cret"
    told = [*errors(reader, url), *errors(Reader(offline=True), url)]
    assert all(f"{server.url}/a?" in text or "a.tar.gz" in text for text in told)
    assert "s3cret" not in "".join(told) + repr(reader.events)


def errors(reader: Reader, url: str) -> Iterator[str]:
    """Yield the error of each way to read a URL."""
    for read in (
        reader.fetch,
        partial(reader.copy, limit=1000),
        partial(reader.fetcher.manifest_bytes, sha256="0" * 64),
    ):
        with pytest.raises(LoaderError) as caught:
            read(url)
        yield f"{caught.value} {caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "url",
    [
        "hf://hf_s3cret@huggingface.co/o/r/m.json",
        "hf://user:hf_s3cret@o/r/m.json",
        "hf://o/r/m.json?token=hf_s3cret",
        "https://hf_s3cret@example.invalid/m.json",
        "HTTPS://user:hf_s3cret@example.invalid/m.json",
        "https://example.invalid/a b?hf_s3cret",
        "//hf_s3cret@example.invalid/m.json",
    ],
)
def test_a_secret_in_a_url_that_is_refused_is_never_shown(url: str) -> None:
    for offline in (True, False):
        reader = Reader(offline=offline, patience=Patience(connect=0.1, headers=0.1, attempts=1))
        assert "s3cret" not in "".join(errors(reader, url)) + repr(reader.events)


# Chunks.

BEGINNINGS = {form: magic for magic, form in unpack.MAGIC.items() if form != "zip"}


def small(
    form: str = "", count: int = 3, last: int = 7, size: int = 1000
) -> tuple[bytes, Artifact]:
    noise = random.Random(form).randbytes((count - 1) * size + last)
    data = (BEGINNINGS.get(form, b"") + noise)[: len(noise)]
    return data, described(data, size, format=form)


def body(data: bytes, asked: list[int] | None = None, at_most: int = 1 << 30) -> Body:
    def read(size: int) -> bytes:
        nonlocal data
        assert size > 0
        if asked is not None:
            asked.append(size)
        piece, data = data[: min(size, at_most)], data[min(size, at_most) :]
        return piece

    return Body(0, None, read)


@pytest.mark.parametrize("at_most", [1, 999, 1000, 1 << 30])
def test_chunks_are_read_one_after_another_and_not_a_byte_further(at_most: int) -> None:
    data, whole = small()
    stands = body(data + b"more", at_most=at_most)
    assert b"".join(fetch_module._read_chunk(stands, whole, at) for at in range(3)) == data
    assert stands.read(10)[:1] == b"m"


def test_a_large_chunk_is_asked_for_in_pieces() -> None:
    piece = fetch_module.PIECE
    data, whole = small(count=1, last=2 * piece + 5, size=4 * piece)
    asked: list[int] = []
    assert fetch_module._read_chunk(body(data, asked), whole, 0) == data
    assert asked == [piece, piece, 5]


def test_other_bytes_are_wrong_and_say_where() -> None:
    with pytest.raises(AttemptError, match="the 7 bytes from 2000 on are wrong") as caught:
        fetch_module._read_chunk(body(b"x" * 7), small()[1], 2)
    assert caught.value.wrong == "CHUNK_MISMATCH"


@pytest.mark.parametrize("form", list(BEGINNINGS))
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("length", [0, 1, 3, 500])
def test_a_body_that_ends_early_was_cut(form: str, index: int, length: int) -> None:
    data, whole = small(form)
    start = index * 1000
    said = f"ended after {start + length} of 2007 bytes"
    with pytest.raises(AttemptError, match=said) as caught:
        fetch_module._read_chunk(body(data[start : start + length]), whole, index)
    assert not caught.value.wrong


@pytest.mark.parametrize("form", list(BEGINNINGS))
def test_a_short_body_that_begins_otherwise_is_another_file(form: str) -> None:
    with pytest.raises(AttemptError, match=f"12 bytes that are no {form} came") as caught:
        fetch_module._read_chunk(body(b"<html>login>"), small(form)[1], 0)
    assert caught.value.wrong == "NOT_THE_FILE"


def test_a_short_body_further_on_may_begin_as_it_likes() -> None:
    with pytest.raises(AttemptError, match="ended after 1006") as caught:
        fetch_module._read_chunk(body(b"<html>"), small("tar.zst")[1], 1)
    assert not caught.value.wrong


# Copies.


def test_a_copy_tells_how_far_it_is(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    assert reader.copy(url) == DATA
    told = [event for event in reader.events if isinstance(event, Downloading)]
    assert {(event.name, event.total) for event in told} == {(url, len(DATA))}
    done = [event.done for event in told]
    assert done == sorted(set(done))
    assert done[-1] == len(DATA)


def test_a_copy_replaces_what_its_target_held(server: FaultServer, tmp_path: Path) -> None:
    with (tmp_path / "target").open("w+b") as target:
        target.write(bytes(2 * len(DATA)))
        Reader().fetcher.copy(server.put("/a", DATA), target, limit=len(DATA))
        target.seek(0)
        assert target.read() == DATA
