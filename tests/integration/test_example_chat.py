"""``examples/chat`` as a person starts it: a copy of its folder, the wheel in a clean venv."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import http_served
import pytest
import requests
import space
from gradio_client import Client
from gradio_client.exceptions import AppError
from http_served import Answer, Request
from verbs import PROJECT
from zerogpu import Emulator

from farm import loader

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = PROJECT / "examples/chat"
SDK = ("gradio", "spaces", "huggingface_hub")
"""What the Hub installs into every Gradio Space; the lock says which versions."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example's folder, and ``venv`` beside it with the wheel and the SDK alone."""
    root = tmp_path_factory.mktemp("chat")
    shutil.copytree(EXAMPLE, root / "app", ignore=shutil.ignore_patterns("__pycache__"))
    built = loader.build_wheel(root)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv is not None
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, root / "venv"], check=True)
    python = root / "venv/bin/python"
    constraints = ("--constraint", str(PROJECT / "requirements-dev.lock"))
    install = (uv, "pip", "install", "--quiet", "--python", python, *constraints)
    subprocess.run([*install, built, *SDK], check=True)
    return root


@pytest.fixture(scope="module")
def settings(real_manifest: str, real_model: Path) -> dict[str, str]:
    """What the example's README tells a person to set."""
    pinned = space.pinned(real_manifest)
    return {
        "LLAMA_SPACE_LLAMA_CPP_MANIFEST_URL": pinned["llama_cpp_manifest_url"],
        "LLAMA_SPACE_LLAMA_CPP_MANIFEST_SHA256": pinned["llama_cpp_manifest_sha256"],
        "LLAMA_SPACE_ALLOW_CPU": "1",
        "LLAMA_SPACE_GGUF_PATH": str(real_model),
        "LLAMA_SPACE_MAX_NEW_TOKENS": "24",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }


@pytest.fixture(params=["own machine", "ZeroGPU"])
def served(
    request: pytest.FixtureRequest, folder: Path, settings: dict[str, str], tmp_path: Path
) -> Iterator[space.Space]:
    """The app on the CPU of this machine, and as ZeroGPU starts it, with real workers."""
    python, root = str(folder / "venv/bin/python"), folder / "app"
    home = tmp_path / "home"
    if request.param == "own machine":
        with space.serving(home, python=python, root=root, **settings) as app:
            yield app
        return
    with Emulator() as emulator:
        environment = settings | emulator.environment
        with space.serving(home, python=python, root=root, **environment) as app:
            yield app
            assert emulator.await_free()


def test_example_is_ten_lines_of_code_in_twenty() -> None:
    assert len((EXAMPLE / "app.py").read_text().splitlines()) <= 20


def test_example_tells_a_visitor_one_sentence_and_the_log_the_error(
    folder: Path, tmp_path: Path
) -> None:
    python, root = str(folder / "venv/bin/python"), folder / "app"
    with space.serving(tmp_path / "home", python=python, root=root) as app:
        with pytest.raises(AppError) as caught:
            Client(app.url, verbose=False).predict("Hello", api_name="/respond")
        assert "the owner must correct this app" in str(caught.value)
        assert "release.json" not in str(caught.value)
        assert "RELEASE_NOT_CHOSEN: no release to run is named" in app.said()


def test_example_keeps_no_file_of_a_visitor_and_answers_no_endless_text(
    folder: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    kept = tmp_path / "uploads"
    python, root = str(folder / "venv/bin/python"), folder / "app"
    environment = {**settings, "GRADIO_TEMP_DIR": str(kept)}
    asked: list[str] = []

    def answer(request: Request) -> Answer:
        asked.append(request.path)
        return Answer(200, b"<script>alert(document.domain)</script>")

    with (
        http_served.serving(answer) as stranger,
        space.serving(tmp_path / "home", python=python, root=root, **environment) as app,
    ):
        api = f"{app.url}/gradio_api"
        files = {"files": ("visitors.bin", b"x" * 3_000_000)}
        assert requests.post(f"{api}/upload", files=files, timeout=60).status_code == 404
        assert requests.get(f"{api}/file={stranger}/x", timeout=60).status_code == 404
        file = {"path": f"{stranger}/x", "meta": {"_type": "gradio.FileData"}}
        message = {"role": "user", "content": [{"type": "file", "file": file}]}
        saved = {"data": [None, [message]], "fn_index": 1, "session_hash": "s"}
        answers = [
            requests.post(f"{api}/call/respond", json={"data": [file]}, timeout=60),
            requests.post(f"{api}/queue/join", json=saved, timeout=60),
        ]
        assert [one.status_code for one in answers] == [400, 400]
        assert asked == []
        assert not [path for path in kept.rglob("*") if path.is_file()]
        with pytest.raises(AppError, match="too long"):
            Client(app.url, verbose=False).predict("x" * 20_000, api_name="/respond")
        assert "Traceback" not in app.said()


def test_chat_streams_an_answer_and_sends_the_turns_before(served: space.Space) -> None:
    question = "What is my name?"
    job = Client(served.url, verbose=False).submit(question, api_name="/respond")
    alone = job.result(timeout=180)
    assert alone, served.said()
    assert len(job.outputs()) > 3
    # the likeliest words are the same every time: only what was said before can change them
    other = Client(served.url, verbose=False)
    other.predict("My name is Zebulon.", api_name="/respond")
    assert other.predict(question, api_name="/respond") != alone
    assert "Traceback" not in served.said()
