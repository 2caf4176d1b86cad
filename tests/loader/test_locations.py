"""Which URLs the loader reads from, where they lead, and what of them may be shown."""

from pathlib import Path

import pytest

from llama_loader import locations
from llama_loader.errors import SettingError
from tests.rigs.downloads import Reader
from tests.rigs.refusals import refused


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    "url",
    [
        *("foo", "", "ftp://example.com/m", "https://", "https:///m.json", "javascript:alert(1)"),
        *("http://example.com/manifest.json", "http://127.0.0.1.example.com/x", "data:,x"),
        *("http://localhost@example.com/x", "https://user:secret@example.com/m", "http://[::1/"),
        *("file://host/m.json", "file://", "file:///a%00b", "https://example.com/\n"),
        *("https://example.com:99999/", "https://example.com:zero/"),
        *("hf://owner", "hf://owner/name", "hf://owner/name@/x", "hf://owner/name/x?y"),
        *("hf://o/../x", "hf://o/n@../x", "hf://o/n@%2e%2e/x", "hf://../n/x"),
        *("hf://o/n--bad..name/x", "hf://o/-n/x", "hf://o/a--b/x", "hf://o/a..b/x"),
        *("https://example.com/ ", "ws://127.0.0.1/x", "wss://example.com/x"),
        *("http://localhost:1/m", "HTTP://localhost", "hTTp://LOCALHOST/a"),
    ],
)
def test_what_is_no_url_is_a_setting_that_cannot_be_used(url: str, *, offline: bool) -> None:
    """Offline, too: nobody has to be asked to see it."""
    reader = Reader(offline=offline, token="hf_secret")
    for read in (reader.fetcher.manifest_bytes, reader.copy):
        with refused("URL_REFUSED", SettingError, hint="hf://OWNER/REPO") as caught:
            read(url)
        assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://example.com/m.json", locations.Web("https://example.com/m.json")),
        ("http://127.0.0.1:1/m", locations.Web("http://127.0.0.1:1/m")),
        ("http://[::1]:1/m", locations.Web("http://[::1]:1/m")),
        ("HTTPS://Example.com/m.json", locations.Web("HTTPS://Example.com/m.json")),
        ("file:///a%20b", Path("/a b")),
        ("FILE://localhost/a", Path("/a")),
        ("hf://o/n/m.json", locations.Web("https://huggingface.co/o/n/resolve/main/m.json")),
        (
            "hf://o/n@v/1.0/d/m %.json".replace("@v/", "@v%2F"),
            locations.Web("https://huggingface.co/o/n/resolve/v%252F1.0/d/m%20%25.json"),
        ),
        ("hf://_o/n.1/a...b", locations.Web("https://huggingface.co/_o/n.1/resolve/main/a...b")),
    ],
)
def test_kinds_of_url(url: str, place: object) -> None:
    assert locations.resolve(url) == place


@pytest.mark.parametrize(
    "path",
    [
        "../../api/whoami-v2",
        "./m.json",
        "a/../m.json",
        "a//m.json",
        "m.json/",
        "%2e%2e/%2e%2e/api/whoami-v2",
        "%2E./m.json",
        "..%2f..%2fapi",
        "%252e%252e/api",
        "a%5c..%5cb",
        "..\\..\\api",
    ],
)
@pytest.mark.parametrize("start", ["hf://o/n/", "hf://o/n@main/"])
def test_a_path_on_the_hub_cannot_lead_elsewhere(start: str, path: str) -> None:
    with refused("URL_REFUSED", SettingError):
        locations.resolve(start + path, token="hf_secret")


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://hub.example", "HTTP://hub.example", "http://127.0.0.1.hub.example"),
        *("http://127.1", "http://2130706433", "http://0x7f.0.0.1", "http://[::ffff:127.0.0.1]"),
        *("http://localhost.hub.example", "http://localhost:1", "hTTp://LOCALHOST"),
        *("https://hub.example?x=", "https://hub.example?token=hf_secret"),
        *(
            "https://hub.example#",
            "https://hub.example/#hf_secret",
            "http://127.0.0.1:1/?hf_secret",
        ),
        *("https://me:hf_secret@hub.example", "hub.example"),
    ],
)
def test_an_endpoint_that_is_neither_https_nor_a_loopback_address_is_refused(endpoint: str) -> None:
    with refused("ENDPOINT_REFUSED", SettingError) as caught:
        locations.resolve("hf://o/n/x", endpoint=endpoint, token="hf_secret")
    assert "hf_secret" not in caught.value.message
    assert "give http://127.0.0.1:PORT" in caught.value.hint


@pytest.mark.parametrize(
    "endpoint",
    ["https://hub.example", "HTTPS://hub.example/path", "http://127.0.0.1:1", "http://[::1]:1"],
)
def test_an_endpoint_is_the_hubs_address(endpoint: str) -> None:
    found = locations.resolve("hf://o/n/x", endpoint=endpoint, token="hf_secret")
    assert found == locations.Web(f"{endpoint}/o/n/resolve/main/x", "hf_secret")
    assert "hf_secret" not in repr(found)


def test_redirect_stays_at_https() -> None:
    for location in ("/b", "https://other.example/b", "HTTPS://other.example/b"):
        assert locations.redirected("https://a.example/a", location)
    assert locations.redirected("https://127.0.0.1/a", "http://127.0.0.1/b") is None


def test_patience_is_what_the_documents_promise() -> None:
    assert locations.Patience() == locations.Patience(10, 20, 30, 16_384, 20, 4, 60, 3600)


def test_loopback_is_an_address() -> None:
    for address in ("127.0.0.1", "127.255.255.254", "::1"):
        assert locations.is_loopback(address)
    for address in ("0.0.0.0", "128.0.0.1", "::", "::2", "::ffff:127.0.0.1", "localhost", ""):
        assert not locations.is_loopback(address)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.example/x", "https://a.example/x"),
        ("https://a.example/x?s3cret", "https://a.example/x?…"),
        ("https://a.example/x y#s3cret", "https://a.example/x y#…"),
        ("https://me:s3cret@a.example/x?s3cret", "…@a.example/x?…"),
        ("hf://o/n@v1/x", "hf://o/n@v1/x"),
        ("hf://s3cret@o/n/x", "…@o/n/x"),
        ("hf://s3cret@o/n@v1/x?s3cret", "…@v1/x?…"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_secret(url: str, shown: str) -> None:
    assert locations.shown(url) == shown
