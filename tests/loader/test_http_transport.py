"""One request to a server that misbehaves: every wait has an end, and no secret leaks."""

import contextlib
import os
import socket
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.locations import Patience, Web
from tests.rigs import fault_server as faults
from tests.rigs.downloads import CHUNK, DATA, IMPATIENT, OTHER, Reader, ranges, refused
from tests.rigs.fault_server import FaultServer, make_certificate
from tests.rigs.relays import Proxy, Relay, to_port

pytestmark = pytest.mark.usefixtures("no_certificates_of_this_machine")

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
    reader = Reader(patience=replace(HEADERS, headers=0.4, attempts=1))
    assert "no answer within 0.4 s" in refused(NetworkError, "UNREACHABLE", reader, slow)


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


def test_slow_headers_within_the_deadline_are_no_fault(server: FaultServer) -> None:
    """Nor does their time count against the body's rate."""
    url = server.put("/a", DATA)
    server.fail("/a", faults.drips_head(30, every=0.08), always=True)
    reader = Reader(patience=replace(IMPATIENT, headers=5.0, rate=4_000_000))
    assert reader.fetch(url) == DATA
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("piece", "every", "behind"),
    [
        (b"x", 0.05, b"5;"),
        (b"0", 0.05, b""),
        (b"x: y\r\n", 0.05, b"0\r\n"),
        (b"x: y\r\n" * 1000, 0.0, b"0\r\n"),
        (b"0" * 8192, 0.0, b""),
        (b"1;" + b"x" * 60_000 + b"\r\n", 0.0, b""),
    ],
    ids=["extension", "length", "trailers", "fast trailers", "fast length", "fast extensions"],
)
def test_what_comes_between_the_bytes_of_a_body_is_no_progress_and_not_read_without_end(
    server: FaultServer,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    piece: bytes,
    every: float,
    behind: bytes,
) -> None:
    monkeypatch.setattr(faults, "ENOUGH", 1 << 50)  # no end
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", faults.repeats(piece, every, behind=CHUNKED + behind), always=True)
    began = time.monotonic()
    assert reader.fetch(slow, good) == DATA
    assert time.monotonic() - began < IMPATIENT.deadline / 2


def test_chunk_with_a_length_below_zero_gives_no_more_than_was_asked_for(
    server: FaultServer, tmp_path: Path
) -> None:
    """http.client returns what comes until the connection ends, in blocks of 8 KiB."""
    endless = faults.repeats(bytes(1 << 16), behind=CHUNKED + b"-1\r\n")
    bad, good = server.put("/bad", DATA), server.put("/good", DATA)
    server.fail("/bad", endless, always=True)
    reader = Reader(patience=Patience())
    tracemalloc.start()
    assert reader.fetch(bad, good) == DATA
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    with (tmp_path / "model").open("w+b") as file:
        reader.fetcher.resume(Web(bad), file, 1001)
        assert file.tell() == 1001


def test_cookies_are_not_kept(server: FaultServer) -> None:
    """``http.cookiejar`` warns of this one with a traceback."""
    url = server.put("/a", DATA)
    server.fail("/a", faults.body(DATA, Set_Cookie=f"x=y; expires=1 Jan {'1' * 5000}"), always=True)
    assert Reader().fetch(url) == DATA


def test_small_chunks_are_not_mistaken_for_that(server: FaultServer) -> None:
    def crumbs(answer: faults.Answer) -> None:
        answer.handler.wfile.write(CHUNKED)
        pieces = (DATA[at : at + 7] for at in range(0, len(DATA), 7))
        answer.handler.wfile.write(b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces))
        answer.handler.wfile.write(b"0\r\n\r\n")

    url = server.put("/a", DATA)
    server.fail("/a", crumbs)
    assert Reader(patience=Patience()).fetch(url) == DATA
    assert len(server.requests) == 1


HUGE = "9" * 5000
NO_ASCII = (
    (200, "ETag", '"one{}"'),
    (200, "Last-Modified", "{}, 01 Jan 2020 00:00:00 GMT"),
    (200, "Content-Length", "{}12"),
    (206, "Content-Range", "bytes 0-9{}/10"),
    (206, "Content-Range", "{}"),
    (302, "Location", "/good{}"),
    (302, "Location", "https://{}/"),
    (503, "Retry-After", "{}"),
    (503, "Retry-After", "5{}"),
    (503, "Retry-After", "Mon, 01 Jan 2020 00:00:00 {}"),
)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        *(
            (status, {"Date": "Mon, 01 Jan 2024 00:00:00 GMT", name: value.format(text)})
            for status, name, value in NO_ASCII
            for text in ("\xff", "\x85")
        ),
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
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        answer.handler.wfile.write(head + DATA[: 3 * CHUNK + 5])

    url, good = server.put("/a", DATA), server.put("/good", DATA)
    server.fail("/a", hostile, always=True)
    assert reader.fetch(url, good) == DATA
    with pytest.raises(LoaderError):
        reader.fetch(url)
    with contextlib.suppress(NetworkError):
        assert DATA.startswith(reader.copy(url))
    assert {request.path for request in server.requests} == {"/a", "/good"}


def test_a_tls_handshake_that_drips_is_left_for_the_next_mirror(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    patience = replace(IMPATIENT, connect=1.0)
    with (
        FaultServer(certificate) as server,
        Relay(to_port(server.port), most=1, every=0.05) as trickle,
    ):
        good = server.put("/a", DATA)
        began = time.monotonic()
        slow = f"https://127.0.0.1:{trickle.port}/a"
        assert Reader(patience=patience).fetch(slow, good) == DATA
        assert time.monotonic() - began < 3


def test_silent_addresses_of_a_name_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses are those of a listener on loopback whose queue is full."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("0.0.0.0", 0))
        full.listen(0)
        for _ in range(3):
            one = waiting.enter_context(socket.socket())
            one.settimeout(0)
            one.connect_ex(("127.0.0.1", full.getsockname()[1]))
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", full.getsockname()[1]))
            for last in range(2, 22)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        reader, began = Reader(patience=replace(HEADERS, attempts=1)), time.monotonic()
        refused(NetworkError, "UNREACHABLE", reader, "https://mirror.invalid/a")
        assert time.monotonic() - began < 3 * HEADERS.headers


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
        "http://localhost:PORT/b",  # the name may lead to another machine
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "//example.org/a",
        "http://[::1",
        "",
        "hf://a/b/c",
        "http://example.org\\@127.0.0.1/",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1\\.example.org/",
        "ht\ttp://127.0.0.1/b",
    ],
)
def test_a_redirect_elsewhere_is_refused(
    server: FaultServer, reader: Reader, location: str
) -> None:
    url, _ = server.put("/a", b""), server.put("/b", DATA)
    server.fail("/a", faults.redirect(location.replace("PORT", f"{server.port}")), always=True)
    assert "redirected to" in refused(NetworkError, "UNREACHABLE", reader, url)
    assert server.asked("/b") == []


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
    certificate: Path,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    tmp_path: Path,
) -> None:
    with FaultServer(certificate) as server, Proxy(server.port) as proxy:
        url = server.put("/a", DATA)
        with pytest.raises(NetworkError, match=f"certificate verify failed.*; .*{variable}"):
            reader.fetch(url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv(variable, str(certificate))
        assert reader.fetch(url) == DATA
        assert reader.fetch("https://release.invalid/a") == DATA
        assert proxy.targets == ["release.invalid:443"]
        (broken := tmp_path / "broken.pem").write_text("none\n")
        for place in ("/nowhere.pem", str(broken)):
            monkeypatch.setenv(variable, place)
            message = refused(SettingError, "SETTING_INVALID", reader, "https://release.invalid/a")
            assert f"{variable} names certificates that cannot be read: {place}" in message


@pytest.mark.parametrize("scheme", ["HTTPS", "https"])
@pytest.mark.parametrize(
    "plain", ["http://127.0.0.1", "HTTP://127.0.0.1", "http://release.invalid"]
)
def test_https_never_becomes_http(
    certificate: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, scheme: str, plain: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.put("/b", DATA)
    with FaultServer(certificate) as secure:
        url = secure.put("/a", b"").replace("https", scheme)
        secure.fail("/a", faults.redirect(f"{plain}:{server.port}/b"), always=True)
        assert "which is not https" in refused(NetworkError, "UNREACHABLE", Reader(), url)
        assert len(secure.requests) == 1
    assert server.requests == []


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


def test_files_are_read_like_the_rest(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a b%").write_bytes(DATA)
    url = (tmp_path / "a b%").as_uri()
    assert reader.fetch(url) == DATA
    assert reader.copy(url) == DATA
    (tmp_path / "a b%").write_bytes(OTHER)
    refused(IntegrityError, "CHUNK_MISMATCH", reader, url)


def test_a_file_that_is_none_is_not_waited_for(tmp_path: Path, reader: Reader) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        assert "not a file" in refused(NetworkError, "UNREACHABLE", reader, path.as_uri())


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
        server.put("/renamed", DATA)
        server.fail("/o/n/resolve/v1/a", faults.redirect("/renamed"), always=True)
        assert reader.copy("hf://o/n@v1/a") == DATA  # the Hub's own redirect keeps it
        assert server.asked("/renamed")[0].headers["authorization"] == "Bearer hf_secret"


def test_netrc_is_left_alone(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert Reader().copy(server.put("/a", DATA)) == DATA
    assert "authorization" not in server.requests[0].headers


# Other machines are never asked in clear, and the token goes to the Hub alone.


@pytest.mark.parametrize("path", ["/a", "hf"])
def test_localhost_is_not_asked(server: FaultServer, path: str) -> None:
    """It may lead to another machine; the name is refused before it is resolved."""
    url, _ = server.put("/a", DATA), server.put("/o/n/resolve/main/a", DATA)
    named = f"http://localhost:{server.port}"
    reader = Reader(token="hf_secret", endpoint=named)
    asked = "hf://o/n/a" if path == "hf" else f"{named}{path}"
    with pytest.raises(SettingError) as caught:
        reader.copy(asked)
    assert "hf_secret" not in caught.value.message
    assert server.requests == []
    assert reader.fetch(asked, url) == DATA  # among mirrors it is passed over
    assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("is_tunnelled", [False, True])
@pytest.mark.parametrize("is_secure", [False, True])
def test_a_body_that_is_ended_for_its_time_is_not_the_whole_file(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, is_secure: bool, is_tunnelled: bool
) -> None:
    """A body without a length ends with its connection: also where this side ended it."""

    def stalls(answer: faults.Answer) -> None:
        answer.head(length=None)
        answer.send(DATA[:CHUNK])
        answer.handler.connection.settimeout(10)
        answer.handler.connection.recv(1)

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with FaultServer(certificate if is_secure else None) as server, Proxy(server.port) as proxy:
        url = server.put("/a", DATA)
        if is_secure and is_tunnelled:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            monkeypatch.setenv("NO_PROXY", "")
            url = "https://release.invalid/a"
        server.fail("/a", stalls, always=True)
        reader = Reader(patience=replace(IMPATIENT, silence=5.0, deadline=0.5))
        began = time.monotonic()
        with pytest.raises(NetworkError, match=r"not done within 0\.5 s"):
            reader.copy(url)
        assert time.monotonic() - began < 4
