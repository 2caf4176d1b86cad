"""moto's S3 server as a process of a test's own, from packages of its own.

It brings sixty of them, so they are locked beside this file (``nox -s lock``) and come into a
folder of the test's, not into the development environment.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import requests
import server_process

from llama_loader.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK: Final = Path(__file__).with_name("s3_server.lock")
_HOST: Final = "127.0.0.1"
_NAMES: Final = {"s3": "http://s3.amazonaws.com/doc/2006-03-01/"}


@dataclass(frozen=True)
class S3Server:
    """Listens on loopback; takes plain requests, as a bucket whose policy allows them."""

    port: int

    def bucket(self, name: str, *, readable: bool = True) -> str:
        """Make a bucket that takes plain requests; returns its address in ccache's words."""
        where = f"http://{_HOST}:{self.port}/{name}"
        actions = ["s3:PutObject", "s3:DeleteObject", *(["s3:GetObject"] if readable else [])]
        allowed = {"Effect": "Allow", "Principal": "*", "Action": actions}
        statement = allowed | {"Resource": f"arn:aws:s3:::{name}/*"}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        requests.put(where, timeout=30).raise_for_status()
        requests.put(f"{where}?policy", json=policy, timeout=30).raise_for_status()
        return self.address(name)

    def address(self, name: str) -> str:
        """Return the address in ccache's words of a bucket that may not be there."""
        return f"http://{_HOST}:{self.port}/{name}/objects/"

    def keys(self, name: str) -> list[str]:
        """List a bucket, in S3's own way."""
        answer = requests.get(f"http://{_HOST}:{self.port}/{name}?list-type=2", timeout=30)
        found = ET.fromstring(answer.content).iterfind("s3:Contents/s3:Key", _NAMES)
        return [key.text or "" for key in found]


@contextmanager
def serving(folder: Path) -> Iterator[S3Server]:
    """Bring the server's packages into ``folder`` and serve on a free port."""
    packages = folder / "s3_server"
    uv = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes")
    where = ("--python", sys.executable, "--target", str(packages), "-r", str(LOCK))
    subprocess.run([*uv, *where], check=True)
    port = free_port()
    server = [sys.executable, "-m", "moto.server", "--host", _HOST, "--port", str(port)]
    log, environment = folder / "s3_server.log", {"PYTHONPATH": str(packages)}
    with server_process.running(server, (_HOST, port), log, environment):
        yield S3Server(port)
