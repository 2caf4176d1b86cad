"""Faults 1 to 17: a server that does not do what it should (docs/faults.md)."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import random
import re
import socket
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import fetch as fetch_module
from llama_loader import locations
from llama_loader.chunks import Wanted
from llama_loader.copying import Copy
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Downloading, Event, Resolving
from llama_loader.fetch import Fetcher
from llama_loader.mirrors import backoff
from llama_loader.patience import Patience
from tests.rigs import fault_server as faults
from tests.rigs.fault_server import FaultServer, Proxy, Trickle, make_certificate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CHUNK = 50_000
DATA = b"\x1f\x8b" + random.Random(7).randbytes(950_000)
OTHER = b"\x1f\x8b" + random.Random(8).randbytes(950_000)
IMPATIENT = Patience(connect=2, silence=1, rate=100_000, window=0.3, deadline=20)


def wanted(data: bytes = DATA, **fields: Any) -> Wanted:
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    digests = tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)
    whole = hashlib.sha256(data).hexdigest()
    known = {"sha256": whole, "chunks": digests, "format": "tar.gz", **fields}
    return Wanted("a.tar.gz", len(data), chunk_size=CHUNK, **known)


class Reader:
    """A fetcher that does not wait, but writes down how long it would have."""

    def __init__(self, **options: Any) -> None:
        self.sleeps: list[float] = []
        self.events: list[Event] = []
        options.setdefault("patience", IMPATIENT)
        self.fetcher = Fetcher(sleep=self.sleeps.append, sink=self.events.append, **options)

    def fetch(self, *urls: str, **fields: Any) -> bytes:
        with closing(self.fetcher.chunks(wanted(**fields), urls)) as chunks:  # type: ignore[type-var]
            return b"".join(chunks)

    def copy(self, url: str, limit: int = 10_000_000) -> bytes:
        target = io.BytesIO()
        digest, size = self.fetcher.copy(url, Copy(target), limit=limit)
        data = target.getvalue()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)
        return data


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_certificates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def reader() -> Reader:
    return Reader()


def refused(kind: type[LoaderError], code: str, reader: Reader, *urls: str, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        reader.fetch(*urls, **fields)
    assert caught.value.code == code, caught.value.message
    return caught.value.message


def ranges(server: FaultServer, path: str = "/a") -> list[str | None]:
    return [request.headers.get("range") for request in server.asked(path)]


def test_a_file_comes_whole_and_says_how_far_it_is(server: FaultServer, reader: Reader) -> None:
    assert reader.fetch(server.put("/a", DATA)) == DATA
    done = [event.done for event in reader.events if isinstance(event, Downloading)]
    assert done == [*range(CHUNK, len(DATA), CHUNK), len(DATA)]
    assert server.asked("/a")[0].headers["accept-encoding"] == "identity"
    assert reader.sleeps == []


def test_chunks_are_handed_over_as_they_come(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(2 * CHUNK + 1))
    chunks = reader.fetcher.chunks(wanted(), [url])
    with closing(chunks):  # type: ignore[type-var]
        assert [len(next(chunks)), len(next(chunks))] == [CHUNK, CHUNK]
        assert len(server.requests) == 1


# 1: cut


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


# 2, 3, 4: ranges


def test_a_server_without_ranges_sends_it_all_again(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.cut(5 * CHUNK), faults.ignores_range)
    assert reader.fetch(url) == DATA


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
    second = server.asked("/a")[1]
    assert second.headers["if-range"] == '"one"'
    assert second.sent == len(DATA)


def test_other_content_in_the_middle_is_wrong(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')

    def cut_and_changed(answer: faults.Answer) -> None:
        faults.cut(5 * CHUNK)(answer)
        answer.file.etag, answer.file.data = '"two"', OTHER

    server.fail("/a", cut_and_changed)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)


def test_a_copy_goes_on_only_with_the_same_content(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", faults.cut(300_000))
    assert reader.copy(url) == DATA
    assert ranges(server) == [None, "bytes=300000-"]
    assert server.sent("/a") == len(DATA)


def test_a_copy_of_a_file_that_changes_starts_over(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')

    def cut_and_changed(answer: faults.Answer) -> None:
        faults.cut(300_000)(answer)
        answer.file.etag, answer.file.data = '"two"', OTHER

    server.fail("/a", cut_and_changed)
    assert reader.copy(url) == OTHER


def test_a_copy_notices_a_server_that_ignores_if_range(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", OTHER, etag='"two"')

    def first(answer: faults.Answer) -> None:
        answer.data, answer.etag = DATA, '"one"'
        faults.cut(300_000)(answer)

    def careless(answer: faults.Answer) -> None:
        answer.request.headers.pop("if-range")
        faults.healthy(answer)

    server.fail("/a", first, careless)
    assert reader.copy(url) == OTHER


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_copy_without_a_strong_name_starts_over(
    server: FaultServer, reader: Reader, etag: str | None
) -> None:
    url = server.put("/a", DATA, etag=etag)
    server.fail("/a", faults.cut(300_000))
    assert reader.copy(url) == DATA
    assert ranges(server) == [None, None]


@pytest.mark.parametrize(("etag", "asked"), [('"one"', 6), (None, 4)])
def test_a_copy_that_gains_is_forgiven(
    server: FaultServer, reader: Reader, etag: str | None, asked: int
) -> None:
    data = DATA * 7
    url = server.put("/a", data, etag=etag)
    server.fail("/a", *[faults.cut(1_200_000 * number) for number in range(1, 6)])
    if etag:
        assert reader.copy(url) == data
    else:
        with pytest.raises(NetworkError):
            reader.copy(url)
    assert len(server.requests) == asked


def test_a_copy_that_hardly_gains_is_given_up(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", *[faults.cut(100_000 * number) for number in range(1, 6)])
    with pytest.raises(NetworkError):
        reader.copy(url)
    assert len(server.requests) == IMPATIENT.attempts


# 5, 6, 7: length


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


# 8: a flipped bit


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
        got.extend(reader.fetcher.chunks(wanted(sha256="0" * 64), [url]))
    assert caught.value.code == "SHA256_MISMATCH"
    assert len(b"".join(got)) < len(DATA)


# 9: busy


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


# 10, 11: not there, or hardly


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    for chunk in reader.fetcher.chunks(wanted(), [url]):
        time.sleep(0.05)
        got.append(chunk)
    assert b"".join(got) == DATA
    assert len(server.requests) == 1


HEADERS = replace(IMPATIENT, headers=1.0)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "fault",
    [
        faults.drips_head(1, every=0.1),
        faults.drips_head(40, every=0.4),
        faults.repeats(b"H", every=0.1, behind=b"HTTP/1.1 200 OK\r\n"),
        faults.repeats(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.01),
        faults.repeats(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        faults.drips_head(1, every=0.1, code=302, Location="/good"),
    ],
    ids=["bytes", "lines", "endless", "continue", "fast continue", "redirect"],
)
def test_headers_that_drip_are_left_for_the_next_mirror(server: FaultServer, fault: Any) -> None:
    """Every byte comes within the silence that is allowed: only a deadline over all ends it."""
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", fault, always=True)
    began = time.monotonic()
    assert Reader(patience=HEADERS).fetch(slow, good) == DATA
    assert time.monotonic() - began < 3 * HEADERS.headers
    assert len(server.asked("/slow")) == 1


def test_headers_have_one_deadline_over_all_redirects(server: FaultServer) -> None:
    for number in range(5):
        there = f"/{number + 1}"
        server.put(f"/{number}", b"")
        drip = faults.drips_head(20, every=0.09, code=302, Location=there)
        server.fail(f"/{number}", drip, always=True)
    server.put("/5", DATA)
    good = server.put("/good", DATA)
    assert Reader(patience=HEADERS).fetch(f"{server.url}/0", good) == DATA
    assert len(server.asked("/1")) == 1
    assert server.asked("/5") == []


def test_headers_that_drip_and_no_mirror(server: FaultServer) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.drips_head(1, every=0.1), always=True)
    reader = Reader(patience=replace(HEADERS, headers=0.4, attempts=2))
    assert "no answer within 0.4 s" in refused(NetworkError, "UNREACHABLE", reader, url)


def test_slow_headers_within_the_deadline_are_no_fault(server: FaultServer) -> None:
    """Nor does their time count against the body's rate."""
    url = server.put("/a", DATA)
    server.fail("/a", faults.drips_head(30, every=0.08), always=True)
    reader = Reader(patience=replace(IMPATIENT, headers=5.0, rate=4_000_000))
    assert reader.fetch(url) == DATA
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        faults.repeats(b"x", every=0.05, behind=CHUNKED + b"5;"),
        faults.repeats(b"0", every=0.05, behind=CHUNKED),
        faults.repeats(b"x: y\r\n", every=0.05, behind=CHUNKED + b"0\r\n"),
    ],
    ids=["extension", "length", "trailers"],
)
def test_a_drip_between_the_bytes_of_a_body_is_no_progress(server: FaultServer, fault: Any) -> None:
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", fault, always=True)
    began = time.monotonic()
    assert Reader().fetch(slow, good) == DATA
    assert time.monotonic() - began < 10 * IMPATIENT.window


@pytest.mark.parametrize(
    ("piece", "behind"),
    [(b"x: y\r\n" * 1000, b"0\r\n"), (b"0" * 8192, b""), (b"1;" + b"x" * 60_000 + b"\r\n", b"")],
    ids=["trailers", "length", "extensions"],
)
def test_what_is_not_the_file_is_not_read_without_end(
    server: FaultServer, reader: Reader, piece: bytes, behind: bytes
) -> None:
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", faults.repeats(piece, behind=CHUNKED + behind), always=True)
    assert reader.fetch(slow, good) == DATA
    assert server.sent("/slow") < faults.ENOUGH


def test_small_chunks_are_not_mistaken_for_that(server: FaultServer, reader: Reader) -> None:
    def crumbs(answer: faults.Answer) -> None:
        answer.handler.wfile.write(CHUNKED)
        pieces = (DATA[at : at + 7] for at in range(0, len(DATA), 7))
        answer.handler.wfile.write(b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces))
        answer.handler.wfile.write(b"0\r\n\r\n")

    url = server.put("/a", DATA)
    server.fail("/a", crumbs)
    assert reader.fetch(url) == DATA
    assert len(server.requests) == 1


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, {"Retry-After": "9" * 400}),
        (503, {"Retry-After": HUGE}),
        (503, {"Retry-After": "Mon, 01 Jan 99999999999999 00:00:00 GMT"}),
        (503, {"Retry-After": "Mon, 01 Jan 2020 00:00:00 +99999999999999999999"}),
        (200, {"Content-Length": HUGE}),
        (200, {"Content-Length": "-5"}),
        (206, {"Content-Range": f"bytes {HUGE}-9/10"}),
        (206, {"Content-Range": f"bytes 0-9/{HUGE}"}),
        (206, {"Content-Range": "bytes \u00b2-9/10"}),
        (200, {"Last-Modified": "Mon, 01 Jan 2020 00:00:00 +9999999999", "Date": "x"}),
        (200, {"Transfer-Encoding": "chunked", "Content-Length": "5"}),
        (302, {"Location": f"https://{'a' * 70}.com/"}),
        (302, {"Location": "https://a..b/"}),
        (302, {"Location": "https://%00/"}),
        (302, {"Location": "https://xn--\u00ff/"}),
        (302, {"Location": "https://[v1.x]/"}),
        (302, {f"X-{number}": "x" for number in range(200)}),
    ],
)
def test_hostile_headers_are_an_error_of_the_network(
    server: FaultServer, reader: Reader, status: int, headers: dict[str, str]
) -> None:
    """Neither a number that is too large nor a host that cannot be is a programming error."""

    def hostile(answer: faults.Answer) -> None:
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {text}" for name, text in headers.items())]
        answer.handler.wfile.write("\r\n".join([*lines, "", "hello"]).encode("latin-1"))

    url, good = server.put("/a", DATA), server.put("/good", DATA)
    server.fail("/a", hostile, always=True)
    assert reader.fetch(url, good) == DATA
    with pytest.raises(LoaderError):
        reader.fetch(url)


def test_a_tls_handshake_that_drips_is_left_for_the_next_mirror(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    patience = replace(IMPATIENT, connect=1.0)
    with FaultServer(certificate) as server, Trickle(server.port, every=0.05) as trickle:
        good = server.put("/a", DATA)
        began = time.monotonic()
        slow = f"https://127.0.0.1:{trickle.port}/a"
        assert Reader(patience=patience).fetch(slow, good) == DATA
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_proxy_that_drips_is_left(monkeypatch: pytest.MonkeyPatch, behind: bytes) -> None:
    with FaultServer() as server:
        server.fail("release.invalid:443", faults.repeats(b"x", every=0.05, behind=behind))
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        monkeypatch.setenv("NO_PROXY", "")
        reader = Reader(patience=replace(HEADERS, attempts=1))
        began = time.monotonic()
        said = refused(NetworkError, "UNREACHABLE", reader, "https://release.invalid/a")
        assert "no answer within 1 s" in said
        assert time.monotonic() - began < 3 * HEADERS.headers


def test_addresses_that_do_not_answer_share_the_time(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a name does whose IPv6 addresses lead nowhere: the last of its addresses is reached."""
    nowhere = socket.create_server(("127.0.0.2", server.port), backlog=0)
    usual = socket.getaddrinfo

    def several(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        names = ["127.0.0.2"] * 5 + ["127.0.0.1"] if host == "localhost" else [host]
        return [found for name in names for found in usual(name, port, *args, **kwargs)]

    with nowhere, contextlib.ExitStack() as waiting:
        for _ in range(2):  # fill its queue: the next ones are not answered
            caller = waiting.enter_context(socket.socket())
            caller.settimeout(0)
            caller.connect_ex(nowhere.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", several)
        reader = Reader(patience=replace(IMPATIENT, connect=5, headers=2, attempts=1))
        server.put("/a", DATA)
        began = time.monotonic()
        assert reader.fetch(f"http://localhost:{server.port}/a") == DATA
        assert 1 < time.monotonic() - began < 2


# 12, 13: redirects


def test_redirects_are_followed_with_the_range(server: FaultServer, reader: Reader) -> None:
    server.put("/b", DATA)
    url = server.put("/a", b"")
    server.fail("/a", faults.redirect("/b", 307), always=True)
    server.fail("/b", faults.cut(3 * CHUNK))
    assert reader.fetch(url) == DATA
    assert ranges(server, "/b") == [None, f"bytes={3 * CHUNK}-"]


@pytest.mark.parametrize(
    "location",
    [
        "http://example.org/a",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "//example.org/a",
        "http://[::1",
        "",
        "hf://a/b/c",
        "http://example.org\\@127.0.0.1/",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1\\.example.org/",
    ],
)
def test_a_redirect_elsewhere_is_refused(
    server: FaultServer, reader: Reader, location: str
) -> None:
    url = server.put("/a", b"")
    server.fail("/a", faults.redirect(location), always=True)
    assert "redirected to" in refused(NetworkError, "UNREACHABLE", reader, url)


def test_a_redirect_that_goes_round_is_refused(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", b"")
    server.fail("/a", faults.redirect("/a"), always=True)
    assert "more than 5 redirects" in refused(NetworkError, "UNREACHABLE", reader, url)
    assert len(server.requests) == 6


def test_the_body_of_a_redirect_is_not_read(server: FaultServer, reader: Reader) -> None:
    def endless_redirect(answer: faults.Answer) -> None:
        answer.head(302, None, Location="/b")
        while answer.request.sent < faults.ENOUGH:
            answer.send(bytes(1 << 16))

    server.put("/b", DATA)
    url = server.put("/a", b"")
    server.fail("/a", endless_redirect)
    assert reader.fetch(url) == DATA
    assert server.sent("/a") < faults.ENOUGH


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    return make_certificate(folder, "release.invalid", "DNS:release.invalid", "IP:127.0.0.1")


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_of_the_environment(
    certificate: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    with FaultServer(certificate) as server, Proxy(server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        server.put("/a", DATA)
        assert reader.fetch("https://release.invalid/a") == DATA
        assert proxy.targets == ["release.invalid:443"]


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_https_on_loopback(
    certificate: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    with FaultServer(certificate) as server:
        assert reader.fetch(server.put("/a", DATA)) == DATA


def test_an_unknown_certificate_is_refused(certificate: Path, reader: Reader) -> None:
    with FaultServer(certificate) as server:
        server.put("/a", DATA)
        message = refused(NetworkError, "UNREACHABLE", reader, f"{server.url}/a")
    assert "certificate" in message


def test_a_certificate_file_that_is_not_there_is_the_networks_fault(
    certificate: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    with FaultServer(certificate) as server, Proxy(server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        message = refused(NetworkError, "UNREACHABLE", reader, "https://release.invalid/a")
    assert "nowhere.pem" in message


@pytest.mark.parametrize("plain", ["http://127.0.0.1:1/a", "http://release.invalid/a"])
def test_https_never_becomes_http(
    certificate: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, plain: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with FaultServer(certificate) as server:
        url = server.put("/a", b"")
        server.fail("/a", faults.redirect(plain), always=True)
        assert "which is not https" in refused(NetworkError, "UNREACHABLE", reader, url)


# 14, 15: not the file


def test_compression_on_the_way_is_not_undone(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.encoded, always=True)
    refused(IntegrityError, "FILE_TOO_LARGE", reader, url)
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
        reader.fetcher.manifest(url, "0" * 64)
    assert caught.value.code == "MANIFEST_PIN_MISMATCH"
    with pytest.raises(IntegrityError, match="not JSON"):
        reader.fetcher.manifest(url, None)


# 16, 17: proxies, offline


def test_loopback_is_never_reached_through_a_proxy(
    server: FaultServer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(1) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
            monkeypatch.setenv(name.lower(), proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        assert reader.fetch(server.put("/a", DATA)) == DATA
        assert proxy.targets == []


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
        reader.fetcher.manifest("hf://owner/name/manifest.json", None)
    with pytest.raises(NetworkError):
        reader.copy(url)
    assert reader.fetch(url, (tmp_path / "a").as_uri()) == DATA
    assert server.requests == []


# the other kinds of URL


def test_files_are_read_like_the_rest(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a b%").write_bytes(DATA)
    url = (tmp_path / "a b%").as_uri()
    assert reader.fetch(url) == DATA
    assert reader.copy(url) == DATA
    (tmp_path / "a b%").write_bytes(OTHER)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)


def test_a_file_that_is_none_is_not_waited_for(tmp_path: Path, reader: Reader) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for path, reason in ((tmp_path / "fifo", "not a file"), (tmp_path, "not a file")):
        assert reason in refused(NetworkError, "UNREACHABLE", reader, path.as_uri())


@pytest.mark.parametrize(
    "url",
    [
        "foo",
        "",
        "http://example.com/manifest.json",
        "http://127.0.0.1.example.com/x",
        "http://localhost@example.com/x",
        "ftp://example.com/m",
        "https://",
        "https:///m.json",
        "file://host/m.json",
        "file://",
        "file:///a%00b",
        "hf://owner",
        "hf://owner/name",
        "hf://owner/name@/x",
        "hf://owner/name/x?y",
        "https://user:secret@example.com/m",
        "http://[::1/",
        "https://example.com:99999/",
        "https://example.com:zero/",
        "https://example.com/\n",
        "javascript:alert(1)",
        "data:,x",
    ],
)
def test_what_is_no_url_is_a_setting_that_cannot_be_used(url: str, reader: Reader) -> None:
    for ask in (lambda: reader.fetcher.manifest(url, None), lambda: reader.copy(url)):
        with pytest.raises(SettingError) as caught:
            ask()
        assert caught.value.exit_status == 2
        assert "hf://OWNER/REPO" in caught.value.hint
        assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://example.com/m.json", locations.Web("https://example.com/m.json")),
        ("http://localhost:1/m", locations.Web("http://localhost:1/m")),
        ("http://[::1]:1/m", locations.Web("http://[::1]:1/m")),
        ("hf://o/n/m.json", locations.Hub("o/n", None, "m.json")),
        ("hf://o/n@v1.0/d/m.json", locations.Hub("o/n", "v1.0", "d/m.json")),
    ],
)
def test_kinds_of_url(url: str, place: object) -> None:
    assert locations.parse(url) == place


def test_the_hub_gets_the_token_and_nobody_else(server: FaultServer) -> None:
    with FaultServer() as storage:
        storage.put("/blob", DATA)
        path = "/o/n/resolve/main/dir/a%20b"
        server.put(path, b"")
        server.fail(path, faults.redirect(f"{storage.url}/blob?signature=x"), always=True)
        reader = Reader(token="hf_secret", endpoint=server.url)
        assert reader.fetch("hf://o/n/dir/a b") == DATA
        assert server.asked(path)[0].headers["authorization"] == "Bearer hf_secret"
        assert "authorization" not in storage.asked("/blob")[0].headers
        assert reader.fetch(server.put("/plain", DATA)) == DATA
        assert "authorization" not in server.asked("/plain")[0].headers


def test_a_redirect_within_the_hub_keeps_the_token(server: FaultServer) -> None:
    server.put("/renamed", DATA)
    server.fail("/o/n/resolve/v1/a", faults.redirect("/renamed"), always=True)
    reader = Reader(token="hf_secret", endpoint=server.url)
    assert reader.copy("hf://o/n@v1/a") == DATA
    assert server.asked("/renamed")[0].headers["authorization"] == "Bearer hf_secret"


def test_netrc_is_left_alone(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert Reader().copy(server.put("/a", DATA)) == DATA
    assert "authorization" not in server.requests[0].headers


def test_a_token_never_goes_over_plain_http() -> None:
    reader = Reader(token="hf_secret", endpoint="http://hub.example.org")
    with pytest.raises(SettingError, match="neither https nor on loopback"):
        reader.copy("hf://o/n/a")
    assert "neither https" in refused(NetworkError, "UNREACHABLE", reader, "hf://o/n/a")


@pytest.mark.parametrize("url", ["hf://o/n--bad..name/x", "hf://o/-n/x"])
def test_a_repository_that_cannot_be(url: str) -> None:
    with pytest.raises(SettingError):
        Reader().copy(url)


def test_a_manifest_is_read_with_retries(server: FaultServer, reader: Reader) -> None:
    from tests.rigs import archives

    _, artifact = archives.release()
    data = archives.manifest(artifact)
    url = server.put("/m.json", data)
    server.fail("/m.json", faults.cut(100), faults.status(503))
    manifest = reader.fetcher.manifest(url, hashlib.sha256(data).hexdigest())
    assert manifest.artifacts == (artifact,)
    assert len(reader.sleeps) == 2


def test_a_manifest_that_is_missing_names_the_url(server: FaultServer, reader: Reader) -> None:
    with pytest.raises(NetworkError, match="404") as caught:
        reader.fetcher.manifest(f"{server.url}/m.json", None)
    assert f"{server.url}/m.json" in caught.value.message


def test_a_manifest_of_100_megabytes_is_not_read(tmp_path: Path, reader: Reader) -> None:
    with (tmp_path / "m.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(IntegrityError, match="larger than 8388608 bytes"):
        reader.fetcher.manifest((tmp_path / "m.json").as_uri(), None)


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


@pytest.mark.parametrize("url", ["nothing", "ftp://host/a", "https://"])
def test_what_is_no_url_is_the_settings_fault(url: str) -> None:
    """Offline, too: nobody has to be asked to see it."""
    for offline in (False, True):
        reader = Reader(offline=offline)
        with pytest.raises(SettingError):
            reader.copy(url)
        with pytest.raises(SettingError):
            reader.fetcher.read(url, limit=10)


@pytest.mark.parametrize(("gained", "forgiven"), [(0, True), (-1, False)])
def test_a_copy_that_gains_little_is_not_tried_for_ever(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, gained: int, forgiven: bool
) -> None:
    """Each connection brings so much and breaks; a gain of ``_WORTH_ANOTHER`` is one."""
    each = 60_000
    monkeypatch.setattr(fetch_module, "_WORTH_ANOTHER", each - gained)
    reader = Reader()
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", *(faults.cut(end) for end in range(each, len(DATA), each)))
    if forgiven:
        assert reader.copy(url) == DATA
    else:
        with pytest.raises(NetworkError):
            reader.copy(url)


def test_how_long_a_small_file_is_waited_for() -> None:
    assert fetch_module.SMALL_FILE_SECONDS == 120
