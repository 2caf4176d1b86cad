"""Who can use a real server that ``serve`` started: its caller, and no other."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from verbs import PROJECT

pytestmark = pytest.mark.model

ELSEWHERE = "https://evil.example"
LOCAL = "http://localhost:3000"
ALLOWED = "Access-Control-Allow-Origin"
PATHS = ("/v1/models", "/props", "/slots", "/v1/completions", "/tokenize", "/metrics", "/models")


@contextmanager
def serving(manifest: str, model: Path, store: Path, *options: str) -> Iterator[dict[str, Any]]:
    """What ``serve --json`` says of a server that runs meanwhile."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "llama_loader", "serve", "--manifest", manifest, "--json"),
            *("--allow-cpu", "--store", str(store), "--model", str(model), *options),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT / "spaces")},
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def ask(
    told: dict[str, Any], path: str, *, key: str | None = None, method: str = "GET", **headers: str
) -> tuple[int, str | None, bytes]:
    """Return the status of a request, whom its answer may be shown to, and the answer."""
    connection = http.client.HTTPConnection(told["url"].removeprefix("http://"), timeout=60)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    headers["Content-Type"] = "application/json"
    body = '{"prompt": "1", "max_tokens": 1}' if path.endswith("completions") else None
    connection.request("POST" if body else method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.getheader(ALLOWED), answer.read()
    connection.close()
    return found


def test_real_server_answers_no_other_origin_and_no_foreign_host_without_the_key(
    real_manifest: str, real_model: Path, tmp_path: Path
) -> None:
    with serving(real_manifest, real_model, tmp_path) as told:
        key = told["api_key"]
        for headers in ({}, {"Host": "evil.example"}, {"Origin": ELSEWHERE}, {"Origin": LOCAL}):
            for path in PATHS:
                status, _, answer = ask(told, path, **headers)
                assert status == 401, (path, headers)
                assert b"SmolLM" not in answer
            assert ask(told, "/props", key="another", **headers)[0] == 401
            assert ask(told, "/v1/completions", key=key, **headers)[0] == 200
        assert json.loads(ask(told, "/health")[2]) == {"status": "ok"}
        assert ask(told, "/")[0] == 404  # no web page of its own
        for method, key_of_request in (("GET", key), ("GET", None), ("OPTIONS", None)):
            for origin, shown_to in ((ELSEWHERE, None), ("null", None), (LOCAL, LOCAL)):
                found = ask(told, "/v1/models", key=key_of_request, method=method, Origin=origin)
                assert found[1] == shown_to, (method, origin)


def test_real_server_with_no_key_shows_nothing_to_the_page_of_another_origin(
    real_manifest: str, real_model: Path, tmp_path: Path
) -> None:
    """What ``SERVER_OPEN`` says: other users and, by DNS rebinding, web pages can still use it."""
    with serving(real_manifest, real_model, tmp_path, "--no-key") as told:
        assert told["api_key"] is None
        assert ask(told, "/v1/models", Origin=ELSEWHERE)[:2] == (200, None)
        assert ask(told, "/v1/completions", Host="evil.example")[0] == 200


def test_person_s_arguments_let_another_origin_in(
    real_manifest: str, real_model: Path, tmp_path: Path
) -> None:
    options = ("--", "--cors-origins", ELSEWHERE)
    with serving(real_manifest, real_model, tmp_path, *options) as told:
        found = ask(told, "/v1/models", key=told["api_key"], Origin=ELSEWHERE)
        assert found[:2] == (200, ELSEWHERE)
        assert ask(told, "/v1/models", Origin=ELSEWHERE)[0] == 401
