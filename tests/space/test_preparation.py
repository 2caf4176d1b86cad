import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from releases import BARE, Unlisted, artifact, manifest

from llama_loader import loader, self_test, settings
from llama_loader.errors import HostError, SettingError
from llama_loader.events import Event, Note, Stage, Timeline
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.selection import Choice
from llama_loader.settings import Settings
from llama_space import preparation

ASSUMED = replace(
    BARE, zerogpu=True, gpu_source="zerogpu", gpus=(Gpu("NVIDIA RTX PRO 6000 Blackwell", "120"),)
)
NAMED = replace(ASSUMED, gpu_source="/proc/driver/nvidia", gpus=(Gpu("NVIDIA H200", "90"),))
UNKNOWN = replace(ASSUMED, gpu_source="/proc/driver/nvidia", gpus=(Gpu("NVIDIA X1000", None),))
RELEASE = manifest(
    artifact("cu128", "sm90", "90"), artifact("cu128", "sm120", "120"), artifact("cpu", "cpu")
)


def zerogpu(**options: str) -> Settings:
    return settings.load(options, {"SPACES_ZERO_GPU": "true"})


@pytest.mark.parametrize(
    ("given", "facts", "expected"),
    [
        (zerogpu(), ASSUMED, ("120", "90")),
        (zerogpu(), UNKNOWN, ("120", "90")),
        (zerogpu(), NAMED, (None,)),
        (zerogpu(cuda_arch="90"), ASSUMED, ("90",)),
        (zerogpu(n_gpu_layers="0"), ASSUMED, (None,)),
        (zerogpu(url="https://x/a.tar.gz"), ASSUMED, (None,)),
        (settings.load({}, {}), BARE, (None,)),
    ],
)
def test_both_kinds_of_zerogpu_where_the_gpu_is_not_known(
    given: Settings, facts: HostFacts, expected: tuple[str | None, ...]
) -> None:
    assert preparation.likely(given, facts) == expected


def installing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: HostFacts, *lacking: str
) -> list[str | None]:
    """Let ``prepare`` pretend: nothing is fetched, and some architectures are not there."""
    asked: list[str | None] = []
    (tmp_path / "m.gguf").touch()

    def prepare(given: Settings, **_: object) -> Prepared:
        asked.append(given.cuda_arch)
        if given.cuda_arch in lacking:
            raise HostError("NO_ARTIFACT_FOR_GPU", f"nothing for {given.cuda_arch}")
        found = RELEASE.artifacts[0 if given.cuda_arch == "90" else 1]
        installed = Unlisted(tmp_path, tmp_path, "0" * 64, found)
        timeline = Timeline()
        timeline(Stage("fetch", 1.0))
        choice = Choice(found, "") if given.manifest_url else None
        return Prepared(installed, facts, choice, (), (), timeline, released=(RELEASE, "u"))

    monkeypatch.setattr(preparation, "prepare", prepare)
    monkeypatch.setattr(preparation.host, "detect", lambda _: facts)
    return asked


def test_preparation_for_an_unknown_zerogpu_fetches_both_runtimes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = installing(monkeypatch, tmp_path, ASSUMED)
    ready, known = preparation.run(zerogpu(gguf_path=str(self_test.MODEL)), lambda _: None)
    assert asked == ["120", "90"]
    assert known["architecture"] == "120"
    assert known["timeline"][0] == ("fetch", 2.0)
    assert ready.settings.cuda_arch is None
    assert pickle.loads(pickle.dumps(ready)) == ready  # noqa: S301 - a worker gets it so


@pytest.mark.parametrize(("pin", "verified"), [({}, False), ({"manifest_sha256": "0" * 64}, True)])
def test_verified_is_said_of_what_a_pin_vouches_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pin: dict[str, str], verified: bool
) -> None:
    installing(monkeypatch, tmp_path, NAMED)
    given = zerogpu(gguf_path=str(self_test.MODEL), manifest_url="https://x/m.json", **pin)
    _, known = preparation.run(given, lambda _: None)
    assert (known["verified"], known["model_sha256"]) == (verified, None)


def test_one_of_two_is_enough_and_the_other_is_said_but_neither_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installing(monkeypatch, tmp_path, ASSUMED, "120")
    events: list[Event] = []
    _, known = preparation.run(zerogpu(gguf_path=str(self_test.MODEL)), events.append)
    assert known["architecture"] == "90"
    assert [one.code for one in events if isinstance(one, Note)] == ["NO_ARTIFACT_FOR_GPU"]
    installing(monkeypatch, tmp_path, ASSUMED, "120", "90")
    with pytest.raises(HostError, match="nothing for 120"):
        preparation.run(zerogpu(gguf_path=str(self_test.MODEL)), lambda _: None)


def test_default_model_of_17_gb_is_told_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installing(monkeypatch, tmp_path, NAMED)
    told: list[Event] = []

    def get(*_: object, **__: object) -> Path:
        told.append(Stage("model", 0.0))
        return self_test.MODEL

    monkeypatch.setattr(preparation.model, "at_hand", lambda _: None)
    monkeypatch.setattr(preparation.model, "get", get)
    preparation.run(zerogpu(), told.append)
    note, _ = told
    assert isinstance(note, Note)
    assert (note.code, "17 GB" in note.message) == ("MODEL_DEFAULT", True)
    assert "YAKULINGO_SPACES_GGUF_REPO_ID" in note.hint
    preparation.run(zerogpu(gguf_repo_id="me/model"), told.append)
    assert len(told) == 3


def test_a_model_that_is_not_there_is_found_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installing(monkeypatch, tmp_path, NAMED)
    with pytest.raises(SettingError, match="/nowhere"):
        preparation.run(zerogpu(gguf_path="/nowhere"), lambda _: None)


def test_a_manifest_that_is_trusted_already_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = settings.load({"store": str(tmp_path), "allow_cpu": "1"}, {})
    wanted: list[str] = []

    def install(
        _: object, _artifact: object, urls: tuple[str, ...], *__: object, **___: object
    ) -> str:
        wanted.extend(urls)
        return "installed"

    monkeypatch.setattr("llama_loader.store.Store.install", install)
    prepared = loader.prepare(given, released=(RELEASE, "https://x/y/manifest.json"))
    assert wanted == ["https://x/y/x"]
    assert prepared.released == (RELEASE, "https://x/y/manifest.json")
