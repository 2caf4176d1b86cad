"""Faults 1 to 17: a server that does not do what it should (docs/faults.md)."""

import gzip
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from llama_loader import fetch as fetch_module
from llama_loader.errors import IntegrityError, LoaderError, NetworkError
from llama_loader.events import Downloading
from llama_loader.locations import Patience, Web
from llama_loader.store import Store
from tests.rigs import fault_server as faults
from tests.rigs import refusals
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


@pytest.mark.parametrize("kept", [0, 123_456, len(DATA)])
@pytest.mark.parametrize(
    "fault",
    [
        *(faults.healthy, faults.cut(400_000), faults.ignores_range, faults.status(416)),
        faults.content_range("bytes 1-2/3"),
        pytest.param(faults.stalls(300_000), id="stalls"),
        pytest.param(faults.shaped(20_000), id="shaped"),
        faults.body(DATA + b"more", chunked=True),
    ],
)
def test_resume_appends_what_is_missing_whatever_the_server_did(
    server: FaultServer,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    fault: faults.Fault,
    kept: int,
) -> None:
    """There is no deadline and, with a known size, no other bound, as models are large."""
    monkeypatch.setattr(fetch_module, "_LARGEST", 1)
    place = Web(server.put("/a", DATA))
    server.fail("/a", fault, fault)
    target = BytesIO(DATA[:kept])
    reader.fetcher.resume(place, target, len(DATA))
    assert target.getvalue() == DATA
    assert bool(server.requests) == (kept < len(DATA))
    assert ranges(server)[:1] == [f"bytes={kept}-" if kept else None][: len(server.requests)]


@pytest.mark.parametrize("fault", [faults.cut(400_000), faults.body(DATA, chunked=True)])
def test_resume_of_a_file_of_unknown_size_ends_where_the_answer_says(
    server: FaultServer, reader: Reader, monkeypatch: pytest.MonkeyPatch, fault: faults.Fault
) -> None:
    monkeypatch.setattr(fetch_module, "_LARGEST", len(DATA))  # a file may be as large as the bound
    place, target = Web(server.put("/a", DATA)), BytesIO(b"")
    server.fail("/a", fault)
    reader.fetcher.resume(place, target, None)
    assert target.getvalue() == DATA
    assert ranges(server)[1:] in ([], ["bytes=400000-"])


@pytest.mark.parametrize(
    ("first", "requests"),
    [([], 1), ([faults.body(DATA, chunked=True)], 1), ([faults.cut(0)], 2)],
)
def test_resume_of_a_file_of_unknown_size_has_a_bound(
    server: FaultServer,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    first: list[faults.Fault],
    requests: int,
) -> None:
    assert (fetch_module.PIECE, fetch_module._LARGEST) == (262_144, 1_099_511_627_776)
    monkeypatch.setattr(fetch_module, "_LARGEST", 300_000)
    place, target = Web(server.put("/a", DATA)), BytesIO(b"")
    server.fail("/a", *first)
    with pytest.raises(NetworkError, match="larger than 300000 bytes") as caught:
        reader.fetcher.resume(place, target, None)
    assert caught.value.refusals == {200}
    assert len(target.getvalue()) <= 300_000 + fetch_module.PIECE
    assert len(server.requests) == requests


def one_byte(answer: faults.Answer) -> None:
    """A gain with each connection, for which no rate is ever asked."""
    answer.heed_range()
    answer.head()
    answer.send(answer.data[answer.start : answer.start + 1])


@pytest.mark.parametrize(
    ("fault", "attempts", "refusal", "words"),
    [
        (faults.body(b"<html>log in</html>"), 1, 200, f"19 bytes instead of {len(DATA)} came"),
        (faults.body(b"<html>", chunked=True), 4, 0, f"ended after 6 of {len(DATA)} bytes"),
        (faults.status(429, Retry_After="3600"), 1, 0, "to be asked again in 3600 s"),
        (faults.status(403), 1, 403, "HTTP status 403"),
        (faults.shaped(20_000, ranges=False), 4, 0, "slower than"),
        (one_byte, 4, 0, "950001 more expected"),
    ],
)
def test_resume_gives_up_where_no_attempt_gains_anything(
    server: FaultServer,
    reader: Reader,
    fault: faults.Fault,
    attempts: int,
    refusal: int,
    words: str,
) -> None:
    place = Web(server.put("/a", DATA))
    server.fail("/a", fault, always=True)
    with pytest.raises(NetworkError, match=words) as caught:
        reader.fetcher.resume(place, BytesIO(), len(DATA))
    assert len(server.requests) == attempts
    assert caught.value.refusals == {refusal}


@pytest.mark.parametrize("end", [0, 1])
def test_backoff_doubles_up_to_8_seconds_with_jitter(
    monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    monkeypatch.setattr("random.uniform", lambda *ends: ends[end])
    pauses = [fetch_module.backoff(failures, None, IMPATIENT) for failures in range(1, 7)]
    assert pauses == [(0.5, 1.5)[end] * own for own in (1, 2, 4, 8, 8, 8)]


def test_resume_forgives_what_failed_with_every_gain(
    server: FaultServer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    place, target = Web(server.put("/a", DATA)), BytesIO()
    server.fail("/a", faults.status(503))
    server.fail("/a", *[faults.cut(fetch_module.PIECE * number) for number in range(1, 4)])
    reader.fetcher.resume(place, target, len(DATA))
    assert target.getvalue() == DATA
    assert reader.sleeps == [1.0] * 4


def cut_in_a_chunk(answer: faults.Answer) -> None:
    answer.head(length=None, Transfer_Encoding="chunked")
    answer.send(b"%x\r\n" % len(DATA) + DATA[: CHUNK + 5])


def without_ranges(answer: faults.Answer) -> None:
    """Send the beginning again, and cut before what is here."""
    answer.head()
    answer.send(answer.data[: 2 * CHUNK])


@pytest.mark.parametrize(
    ("failing", "asked"),
    [
        *(
            ((faults.cut(len(DATA) * share // 100),), [None, len(DATA) * share // 100 // CHUNK])
            for share in (10, 50, 90)
        ),
        ((cut_in_a_chunk,), [None, 1]),
        ((faults.cut(5 * CHUNK), without_ranges, faults.ignores_range), [None, 5, 5]),
        *(
            ((faults.cut(5 * CHUNK), wrong), [None, 5, None])
            for wrong in (
                faults.content_range("bytes 0-9/10", 0),
                faults.content_range("bytes 250001-950001/950002", 1),
                faults.content_range("", 0),
                faults.content_range("pages 1-2/3", 0),
                faults.content_range("bytes -1-5/6", 0),
                faults.status(416),
            )
        ),
    ],
)
def test_cut_connection_resumes_at_the_last_verified_chunk_and_no_wrong_range_is_believed(
    server: FaultServer, reader: Reader, failing: tuple[faults.Fault, ...], asked: list[int | None]
) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", *failing)
    assert reader.fetch(url) == DATA
    assert ranges(server) == [one and f"bytes={one * CHUNK}-" for one in asked]
    assert reader.sleeps


def test_every_chunk_gained_forgives_what_failed(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", *[faults.cut(CHUNK * number + 1) for number in range(1, 10)])
    assert reader.fetch(url) == DATA
    assert len(reader.sleeps) == 9
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


def cut_and_changed(data: bytes) -> Any:
    """Cut the first answer, and serve something under another name from then on."""

    def fault(answer: faults.Answer) -> None:
        faults.cut(5 * CHUNK)(answer)
        answer.file.etag, answer.file.data = '"two"', data

    return fault


def test_a_file_that_changes_between_attempts(server: FaultServer) -> None:
    """An artifact's chunks decide; of an archive by URL no earlier byte is trusted."""
    for data, path in ((DATA, "/same"), (OTHER, "/other"), (OTHER, "/copy")):
        url = server.put(path, DATA, etag='"one"')
        server.fail(path, cut_and_changed(data))
        if path == "/same":
            assert Reader().fetch(url) == DATA
            assert ranges(server, path) == [None, f"bytes={5 * CHUNK}-"]
        elif path == "/other":
            refused(IntegrityError, "CHUNK_MISMATCH", Reader(), url)
        else:
            assert Reader().copy(url) == OTHER


@pytest.mark.parametrize("times", [1, 9])
def test_a_copy_that_is_cut_starts_over(server: FaultServer, reader: Reader, times: int) -> None:
    url = server.put("/a", DATA, etag='"one"')
    server.fail("/a", *[faults.cut(100_000 * number) for number in range(1, times + 1)])
    if times == 1:
        assert reader.copy(url) == DATA
        assert ranges(server) == [None, None]
    else:
        with pytest.raises(NetworkError):
            reader.copy(url)
        assert len(server.requests) == IMPATIENT.attempts


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "length", [0, 10, CHUNK, *(len(DATA) + more for more in (-1, 1, 5_000_000))]
)
def test_a_body_of_another_length_is_refused(
    server: FaultServer, reader: Reader, length: int, chunked: bool
) -> None:
    url, sent = server.put("/a", DATA), DATA[:length].ljust(length)
    server.fail("/a", faults.body(sent, chunked=chunked), always=True)
    if length > len(DATA):
        refused(IntegrityError, "FILE_TOO_LARGE", reader, url)
        return
    message = refused(NetworkError, "UNREACHABLE", reader, url)
    assert f"{length} of {len(DATA)} bytes" in message


def test_one_byte_too_many_is_all_that_is_read_of_an_endless_body(
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
    with pytest.raises(IntegrityError, match="larger than 2000000 bytes"):
        reader.copy(url, limit=2_000_000)
    with pytest.raises(IntegrityError, match="larger than 100 bytes"):
        reader.fetcher.read(url, limit=100)
    assert server.sent("/a") < faults.ENOUGH


@pytest.mark.parametrize("at", [0, 5 * CHUNK, len(DATA) - 1])
def test_a_flipped_bit_costs_one_chunk(server: FaultServer, reader: Reader, at: int) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.flipped(at))
    assert reader.fetch(url) == DATA
    first = at // CHUNK * CHUNK
    assert ranges(server) == [None, f"bytes={first}-" if first else None]
    assert reader.sleeps == []
    server.fail("/a", faults.flipped(at), always=True)
    message = refused(IntegrityError, "CHUNK_MISMATCH", reader, url)
    assert f"from {first} on" in message
    assert len(server.requests) == 4


def test_wrong_bytes_of_one_mirror_are_repaired_by_the_next(
    server: FaultServer, reader: Reader
) -> None:
    bad, good = server.put("/bad", OTHER), server.put("/good", DATA)
    assert reader.fetch(bad, good) == DATA
    server.fail("/good", faults.status(404), always=True)
    message = refused(IntegrityError, "CHUNK_MISMATCH", reader, bad, good)
    assert "404" in message


@pytest.mark.parametrize("digit", ["0", "f"])
def test_chunks_that_are_right_do_not_make_the_whole_right(
    server: FaultServer, reader: Reader, digit: str
) -> None:
    url = server.put("/a", DATA)
    got: list[bytes] = []
    with refusals.refused("SHA256_MISMATCH", IntegrityError, "every chunk is right"):
        got.extend(reader.fetcher.chunks(described(sha256=digit * 64), [url]))
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


@pytest.mark.parametrize("small", [False, True])
def test_waiting_has_an_end(server: FaultServer, *, small: bool) -> None:
    """A small file's end is 60 s, whatever the patience with large ones."""
    url = server.put("/a", DATA)
    server.fail("/a", faults.status(503, Retry_After="50"), always=True)
    reader = Reader(patience=Patience(deadline=3600 if small else 30))
    if small:
        server.fail("/a", faults.status(503, Retry_After="60"), always=True)
        with pytest.raises(
            NetworkError, match=r"asked again in 60 s; not done within 60 s"
        ) as caught:
            reader.fetcher.manifest_bytes(url)
        assert caught.value.refusals == {0}
        assert "does this machine reach it" in caught.value.hint
    else:
        assert "not done within 30 s" in refused(NetworkError, "UNREACHABLE", reader, url)
    assert reader.sleeps == []


def test_a_download_has_an_end(server: FaultServer) -> None:
    reader = Reader(patience=Patience(deadline=0.5, rate=1))
    url = server.put("/a", DATA)
    server.fail("/a", faults.drip(10_000, every=0.05), always=True)
    assert "not done within 0.5 s" in refused(NetworkError, "UNREACHABLE", reader, url)


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


def tires(answer: faults.Answer) -> None:
    """Send a good beginning, then a trickle."""
    answer.head()
    answer.send(DATA[: 8 * CHUNK])
    for at in range(8 * CHUNK, len(DATA), 100):
        answer.send(DATA[at : at + 100])
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (faults.drip(100, every=0.02), None),
        (faults.silent(3), None),
        (tires, f"bytes={8 * CHUNK}-"),
    ],
)
def test_a_trickle_is_left_for_the_next_mirror(
    server: FaultServer, reader: Reader, fault: Any, asked: str | None
) -> None:
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", fault, always=True)
    assert reader.fetch(slow, good) == DATA
    assert ranges(server, "/good") == [asked]


def test_a_slow_consumer_is_not_the_servers_fault(server: FaultServer) -> None:
    reader = Reader(patience=Patience(window=0.2, rate=1_000_000))
    url = server.put("/a", DATA)
    got = []
    for chunk in reader.fetcher.chunks(described(), [url]):
        time.sleep(0.05)
        got.append(chunk)
    assert b"".join(got) == DATA
    assert len(server.requests) == 1


def test_compression_on_the_way_is_not_undone_and_a_tarball_that_is_called_so_is_understood(
    server: FaultServer, reader: Reader
) -> None:
    url, called = server.put("/a", DATA), server.put("/b", DATA)
    server.fail("/a", faults.encoded, always=True)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)
    assert gzip.decompress(reader.copy(url)) == DATA
    server.fail("/b", faults.body(DATA, Content_Encoding="gzip"), always=True)
    assert reader.fetch(called) == DATA


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("length", "code"),
    [(200, "NOT_THE_FILE"), (CHUNK + 10, "CHUNK_MISMATCH"), (2_000_000, "CHUNK_MISMATCH")],
)
def test_a_login_page_is_not_the_file(
    server: FaultServer, reader: Reader, length: int, code: str, chunked: bool
) -> None:
    page = b"<!doctype html><title>Log in</title>".ljust(length)
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(page, chunked=chunked, Content_Type="text/html"), always=True)
    with refusals.refused(code, IntegrityError, hint="login"):
        reader.fetch(url)


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
        reader.fetcher.manifest_bytes("hf://owner/name/manifest.json")
    with pytest.raises(NetworkError):
        reader.copy(url)
    assert reader.fetch(url, (tmp_path / "a").as_uri()) == DATA
    assert server.requests == []


def test_a_manifest_of_100_megabytes_is_not_read(tmp_path: Path, reader: Reader) -> None:
    with (tmp_path / "m.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(IntegrityError, match="larger than 4194304 bytes"):
        reader.fetcher.manifest_bytes((tmp_path / "m.json").as_uri())


def test_what_is_read_first_is_said_first(server: FaultServer, reader: Reader) -> None:
    url = server.put("/m", b"{}")
    assert reader.fetcher.manifest_bytes(url) == b"{}"
    assert reader.events == [Downloading(url, 0, None), Downloading(url, 2, 2)]


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
        reader.fetcher.manifest_bytes(f"{server.url}/a")
    assert time.monotonic() - began < 3
    assert f"{server.url}/a: " in caught.value.message
    assert server.asked("/m.json")


# Which mirror is asked next, and when.


def test_mirrors_that_failed_as_often_are_asked_in_their_order(
    server: FaultServer, reader: Reader
) -> None:
    one, two = server.put("/one", DATA), server.put("/two", DATA)
    for path in ("/one", "/two"):
        server.fail(path, faults.cut(CHUNK // 2), faults.cut(CHUNK // 2))
    assert reader.fetch(one, two) == DATA
    assert [request.path for request in server.requests] == ["/one", "/two", "/one", "/two", "/one"]
    assert len(reader.sleeps) == 3  # none before the first request to each
    assert all(low <= s <= 3 * low for low, s in zip((0.5, 0.5, 1), reader.sleeps, strict=True))


@pytest.mark.parametrize(
    ("codes", "refusals"),
    [((404, 410), {404, 410}), ((404, 403), {404, 403}), ((404, 503), {404, 0})],
)
def test_error_of_a_download_has_the_refusal_of_every_url(
    server: FaultServer, codes: tuple[int, int], refusals: set[int]
) -> None:
    for number, code in enumerate(codes):
        server.fail(f"/{number}", faults.status(code), always=True)
    with pytest.raises(NetworkError) as caught:
        Reader().fetch(f"{server.url}/0", f"{server.url}/1")
    error = caught.value
    assert (error.code, error.refusals) == ("UNREACHABLE", refusals)
    told = [f"{server.url}/{number}: HTTP status {code}" for number, code in enumerate(codes)]
    assert error.message == f"a.tar.gz cannot be fetched: {'; '.join(told)}"  # each reason once
    assert error.hint.startswith("is the address right")
    assert ("does this machine reach it" in error.hint) == (0 in refusals)
    assert ("not of a page about it" in error.hint) == (0 not in refusals)
    for other, told, refusal in (
        ("foo", "it is not a URL to load from", 0),
        ("file:///", "it is not a file; a release's manifest in it is file:///manifest.json", 0),
        ("file:///missing", "file:///missing: No such file or directory", 404),
        ("file:///dev/null/x", "file:///dev/null/x: Not a directory", 0),
    ):
        with pytest.raises(NetworkError, match=f"{told}[ ;]") as caught:
            Reader().fetch(f"{server.url}/0", other)
        assert caught.value.refusals == {404, refusal}


def test_wrong_bytes_once_are_the_networks_fault(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    server.fail("/a", faults.flipped(CHUNK), *[faults.status(404)] * 3)
    refused(NetworkError, "UNREACHABLE", reader, url)


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
        partial(Store(Path("/nowhere")).manifest, sha256="0" * 64, fetcher=reader.fetcher),
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


# Copies.


def test_a_copy_tells_how_far_it_is_and_replaces_what_its_target_held(
    server: FaultServer, reader: Reader, tmp_path: Path
) -> None:
    url = server.put("/a", DATA)
    with (tmp_path / "target").open("w+b") as target:
        target.write(bytes(2 * len(DATA)))
        reader.fetcher.copy(url, target, limit=len(DATA))
        target.seek(0)
        assert target.read() == DATA
    told = [event for event in reader.events if isinstance(event, Downloading)]
    assert {(event.name, event.total) for event in told} == {(url, len(DATA))}
    done = [event.done for event in told]
    assert done == sorted(set(done))
    assert done[-1] == len(DATA)
    assert reader.fetcher.read(url, limit=len(DATA)) == DATA
