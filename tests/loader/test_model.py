"""Models: local files, the Hub's cache, the real Hub client against a Hub on loopback."""

import errno
import hashlib
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from verbs import PROJECT

from llama_loader import hub, model, model_file, self_test
from llama_loader.errors import IntegrityError, LoaderError, SettingError
from llama_loader.settings import Settings, bound_xet
from tests.rigs.heard import heard
from tests.rigs.hub import COMMIT, Hub, serving
from tests.rigs.releases import settings
from tests.rigs.small_disk import mounted

SPACES = PROJECT / "spaces"
TINY = self_test.MODEL.read_bytes()


def refused(path: Path) -> SettingError:
    """Return the error of a local model, for the doctor and for whoever serves it."""
    with pytest.raises(SettingError) as caught:
        model_file.require_usable(path)
    error, wanted = caught.value, settings(GGUF_PATH=str(path))
    with pytest.raises(SettingError) as told:
        model.get(wanted)
    assert told.value.render() == error.render()
    assert error.exit_status == 2
    assert str(path) in error.message
    return error


def test_model_that_this_user_may_not_look_at_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "is_file", refuse)
    assert refused(tmp_path / "m.gguf").code == "MODEL_NOT_READABLE"


def test_a_pinned_model_is_hashed() -> None:
    digest, local = hashlib.sha256(TINY).hexdigest(), str(self_test.MODEL)
    for pin in ({}, {"GGUF_SHA256": digest}):
        assert model.get(settings(GGUF_PATH=local, **pin)) == self_test.MODEL
    with pytest.raises(IntegrityError, match=digest):
        model.get(settings(GGUF_PATH=local, GGUF_SHA256="0" * 64))


@pytest.mark.parametrize("where", ["GGUF_PATH", "GGUF_FILENAME"])
def test_pin_of_a_model_in_parts_is_refused_before_anything_is_fetched(where: str) -> None:
    """The digest could be right for the first part alone, and says nothing of the others."""
    wanted = settings(**{where: "m-00001-of-00005.gguf", "GGUF_SHA256": "0" * 64})
    with pytest.raises(SettingError, match=r"m-00001-of-00005\.gguf is file 1 of 5") as caught:
        model.get(wanted)
    assert caught.value.code == "MODEL_PIN_OF_PARTS"
    single = reason(settings(**{where: "m-00001-of-00001.gguf"}))
    assert single.code in {"OFFLINE", "MODEL_MISSING"}


def reason(wanted: Settings) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        model.get(replace(wanted, offline=True))
    return caught.value


BEGIN = "from llama_loader import model, settings; s = settings.load();"
PRINT_PATH = f"{BEGIN}print(model.get(s))"
AT_HAND = f"{BEGIN}print(model.at_hand(s))"


def from_hub(hub: Hub, place: Path, code: str, **variables: str) -> str:
    """Fetch with the real client, in a process of its own: its settings are read at import."""
    environ = environment(hub, place, **variables)
    done = heard([sys.executable, "-c", code], env=environ)
    if done.returncode:
        raise AssertionError(done.stderr.splitlines()[-1])
    assert done.stderr == ""
    return done.stdout.strip()


def environment(hub: Hub, place: Path, **variables: str) -> dict[str, str]:
    names = {f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()}
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(place),
        "HF_HOME": str(place / "hf"),
        "HF_ENDPOINT": hub.url,
        "PYTHONPATH": str(SPACES),
        "YAKULINGO_SPACES_GGUF_REPO_ID": "me/model",
        "YAKULINGO_SPACES_GGUF_FILENAME": "sub/m.gguf",
        "HF_XET_CLIENT_READ_TIMEOUT": "2s",
        **names,
    }
    if "HF_TOKEN" in variables:
        environ["HF_TOKEN"] = variables["HF_TOKEN"]
    return environ


def path_from_hub(hub: Hub, place: Path, **variables: str) -> Path:
    return Path(from_hub(hub, place, PRINT_PATH, **variables))


def test_a_model_in_the_hubs_cache_is_at_hand_without_asking(tmp_path: Path) -> None:
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        assert from_hub(hub, tmp_path, AT_HAND) == "None"
        assert hub.tokens_seen == set()
        path = path_from_hub(hub, tmp_path)
    assert from_hub(hub, tmp_path, AT_HAND) == str(path)
    assert from_hub(hub, tmp_path, AT_HAND, GGUF_REVISION=COMMIT) == str(path)
    assert from_hub(hub, tmp_path, AT_HAND, GGUF_REVISION="v9") == "None"
    assert from_hub(hub, tmp_path, AT_HAND, GGUF_PATH="/nowhere") == "None"


def test_all_parts_of_a_model_are_fetched_and_the_first_is_returned(tmp_path: Path) -> None:
    """The progress is that of all parts."""
    names = [f"sub/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    sizes = (12_000_000, 9_000_000, 1_000_000)
    parts = {
        name: (TINY + name.encode()).ljust(size) for name, size in zip(names, sizes, strict=True)
    }
    told = f"{BEGIN}print(model.get(s, sink=lambda e: print(e.name, e.done, e.total)))"
    with serving(Hub(files={name: parts[name] for name in names[:2]})) as hub:
        with pytest.raises(AssertionError, match="has no file sub/m-00003"):
            path_from_hub(hub, tmp_path, GGUF_FILENAME=names[0])
        assert from_hub(hub, tmp_path, AT_HAND, GGUF_FILENAME=names[0]) == "None"
        hub.files.update(parts)
        *lines, path = from_hub(hub, tmp_path, told, GGUF_FILENAME=names[0]).splitlines()
        assert from_hub(hub, tmp_path, AT_HAND, GGUF_FILENAME=names[0]) == path
    counts = [int(line.split()[1]) for line in lines]
    assert counts == sorted(counts)
    assert 12_000_000 < counts[-1] == sum(sizes)
    assert {line.split()[0] + line.split()[2] for line in lines} == {f"{names[0]}{sum(sizes)}"}
    for name in names:
        assert Path(path).with_name(name.rpartition("/")[2]).read_bytes() == parts[name]


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://hub.example", "http://localhost:1", "http://127.0.0.1.example", "http://[::"),
        *("https://me:hf_secret@hub.example", "https://hub.example?token=hf_secret"),
        *("https://hub.example/#hf_secret", "http://127.0.0.1:1/?hf_secret"),
    ],
)
def test_token_for_the_models_hub_goes_to_https_or_a_loopback_address_only(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub's client was called")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked)
    wanted = replace(settings(HF_TOKEN="hf_secret"), hf_endpoint=endpoint)
    for ask in (model.get, hub.size):
        with pytest.raises(SettingError) as caught:
            ask(wanted)
        assert caught.value.code == "ENDPOINT_REFUSED"
        if "hf_secret" not in endpoint:
            assert endpoint in caught.value.message
        assert "hf_secret" not in caught.value.render()


def test_the_real_hub_client_against_a_local_hub(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()  # kept for a day: the client made an AttributeError of each question
    (tmp_path / "hf" / ".agent_harnesses.json").write_text("[1]")
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        path = path_from_hub(hub, tmp_path)
        assert path.read_bytes() == TINY
        assert path.is_relative_to(tmp_path / "hf")
        assert hub.tokens_seen == {None}
        digest = hashlib.sha256(TINY).hexdigest()
        assert path_from_hub(hub, tmp_path, GGUF_SHA256=digest, GGUF_REVISION=COMMIT) == path
        for variables, words in (
            (
                {"GGUF_FILENAME": "other.gguf"},
                "SettingError: FILE_NOT_FOUND: .* no file other",
            ),
            ({"GGUF_REVISION": "v9"}, "SettingError: REVISION_NOT_FOUND: .* has no revision v9"),
            ({"GGUF_REPO_ID": "me/other"}, "SettingError: REPOSITORY_NOT_FOUND: .* me/other"),
            ({"GGUF_SHA256": "0" * 64}, "pinned is 0000"),
        ):
            with pytest.raises(AssertionError, match=words):
                path_from_hub(hub, tmp_path, **variables)
    assert path_from_hub(hub, tmp_path, OFFLINE="1") == path


def test_a_gated_model_needs_the_token(tmp_path: Path) -> None:
    with serving(Hub(files={"sub/m.gguf": TINY}, token="hf_right")) as hub:
        with pytest.raises(AssertionError, match=r"MODEL_GATED: .*, and HF_TOKEN is not set"):
            path_from_hub(hub, tmp_path)
        with pytest.raises(AssertionError, match="has no access to it"):
            path_from_hub(hub, tmp_path, HF_TOKEN="hf_wrong")
        assert path_from_hub(hub, tmp_path, HF_TOKEN="hf_right").read_bytes() == TINY


@pytest.mark.parametrize(
    ("error", "code", "status", "words"),
    [
        # as a write says it: without a name
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL", 6, "No space left"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "STORE_FAILED", 6, "Read-only file"),
        (ValueError("what"), "HUB_UNREACHABLE", 3, "what"),
        (RuntimeError("what"), "HUB_UNREACHABLE", 3, "HF_HUB_DISABLE_XET"),
    ],
)
def test_errors_of_the_hubs_client_that_are_not_its_own_become_sentences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: str, status: int,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", Mock(side_effect=error))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(LoaderError) as caught:
        model.get(settings(GGUF_REPO_ID="me/model", GGUF_FILENAME="m.gguf"))
    assert (caught.value.code, caught.value.exit_status) == (code, status)
    assert words in caught.value.render()


def test_a_model_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    """Both sizes are told; what is in the cache already is not counted."""
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    files = {names[0]: TINY.ljust(9_000_000), names[1]: TINY.ljust(9_000_000)}
    with mounted(tmp_path / "disk", "12m") as resize, serving(Hub(files=files)) as hub:
        for _ in range(2):
            with pytest.raises(AssertionError, match=r"takes 0\.018 GB more, 0\.0126 GB are free"):
                path_from_hub(hub, tmp_path / "disk", GGUF_FILENAME=names[0])
        assert [path for path in hub.bodies if "/resolve/" in path] == []
        resize("24m")
        first = path_from_hub(hub, tmp_path / "disk", GGUF_FILENAME=names[0])
        first.resolve().unlink()
        first.unlink()
        resize("20m")
        assert path_from_hub(hub, tmp_path / "disk", GGUF_FILENAME=names[0]) == first


@pytest.mark.parametrize("silent", [False, True])
def test_xet_storage_that_does_not_answer_is_left_for_the_hub_itself(
    tmp_path: Path, *, silent: bool
) -> None:
    """Left alone, hf_xet tries for more than four minutes."""
    code = f"{BEGIN}print(model.get(s, sink=lambda e: print(type(e).__name__)))"
    with socket.create_server(("127.0.0.1", 0)) as storage:
        port = storage.getsockname()[1] if silent else 9
        with serving(Hub(files={"sub/m.gguf": TINY}, xet=f"http://127.0.0.1:{port}")) as hub:
            started = time.monotonic()
            told = from_hub(hub, tmp_path, code).splitlines()
    assert Path(told[-1]).read_bytes() == TINY
    assert told[0] == "Note"
    assert time.monotonic() - started < 30
    assert not list(tmp_path.rglob("*.log"))  # written through a link of another user, too


def test_xet_gives_up_within_a_minute_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"HF_XET_CLIENT_READ_TIMEOUT": "20s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    bound_xet()
    assert {name: os.environ[name] for name in names} == names
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "1s")
    bound_xet()
    assert os.environ["HF_XET_CLIENT_READ_TIMEOUT"] == "1s"
