"""One request to a server that misbehaves: every wait has an end, and no secret leaks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import http_transport
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.locations import Patience
from tests.rigs import fault_server as faults
from tests.rigs.downloads import CHUNK, DATA, IMPATIENT, OTHER, Reader, ranges, refused
from tests.rigs.fault_server import FaultServer, Proxy, Trickle, make_certificate

if TYPE_CHECKING:
    from pathlib import Path

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
    server: FaultServer,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    piece: bytes,
    behind: bytes,
) -> None:
    monkeypatch.setattr(faults, "ENOUGH", 1 << 50)  # no end
    slow, good = server.put("/slow", DATA), server.put("/good", DATA)
    server.fail("/slow", faults.repeats(piece, behind=CHUNKED + behind), always=True)
    began = time.monotonic()
    assert reader.fetch(slow, good) == DATA
    assert time.monotonic() - began < IMPATIENT.deadline / 2
    assert server.sent("/slow") < faults.ENOUGH


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


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_certificate_file_that_is_not_there_is_the_networks_fault(
    certificate: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere.pem")
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
    for path, reason in ((tmp_path / "fifo", "not a file"), (tmp_path, "not a file")):
        assert reason in refused(NetworkError, "UNREACHABLE", reader, path.as_uri())


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


# Other machines are never asked in clear, and the token goes to the Hub alone.


@pytest.mark.parametrize("path", ["/a", "hf"])
def test_localhost_is_not_asked(server: FaultServer, path: str) -> None:
    """It may lead to another machine; the name is refused before it is resolved."""
    server.put("/a", DATA)
    server.put("/o/n/resolve/main/a", DATA)
    named = f"http://localhost:{server.port}"
    reader = Reader(token="hf_secret", endpoint=named)
    with pytest.raises(SettingError) as caught:
        reader.copy("hf://o/n/a" if path == "hf" else f"{named}{path}")
    assert "hf_secret" not in caught.value.message
    assert server.requests == []


def test_localhost_among_mirrors_is_passed_over(server: FaultServer, reader: Reader) -> None:
    url = server.put("/a", DATA)
    assert reader.fetch(url.replace("127.0.0.1", "localhost"), url) == DATA
    assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"


def test_a_redirect_to_localhost_is_not_followed(server: FaultServer, reader: Reader) -> None:
    server.put("/b", DATA)
    server.fail("/a", faults.redirect(f"http://localhost:{server.port}/b"), always=True)
    refused(NetworkError, "UNREACHABLE", reader, f"{server.url}/a")
    assert server.asked("/b") == []


@pytest.mark.parametrize(
    "url",
    ["hf://o/n/../../api/whoami-v2", "hf://o/n/%2e%2e/%2e%2e/api/whoami-v2", "hf://o/n@../x/api"],
)
def test_the_hub_is_not_asked_for_what_is_no_file_of_the_repository(
    server: FaultServer, url: str
) -> None:
    reader = Reader(token="hf_secret", endpoint=server.url)
    with pytest.raises(SettingError):
        reader.copy(url)
    refused(NetworkError, "UNREACHABLE", reader, url)
    assert server.requests == []


@pytest.mark.parametrize("scheme", ["HTTPS", "hTTps", "https"])
@pytest.mark.parametrize("plain", ["http", "HTTP"])
def test_https_in_any_spelling_never_becomes_http(
    certificate: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, scheme: str, plain: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.put("/b", DATA)
    with FaultServer(certificate) as secure:
        url = secure.put("/a", b"").replace("https", scheme)
        to = f"{server.url}/b".replace("http", plain)
        secure.fail("/a", faults.redirect(to), always=True)
        assert "which is not https" in refused(NetworkError, "UNREACHABLE", Reader(), url)
        assert len(secure.requests) == 1
    assert server.requests == []


NOT_ASCII = ["\xff", "\u00e9\u00e8", "\x85", "\xa0"]


@pytest.mark.parametrize("text", NOT_ASCII)
@pytest.mark.parametrize(
    ("status", "name", "value"),
    [
        (200, "ETag", '"one{}"'),
        (200, "Last-Modified", "Mon, 01 Jan 2020 00:00:00 GMT{}"),
        (200, "Last-Modified", "{}, 01 Jan 2020 00:00:00 GMT"),
        (200, "Content-Length", "{}12"),
        (206, "Content-Range", "bytes 0-9{}/10"),
        (206, "Content-Range", "{}"),
        (302, "Location", "/good{}"),
        (302, "Location", "https://{}/"),
        (503, "Retry-After", "{}"),
        (503, "Retry-After", "5{}"),
        (503, "Retry-After", "Mon, 01 Jan 2020 00:00:00 {}"),
    ],
)
def test_headers_that_are_not_ascii_are_the_networks_fault(
    server: FaultServer, reader: Reader, status: int, name: str, value: str, text: str
) -> None:
    def hostile(answer: faults.Answer) -> None:
        line = f"{name}: {value.format(text)}"
        head = f"HTTP/1.1 {status} x\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n{line}\r\n\r\n"
        answer.handler.wfile.write(head.encode("latin-1") + DATA[: 3 * CHUNK + 5])

    url, good = server.put("/a", DATA), server.put("/good", DATA)
    server.fail("/a", hostile, always=True)
    assert reader.fetch(url, good) == DATA
    with pytest.raises(NetworkError):
        reader.fetch(url)
    with contextlib.suppress(NetworkError):
        assert DATA.startswith(reader.copy(url))
    assert {request.path for request in server.requests} == {"/a", "/good"}


@pytest.mark.parametrize(
    "fault",
    [
        faults.repeats(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.01),
        faults.repeats(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        faults.drips_head(1, every=0.1),
    ],
    ids=["continue", "fast continue", "bytes"],
)
def test_a_small_file_whose_headers_never_end_is_given_up(server: FaultServer, fault: Any) -> None:
    url = server.put("/m.json", b"{}")
    server.fail("/m.json", fault, always=True)
    reader = Reader(patience=replace(HEADERS, headers=0.5, attempts=2))
    began = time.monotonic()
    with pytest.raises(NetworkError, match=r"no answer within 0\.5 s"):
        reader.fetcher.read(url, limit=100)
    assert time.monotonic() - began < 3


def test_an_error_about_a_signed_url_does_not_show_its_query(reader: Reader) -> None:
    url = "https://127.0.0.1:1/a?X-Signature=s3cret"
    assert "s3cret" not in refused(NetworkError, "UNREACHABLE", reader, url)
    text = http_transport._reason(ValueError("cannot parse /a?X-Signature=s3cret (at 3)"), url)
    assert text == "cannot parse /a?… (at 3)"


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


def test_no_thread_outlives_its_request(server: FaultServer, reader: Reader) -> None:
    server.put("/b", DATA)
    server.fail("/a", faults.redirect("/b"))
    before = set(threading.enumerate())
    assert reader.fetch(f"{server.url}/a", f"{server.url}/b") == DATA
    left = set(threading.enumerate()) - before
    assert [each for each in left if isinstance(getattr(each, "_target", None), MethodType)] == []
