"""`invoke space`, against a Hub on loopback: from nothing to a Space that answers, and again."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from invoke.context import Context

from farm import elf, loader, own_space, preflight, release_verbs
from farm.errors import FarmError, PackError, PublishError, UsageError
from farm.options import BuildRequest, Deploy, Wish
from farm.publish import deploy_space, pin_space, places
from farm.terminal.progress import BuildReport
from llama_loader.errors import IntegrityError
from tests.rigs import binaries, http_served, hub_repository, tiny_release
from tests.rigs.heard import heard
from tests.rigs.http_served import Answer
from tests.rigs.refusals import refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.rigs.http_served import Request

PROJECT = Path(__file__).resolve().parents[2]
SPACE = "me/space"
RELEASES = "me/llama-server"
CPU = Wish(SPACE, model="4b", hardware="cpu-basic", wait=1)


@pytest.fixture
def hub(
    hub: hub_repository.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[hub_repository.Hub]:
    """Serve the pages of its Spaces too; no release is pinned in the checkout."""
    with http_served.serving(lambda _: Answer(200, b"a page")) as hub.host:
        monkeypatch.setattr(pin_space, "FILE", tmp_path / "no" / "release.json")
        monkeypatch.setattr(own_space, "_INTERVAL_S", 0.01)
        monkeypatch.setattr(loader, "build_wheel", _a_wheel)
        yield hub


def _a_wheel(folder: Path) -> Path:
    place = folder / "llama_space-1-py3-none-any.whl"
    place.write_bytes(b"as test_loader.py builds it")
    return place


Make = Callable[..., str]


@pytest.fixture
def make(capsys: pytest.CaptureFixture[str]) -> Make:
    """Run `invoke space`; gives what it printed."""

    def told(wish: Wish, *, dry_run: bool = False) -> str:
        own_space.make(replace(wish, dry_run=dry_run), BuildReport())
        return "".join(reversed(capsys.readouterr()))

    return told


def fetched_by(hub: hub_repository.Hub, space: Path, store: Path) -> str:
    """Run what a deployed Space runs at its start: its own loader, variables and release.json."""
    repository = hub.repositories[SPACE]
    for name, content in repository.commits[-1].items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    done = heard(
        [sys.executable, "-m", "llama_loader", "fetch", "--no-test-run", "--json"],
        cwd=space,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(store),
            "HF_ENDPOINT": hub.url,
            **repository.variables,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_space_is_built_from_nothing_and_its_own_loader_gets_what_was_published(
    hub: hub_repository.Hub, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    """What compiles is another test's; here the folder is filled by a small real build."""
    folder = tmp_path / "dist"

    def build(*_: object) -> None:
        shutil.move(tiny_release.of_build(kept, 11549, tmp_path), folder)

    monkeypatch.setattr(preflight, "build", build)
    hub.stages = [{"stage": "BUILDING"}, {"stage": "APP_STARTING"}, {"stage": "RUNNING"}]
    wish = replace(CPU, folder=folder)
    said = make(wish, dry_run=True)
    for told in (
        f"into {folder} and published to hf:{RELEASES}",
        "engine: ",
        "hardware cpu-basic",
        "mradermacher's",
    ):
        assert told in said
    assert hub.repositories == {}
    files = re.findall(r"Space .*: (\d+) files", said)
    said = make(wish)
    assert files == re.findall(r"Space .*: (\d+) files", said)
    assert said.splitlines()[-1] == hub.host
    assert said.count("SHA256SUMS") == 1
    assert "for requirements.txt of a Space: llama-space @ " in said
    assert "running; waiting for its page to answer (at most 1 minutes, --wait)" in said
    assert hub.repositories[RELEASES].tags.keys() == {"b11549-1"}
    assert hub.repositories[SPACE].hardware == "cpu-basic"
    assert '"verified": true' in fetched_by(hub, tmp_path / "space", tmp_path / "home")

    released = hub.repositories.pop(RELEASES)
    said = make(replace(CPU, folder=tmp_path / "none"), dry_run=True)
    assert "change release.json" in said
    assert "delete" not in said
    hub.repositories[RELEASES] = released
    assert "model the Space's own: mradermacher/translategemma-4b-it-i1-GGUF" in make(
        replace(wish, model=None), dry_run=True
    )
    commits = {name: len(one.commits) for name, one in hub.repositories.items()}
    assert "release: b11549-1 of hf:me/llama-server" in make(wish, dry_run=True)
    unasked = replace(wish, hardware=None, model="27b")
    assert re.search(
        "b11549-1 of(?s:.*)TOO_LARGE(?s:.*)own: cpu-basic", make(unasked, dry_run=True)
    )
    hub.repositories[SPACE].hardware = ""
    assert "is chosen for zero-a10g: give --hardware for another" in make(unasked, dry_run=True)
    hub.repositories[SPACE].hardware = "cray"
    with refused("HARDWARE_UNKNOWN", UsageError, "cray"):
        make(unasked, dry_run=True)
    sent, again = list(hub.sent), make(replace(wish, folder=tmp_path / "none"))
    assert "release: b11549-1 of hf:me/llama-server" in again
    assert hub.sent == sent
    assert len(hub.repositories[RELEASES].commits) == commits[RELEASES]


def test_build_that_the_hardware_cannot_run_is_not_published(
    hub: hub_repository.Hub, released: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setattr(preflight, "build", lambda *_: None)
    with refused("RELEASE_CANNOT_RUN", PublishError, "zero-a10g: release b11549-1 has") as caught:
        make(Wish(SPACE, model="4b", folder=released))
    assert "NO_ARTIFACT" in caught.value.message
    assert hub.repositories == {}


def test_pinned_release_that_the_hardware_cannot_run_is_refused(
    hub: hub_repository.Hub,
    released: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Make,
) -> None:
    pinned = tmp_path / "release.json"
    monkeypatch.setattr(pin_space, "FILE", pinned)
    pin_space.write(pin_space.url((released / "manifest.json").as_uri()).content, pinned)
    with refused("RELEASE_CANNOT_RUN", PublishError, "zero-a10g: release .*NO_ARTIFACT") as caught:
        make(Wish(SPACE), dry_run=True)
    assert "invoke pin-space" in caught.value.hint
    assert "\n" not in caught.value.message
    with refused("RELEASE_CANNOT_RUN", PublishError):  # deploy-space, too
        own_space.require_pin_runs(Deploy(SPACE, hardware="zero-a10g"), print)
    own_space.require_pin_runs(Deploy(SPACE, hardware="cray"), (told := []).append)
    assert told[-1].startswith("note[HARDWARE_UNKNOWN]: not compared with the hardware: ")
    own_space.publish(released, places.parse(f"hf:{RELEASES}"))
    named = Wish(SPACE, releases=f"hf:{RELEASES}", release="b11549-1")
    with refused("RELEASE_CANNOT_RUN", PublishError, "zero-a10g: release .*NO_ARTIFACT"):
        make(named, dry_run=True)
    with refused("NOT_PUBLISHED", PublishError, hint="there is: b11549-1"):
        make(replace(named, release="b1-1"), dry_run=True)
    said = make(replace(named, release=None), dry_run=True)
    assert f"release: b11549-1 of hf:{RELEASES} is skipped: release" in said
    assert "yet" not in said
    allowed = Wish(
        SPACE, variable=("YAKULINGO_SPACES_ALLOW_CPU=1", "LLAMA_SPACE_NCTX=1", "N_CTX=1")
    )
    said = make(allowed, dry_run=True)
    assert "hardware zero-a10g (ZeroGPU)" in said
    assert "warning[SETTING_UNKNOWN]: LLAMA_SPACE_NCTX is no setting" in said
    assert "N_CTX is no setting: did you mean YAKULINGO_SPACES_N_CTX?" in said
    (released / "manifest.json").unlink()
    assert "note[RELEASE_UNREACHABLE]: not compared" in make(allowed, dry_run=True)
    pinned.write_text("{}")
    with refused("PIN_INVALID", UsageError):
        make(allowed, dry_run=True)
    assert hub.repositories.keys() == {RELEASES}


@pytest.mark.usefixtures("hub")
def test_release_in_a_folder_is_told_without_a_requirement_that_no_space_could_read(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_space.publish(released, places.parse(str(tmp_path / "place")))
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("file://")
    assert "requirements.txt" not in said.err


@pytest.mark.parametrize("step", ["/llama-server/tag/", "/space/variables", "/space/commit/"])
def test_run_that_a_step_stopped_is_resumed_by_the_next(
    step: str, hub: hub_repository.Hub, released: Path, tmp_path: Path, make: Make
) -> None:
    hub.refuse = f"POST .*{step}"
    wish = replace(CPU, folder=released)
    with refused("HUB_REFUSED") as caught:
        make(wish)
    assert caught.value.hint
    hub.refuse = ""
    assert make(wish).splitlines()[-1] == hub.host
    fetched_by(hub, tmp_path / "space", tmp_path / "home")


def test_what_can_be_refused_at_once_is_refused_before_a_build(
    hub: hub_repository.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    hub.repositories[SPACE] = hub_repository.Repository(commits=[{"app.py": b"theirs"}])
    files = {f"{name}.gguf": b"" for name in ("small-Q4_K_M", "mmproj-Q4_K_M", "a-Q4_K_M_L")}
    hub.repositories["me/small-GGUF"] = hub_repository.Repository(commits=[files])
    assert deploy_space.found_model("me/small-GGUF:q4_k_m") == "me/small-GGUF:small-Q4_K_M.gguf"
    bucket = "bucket:me/small-GGUF:a-Q4_K_M_L.gguf"
    assert deploy_space.found_model(bucket) == bucket
    with refused("SPACE_NOT_OURS", PublishError):
        make(CPU)
    for change, code in (
        ({"model": "70b"}, "MODEL_INVALID"),
        ({"model": "me/nothing:x.gguf"}, "MODEL_INVALID"),
        ({"model": "me/small-GGUF:Q8_0"}, "MODEL_INVALID"),
        ({"model": "bucket:me/small-GGUF:none.gguf"}, "MODEL_INVALID"),
        ({"hardware": "cray"}, "HARDWARE_UNKNOWN"),
        ({"variable": ("HF_TOKEN=x",)}, "VARIABLE_IS_SECRET"),
        ({"variable": ("LLAMA_SPACE_N_CTX=abc",)}, "SETTING_INVALID"),
        ({"url": "https://x/y", "release": "b1-1"}, "OPTIONS_INVALID"),
        ({"url": "https://x/y", "build": BuildRequest(line="cu130")}, "OPTIONS_INVALID"),
        ({"releases": str(tmp_path)}, "PIN_IS_LOCAL"),
    ):
        with refused(code, UsageError if code != "PIN_IS_LOCAL" else PublishError):
            make(replace(CPU, **change))
    hub.refuse = "HEAD .*gguf"
    with refused("HUB_REFUSED", PublishError, hint="the model's name"):
        make(CPU)
    hub.refuse, hub.role = "", "read"
    with refused("TOKEN_INVALID", UsageError):
        make(CPU)
    monkeypatch.setenv("HF_TOKEN", "hf_w0rng")
    with refused("HUB_REFUSED", PublishError, "Invalid user token"):
        make(CPU)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with refused("TOKEN_MISSING", UsageError):
        make(CPU)
    hub.repositories.clear()
    said = make(replace(CPU, model="27b"), dry_run=True)
    assert "warning[MODEL_TOO_LARGE]: it has 17 GB" in said
    assert "note[TOKEN_MISSING]: without --dry-run it ends here: HF_TOKEN is not set" in said
    assert RELEASES not in hub.repositories


@pytest.mark.parametrize(
    ("stage", "code"),
    [
        ({"stage": "BUILD_ERROR", "errorMessage": "no\nsuch package"}, "SPACE_FAILED"),
        ({"stage": "BUILDING"}, "SPACE_NOT_READY"),
        ({"stage": "RUNNING", "sha": "of the commit before"}, "SPACE_NOT_READY"),
        ({"stage": "RUNNING", "sha": {"no": "commit"}}, "SPACE_NOT_READY"),
    ],
)
def test_space_that_does_not_come_up_is_named_with_its_log(
    stage: dict[str, Any], code: str, hub: hub_repository.Hub
) -> None:
    hub.repositories[SPACE] = hub_repository.Repository()
    hub.stages = [stage]
    with refused(code, PublishError, hint=f"{hub.url}/spaces/{SPACE}?logs=container") as caught:
        own_space.wait(SPACE, 0.05, lambda _: None, interval=0.01)
    assert stage["stage"] in caught.value.message
    assert "\n" not in caught.value.message


def test_page_that_does_not_answer_is_waited_for(hub: hub_repository.Hub) -> None:
    hub.repositories[SPACE] = hub_repository.Repository()
    asked: list[str] = []

    def late(request: Request) -> Answer:
        asked.append(request.path)
        return Answer(200 if len(asked) > 2 else 404, b"")

    with http_served.serving(late) as hub.host:
        own_space.wait(SPACE, 30, lambda _: None, interval=0.01)
    assert len(asked) == 3
    asked.clear()
    with http_served.serving(late) as hub.host, refused("SPACE_NOT_READY", match="status 404"):
        own_space.wait(SPACE, 0, lambda _: None, interval=0.01)


def test_token_goes_to_no_page_of_another_server(hub: hub_repository.Hub) -> None:
    """A Hub's answer says where a private Space's page is."""
    hub.repositories[SPACE], hub.private = hub_repository.Repository(), True
    tokens: list[str | None] = []

    def page(request: Request) -> Answer:
        tokens.append(request.headers.get("Authorization"))
        return Answer(200, b"a page")

    with http_served.serving(page) as url:
        hub.host = url
        own_space.wait(SPACE, 30, lambda _: None, interval=0.01)
        for host in (f"{url}/shutdown?now=1", 5):
            hub.host = cast("str", host)
            with refused("PLACE_UNUSABLE", PublishError, "is no Space's page"):
                own_space.wait(SPACE, 0, lambda _: None, interval=0.01)
    assert tokens == [None]


def test_hub_without_xet_is_told_as_what_it_is(
    hub: hub_repository.Hub, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(hub_repository, "LARGE", 1)
    with refused("HUB_REFUSED", PublishError, "404 Not Found", hint="HF_HUB_DISABLE_XET=1"):
        own_space.publish(released, places.parse(f"hf:{RELEASES}"))
    assert not hub.sent


def test_hub_without_dns_is_unreachable_and_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    with refused("HUB_UNREACHABLE", PublishError, "https://hub.invalid: ", hint="HF_HUB_OFFLINE"):
        deploy_space.compare(deploy_space.plan(Deploy(SPACE, model="4b")))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return an archive as the official ones are: sm_120a and PTX, no manifest, links."""
    bin_ = tmp_path / "build" / "bin"
    bin_.mkdir(parents=True)
    code = tmp_path / "code"
    code.write_bytes(binaries.container(binaries.entry(2, 120, flags=0x1100011)))
    for name in ("libcudart.so.12", "libcublas.so.12"):
        binaries.library(bin_, name)
    binaries.library(bin_, "libggml-cuda.so", "libcudart.so.12", "libcublas.so.12", fatbin=code)
    binaries.program(bin_, "llama-server", source="int main(void) { return 0; }")
    place = tmp_path / "llama-b11549-bin-linux-cuda-x64.tar.gz"
    with tarfile.open(place, "w:gz") as tar:
        for name in ("llama-server", "libggml-cuda.so"):
            tar.add(bin_ / name, f"build/bin/{name}")
    return place


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (own_space.ZEROGPU[0], "because"),
        (own_space.ZEROGPU[1], "NO_ARTIFACT_FOR_GPU"),
        ("glibc=2.36", "NO_GPU"),
        ("capability=12.0,driver=580,glibc=2.2,torch=cu128", "GLIBC_TOO_OLD"),
        ("capability=12.0,driver=510,glibc=2.36,torch=cu128", "DRIVER_TOO_OLD"),
        ("capability=12.0,driver=580,glibc=2.36,torch=cu130", "CUDA_LIBRARY_MISSING"),
    ],
)
def test_archive_says_beforehand_whether_a_host_can_run_it(
    facts: str,
    said: str,
    archive: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = pin_space.archive(archive.as_uri(), (facts,))
    ((_, told, can_run),) = found.answers
    assert said in told
    assert can_run == (said == "because")
    if can_run:
        assert found.variables() == {
            "YAKULINGO_SPACES_LLAMA_CPP_URL": archive.as_uri(),
            "YAKULINGO_SPACES_LLAMA_CPP_SHA256": found.sha256,
        }
    else:
        with refused("ARCHIVE_CANNOT_RUN", PublishError) as caught:
            found.variables()
        assert "invoke pin-space --url URL --suppose" in caught.value.hint
    if said == "NO_GPU":
        release_verbs.pin_space(Context(), url=archive.as_uri(), suppose=facts, allow_cpu=True)
        told = capsys.readouterr()
        assert "YAKULINGO_SPACES_LLAMA_CPP_SHA256=" in told.out
        assert "only this machine can read its address, and no Space" in told.err
    monkeypatch.setattr(pin_space, "_CHUNK", 1 << 40)
    with pytest.raises(IntegrityError, match="that the farm wrote"):
        pin_space.archive(archive.as_uri(), (facts,))


def test_space_with_an_archive_is_pinned_by_variables_and_builds_nothing(
    hub: hub_repository.Hub, archive: Path, tmp_path: Path, make: Make
) -> None:
    hub.repositories["me/archives"] = hub_repository.Repository(
        commits=[{"llama.tar.gz": archive.read_bytes()}]
    )
    url = "hf://me/archives/llama.tar.gz"
    make(Wish(SPACE, model="4b", url=url, wait=0))
    repository = hub.repositories[SPACE]
    assert repository.variables["YAKULINGO_SPACES_LLAMA_CPP_URL"] == url
    assert "release.json" not in repository.commits[-1]
    assert '"trust": "pinned"' in fetched_by(hub, tmp_path / "space", tmp_path / "home")

    # a release instead: what would win over it is removed
    planned = deploy_space.plan(
        Deploy(SPACE), release={"manifest_url": "https://example.org/m.json"}
    )
    changes = deploy_space.compare(planned)
    assert changes.unset == tuple(sorted(found for found in repository.variables if "CPP" in found))
    deploy_space.deploy(changes)
    assert not any("CPP" in name for name in repository.variables)


def test_what_is_no_archive_of_llama_cpp_is_told_in_the_loaders_words(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"<html>log in</html>")
    with refused("ARCHIVE_UNKNOWN", FarmError) as caught:
        pin_space.archive((tmp_path / "x.tar.gz").as_uri(), own_space.ZEROGPU)
    assert "error[" not in caught.value.message
    monkeypatch.setattr(elf, "MOST_BINARIES", 0)
    with refused("ARCHIVE_UNSOUND", PackError):
        pin_space.archive(archive.as_uri(), own_space.ZEROGPU)


@pytest.mark.parametrize(
    ("name", "arch_set"),
    [("zero-a10g", "zerogpu"), ("l4x1", "sm89"), ("l40sx1", "sm89"), ("t4-small", "sm75"),
     ("a10g-large", "sm86"), ("a100-large", "sm80"), ("cpu-upgrade", "cpu")],
)  # fmt: skip
def test_hardware_has_the_set_of_its_gpu(name: str, arch_set: str) -> None:
    assert deploy_space.hardware(name)
    assert own_space.host_of(name).arch_set == arch_set
