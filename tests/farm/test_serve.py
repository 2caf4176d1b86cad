"""The release server, asked over real connections."""

import http.client
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farm import durable
from farm.errors import UsageError
from farm.serve import ReleaseServer, serve_forever
from tests.rigs.refusals import refused

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReleaseServer]:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "a.tar.zst").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    (folder / "with space.json").write_text("{}", "utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text("x", "utf-8")
    (tmp_path / "secret").write_text("secret", "utf-8")
    (folder / "way-out").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    for number in range(41):  # Linux follows 40
        (folder / f"link-{number}").symlink_to(f"link-{number - 1}" if number else "empty")
    with ReleaseServer(folder) as running:
        yield running


def ask(
    server: ReleaseServer, target: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, headers=named)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_whole_file(server: ReleaseServer) -> None:
    with urllib.request.urlopen(f"{server.url}a.tar.zst", timeout=10) as response:
        assert response.read() == CONTENT
        assert response.headers["Content-Length"] == str(len(CONTENT))
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["ETag"].startswith('"')
        assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize("target", ["/a.tar.zst", "/none"])
def test_head_sends_the_headers_and_nothing_behind_them(server: ReleaseServer, target: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"HEAD {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1
    assert target == "/none" or f"Content-Length: {len(CONTENT)}\r\n".encode() in answer


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=1048570-", 1048570, 1048575),
        ("bytes=1048570-99999999", 1048570, 1048575),
    ],
)
def test_range(server: ReleaseServer, wanted: str, first: int, last: int) -> None:
    response, body = ask(server, "/a.tar.zst", Range=wanted)
    assert response.status == 206
    assert body == CONTENT[first : last + 1]
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{len(CONTENT)}"
    assert response.headers["Content-Length"] == str(last + 1 - first)


@pytest.mark.parametrize(
    ("target", "wanted", "status"),
    [
        *(
            ("/a.tar.zst", f"bytes={wanted}", 416)
            for wanted in ("1048576-", "99999999-", "99999999-999999999")
        ),
        ("/empty", "bytes=0-", 416),
        *(
            ("/a.tar.zst", wanted, 200)
            for wanted in ("bytes=0-1,5-6", "items=0-1", "bytes=5-2", "bytes=-", "bytes=x-")
        ),
        ("/a.tar.zst", "bytes=-6", 200),
        ("/a.tar.zst", f"bytes={'9' * 5000}-", 200),
    ],
)
def test_range_outside_the_file_is_refused_and_a_malformed_one_ignored(
    server: ReleaseServer, target: str, wanted: str, status: int
) -> None:
    response, body = ask(server, target, Range=wanted)
    assert response.status == status
    assert status == 416 or body == CONTENT
    whole = 0 if target == "/empty" else len(CONTENT)
    assert response.headers["Content-Range"] == (f"bytes */{whole}" if status == 416 else None)


def test_if_range(server: ReleaseServer) -> None:
    tag = ask(server, "/a.tar.zst", "HEAD")[0].headers["ETag"]
    same, part = ask(server, "/a.tar.zst", Range="bytes=5-9", If_Range=tag)
    assert (same.status, part) == (206, CONTENT[5:10])
    other, whole = ask(server, "/a.tar.zst", Range="bytes=5-9", If_Range='"other"')
    assert (other.status, len(whole)) == (200, len(CONTENT))


def test_tag_changes_with_the_file(server: ReleaseServer, tmp_path: Path) -> None:
    before = ask(server, "/a.tar.zst", "HEAD")[0].headers["ETag"]
    assert ask(server, "/a.tar.zst", "HEAD")[0].headers["ETag"] == before
    path = tmp_path / "release" / "a.tar.zst"
    status = path.stat()
    new = tmp_path / "new"
    new.write_bytes(CONTENT[::-1])
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)
    assert ask(server, "/a.tar.zst", "HEAD")[0].headers["ETag"] != before


def test_connection_is_kept(server: ReleaseServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/sub/x")
        assert connection.getresponse().read() == b"x"
    connection.close()


@pytest.mark.parametrize(
    "target", ["/empty", "/with%20space.json", "/sub/x?query=1", "//sub//x", "/link-39"]
)
def test_names(server: ReleaseServer, target: str) -> None:
    assert ask(server, target)[0].status == 200


@pytest.mark.parametrize(
    "target",
    [
        *("/../secret", "/%2e%2e/secret", "/sub/../../secret", "/..%2fsecret", "/way-out"),
        *("/%2e%2e%2f%2e%2e%2fetc/passwd", "//etc/passwd", "/sub", "/", "/none", "*"),
        *("/a.tar.zst%00", "/%ff", "/" + "x" * 5000, "/sub\\x", "/fifo", "/link-40"),
    ],
)
def test_nothing_else_is_served(server: ReleaseServer, target: str) -> None:
    response, body = ask(server, target)
    assert response.status == 404
    assert b"secret" not in body


def test_page_of_another_name_is_not_answered(server: ReleaseServer) -> None:
    for name, status in (
        ("evil.example", 421),
        ("", 421),
        ("[", 421),
        ("localhost", 200),
        ("127.0.0.1", 200),
    ):
        answered, _ = ask(server, "/a.tar.zst", Host=f"{name}:{server.port}")
        assert answered.status == status


def test_headers_of_more_than_64_kib_are_not_read(server: ReleaseServer) -> None:
    for size, status in ((30_000, 200), (33_000, 431)):
        assert ask(server, "/empty", A="a" * size, B="b" * 32_536)[0].status == status


def test_its_own_address_leads_to_the_manifest(server: ReleaseServer, tmp_path: Path) -> None:
    (tmp_path / "release" / "manifest.json").write_text("{}", "utf-8")
    with urllib.request.urlopen(server.url, timeout=10) as response:
        assert (response.url, response.read()) == (f"{server.url}manifest.json", b"{}")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_other_methods_are_refused(server: ReleaseServer, method: str) -> None:
    assert ask(server, "/a.tar.zst", method)[0].status == 501


def test_many_at_once(server: ReleaseServer) -> None:
    with ThreadPoolExecutor(16) as pool:
        bodies = pool.map(lambda _: ask(server, "/a.tar.zst")[1], range(16))
    assert list(bodies) == [CONTENT] * 16


def test_client_that_goes_away_or_sends_garbage_leaves_the_server_well(
    server: ReleaseServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for request in (b"GET /a.tar.zst HTTP/1.1\r\n\r\n", b"GET /a.t", b""):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.sendall(request)
        client.close()
    for garbage in (b"\x16\x03\x01", b"GET", b"GET / HTTP/9.9", b"GET http://[/ HTTP/1.1"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(garbage + b"\r\n\r\n")
            client.recv(100)
    assert ask(server, "/sub/x")[1] == b"x"
    assert "Traceback" not in capfd.readouterr().err


def test_only_loopback_listens(server: ReleaseServer) -> None:
    assert server.url == f"http://127.0.0.1:{server.port}/"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.port), timeout=2)


def test_port_in_use_is_named_and_free_again_afterwards(tmp_path: Path) -> None:
    with ReleaseServer(tmp_path) as first, refused("PORT_IN_USE", match=str(first.port)):
        ReleaseServer(tmp_path, first.port)
    with ReleaseServer(tmp_path, first.port) as second:
        assert second.port == first.port


def test_folder_of_more_names_than_any_place_has_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "MOST_ENTRIES", 3)
    for number in range(4):
        (tmp_path / "channels" / f"{number}").mkdir(parents=True)
    with refused("FOLDER_TOO_LARGE", UsageError, "channels"):
        serve_forever(tmp_path, 0)


def test_serve_forever_prints_its_url_and_ends_on_interrupt(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("served", "utf-8")
    text = "import sys; from pathlib import Path; from farm.serve import serve_forever; "
    text += "serve_forever(Path(sys.argv[1]), 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    assert url.endswith("/manifest.json")
    with urllib.request.urlopen(url, timeout=10) as response:
        assert response.read() == b"served"
    process.send_signal(2)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
