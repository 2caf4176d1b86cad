"""What a Space is pinned to: a manifest over HTTPS, or an archive of llama.cpp."""

from pathlib import Path

from farm.errors import PublishError, SourceError
from farm.publish import pin_space
from tests.farm.test_durable import names
from tests.rigs import http_served
from tests.rigs.refusals import refused


def test_pin_of_a_manifest_that_redirects_to_plain_http_is_refused() -> None:
    there = "http://192.0.2.1/manifest.json"
    redirect = http_served.Answer(302, None, {"Location": f"{there}?token=secret"})
    with (
        http_served.serving(lambda _: redirect) as url,
        refused("RELEASE_UNREACHABLE", SourceError, f"{there}, which is not https") as caught,
    ):
        pin_space.url(f"{url}/manifest.json")
    assert "secret" not in caught.value.message


def test_a_pin_that_does_not_fit_leaves_the_one_that_was_there(full: Path) -> None:
    with refused("PIN_NOT_WRITTEN", PublishError, "No space left"):
        pin_space.write({"manifest_url": "x" * (64 << 10)}, full / "file")
    assert (full / "file").read_bytes() == b"old"
    assert names(full) == ["file", "other"]
