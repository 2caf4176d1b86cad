"""Downloads from a real server on loopback that misbehaves (FAULTS rows 1 to 17)."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import pytest
from fault_server import Fault, FaultServer

from llama_loader import fetch
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.fetch import Fetcher, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK = 64 * 1024
CONTENT = random.Random(7).randbytes(10 * CHUNK + 123)
PATH = "/a.tar.zst"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


WANTED = Wanted(
    name="a.tar.zst",
    size=len(CONTENT),
    sha256=digest(CONTENT),
    chunk_size=CHUNK,
    chunks=tuple(digest(CONTENT[i : i + CHUNK]) for i in range(0, len(CONTENT), CHUNK)),
)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({PATH: CONTENT}) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher(sleep=waits.append)


def get(fetcher: Fetcher, *urls: str, wanted: Wanted = WANTED) -> bytes:
    return b"".join(fetcher.chunks(wanted, urls))


def test_a_sound_download_is_one_request(fetcher: Fetcher, server: FaultServer) -> None:
    assert get(fetcher, server.url + PATH) == CONTENT
    assert len(server.asked) == 1
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_a_cut_connection_goes_on_at_the_last_verified_chunk(
    fetcher: Fetcher, server: FaultServer, waits: list[float], percent: int
) -> None:
    cut = len(CONTENT) * percent // 100
    server.script[PATH] = [Fault(cut=cut), Fault()]
    assert get(fetcher, server.url + PATH) == CONTENT
    assert [asked.first_byte for asked in server.asked] == [0, cut // CHUNK * CHUNK]
    assert server.sent - len(CONTENT) < CHUNK
    assert len(waits) == 1


def test_a_server_without_ranges_is_read_from_the_start(
    fetcher: Fetcher, server: FaultServer
) -> None:
    server.script[PATH] = [Fault(cut=5 * CHUNK), Fault(ignore_range=True)]
    assert get(fetcher, server.url + PATH) == CONTENT


@pytest.mark.parametrize("wrong", ["bytes 0-9/10", "bytes 5-9/99999999", "rubbish", ""])
def test_a_wrong_content_range_is_not_believed(
    fetcher: Fetcher, server: FaultServer, wrong: str
) -> None:
    server.script[PATH] = [
        Fault(cut=5 * CHUNK),
        Fault(headers={"Content-Range": wrong}),
        Fault(ignore_range=True),
    ]
    assert get(fetcher, server.url + PATH) == CONTENT


def test_a_file_that_changed_between_attempts_is_found_out(
    fetcher: Fetcher, server: FaultServer
) -> None:
    server.script[PATH] = [Fault(cut=5 * CHUNK), Fault(body=b"x" * len(CONTENT))]
    with pytest.raises(LoaderError) as refused:
        get(fetcher, server.url + PATH)
    assert refused.value.exit_status in (3, 4)


def test_a_body_that_ends_too_early_is_a_network_error(
    fetcher: Fetcher, server: FaultServer
) -> None:
    short = CONTENT[: 3 * CHUNK]
    server.files[PATH] = short
    with pytest.raises(NetworkError, match=r"shorter|range"):
        get(fetcher, server.url + PATH)


@pytest.mark.parametrize("fault", [Fault(body=CONTENT + b"x"), Fault(endless=True)])
def test_a_body_that_goes_on_is_stopped(
    fetcher: Fetcher, server: FaultServer, fault: Fault
) -> None:
    server.script[PATH] = [fault]
    with pytest.raises(IntegrityError, match="larger") as refused:
        get(fetcher, server.url + PATH)
    assert refused.value.exit_status == 4


def test_one_flipped_bit_costs_one_chunk(
    fetcher: Fetcher, server: FaultServer, waits: list[float]
) -> None:
    server.script[PATH] = [Fault(flip=4 * CHUNK + 9), Fault()]
    assert get(fetcher, server.url + PATH) == CONTENT
    assert [asked.first_byte for asked in server.asked] == [0, 4 * CHUNK]
    assert waits == []


def test_a_chunk_that_is_wrong_twice_is_refused(fetcher: Fetcher, server: FaultServer) -> None:
    server.script[PATH] = [Fault(flip=4 * CHUNK + 9)]
    taken = []
    with pytest.raises(IntegrityError) as refused:
        taken.extend(fetcher.chunks(WANTED, [server.url + PATH]))
    assert refused.value.code == "CHUNK_MISMATCH"
    assert len(taken) == 4
    assert len(server.asked) == 2


def test_a_wrong_chunk_is_fetched_from_the_mirror(fetcher: Fetcher, server: FaultServer) -> None:
    server.files["/mirror"] = CONTENT
    server.script[PATH] = [Fault(flip=9)]
    assert get(fetcher, server.url + PATH, server.url + "/mirror") == CONTENT


def test_right_chunks_of_a_wrong_whole_are_refused(fetcher: Fetcher, server: FaultServer) -> None:
    lying = Wanted(WANTED.name, WANTED.size, "0" * 64, CHUNK, WANTED.chunks)
    with pytest.raises(IntegrityError, match="whole"):
        get(fetcher, server.url + PATH, wanted=lying)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_after_a_while(
    fetcher: Fetcher, server: FaultServer, waits: list[float], status: int
) -> None:
    server.script[PATH] = [Fault(status=status), Fault(status=status), Fault()]
    assert get(fetcher, server.url + PATH) == CONTENT
    assert len(waits) == 2
    assert 0.5 <= waits[0] <= 1.5
    assert 1.0 <= waits[1] <= 3.0


def test_retry_after_is_heeded(fetcher: Fetcher, server: FaultServer, waits: list[float]) -> None:
    server.script[PATH] = [Fault(status=503, headers={"Retry-After": "7"}), Fault()]
    assert get(fetcher, server.url + PATH) == CONTENT
    assert waits == [7.0]


def test_a_server_that_stays_busy_is_given_up_with_the_reason(
    fetcher: Fetcher, server: FaultServer, waits: list[float]
) -> None:
    server.script[PATH] = [Fault(status=503)]
    with pytest.raises(NetworkError, match="HTTP status 503") as failed:
        get(fetcher, server.url + PATH)
    assert server.url in failed.value.message
    assert len(server.asked) == fetch.ATTEMPTS
    assert sum(waits) < 60


def test_a_missing_file_is_not_asked_for_again(fetcher: Fetcher, server: FaultServer) -> None:
    with pytest.raises(NetworkError, match="404"):
        get(fetcher, server.url + "/nowhere")
    assert len(server.asked) == 1


def test_nobody_listening_is_a_network_error_that_names_every_mirror(fetcher: Fetcher) -> None:
    urls = ("http://127.0.0.1:1/a", "http://127.0.0.1:2/b")
    with pytest.raises(NetworkError) as failed:
        get(fetcher, *urls)
    assert failed.value.exit_status == 3
    for url in urls:
        assert url in failed.value.message


def test_the_next_mirror_helps(fetcher: Fetcher, server: FaultServer) -> None:
    assert get(fetcher, "http://127.0.0.1:1/a", server.url + PATH) == CONTENT


def test_a_drip_is_as_good_as_nothing(
    fetcher: Fetcher, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RATE_WINDOW", 0.2)
    monkeypatch.setattr(fetch, "MIN_RATE", 1_000_000)
    monkeypatch.setattr(fetch, "PIECE", 1000)
    server.files["/mirror"] = CONTENT
    server.script[PATH] = [Fault(drip=0.01)]
    assert get(fetcher, server.url + PATH, server.url + "/mirror") == CONTENT
    assert server.asked[-1].path == "/mirror"


@pytest.mark.parametrize("target", ["http://example.com/a", "ftp://example.com/a", ""])
def test_a_redirect_away_from_https_is_refused(
    fetcher: Fetcher, server: FaultServer, target: str
) -> None:
    server.script[PATH] = [Fault(status=302, headers={"Location": target, "Content-Length": "0"})]
    with pytest.raises(NetworkError, match="redirected"):
        get(fetcher, server.url + PATH)
    assert len(server.asked) == 1


def test_a_redirect_is_followed_and_a_loop_is_not(fetcher: Fetcher, server: FaultServer) -> None:
    empty = {"Content-Length": "0"}
    server.script["/moved"] = [Fault(status=302, headers={"Location": PATH, **empty})]
    assert get(fetcher, server.url + "/moved") == CONTENT
    server.script["/loop"] = [Fault(status=302, headers={"Location": "/loop", **empty})]
    with pytest.raises(NetworkError, match="redirects"):
        get(fetcher, server.url + "/loop")


def test_compressed_transfer_is_refused_not_decoded(fetcher: Fetcher, server: FaultServer) -> None:
    server.script[PATH] = [Fault(headers={"Content-Encoding": "gzip"})]
    with pytest.raises(NetworkError, match="compresses"):
        get(fetcher, server.url + PATH)


def test_a_login_page_is_an_integrity_error(fetcher: Fetcher, server: FaultServer) -> None:
    server.script[PATH] = [Fault(body=b"<html>log in</html>" + b" " * len(CONTENT))]
    with pytest.raises(IntegrityError):
        get(fetcher, server.url + PATH)


def test_offline_opens_no_connection(server: FaultServer, tmp_path: Path) -> None:
    offline = Fetcher(offline=True)
    with pytest.raises(NetworkError) as refused:
        get(offline, server.url + PATH)
    assert refused.value.code == "OFFLINE"
    assert server.asked == []
    file = tmp_path / "a"
    file.write_bytes(CONTENT)
    assert get(offline, file.as_uri()) == CONTENT


def test_proxy_variables_are_honoured(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fetcher: Fetcher
) -> None:
    """The proxy is our own server: it is asked for the absolute URL of another host."""
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(NetworkError, match=r"roxy|501|Tunnel"):
        get(fetcher, "https://releases.example/a.tar.zst")


def test_a_manifest_is_checked_against_its_pin(fetcher: Fetcher, server: FaultServer) -> None:
    server.files["/m.json"] = b"{}"
    with pytest.raises(IntegrityError) as refused:
        fetcher.manifest(server.url + "/m.json", "0" * 64)
    assert refused.value.code == "MANIFEST_PIN_MISMATCH"
    with pytest.raises(IntegrityError, match=r"\$"):
        fetcher.manifest(server.url + "/m.json", digest(b"{}"))


def test_a_huge_manifest_is_stopped(fetcher: Fetcher, server: FaultServer) -> None:
    server.script["/m.json"] = [Fault(endless=True, body=None)]
    server.files["/m.json"] = b" " * 1000
    with pytest.raises(IntegrityError, match="larger"):
        fetcher.manifest(server.url + "/m.json", None)


@pytest.mark.parametrize(
    "url",
    ["foo", "", "http://example.com/m.json", "ftp://a/b", "hf://only", "file://host/x", "https://"],
)
def test_what_is_no_url_to_load_from_is_a_setting_error(fetcher: Fetcher, url: str) -> None:
    with pytest.raises(SettingError) as refused:
        fetcher.manifest(url, None)
    assert "file://" in refused.value.hint


def test_a_hub_url_goes_to_the_endpoint_with_the_token_and_no_further(
    server: FaultServer,
) -> None:
    """The Hub redirects to storage on another host, which must not see the token."""
    with FaultServer({"/blob": CONTENT}) as storage:
        path = "/owner/repo/resolve/v1/m.bin"
        server.script[path] = [
            Fault(status=302, headers={"Location": storage.url + "/blob", "Content-Length": "0"})
        ]
        hub = Fetcher(token="hf_secret", endpoint=server.url, sleep=lambda _: None)
        assert get(hub, "hf://owner/repo@v1/m.bin") == CONTENT
        assert server.asked[0].headers["Authorization"] == "Bearer hf_secret"
        assert "Authorization" not in storage.asked[0].headers
