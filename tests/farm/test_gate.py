"""A release comes into a channel with a report of its checks; what is fetched is bounded."""

import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import fault_server
import msgspec
import pytest
from fault_server import FaultServer
from published import edited
from releases import artifact, manifest

from farm import loader, release
from farm.errors import FarmError, PackError, PublishError
from farm.inputs import packages
from farm.publish import gate, places
from farm.publish.gate import opened
from farm.publish.publishing import Known
from farm.serve import ReleaseServer
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError
from tests.rigs import github_releases, http_served, published
from tests.rigs.heard import heard
from tests.rigs.published import Place, publish
from tests.rigs.refusals import refused


def require_gate(place: Place, checked: str | None) -> None:
    gate.require_gate(place.open(), "b11549-1", lambda _: None, checked=checked)


def digest(released: Path) -> str:
    return hashlib.sha256((released / "manifest.json").read_bytes()).hexdigest()


def test_digest_that_the_gate_printed_counts_for_that_manifest_alone(
    place: Place, released: Path
) -> None:
    publish(place, released)
    require_gate(place, digest(released))
    with refused("RELEASE_CHANGED", PublishError):
        require_gate(place, "0" * 64)


def test_release_is_checked_then_and_there_without_a_digest(place: Place, released: Path) -> None:
    """The tiny tree's llama-server is none: the gate finds that; where a key is, nothing starts."""
    publish(place, released)
    made: list[gate.GateCheck] = []
    report = gate.check_published(place.open(), "b11549-1", made.append)
    with refused("GATE_FAILED", PublishError, match="computes on the CPU"):
        report.require_passed()
    assert [check.passed for check in made[:3]] == [True, True, False]
    assert "(is this really a llama-server?" in made[2].detail  # the check's own hint
    made.clear()
    checked = gate.require_gate(place.open(), "b11549-1", made.append)
    assert ([check.passed for check in made], checked) == ([True, True], digest(released))


def test_no_program_is_started_of_a_release_that_is_not_what_its_manifest_says(
    released: Path,
) -> None:
    (released / "SHA256SUMS").write_bytes(b"")
    report = gate.run(released, lambda _: None)
    assert [check.passed for check in report.checks] == [False, True]


@pytest.mark.parametrize("answer", [[1], "x", {"content": 1}])
def test_answer_that_no_llama_server_gives_is_a_check_that_failed(
    released: Path, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(packages, "fetch_model", str)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # gets neither question nor key
    monkeypatch.setenv("no_proxy", "")
    with http_served.serving(lambda _: http_served.Answer(200, answer)) as url:
        served = nullcontext({"url": url, "api_key": ""})
        monkeypatch.setattr(loader, "serving", lambda *_, **__: served)
        check = gate.run(released, lambda _: None).checks[-1]
    assert (check.passed, check.detail[:9]) == (False, "Expected ")


def test_digest_is_that_of_the_manifest_that_was_checked(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder shows the checks another manifest than is to be signed."""
    manifest, verify = released / "manifest.json", release.verify
    honest = manifest.read_bytes()
    lying = json.loads(honest)
    lying["artifacts"][0]["needs"] = ["libevil.so.1"]
    manifest.write_text(json.dumps(lying))

    def show_the_honest_one(*arguments: Any) -> tuple[str, ...]:
        manifest.write_bytes(honest)
        return verify(*arguments)

    monkeypatch.setattr(release, "verify", show_the_honest_one)
    report = gate.run(released, lambda _: None)
    assert digest(released) == hashlib.sha256(honest).hexdigest() != report.manifest_sha256
    assert not report.checks[0].passed


def test_published_file_longer_than_its_manifest_says_is_not_fetched_to_its_end(
    released: Path, tmp_path: Path
) -> None:
    to = places.parse(str(tmp_path / "published"))
    publish(to, released)
    tarball = next((tmp_path / "published").rglob("*.tar.zst"))
    os.truncate(tarball, 1 << 40)
    known = {path.name: Known(1, "0" * 64) for path in tarball.parent.iterdir()}
    with (
        mock.patch.object(to, "present", return_value=known),
        refused("RELEASE_MISMATCH", PackError, "longer"),
    ):
        gate.check_published(to, "b11549-1", lambda _: None)


def test_only_what_the_manifest_names_is_fetched_to_be_checked(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with published.serving("github", tmp_path, monkeypatch) as place:
        publish(place, released)
        assets = place.server.release("b11549-1").assets
        evil = github_releases.Asset(999, "../../escaped", b"x")
        assets.append(evil)
        (tmp_path / "a").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a"))
        gate.check_published(place.open(), "b11549-1", lambda _: None)
        assert not list(tmp_path.rglob("escaped"))
        assets[:] = [one for one in assets if one.name not in {"SHA256SUMS", evil.name}]
        with refused("RELEASE_INCOMPLETE", PublishError, match="SHA256SUMS"):
            gate.check_published(place.open(), "b11549-1", lambda _: None)


def test_no_secret_comes_to_the_programs_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FARM_SIGNING_KEY", "FARM_SIGNING_PASSWORD", "GITHUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    assert "s3cret" not in loader.environment({}).values()
    assert loader.environment({"A": "b"})["A"] == "b"


TARBALL = b"a tarball, as far as fetching is concerned"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release folder, complete in names and sizes."""
    place = tmp_path / "dist"
    place.mkdir()
    plain = artifact("cu128", "sm90", "90", size=len(TARBALL))
    listed = msgspec.structs.replace(
        plain,
        urls=(plain.name,),
        sbom=schema.Sbom(url=f"{plain.name}.cdx.json", sha256="0" * 64),
    )
    (place / "manifest.json").write_bytes(schema.dump(manifest(listed)))
    (place / listed.name).write_bytes(TARBALL)
    (place / f"{listed.name}.cdx.json").write_text("{}")
    (place / "SHA256SUMS").write_text("")
    (place / "manifest.schema.json").write_text("{}")
    return place


def read(folder: Path, **pin: str) -> None:
    """Fetch the release over HTTP."""
    with ReleaseServer(folder) as server, opened(server.url, **pin):
        pass


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_url_gives_everything_that_the_manifest_names_and_leaves_nothing(folder: Path) -> None:
    with ReleaseServer(folder) as server:
        for url in (server.url, f"{server.url}manifest.json"):
            with opened(url) as (found, _):
                assert names(found) == names(folder)
                for name in names(folder):
                    assert (found / name).read_bytes() == (folder / name).read_bytes()
            assert not found.exists()


def test_a_manifest_on_the_hub_is_read_from_its_repository(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "owner" / "repo" / "resolve" / "b11549-1"
    hub.parent.mkdir(parents=True)
    folder.rename(hub)
    with ReleaseServer(tmp_path / "hub") as server:
        # huggingface_hub reads its endpoint once, when it is imported: so in another process.
        done = heard(
            [sys.executable, "-c", READ, "hf://owner/repo@b11549-1/manifest.json"],
            env={**os.environ, "HF_ENDPOINT": server.url.rstrip("/")},
        )
    assert done.stdout.split() == sorted(names(hub)), done.stderr


READ = """
import sys
import time
from farm.publish.gate import opened
with opened(sys.argv[1]) as (folder, _):
    print(*sorted(path.name for path in folder.iterdir()))
"""


def test_a_folder_is_taken_by_any_of_its_names(folder: Path) -> None:
    for name in (str(folder), f"{folder}/manifest.json", folder.as_uri(), f"{folder.as_uri()}/"):
        with opened(name) as (found, _):
            assert found.samefile(folder)
    for name, why, hint in (
        (str(folder.parent), "is a place with releases", f"such as {folder}"),
        (
            f"{folder.as_uri()}/manifst.json",
            f"^there is no {folder}/manifst.json",
            "a release folder",
        ),
    ):
        with refused("RELEASE_MISSING", FarmError, why, hint=hint), opened(name):
            pass


def test_a_pin_holds_for_folders_and_urls(folder: Path) -> None:
    with ReleaseServer(folder) as server:
        for where in (str(folder), server.url):
            right = digest(folder)
            with opened(where, sha256=right) as (found, content):
                (found / "manifest.json").write_bytes(b"{}")  # by who may write to the folder
                assert hashlib.sha256(content).hexdigest() == right
            (folder / "manifest.json").write_bytes(content)
            with (
                refused("RELEASE_MISMATCH", FarmError, "not the pinned"),
                opened(where, sha256="0" * 64),
            ):
                pass


def test_a_body_longer_than_the_manifest_says_is_not_read_to_its_end(folder: Path) -> None:
    tarball = next(folder.glob("*.tar.zst"))
    tarball.write_bytes(TARBALL + b"!")
    says = f"is longer than {len(TARBALL)} bytes"
    with refused("RELEASE_MISMATCH", FarmError, says, hint="is the address right"):
        read(folder)


def test_sbom_of_another_name_does_not_replace_the_pinned_manifest(folder: Path) -> None:
    with edited(folder) as tree:
        tree["artifacts"][0]["sbom"]["url"] = "other/manifest.json"
    (folder / "other").mkdir()
    shutil.copy(folder / "manifest.json", folder / "other")
    with refused("RELEASE_MISMATCH", FarmError, "its SBOM is not"):
        read(folder, sha256=digest(folder))


def test_what_is_not_there_is_named(folder: Path) -> None:
    next(folder.glob("*.cdx.json")).unlink()
    with refused("RELEASE_UNREACHABLE", FarmError, r"cdx\.json cannot be fetched: .*404"):
        read(folder)


def test_a_mirror_is_asked_where_the_first_does_not_answer(folder: Path) -> None:
    (folder / "mirror").mkdir()
    with edited(folder) as tree:
        tarball = tree["artifacts"][0]
        tarball["urls"] = [tarball["name"], "mirror/moved"]
    (folder / tarball["name"]).rename(folder / "mirror" / "moved")
    with ReleaseServer(folder) as server, opened(server.url) as (found, _):
        assert (found / tarball["name"]).read_bytes() == TARBALL


def test_a_channel_s_manifest_says_which_release_to_verify(folder: Path, tmp_path: Path) -> None:
    channel = tmp_path / "channels" / "stable"
    channel.mkdir(parents=True)
    shutil.copy(folder / "manifest.json", channel)
    with edited(channel) as tree:
        (listed,) = tree["artifacts"]
        listed["urls"] = [f"../../dist/{listed['name']}"]
        listed["sbom"]["url"] = f"../../dist/{listed['sbom']['url']}"
    with ReleaseServer(tmp_path) as server:
        file = channel / "manifest.json"
        for where in (f"{server.url}channels/stable/manifest.json", str(channel), str(file)):
            with refused("CHANNEL_NOT_RELEASE", FarmError) as caught, opened(where) as (found, _):
                release.verify(found)
            assert caught.value.hint.endswith("/dist/manifest.json")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://192.0.2.1/manifest.json", "RELEASE_URL_UNSAFE"),
        ("http://localhost/manifest.json", "RELEASE_URL_UNSAFE"),  # a name may lead anywhere
        ("ftp://example.org/manifest.json", "RELEASE_URL_UNKNOWN"),
        ("hf://owner/manifest.json", "RELEASE_URL_UNKNOWN"),
        ("https://[::1/manifest.json", "RELEASE_URL_UNKNOWN"),
    ],
)
def test_other_kinds_of_urls_are_refused_before_anything_is_opened(url: str, code: str) -> None:
    with pytest.raises(FarmError) as caught, opened(url):
        pass
    assert (caught.value.code, caught.value.exit_status) == (code, 2)


@pytest.mark.parametrize("fault", [fault_server.drip(1, 0.1), fault_server.drips_head(1, 0.1)])
def test_server_that_sends_a_byte_now_and_then_is_not_awaited(
    monkeypatch: pytest.MonkeyPatch, fault: fault_server.Fault
) -> None:
    monkeypatch.setattr(packages, "ANSWER", 0.5)
    monkeypatch.setattr(packages, "DEADLINE", 0.5)
    with FaultServer() as server:
        url = server.put("/manifest.json", bytes(100))
        server.fail("/manifest.json", fault, always=True)
        with refused("RELEASE_UNREACHABLE", FarmError, "not done within"), opened(url):
            pass


def test_urls_of_one_file_share_its_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "DEADLINE", 0.5)
    with FaultServer() as server:
        for name in names(folder):
            server.put(f"/{name}", (folder / name).read_bytes())
        found = json.loads((folder / "manifest.json").read_bytes())
        entry = found["artifacts"][0]
        entry["urls"] *= 50
        server.put("/manifest.json", json.dumps(found).encode())
        server.fail(f"/{entry['name']}", fault_server.drip(1, 0.1), always=True)
        late, url = "more URLs: no time is left", f"{server.url}/manifest.json"
        with refused("RELEASE_UNREACHABLE", FarmError, late), opened(url):
            pass


def test_redirects_of_one_file_share_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "DEADLINE", 0.5)

    def elsewhere(asked: http_served.Request) -> http_served.Answer:
        time.sleep(0.2)
        return http_served.Answer(302, None, {"Location": f"{asked.path}x"})

    with (
        http_served.serving(elsewhere) as url,
        refused("RELEASE_UNREACHABLE", FarmError, "not done within"),
        opened(f"{url}/manifest.json"),
    ):
        pass


@pytest.mark.parametrize("kind", ["FIFO", "a tebibyte"])
def test_pin_of_what_is_no_small_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "manifest.json"
    if kind == "FIFO":
        os.mkfifo(place)
    else:
        place.touch()
        os.truncate(place, 1 << 40)
    with refused("RELEASE_MISSING", FarmError), opened(str(tmp_path), sha256="0" * 64):
        pass


def test_a_manifest_that_is_a_login_page_is_refused() -> None:
    with FaultServer() as server:
        url = server.put("/manifest.json", b"<html>log in</html>")
        with pytest.raises(IntegrityError, match="JSON"), opened(url):
            pass
