"""The Hub's own client: what it is led to, what it raises, which versions are used."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from verbs import PROJECT

from llama_loader import hub as hub_module
from llama_loader import hub_client as client
from llama_loader import model
from tests.loader.test_hub import TELL, asking
from tests.loader.test_model import PRINT_PATH, TINY, environment
from tests.rigs import fault_server, http_served, refusals
from tests.rigs.fault_server import FaultServer
from tests.rigs.heard import heard
from tests.rigs.http_served import Answer, Request
from tests.rigs.hub import COMMIT, Hub, serving
from tests.rigs.waiting import until


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client of this process keeps files in the test's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_hub_out_of_reach_is_one_error_without_the_clients_own_lines(tmp_path: Path) -> None:
    environ = environment(Hub(url="http://127.0.0.1:9"), tmp_path)
    done = heard([sys.executable, "-c", TELL], env=environ)
    assert "HUB_UNREACHABLE: cannot fetch me/model/" in done.stderr
    assert "check the network and try again" in done.stderr
    for odd in ("Retrying", "XET", "Xet"):
        assert odd not in done.stderr


def test_redirect_that_the_loader_would_not_follow_is_not_followed_by_the_hubs_client() -> None:
    asked = []

    def answer(request: Request) -> Answer:
        asked.append(request.path)
        place = request.headers["Host"].replace("127.0.0.1", "localhost")
        return Answer(302, None, {"Location": f"http://{place}/admin"})

    with http_served.serving(answer) as url:
        for named in ({}, {"gguf_repo_id": "me/model:Q4_K_M", "gguf_filename": None}):
            with refusals.refused("HUB_UNUSABLE", match="to 'http://localhost:.*is not https"):
                hub_module.size(model.named(asking(url, **named)))
    assert asked == ["/me/model/resolve/main/m.gguf", "/api/models/me/model"]


def test_hub_that_answers_byte_by_byte_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread stays behind that continues to read."""
    monkeypatch.setattr(client, "_ANSWERED", 0.5)
    before = set(threading.enumerate())
    with FaultServer() as server:
        for path in ("/me/model/resolve/main/m.gguf", "/api/models/me/model"):
            server.put(path, b"[]")
            server.fail(path, fault_server.drips_head(1, 0.1), always=True)
        for named in ({}, {"gguf_repo_id": "me/model:Q4_K_M", "gguf_filename": None}):
            with refusals.refused("HUB_UNREACHABLE", match="no whole answer within 0.5 s"):
                hub_module.size(model.named(asking(server.url, **named)))

        def left() -> list[str]:
            names = [one.name for one in {*threading.enumerate()} - before]
            return [name for name in names if "_run" in name]

        until(lambda: not left(), lambda: f"{left()} still read")


@dataclass
class Turncoat(Hub):
    """Names files as a Hub does when it is asked first, and then as ``then`` says."""

    then: dict[str, str | None] = field(default_factory=dict)
    refuses_then: bool = False
    status_then: int = 0
    asked: list[Request] = field(default_factory=list)

    def answer(self, asked: Request) -> Answer:
        self.asked.append(asked)
        if [one.method for one in self.asked].count("HEAD") > 1:
            self.changed = self.then
            self.files = {} if self.refuses_then else self.files
            if self.status_then:
                return Answer(self.status_then, None, self.then)
        return super().answer(asked)


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit", "404"])
def test_hub_that_names_a_path_when_its_own_client_asks_is_refused(
    tmp_path: Path, header: str
) -> None:
    """The client would write there, outside the cache, what the Hub sends."""
    path = f"{tmp_path}/code.py"
    named = {"ETag": f'W/"{path}"', "X-Linked-Etag": f'"{path}"'}.get(header, path)
    then = {header: named} if header != "404" else {"X-Repo-Commit": path}
    served = Turncoat(files={"m.gguf": TINY}, then=then, refuses_then=header == "404")
    with serving(served), refusals.refused("HUB_UNUSABLE", match=path[:40]):
        model.get(asking(served.url, tmp_path))
    assert not [*tmp_path.rglob("code.py"), *tmp_path.rglob("snapshots/*")]


@pytest.mark.parametrize(
    ("xet", "then"),
    [
        ("", {"ETag": '"other"'}),
        ("", {"X-Repo-Commit": "d" * 40}),
        ("", {"X-Linked-Size": "7"}),
        ("http://127.0.0.1:9", {"X-Xet-Hash": None}),
        ("http://127.0.0.1:9", {"X-Xet-Hash": "b" * 64}),
        ("http://127.0.0.1:9", {}),
    ],
)
def test_hub_that_names_another_file_when_its_own_client_asks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xet: str, then: dict[str, str | None]
) -> None:
    """The client would fetch it itself: without a digest, a least rate, or an end."""
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: bool(then))
    served = Turncoat(files={"m.gguf": TINY}, then=then, xet=xet)
    with serving(served), refusals.refused("HUB_UNUSABLE", match="then" if then else "neither"):
        model.get(asking(served.url, tmp_path))
    assert len(served.bodies) == (not xet)
    assert not [*tmp_path.rglob("snapshots/*/*.gguf")]


def test_hub_that_asks_its_client_to_come_again_in_years_is_asked_within_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    for then in ({"Retry-After": "9" * 30}, {"RateLimit": f'"api";r=0;t={"9" * 400}'}):
        served = Turncoat(files={"m.gguf": TINY}, then={**then}, status_then=429)
        with serving(served), refusals.refused("HUB_UNREACHABLE"):
            model.get(asking(served.url, tmp_path / str(len(slept))))
    assert set(slept) == {61.0}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10s", "'10s'"),
        ("TQDM_MININTERVAL", "often", "a variable that huggingface_hub reads"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "socks"),
    ],
)
def test_client_of_the_hub_that_cannot_be_used_is_a_finding_and_no_defect(
    tmp_path: Path, variable: str, value: str, words: str
) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), variable: value}
    argv = [sys.executable, "-m", "llama_loader", "doctor", "--url", "file:///nowhere/x.tar.gz"]
    here = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = heard(argv, cwd=PROJECT / "spaces", env={**environ, **here})
    assert done.stderr.count("\n") == 2  # the first failure, with its hint
    (line,) = (line for line in done.stdout.splitlines() if "FAIL model: " in line)
    assert words in line.lower()
    assert "verdict: a model cannot be served" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("version", "told"), [("1.0.1", "HUB_CLIENT_MISSING"), ("1.1.0", COMMIT)])
def test_oldest_client_of_the_hub_fetches_and_one_before_it_is_refused(
    tmp_path: Path, version: str, told: str
) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv is not None
    install = (uv, "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "client")
    subprocess.run([*install, f"huggingface_hub=={version}"], check=True)
    with serving(Hub(files={"sub/m.gguf": TINY})) as hub:
        path = f"{tmp_path / 'client'}:{PROJECT / 'spaces'}"
        environ = environment(hub, tmp_path) | {"PYTHONPATH": path}
        done = heard([sys.executable, "-c", PRINT_PATH], env=environ)
    assert told in done.stdout + done.stderr
