"""A tiny runtime that starts in milliseconds, and another user's process that tries to swap it.

The program answers as much of llama-server's HTTP API as a start needs. It is linked with one
library and loads another as a plugin, as llama-server does. What the attacker puts in their place
leaves a file in ``proof`` as soon as one instruction of it is executed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from unittest.mock import patch

from llama_loader import loader, self_test, server, settings
from llama_loader.errors import LoaderError
from llama_loader.server import Server
from tests.rigs import archives

OTHER_USER: Final = 65534
"""The attacker's user id: nobody."""
SITUATIONS: Final = ("private", "sticky", "opened", "above")
"""Where the runtime lies when it is attacked.

``private``: only its user may write there. ``sticky``: in a folder like /tmp. ``opened``: its user
made all its files writable for everybody, and the attacker opened them then. ``above``: its user
made the folder above the store writable for everybody after the runtime was prepared.
"""

_SERVER: Final = r"""
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int linked(void);

static void answer(int client) {
    static char request[65536];
    size_t got = 0;
    char *end = NULL;
    while (got < sizeof request - 1) {
        ssize_t some = read(client, request + got, sizeof request - 1 - got);
        if (some <= 0) return;
        got += some;
        request[got] = 0;
        end = strstr(request, "\r\n\r\n");
        char *length = strstr(request, "Content-Length: ");
        if (end && got >= (size_t)(end + 4 - request) + (length ? atoi(length + 16) : 0)) break;
    }
    const char *body = "{\"choices\": [{\"text\": \"!\", \"finish_reason\": \"length\"}]}";
    dprintf(client, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n%s",
            strlen(body), body);
}

int main(int count, char **words) {
    char plugin[4096];
    ssize_t length = readlink("/proc/self/exe", plugin, sizeof plugin - 32);
    plugin[length] = 0;
    strcpy(strrchr(plugin, '/'), "/libggml-plugin.so");
    if (!dlopen(plugin, RTLD_NOW) || !linked()) return 3;
    int port = 0, one = 1, shared = SO_REUSEADDR;
    for (int at = 1; at < count; at++) {
        if (!strcmp(words[at], "--list-devices")) return puts("Available devices:\n  (none)") < 0;
        if (!strcmp(words[at], "--port") && at + 1 < count) port = atoi(words[at + 1]);
        if (!strcmp(words[at], "--reuse-port")) shared = SO_REUSEPORT;
    }
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(port)};
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(server, SOL_SOCKET, shared, &one, sizeof one);
    if (bind(server, (struct sockaddr *)&place, sizeof place) || listen(server, 16)) return 4;
    for (;;) {
        int client = accept(server, NULL, NULL);
        if (client >= 0) { answer(client); close(client); }
    }
}
"""
_LIBRARY: Final = "int linked(void) { return 1; }\n"
_EVIL: Final = r"""
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void proof(void) {
    close(open(PROOF, O_WRONLY | O_CREAT, 0666));
}
int linked(void) { return 1; }
int main(void) { return 5; }
"""


@dataclass(frozen=True)
class Payload:
    """What the attacker wants to have executed, and the folder where that would show."""

    program: Path
    library: Path
    proof: Path

    def executed(self) -> bool:
        """Return whether one instruction of it was executed."""
        return any(self.proof.iterdir())


def _compiled(place: Path, source: str, *options: str) -> Path:
    text = place.with_name(f"{place.name}.c")
    text.write_text(source)
    command = ["gcc", "-O1", *options[:1], "-o", str(place), str(text), *options[1:]]
    subprocess.run(command, check=True, capture_output=True)
    return place


def release(folder: Path, *, padding: int = 0) -> str:
    """Make a release of the tiny runtime, its plugin so much longer; returns its manifest's URL."""
    folder.mkdir()
    library = _compiled(folder / "liblinked.so", _LIBRARY, "-shared", "-fPIC")
    plugin = Path(shutil.copy2(library, folder / "libggml-plugin.so"))
    os.truncate(plugin, plugin.stat().st_size + padding)
    rpath = ("-Wl,-rpath,$ORIGIN", "-ldl")
    program = _compiled(folder / "llama-server", _SERVER, "-pie", str(library), *rpath)
    entries = [
        archives.Entry(
            f"runtime/{path.name}", path.read_bytes(), 0o755 if path == program else 0o644
        )
        for path in (program, library, plugin)
    ]
    packed = archives.compress(archives.tar(entries))
    artifact = archives.describe(packed, entries, chunk_size=4 << 20)
    (folder / artifact.name).write_bytes(packed)
    (folder / "manifest.json").write_bytes(archives.manifest(artifact))
    return (folder / "manifest.json").as_uri()


def payload(folder: Path) -> Payload:
    """Compile what leaves a proof where it is executed; all users may read it and write there."""
    folder.mkdir()
    proof = folder / "proof"
    for place in (proof, folder / "staged"):
        place.mkdir()
        place.chmod(0o777)
    define = f'-DPROOF="{proof}/executed"'
    program = _compiled(folder / "evil", _EVIL, "-pie", define)
    library = _compiled(folder / "evil.so", _EVIL, "-shared", "-fPIC", define)
    return Payload(program, library, proof)


class Attacker:
    """A process of another user that tries to swap what is below a folder, until it is ended.

    Its first attempts, to open the files for writing, were made when it has started.
    """

    def __init__(self, target: Path, payload: Payload) -> None:
        script = Path(__file__).with_name("swap_attacker.py")
        told = (OTHER_USER, target, payload.program, payload.library, payload.proof)
        self._process = subprocess.Popen(
            [sys.executable, str(script), *map(str, told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def end(self) -> dict[str, Counter[str]]:
        """End it; return what it tried and what succeeded, by the way."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        counts = {name: Counter(found) for name, found in self._answer().items()}
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return counts

    def _answer(self) -> dict[str, dict[str, int]]:
        assert self._process.stdout is not None
        found: dict[str, dict[str, int]] = json.loads(self._process.stdout.readline())
        return found


@contextmanager
def open_to_all() -> Iterator[Path]:
    """Give a temporary folder that every user may look into, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="swap-attack-") as place:
        Path(place).chmod(0o755)
        yield Path(place)


@dataclass
class Total:
    """What came of an attack."""

    executions: int = 0  # of the runtime
    refused: Counter[str] = field(default_factory=Counter)  # by the error's code
    tried: Counter[str] = field(default_factory=Counter)  # by the attacker's way
    succeeded: Counter[str] = field(default_factory=Counter)  # what the system allowed

    def add(self, other: Total) -> None:
        """Add another attack's figures."""
        self.executions += other.executions
        self.refused += other.refused
        self.tried += other.tried
        self.succeeded += other.succeeded


class Victim:
    """An installed runtime, as the loader starts it again and again."""

    def __init__(self, manifest: str, store: Path, model: Path = self_test.MODEL) -> None:
        given = {"manifest_url": manifest, "store": str(store), "allow_cpu": "1"}
        self.settings = settings.load(given)
        self.prepared = loader.prepare(self.settings)
        self.plan = loader.plan_server(self.settings, self.prepared, model)
        self.total = Total()

    @property
    def root(self) -> Path:
        """The runtime's folder in the store."""
        return self.prepared.installed.root

    def round(self, listings: int = 1) -> None:
        """Ask it for its devices so often, start it, and start it again after it was killed."""
        keeper = Server(self.plan, before=self.prepared.require_sound)
        for _ in range(listings):
            self._execute(lambda: loader.list_devices(self.settings, self.prepared))
        try:
            if self._execute(keeper.keep):
                os.kill(keeper.pid or 0, signal.SIGKILL)
                keeper.wait(5)
                self._execute(keeper.ensure)
        finally:
            keeper.stop()

    def _execute(self, act: Callable[[], object]) -> bool:
        try:
            act()
        except LoaderError as error:
            self.total.refused[error.code] += 1
            return False
        self.total.executions += 1
        return True


def prepare_for(situation: str, victim: Victim) -> None:
    """Do what its user did before the attack."""
    above = victim.root.parents[2]
    if situation == "sticky":
        above.chmod(0o1777)
    elif situation == "opened":
        for path in (victim.root, *victim.root.rglob("*")):
            path.chmod(0o777)
    elif situation == "above":
        above.chmod(0o777)


def attack(
    manifest: str,
    above: Path,
    payload: Payload,
    situation: str,
    rounds: int = 2,
    listings: int = 1,
    model: Path = self_test.MODEL,
) -> Total:
    """Install a release in a store in the folder ``above``, and attack while it is executed."""
    victim = Victim(manifest, above / "store", model)
    prepare_for(situation, victim)
    attacker = Attacker(victim.root, payload)
    try:
        for _ in range(rounds):
            victim.round(listings)
    finally:
        counts = attacker.end()
    victim.total.tried, victim.total.succeeded = counts["tried"], counts["succeeded"]
    return victim.total


@contextmanager
def without_pauses() -> Iterator[None]:
    """Let a server be started anew at once."""
    with patch.object(server, "_PAUSE", 0.0):
        yield
