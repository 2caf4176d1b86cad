"""The errors on a machine without a Docker engine, and that no connection stays open."""

import gc
import hashlib
import json
import re
import sys
import warnings
from contextlib import closing
from itertools import repeat
from pathlib import Path

import psutil
import pytest
import urllib3

from farm.engines.docker import connection
from farm.engines.docker.connection import connect
from farm.errors import EngineError
from farm.inputs import packages
from tests.rigs.heard import script
from tests.rigs.http_served import Answer, Request, serving
from tests.rigs.refusals import refused


@pytest.mark.parametrize("listener", ["nothing", "a file"])
def test_no_engine_is_one_error_and_leaves_no_socket(
    listener: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "docker.sock"
    if listener == "a file":
        place.touch()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with refused("ENGINE_NOT_RUNNING", EngineError, hint="a build needs none with"):
            connect()
        gc.collect()
    assert [one for one in caught if one.category is ResourceWarning] == []


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with Docker's configuration, and no variable of Docker's."""
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".docker"
    folder.mkdir()
    for name in ("colima", "other"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        meta = folder / "contexts" / "meta" / digest / "meta.json"
        meta.parent.mkdir(parents=True)
        endpoint = {"Host": f"unix://{tmp_path}/{name}.sock", "SkipTLSVerify": False}
        meta.write_text(json.dumps({"Name": name, "Endpoints": {"docker": endpoint}}))
    (folder / "config.json").write_text(json.dumps({"currentContext": "colima", "auths": {}}))
    return folder


def test_the_current_context_is_asked_and_its_address_is_named(config: Path) -> None:
    told = f"{config.parent}/colima.sock (context 'colima', the current context)"
    with refused("ENGINE_NOT_RUNNING", EngineError, re.escape(f"at unix://{told}: ")):
        connect()


def test_variables_come_before_the_current_context(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONTEXT", "other")
    assert connection.find().url.endswith("/other.sock")
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    assert str(connection.find()) == "unix:///var/run/docker.sock (Docker's usual socket)"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{config}/own.sock")
    assert str(connection.find()) == f"unix://{config}/own.sock (DOCKER_HOST)"


def test_without_variables_and_contexts_it_is_the_usual_socket(config: Path) -> None:
    (config / "config.json").unlink()
    assert connection.find().named_by == "Docker's usual socket"


@pytest.mark.parametrize(
    "damage",
    ["no such context", "no name", "config is no JSON", "config is a list", "meta is no JSON"],
)
def test_a_context_that_cannot_be_read_is_one_error_that_names_it(
    damage: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "no such context":
        monkeypatch.setenv("DOCKER_CONTEXT", "gone")
    elif damage == "no name":
        monkeypatch.setenv("DOCKER_CONTEXT", "gone\udcff")
    elif damage == "config is no JSON":
        (config / "config.json").write_text("{")
    elif damage == "config is a list":
        (config / "config.json").write_text("[]")
        monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    else:
        for meta in config.rglob("meta.json"):
            meta.write_text("[]")
    with refused("ENGINE_CONTEXT_INVALID", EngineError, r"gone|\.json"):
        connect()


def test_a_context_brings_its_certificates(config: Path) -> None:
    digest = hashlib.sha256(b"colima").hexdigest()
    folder = config / "contexts" / "tls" / digest / "docker"
    folder.mkdir(parents=True)
    for name in ("ca", "cert", "key"):
        (folder / f"{name}.pem").touch()
    tls = connection.find().tls
    assert tls is not None
    assert tls.ca_cert == str(folder / "ca.pem")
    assert tls.cert == (str(folder / "cert.pem"), str(folder / "key.pem"))


def _ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    script(folder / "ssh", f"#!{sys.executable}\n{text}")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("DOCKER_HOST", "ssh://me@builder.example:2222")


_FORWARDING = """
import os, socket, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import UnixStreamServer
import threading
open(sys.argv[0] + ".said", "w").write(" ".join(sys.argv[1:]))
class Engine(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"ApiVersion": "1.41"}' if "version" in self.path else b"OK"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def address_string(self):
        return ""
here = sys.argv[sys.argv.index("-L") + 1].split(":")[0]
server = UnixStreamServer(here, Engine)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
open(sys.argv[0] + ".ended", "w").close()
"""


def test_an_engine_behind_ssh_is_reached_with_the_systems_ssh_which_ends_with_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ssh(tmp_path, monkeypatch, _FORWARDING)
    before = psutil.Process().children()  # the tests' own build of a release, for one
    with closing(connect()) as client:
        assert client.ping()
        (forwarding,) = (one for one in psutil.Process().children() if one not in before)
    said = (tmp_path / "ssh.said").read_text()
    assert "-p2222 -l me -L " in said
    assert said.endswith(":/var/run/docker.sock -- builder.example cat")
    assert not forwarding.is_running()


def test_an_ssh_that_cannot_log_in_is_one_error_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ssh(tmp_path, monkeypatch, "import sys\nsys.exit('Permission denied (publickey).')\n")
    words = r"ssh://me@builder\.example:2222(.|\n)*Permission denied \(publickey\)\."
    with refused("ENGINE_NOT_RUNNING", EngineError, words):
        connect()


def test_a_machine_without_ssh_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "ssh://builder.example")
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("ENGINE_SSH_MISSING", EngineError, hint="openssh-client"):
        connect()


@pytest.mark.parametrize("url", ["tcp://1.2.3.4:notaport", "tcp://127.0.0.1:99999", "tcp://["])
def test_an_address_that_is_none_is_one_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", url)
    with pytest.raises(EngineError) as caught:
        connect()
    assert caught.value.code in {"ENGINE_ADDRESS_INVALID", "ENGINE_NOT_RUNNING"}
    assert "DOCKER_HOST" in caught.value.render()


def test_answer_of_a_hostile_engine_is_read_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_LARGEST", 1 << 20)

    def answer(asked: Request) -> Answer:
        if asked.path.endswith("/info"):
            return Answer(200, repeat(b"[" * 65536))
        return Answer(200, {"ApiVersion": "1.41"} if asked.path == "/version" else b"OK")

    with serving(answer) as url:
        monkeypatch.setenv("DOCKER_HOST", url.replace("http:", "tcp:"))
        with (
            closing(connect()) as client,
            refused("ENGINE_FAILED", EngineError, "than 1 MiB"),
            connection.engine_errors("ENGINE_FAILED", "x"),
        ):
            client.info()


def test_a_stream_of_the_engine_that_breaks_off_is_one_error() -> None:
    with (
        pytest.raises(EngineError, match=r"image x: .*Connection broken") as failed,
        connection.engine_errors("ENGINE_FAILED", "image x"),
    ):
        raise urllib3.exceptions.ProtocolError("Connection broken: IncompleteRead(0 bytes read)")
    assert failed.value.hint == "is the Docker engine still running?"
