"""Models from the Hub and its mirrors: names, storages, statuses, disks, variables."""

import gzip
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llama_loader import hub as hub_module
from llama_loader import model, self_test
from llama_loader.errors import LoaderError
from llama_loader.events import Note
from llama_loader.settings import Settings, load
from tests.loader.test_doctor import Clinic, clinic, failures
from tests.loader.test_model import PRINT_PATH, TINY, environment, from_hub, path_from_hub
from tests.rigs import http_served, hub, refusals
from tests.rigs.heard import heard
from tests.rigs.http_served import Answer, Request
from tests.rigs.hub import COMMIT, Hub, serving
from tests.rigs.small_disk import mounted
from tests.rigs.waiting import until

FOLDER = "models--me--model"
AT_HAND = "from llama_loader import model, settings;print(model.at_hand(settings.load()))"
ASK = "from llama_loader import hub, settings; print(hub.size(settings.load()))"
TELL = (
    "from llama_loader import model, settings; s = settings.load();"
    "print(model.get(s, sink=lambda e: print(getattr(e, 'code', '-'))))"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client of this process keeps files in the test's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def asking(url: str, home: Path | str = "/nowhere", **more: str | None) -> Settings:
    """Settings for a model of the Hub at an address."""
    named = {"gguf_repo_id": "me/model", "gguf_filename": "m.gguf", **more}
    return load({}, {"HOME": str(home)}, hf_endpoint=url, **named)


def test_model_on_a_read_only_volume_is_used_without_writing_to_it(tmp_path: Path) -> None:
    """The volume is a cache of the Hub that another machine filled."""
    with mounted(tmp_path / "volume", "8m"), serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        path = path_from_hub(hub, tmp_path / "volume")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "volume")], check=True)
        assert from_hub(hub, tmp_path / "volume", AT_HAND) == str(path)
        assert path_from_hub(hub, tmp_path / "volume") == path
        assert path_from_hub(hub, tmp_path / "volume", OFFLINE="1") == path
        assert path_from_hub(hub, tmp_path / "volume", GGUF_PATH=str(path)) == path
        assert len([one for one in hub.bodies if one.endswith("m.gguf")]) == 1


def test_model_goes_to_a_private_folder_if_the_hubs_cache_cannot_be_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "temporary").mkdir()
    with mounted(tmp_path / "home", "1m"), serving(Hub(files={"m.gguf": TINY})) as hub:
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "home")], check=True)
        environ = environment(hub, tmp_path / "home", GGUF_FILENAME="m.gguf")
        environ["TMPDIR"] = str(tmp_path / "temporary")
        done = heard([sys.executable, "-c", TELL], env=environ)
    assert done.stderr == ""
    told = done.stdout.splitlines()
    assert told[0] == "MODEL_CACHE_TEMPORARY"
    path = Path(told[-1])
    assert path.is_relative_to(tmp_path / "temporary" / f"llama-loader-hub-{os.geteuid()}")
    assert path.read_bytes() == TINY
    assert path.parents[3].stat().st_mode & 0o077 == 0


def test_mirror_that_names_a_xet_storage_and_gives_no_way_to_it_is_asked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "XET_TOKEN", "/api/xet-read-token?of=another")  # answered with 404
    served = hub.Hub(files={"sub/m.gguf": TINY}, xet="http://127.0.0.1:9")
    with hub.serving(served):
        told = from_hub(served, tmp_path, TELL).splitlines()
    assert told[0] == "XET_UNREACHABLE"
    assert Path(told[-1]).read_bytes() == TINY


def test_question_for_the_way_to_xet_is_bounded_wherever_the_hub_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, encodings = [0], []

    class Endless(Hub):
        def answer(self, asked: Request) -> Answer:
            if asked.path != "/elsewhere":
                return super().answer(asked)
            encodings.append(asked.headers["Accept-Encoding"])
            return Answer(200, plain_without_end(sent))

    monkeypatch.setattr(hub, "XET_TOKEN", "/elsewhere")
    served = Endless(files={"m.gguf": TINY}, xet="http://127.0.0.1:9")
    asked = {"gguf_repo_id": "me/model", "gguf_filename": "m.gguf"}
    with serving(served), refusals.refused("HUB_UNREACHABLE", match="longer than 4194304 bytes"):
        model.get(load({}, {"HOME": str(tmp_path)}, hf_endpoint=served.url, **asked))
    assert encodings == ["identity"]
    assert sent[0] < 2000


def unpacked_without_end(sent: list[int]) -> Iterator[bytes]:
    """A JSON text in gzip, 8 MiB of blanks in 8 kB; notes what was sent until the client left."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield packer.compress(b'{"siblings":[') + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(b" " * (8 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    for sent[0] in range(100_000):
        yield piece


def plain_without_end(sent: list[int]) -> Iterator[bytes]:
    yield b'{"siblings":['
    for sent[0] in range(100_000):
        yield b" " * (1 << 16)


@pytest.mark.parametrize(
    ("body", "status", "headers", "words"),
    [
        (unpacked_without_end, 200, {"Content-Encoding": "gzip"}, "compressed"),
        (unpacked_without_end, 404, {"Content-Encoding": "gzip"}, "compressed"),
        (plain_without_end, 200, {}, "longer than 4194304 bytes"),
        (plain_without_end, 302, {"Location": "/elsewhere"}, "longer than 4194304 bytes"),
    ],
)
def test_list_of_files_without_end_takes_neither_memory_nor_time(
    body: Callable[[list[int]], Iterator[bytes]], status: int, headers: dict[str, str], words: str
) -> None:
    sent, asked_for, gone = [0], [], threading.Event()

    def answer(asked: Request) -> Answer:
        asked_for.append(asked.headers["Accept-Encoding"])
        return Answer(status, told_when_it_ends(body(sent)), {**headers})

    def told_when_it_ends(pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from pieces
        finally:
            gone.set()

    with http_served.serving(answer) as url, refusals.refused("HUB_UNREACHABLE", match=words):
        model.named(asking(url, gguf_repo_id="me/model:Q4_K_M", gguf_filename=None))
    assert gone.wait(60)
    assert asked_for == ["identity"]
    assert sent[0] < 2000


def fetched_by_xet(incomplete_path: Path, **_: object) -> None:
    """Stand in for hf_xet's transfer of the tiny model: there is no Xet storage here."""
    incomplete_path.write_bytes(TINY)


@pytest.mark.parametrize("xet", ["", "http://127.0.0.1:9"])
def test_file_in_the_hubs_cache_with_other_bytes_is_named(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, xet: str
) -> None:
    """By Xet the client puts it, in an app without the loader, under another hash than sha256."""
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", fetched_by_xet)
    clinic.variables |= {
        "YAKULINGO_SPACES_GGUF_PATH": "",
        "YAKULINGO_SPACES_GGUF_REPO_ID": "me/model",
        "YAKULINGO_SPACES_GGUF_FILENAME": "m.gguf",
    }
    content = self_test.MODEL.read_bytes()
    with serving(Hub(files={"m.gguf": content}, xet=xet)) as hub:
        path = model.get(load(environ={**clinic.variables, "HF_ENDPOINT": hub.url}))
    assert failures(clinic.examine(OFFLINE="1")) == {}
    blob = path.resolve()
    assert blob.name == hashlib.sha256(content).hexdigest()
    assert not (path.parents[3] / "blobs").exists()  # the client's store of all repositories
    if xet:
        stored = blob.rename(blob.with_name("a" * 64))
        blob.symlink_to(stored)
        blob = stored
    blob.chmod(0o600)
    for damaged, code in (
        (content[:-1] + b"!", "MODEL_SHA256_MISMATCH"),
        (content[:-1], "MODEL_INCOMPLETE"),
    ):
        blob.write_bytes(damaged)
        found = clinic.examine(OFFLINE="1")
        assert failures(found) == {"model": code}
        assert str(blob) in found.as_text()
        assert "delete this file" in found.as_text()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("changed", [{}, {"Content-Length": None}])
def test_killed_download_is_resumed_by_the_next_process(
    tmp_path: Path, changed: dict[str, str | None], *, damaged: bool
) -> None:
    """What the Hub's own client was killed over is removed, once nothing has come for a while."""
    content = bytes(1_000_000) + TINY
    hub = Hub(files={"sub/m.gguf": TINY + content}, changed=changed, halt=400_000)
    blobs = tmp_path / "hf" / "hub" / "models--me--model" / "blobs"
    blobs.mkdir(parents=True)
    etag = hashlib.sha256(hub.files["sub/m.gguf"]).hexdigest()
    (left := blobs / f"{etag}.0123abcd.incomplete").write_bytes(content)
    os.utime(left, (0, 0))
    begun = blobs / f"{etag}.llama-loader.incomplete"
    with serving(hub):
        argv, environ = [sys.executable, "-c", PRINT_PATH], environment(hub, tmp_path)
        from_hub(hub, tmp_path, ASK)
        assert left.exists()  # a question removes nothing
        with subprocess.Popen(argv, env=environ) as process:
            until(lambda: begun.exists() and begun.stat().st_size == 400_000, "the first bytes")
            process.kill()
        hub.resumed.set()
        hub.halt = None
        if damaged:
            begun.write_bytes(bytes(400_000))
            with pytest.raises(AssertionError, match=f"MODEL_SHA256_MISMATCH.*{etag}"):
                path_from_hub(hub, tmp_path)
        path = path_from_hub(hub, tmp_path)
    assert path.read_bytes() == hub.files["sub/m.gguf"]
    assert hub.ranges == [None, "bytes=400000-", *[None] * damaged]
    assert [one.name for one in blobs.iterdir()] == [etag]


def test_download_that_was_killed_while_xet_fetched_it_is_resumable_from_then_on(
    tmp_path: Path,
) -> None:
    """What came by Xet cannot be continued; the storage here is silent."""
    hub = Hub(files={"sub/m.gguf": TINY + bytes(1_000_000)}, halt=400_000)
    blobs = tmp_path / "hf" / "hub" / "models--me--model" / "blobs"
    argv = [sys.executable, "-c", PRINT_PATH]
    with socket.create_server(("127.0.0.1", 0)) as storage, serving(hub):
        hub.xet = f"http://127.0.0.1:{storage.getsockname()[1]}"
        environ = {**environment(hub, tmp_path), "HF_XET_CLIENT_READ_TIMEOUT": "60s"}
        for kept in ("*.incomplete", "*.llama-loader.incomplete"):
            with subprocess.Popen(argv, env=environ) as process:
                until(lambda kept=kept: any(blobs.glob(kept)), "a file that is begun")
                if "loader" in kept:
                    begun = next(blobs.glob(kept))
                    until(lambda begun=begun: begun.stat().st_size == 400_000, "first bytes")
                process.kill()
        hub.resumed.set()
        hub.halt = None
        assert from_hub(hub, tmp_path, TELL).startswith("-\n")
    assert hub.ranges == [None, "bytes=400000-"]


@pytest.mark.parametrize(
    "changed",
    [
        *({"ETag": None}, {"ETag": '""'}, {"ETag": '".."'}, {"ETag": '"a/b"'}),
        *({"ETag": f'"{"a" * 300}"'}, {"ETag": '"/tmp/x"'}, {"X-Linked-Size": "-5"}),
        *({"X-Repo-Commit": None}, {"X-Repo-Commit": "../c"}, {"ETag": None, "X-Repo-Commit": ""}),
    ],
)
def test_what_does_not_answer_as_a_hub_is_found_by_the_doctor_before_a_download(
    clinic: Clinic, tmp_path: Path, changed: dict[str, str | None]
) -> None:
    """A login page with status 200, say. The Hub's client takes an ETag for a path."""
    with serving(Hub(files={"m.gguf": TINY}, changed=changed)) as hub:
        clinic.variables["HF_ENDPOINT"] = hub.url
        found = clinic.examine(GGUF_PATH="", GGUF_REPO_ID="me/model", GGUF_FILENAME="m.gguf")
    assert failures(found) == {"model": "HUB_UNUSABLE"}
    assert "HF_ENDPOINT" in found.as_text()
    assert found.exit_status == 3
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "changed",
    [
        *({"ETag": '"{SHA1{0a}}"'}, {"ETag": 'W/"0a"'}, {"ETag": '""0a""'}),
        *({"Content-Length": None}, {"X-Linked-Size": "many"}, {"X-Linked-Size": "0"}),
    ],
)
def test_mirror_that_has_other_headers_and_is_usable_is_used(
    tmp_path: Path, changed: dict[str, str | None]
) -> None:
    with serving(Hub(files={"sub/m.gguf": TINY}, changed=changed)) as hub:
        assert path_from_hub(hub, tmp_path).read_bytes() == TINY


def test_pinned_file_of_which_xet_has_other_bytes_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transfer(incomplete_path: Path, **_: object) -> None:
        incomplete_path.write_bytes(TINY + bytes(1))

    monkeypatch.setattr("huggingface_hub.file_download.xet_get", transfer)
    for xet in ("http://127.0.0.1:9", ""):
        with serving(Hub(files={"m.gguf": TINY}, xet=xet)) as hub:
            pin = hashlib.sha256(TINY).hexdigest()
            wanted = asking(hub.url, tmp_path, gguf_sha256=pin)
            if xet:
                with refusals.refused("MODEL_SHA256_MISMATCH"):
                    model.get(wanted)
            else:
                assert model.get(wanted).read_bytes() == TINY


def test_newer_commit_is_fetched_by_the_loader_and_the_cached_one_used_without_the_hub(
    tmp_path: Path,
) -> None:
    """What the Hub's client fetches by itself cannot be resumed."""
    found = []
    for content, commit in ((TINY, COMMIT), (TINY + bytes(100), "d" * 40)):
        headers = {"X-Repo-Commit": commit, "Set-Cookie": "²"}  # which no request may have
        served = Hub(files={"m.gguf": content}, changed=headers)
        with serving(served):
            found.append(model.get(asking(served.url, tmp_path)))
            assert model.get(asking(served.url, tmp_path)) == found[-1]
        assert (found[-1].parent.name, found[-1].read_bytes()) == (commit, content)
        assert (len(served.bodies), served.count) == (1, 4)  # once by the Hub's own client
    assert model.get(asking(served.url, tmp_path)) == found[-1]


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to", "foreign"])
def test_begun_download_that_is_no_file_of_this_user_alone_is_not_gone_on_with(
    tmp_path: Path, kind: str
) -> None:
    """Others may write to a shared cache."""
    blobs = tmp_path / "hf" / "hub" / "models--me--model" / "blobs"
    blobs.mkdir(parents=True)
    (own := tmp_path / "own").write_bytes(b"mine")
    begun = blobs / f"{hashlib.sha256(TINY).hexdigest()}.llama-loader.incomplete"
    if kind == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        begun.write_bytes(b"theirs")
        os.chown(begun, 4321, 4321)
    else:
        getattr(begun, kind)(own)
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        path = path_from_hub(hub, tmp_path)
    assert (path.read_bytes(), own.read_bytes()) == (TINY, b"mine")
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize(
    "place",
    [
        "CACHEDIR.TAG",
        FOLDER,
        *(f"{FOLDER}/{one}" for one in ("refs", "snapshots", "blobs", f"snapshots/{COMMIT}/sub")),
        *(f"{FOLDER}/{one}" for one in ("trees", f"trees/{COMMIT}.json", "blobs/1.incomplete")),
        f".locks/{FOLDER}/1.lock",  # filelock before 3.20.1 empties what it leads to
        *(f".locks/{FOLDER}/1.lock/", f"{FOLDER}/blobs/1.incomplete/"),  # no links, but folders
    ],
)
def test_cache_into_which_another_user_put_a_link_is_left_alone(tmp_path: Path, place: str) -> None:
    """The Hub's client writes through it: its commit into ``refs/main``, say."""
    mine = tmp_path / "project" / "refs"
    mine.mkdir(parents=True)
    (mine / "main").write_text("a branch")
    link = tmp_path / "hf" / "hub" / place
    link.parent.mkdir(parents=True)
    if place.endswith("/"):
        link.mkdir()
    else:
        link.symlink_to(mine.parent if place == FOLDER else mine)
    os.chown(link, 4321, 4321, follow_symlinks=False)
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        environ = environment(hub, tmp_path, GGUF_FILENAME="sub/m.gguf")
        told = heard([sys.executable, "-c", TELL], env=environ).stdout.splitlines()
    assert told[0] == "MODEL_CACHE_TEMPORARY"
    assert Path(told[-1]).read_bytes() == TINY
    assert [
        one.read_text() for one in tmp_path.joinpath("project").rglob("*") if one.is_file()
    ] == ["a branch"]


@pytest.mark.parametrize("place", ["snapshots", "blobs", "", f"snapshots/{COMMIT}/sub"])
def test_link_in_the_hubs_cache_that_leads_nowhere_is_named(tmp_path: Path, place: str) -> None:
    """A cache on a disk that is not mounted: the Hub's client says "File exists"."""
    link = tmp_path / "hf" / "hub" / "models--me--model" / place
    link.parent.mkdir(parents=True)
    link.symlink_to("/nowhere/disk")
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub, pytest.raises(AssertionError) as caught:
        path_from_hub(hub, tmp_path)
    assert f"STORE_FAILED: {link}, in the Hub's cache, is a link to /nowhere" in str(caught.value)


@pytest.mark.parametrize("named", [{}, {"ETag": '"1"'}])
def test_file_that_is_not_the_pinned_one_is_not_kept(
    tmp_path: Path, named: dict[str, str | None]
) -> None:
    """Kept, it would be found by every later start, and no other server asked.

    By the Hub's ETag it is refused before it comes.
    """
    pin = hashlib.sha256(TINY).hexdigest()
    for content, code in ((TINY + bytes(100), "MODEL_SHA256_MISMATCH"), (TINY, None)):
        with serving(Hub(files={"m.gguf": content}, changed=named)) as hub:
            asked = {"gguf_repo_id": "me/model", "gguf_filename": "m.gguf", "gguf_sha256": pin}
            wanted = load({}, {"HOME": str(tmp_path)}, hf_endpoint=hub.url, **asked)
            if code is None:
                assert model.get(wanted).read_bytes() == TINY
            else:
                with refusals.refused(code, LoaderError, "pinned"):
                    model.get(wanted)
                assert len(hub.bodies) == len(named)


def test_file_of_a_person_to_which_a_link_in_the_cache_leads_stays(tmp_path: Path) -> None:
    """Another user put the link there; what it leads to is not the pinned model."""
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(TINY + b"mine")
    link = tmp_path / "hub" / FOLDER / "snapshots" / COMMIT / "m.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    pin = hashlib.sha256(TINY).hexdigest()
    with serving(Hub(files={"m.gguf": TINY})) as hub:
        asked = {"gguf_repo_id": "me/model", "gguf_filename": "m.gguf", "gguf_sha256": pin}
        wanted = load({}, {"HOME": str(tmp_path)}, hf_endpoint=hub.url, **asked)
        with refusals.refused("MODEL_SHA256_MISMATCH", LoaderError, "pinned"):
            model.get(wanted)
        assert (mine.read_bytes(), link.is_symlink()) == (TINY + b"mine", False)
        assert model.get(wanted).read_bytes() == TINY


def test_folder_of_more_characters_than_a_disk_takes_is_one_error(tmp_path: Path) -> None:
    name = f"{'a' * 300}.lock/m.gguf"
    with serving(Hub(files={"m.gguf": TINY, name: TINY})) as hub:
        model.get(asking(hub.url, tmp_path))
        with refusals.refused("STORE_FAILED", match="name too long"):
            model.get(asking(hub.url, tmp_path, gguf_filename=name))


def test_ref_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """The Hub's client reads one as a whole; who can write to the cache can make it sparse."""
    ref = tmp_path / "hf" / "hub" / "models--me--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    with ref.open("wb") as file:
        file.truncate(1 << 40)
    with serving(Hub(files={"m.gguf": TINY})) as hub:
        environ = environment(hub, tmp_path, GGUF_FILENAME="m.gguf")
        told = heard([sys.executable, "-c", TELL], env=environ).stdout.splitlines()
    assert told[0] == "MODEL_CACHE_TEMPORARY"
    assert Path(told[-1]).read_bytes() == TINY


HTML = b"<!doctype html><title>log in</title>"


@dataclass
class Half(Hub):
    """Answers HEAD as a Hub does, and GET in its own way."""

    sent: Answer = field(default_factory=lambda: Answer(200, HTML))

    def answer(self, asked: Request) -> Answer:
        return self.sent if asked.method == "GET" else super().answer(asked)


NO_DIGEST: dict[str, str | None] = {"ETag": '"1"'}
NO_SIZE: dict[str, str | None] = {**NO_DIGEST, "Content-Length": None}
WITHOUT = Answer(200, TINY.ljust(300_000), {"Content-Length": None})


@pytest.mark.parametrize(
    ("changed", "sent", "code", "words"),
    [
        *(({}, Answer(status, HTML), "HUB_REFUSED", "HF_TOKEN") for status in (401, 403)),
        *(({}, Answer(status, HTML), "HUB_UNUSABLE", str(status)) for status in (404, 451)),
        ({}, Answer(200, HTML), "HUB_UNUSABLE", f"{len(HTML)} bytes instead of {len(TINY)}"),
        ({}, Answer(302, b"", {"Location": "ftp://x"}), "HUB_UNUSABLE", "which is not https"),
        (NO_SIZE, Answer(200, HTML), "HUB_UNUSABLE", "no whole GGUF file"),
        (NO_DIGEST, Answer(200, HTML.ljust(len(TINY))), "HUB_UNUSABLE", "no whole GGUF file"),
        (NO_SIZE, Answer(200, gzip.compress(TINY)), "HUB_UNUSABLE", "no whole GGUF file"),
        (NO_SIZE, Answer(200, TINY[:-2000]), "HUB_UNUSABLE", "no whole GGUF file"),
        ({"X-Linked-Size": "9" * 400}, Answer(200, TINY), "HUB_UNUSABLE", "or its size"),
        ({"Content-Length": None}, WITHOUT, "MODEL_SHA256_MISMATCH", "correct HF_ENDPOINT"),
        ({"Content-Length": "0"}, WITHOUT, "MODEL_SHA256_MISMATCH", "correct HF_ENDPOINT"),
    ],
)
def test_mirror_that_sends_something_else_than_it_named_leaves_nothing(
    tmp_path: Path, changed: dict[str, str | None], sent: Answer, code: str, words: str
) -> None:
    """Kept, it would be found in the cache by every later start."""
    half = Half(files={"m.gguf": TINY}, changed=changed, sent=sent)
    status = 4 if "SHA256" in code else 3
    with serving(half) as hub, refusals.refused(code, match=words, status=status):
        model.get(asking(hub.url, tmp_path))
    assert not list((tmp_path / "hub").rglob("blobs/*"))


@pytest.mark.parametrize(("largest", "code"), [(100_000, "HUB_UNUSABLE"), (1 << 40, "DISK_FULL")])
def test_file_of_unknown_size_that_is_too_large_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, code: str
) -> None:
    """Kept, it would fill the disk until a person removed it."""
    monkeypatch.setattr("llama_loader.fetch._LARGEST", largest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "disk/hub"))
    sent = Answer(200, bytes(9_000_000), {"Content-Length": None})
    served = Half(files={"m.gguf": TINY}, changed=NO_SIZE, sent=sent)
    with mounted(tmp_path / "disk", "1m"), serving(served):
        with refusals.refused(code):
            model.get(asking(served.url, tmp_path))
        assert not list((tmp_path / "disk").rglob("blobs/*"))


class Slow(Hub):
    """Answers after a while."""

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        time.sleep(0.5)
        return super().judge(path, authorization)


def test_download_of_which_no_byte_comes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = self_test.MODEL.read_bytes()
    monkeypatch.setattr(hub_module, "_SILENCE", 0.1)
    told: list[object] = []
    with serving(Slow(files={"m.gguf": content})) as hub:
        wanted = asking(hub.url, tmp_path)
        assert model.get(wanted, sink=told.append).read_bytes() == content
    notes = [event for event in told if isinstance(event, Note)]
    assert {(note.code, note.message) for note in notes} == {
        ("DOWNLOAD_SILENT", "no byte of me/model/m.gguf has arrived for 0.1 s")
    }


@dataclass
class Mirror(Hub):
    """Answers everything with one status."""

    status: int = 0

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        del path, authorization
        return self.status, "", b""


@pytest.mark.parametrize(
    ("answer", "code", "exit_status", "words"),
    [
        (404, "FILE_NOT_FOUND", 2, "YAKULINGO_SPACES_GGUF_FILENAME"),
        (401, "HUB_REFUSED", 3, "HF_TOKEN"),
        (403, "HUB_REFUSED", 3, "HF_TOKEN"),
        *((code, "HUB_REFUSED", 3, "HF_ENDPOINT") for code in (400, 402, 405, 410, 418, 451)),
        *((code, "HUB_UNREACHABLE", 3, "try again") for code in (408, 429, 500, 503)),
    ],
)
def test_what_a_mirror_refuses_is_told_as_what_it_is(
    tmp_path: Path, answer: int, code: str, exit_status: int, words: str
) -> None:
    told = refusals.refused(code, match=str(answer), hint=words, status=exit_status)
    with serving(Mirror(status=answer)) as mirror, told:
        model.get(load(environ={"HOME": str(tmp_path), "HF_ENDPOINT": mirror.url}))


NAMES = (
    "m.i1-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "mmproj-Q8_0.gguf",
    "Q8_0/m-Q8_0-00001-of-00002.gguf",
    "Q8_0/m-Q8_0-00002-of-00002.gguf",
    "README-Q4_K_M.md",
    "m-IQ4_K_M.gguf",
)


@pytest.mark.parametrize(
    ("wanted", "file"),
    [("Q4_K_M", NAMES[0]), ("q4_k_m", NAMES[0]), ("Q4_K_S", NAMES[1]), ("Q8_0", NAMES[3])],
)
def test_quantisation_names_the_file_that_is_fetched(
    tmp_path: Path, wanted: str, file: str
) -> None:
    with serving(Hub(files=dict.fromkeys(NAMES, TINY))) as hub:
        asked = asking(hub.url, tmp_path, gguf_repo_id=f"me/model:{wanted}", gguf_filename=None)
        assert str(model.get(asked)).endswith(f"/{file}")


def test_file_of_a_quantisation_is_found_again_without_the_hub(tmp_path: Path) -> None:
    named = {"GGUF_REPO_ID": "me/model:Q8_0", "GGUF_FILENAME": ""}
    with serving(Hub(files=dict.fromkeys(NAMES, TINY))) as hub:
        assert from_hub(hub, tmp_path, AT_HAND, **named) == "None"
        path = path_from_hub(hub, tmp_path, **named)
    assert path_from_hub(hub, tmp_path, **named) == path  # nobody answers any more
    assert path_from_hub(hub, tmp_path, **named, OFFLINE="1") == path
    assert from_hub(hub, tmp_path, AT_HAND, **named, OFFLINE="1") == str(path)


def test_folders_deeper_than_any_path_in_the_cache_break_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of a shared cache can make them."""
    (snapshots := tmp_path / "hub" / FOLDER / "snapshots").mkdir(parents=True)
    monkeypatch.chdir(snapshots)
    for _ in range(20):
        Path("a" * 250).mkdir()
        os.chdir("a" * 250)
    wanted = asking("http://127.0.0.1:9", gguf_repo_id="me/model:Q8_0", gguf_filename=None)
    with refusals.refused("HUB_UNREACHABLE"):
        model.named(wanted)


@pytest.mark.parametrize(
    "listed",
    [
        *([1], "a name", {"siblings": [1]}, {"siblings": [{"size": 1}]}, b"<html>log in"),
        *(b"[" * 100_000, {"siblings": 7}, {"error": "none"}),
    ],
)
def test_list_of_files_that_cannot_be_read_is_no_defect_of_the_loader(
    tmp_path: Path, listed: object
) -> None:
    with serving(Hub(listed=listed)) as hub, pytest.raises(LoaderError) as caught:
        model.get(asking(hub.url, tmp_path, gguf_repo_id="me/model:Q8_0", gguf_filename=None))
    assert caught.value.code in {"HUB_UNREACHABLE", "FILE_NOT_FOUND"}
    assert caught.value.exit_status in {2, 3}


def test_quantisation_that_the_repository_does_not_have_is_told_with_those_that_it_has(
    tmp_path: Path,
) -> None:
    there = r"no GGUF file of Q2_K; there are: m\.i1-Q4_K_M"
    with (
        serving(Hub(files=dict.fromkeys(NAMES, TINY))) as hub,
        refusals.refused("FILE_NOT_FOUND", match=there),
    ):
        model.get(asking(hub.url, tmp_path, gguf_repo_id="me/model:Q2_K", gguf_filename=None))


__all__ = ["clinic"]


def test_doctor_finds_that_the_disk_has_no_room_for_the_model(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "1m"), serving(Hub(files={"m.gguf": bytes(9_000_000)})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "disk/hub"))
        clinic.variables["HF_ENDPOINT"] = hub.url
        found = clinic.examine(GGUF_PATH="", GGUF_REPO_ID="me/model", GGUF_FILENAME="m.gguf")
    assert failures(found) == {"model": "DISK_FULL"}
    assert "takes 0.009 GB more" in found.checks[-1].detail
    assert found.exit_status == 6
