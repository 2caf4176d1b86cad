"""Commands of the guides, run as they stand there, with a real release and local servers.

What is replaced is only what the reader replaces, too: ``OWNER/REPO``, ``https://…``, ``/srv``.
``tests/docs/test_documented_commands.py`` says which command is run where.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import documented
import hub_repository
import pytest
from rich.console import Console
from verbs import PROJECT

from farm import demo
from farm.inputs import pins
from farm.options import BuildRequest
from farm.pack import Packed
from farm.terminal import progress as report
from tests.rigs.heard import heard

pytestmark = [pytest.mark.docker, pytest.mark.model]
RELEASE = "b11549-1"
"""What the guides call theirs."""


@dataclass
class Reader:
    """A person who types commands in a checkout that has a release in ``dist/``."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def types(self, text: str, *, page: str, of: Path | None = None) -> str:
        """Run a command that stands on a page; returns what it printed."""
        return self.run(self.filled_in(text, page), of=of)

    def filled_in(self, text: str, page: str) -> str:
        """Return the one command of a page that has this in it, with what a reader replaces."""
        found = {one.text for one in documented.commands(page)}
        (text,) = {text} & found or {one for one in found if text in one}
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text

    def run(self, text: str, *, of: Path | None = None) -> str:
        done = heard(
            ["bash", "-c", text], cwd=of or self.folder, env=self.environment(), timeout=250
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, **self.variables}


@pytest.fixture(scope="module")
def reader(
    real_manifest: str, real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reader:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("farm", "spaces", "build", "tasks.py"):
        source = PROJECT / name
        ignored = shutil.ignore_patterns("__pycache__", "release.json")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder)
    release = Path(real_manifest.removeprefix("file://")).parent
    shutil.copytree(release, folder / "dist")
    cache = folder / "cache" / "llama-server-farm" / "models"
    place = cache / pins.load().model("smollm2").member_sha256 / real_model.name
    place.parent.mkdir(parents=True)
    place.symlink_to(real_model)
    (folder / "model.gguf").symlink_to(real_model)
    here = Reader(folder, {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"})
    here.run(f"invoke manifest --out dist --release {RELEASE}")
    return here


@pytest.fixture
def hub(reader: Reader) -> Iterator[hub_repository.Hub]:
    with hub_repository.Hub().serve() as served:
        reader.variables.update(HF_TOKEN=hub_repository.TOKEN, HF_ENDPOINT=served.url)
        reader.replaced = {"OWNER/REPO": "owner/name", "OWNER/SPACE": "owner/space"}
        yield served


def test_the_guide_to_publishing_command_by_command(
    reader: Reader, hub: hub_repository.Hub
) -> None:
    page = "docs/publishing.md"
    # its release has the CPU's set alone, which other hardware is refused
    reader.replaced["--model 4b"] = "--model 4b --hardware cpu-basic"
    commands = [one.text for one in documented.commands(page)]
    first = [text for text in commands if "rollback" not in text and "status" not in text]
    said = {}
    for text in first:
        said[text] = reader.types(text, page=page)
        if "keygen" in text:
            key = said[text].rpartition("public key: ")[2].strip()
            reader.replaced["RW…"] = key
            # the Space's guide follows a channel that has had two releases
            reader.run("cp -r dist before && invoke manifest --out before --release b11549-0")
            gated = reader.run("invoke gate --folder before")
            assert (gated.count("\nok "), "FAILED" in gated) == (3, False), gated
            assert "The capital of France is Paris" in gated
            sent = reader.run("invoke publish --folder before --to hf:owner/name")
            assert "hf://owner/name@b11549-0/b11549-0/manifest.json" in sent
            channel = "--channel stable --to hf:owner/name --key farm.key"
            reader.run(f"invoke promote b11549-0 {channel}")
    repository = hub.repositories["owner/name"]
    assert repository.tags.keys() == {RELEASE, "b11549-0"}
    space = hub.repositories["owner/space"]
    assert space.variables["YAKULINGO_SPACES_N_CTX"] == "4096"
    assert "4b" in space.variables["YAKULINGO_SPACES_GGUF_REPO_ID"]
    assert json.loads(space.commits[-1]["release.json"])["manifest_sha256"]
    pin = json.loads((reader.folder / "spaces" / "release.json").read_bytes())
    assert (pin["min_serial"], pin["public_key"]) == (2, key)
    for text in commands:
        if text not in first:
            said[text] = reader.types(text, page=page)
    assert said.keys() == set(commands)
    follows = next(text for text in commands if "llama_loader fetch" in text)
    (installed,) = said[follows].splitlines()  # without a warning that it is not pinned
    assert (Path(installed) / "llama-server").is_file()
    back = next(text for text in commands if "rollback" in text)
    assert "channel stable → b11549-0 (before: b11549-1), serial 3" in said[back]
    assert "stable" in said[commands[-1]]
    secret = (reader.folder / "farm.key").read_text().splitlines()[-1]
    assert all(secret not in text and hub_repository.TOKEN not in text for text in said.values())


def test_the_builder_s_and_the_ci_owner_s_commands_after_a_build(
    reader: Reader, hub: hub_repository.Hub, tmp_path: Path
) -> None:
    building, ci, readme = "docs/building.md", "docs/ci.md", "README.md"
    reader.replaced["/srv/releases"] = str(tmp_path / "releases")
    assert "zerogpu" in reader.types("invoke targets", page=readme)
    assert '"include"' in reader.types("invoke targets --json", page=ci)
    for text, page in (
        ("invoke manifest --out dist", building),
        ("invoke manifest --out dist --release b11549-1", ci),
    ):
        assert "dist/manifest.json: b11549-1, artifacts: 1" in reader.types(text, page=page)
    assert "ok llama-server-" in reader.types("invoke verify dist", page=building)
    assert "answers on the CPU" in reader.types("invoke smoke dist", page=building)
    assert "no CUDA" in reader.types("invoke status --folder dist", page=building)
    reader.run("invoke gate --folder dist && invoke keygen --out other.key")
    reader.variables["FARM_SIGNING_KEY"] = (reader.folder / "other.key").read_text()
    for text, page in (
        ("invoke publish --to hf:OWNER/REPO", readme),
        ("invoke promote b11549-1 --channel stable --to hf:OWNER/REPO", readme),
        ("invoke publish --to /srv/releases", ci),
        ("invoke promote b11549-1 --channel candidate --to /srv/releases", ci),
    ):
        reader.types(text, page=page)
    assert "channels/stable/1.json" in hub.repositories["owner/name"].commits[-1]
    channel = tmp_path / "releases" / "channels" / "candidate"
    assert (channel / "manifest.json.minisig").is_file()


def test_the_space_owner_s_commands(reader: Reader, tmp_path: Path) -> None:
    spaces = reader.folder / "spaces"
    (spaces / "release.json").unlink(missing_ok=True)
    store = {"HF_HOME": str(tmp_path), "YAKULINGO_SPACES_ALLOW_CPU": "1"}
    served = subprocess.Popen(
        reader.filled_in("invoke serve-release", "docs/building.md").split(),
        cwd=reader.folder,
        stdout=subprocess.PIPE,
        text=True,
        env=reader.environment(),
    )
    assert served.stdout is not None
    try:
        line = served.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        here = Reader(reader.folder, {**reader.variables, **store})
        digest = hash_of(reader.folder / "dist" / "manifest.json")
        here.replaced = {"https://…/manifest.json": url, "--sha256 …": digest}
        assert "ok " in here.types("invoke verify https://…/manifest.json --sha256 …", page=CI)
        here.variables["YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL"] = url
        for page in ("docs/space.md", "docs/ja/space.md", "docs/cli.md"):
            assert "NO_ARTIFACT" in here_fails(here, page)
        text = "python3 -m llama_loader fetch --manifest https://…/manifest.json"
        fetched = here.types(text, page="README.md", of=spaces).splitlines()
        assert any((Path(line) / "llama-server").is_file() for line in fetched)
        here.run("ln -sf ../model.gguf model.gguf", of=spaces)
        answer = here_serves(here, spaces)
        assert answer.startswith("ready http://127.0.0.1:")
        text = "python3 -m llama_loader doctor --manifest https://…/manifest.json --model"
        assert "llama-server" in here.types(text, page="README.md", of=spaces)
    finally:
        served.send_signal(signal.SIGINT)
        served.communicate(timeout=60)


CI = "docs/ci.md"


def hash_of(file: Path) -> str:
    return f"--sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


def here_fails(reader: Reader, page: str) -> str:
    """Ask for a GPU's host of a release for CPUs: the guide's command, and the loader's no."""
    done = heard(
        ["bash", "-c", reader.filled_in("--suppose", page)],
        cwd=reader.folder / "spaces",
        env={**reader.environment(), "YAKULINGO_SPACES_ALLOW_CPU": "0"},
    )
    assert done.returncode == 5, done.stderr
    return done.stderr


def here_serves(reader: Reader, folder: Path) -> str:
    """Serve until the line that docs/cli.md shows, with its warnings; ask, then interrupt."""
    command = reader.filled_in("llama_loader serve", "README.md").split()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=reader.environment(), **pipes) as process:
        line = str(process.stdout.readline())  # type: ignore[union-attr]
        told = "".join(process.stderr.readline() for _ in range(4))  # type: ignore[union-attr]
        asked = reader.filled_in("/v1/chat/completions", "docs/cli.md")
        asked = asked.replace("http://127.0.0.1:41873", line.split()[1])
        key = told.partition("Bearer ")[2].split()[0]
        assert '"assistant"' in reader.run(asked.replace("2cVDSnxlfyJ…", key))
        process.send_signal(signal.SIGINT)
        told += process.communicate(timeout=60)[1]
    warned = re.compile(r"^(?:warning\[\w+\]|hint):", re.MULTILINE)
    assert warned.findall(told) == warned.findall((PROJECT / "docs" / "cli.md").read_text("utf-8"))
    return line


def test_the_demo_of_the_readme(
    real_manifest: str, real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the build, which other tests make for real, and the download of its source."""
    release = Path(real_manifest.removeprefix("file://")).parent

    def built(request: BuildRequest, _: object) -> tuple[SimpleNamespace, ...]:
        shutil.copytree(release, request.out)
        (path,) = request.out.glob("*.tar.zst")
        content = path.read_bytes()
        tarball = Packed(path, hashlib.sha256(content).hexdigest(), len(content))
        return (SimpleNamespace(tarball=tarball, build_seconds=1.0, pack_seconds=1.0),)

    monkeypatch.setattr("farm.demo.preflight.build", built)
    monkeypatch.setattr(
        "farm.demo.choose_source", lambda _: SimpleNamespace(tree=tmp_path, build=11549)
    )
    monkeypatch.setattr("farm.demo.packages.fetch_model", lambda _: real_model)
    picture = tmp_path / "timeline.svg"
    out = tmp_path / "dist"
    said = io.StringIO()
    with report.BuildReport(Console(file=said, width=200)) as told:
        demo.Demo("cpu", "local", None, picture, out=out).run(told)
    assert picture.read_text("utf-8").startswith("<svg")
    assert (out / "manifest.json").is_file()
    assert f"the release stays in {out}; the next commands:" in said.getvalue()
    assert f"invoke serve-release --folder {out}" in said.getvalue()


def test_the_sessions_are_listed(reader: Reader) -> None:
    shutil.copy2(PROJECT / "noxfile.py", reader.folder)
    said = reader.types("python3 -m nox -l", page="docs/ci.md")
    for session in ("lint", "typecheck", "tests", "unit", "demo", "gpu"):
        assert f" {session} -> " in said
    unit = ("nox", "--no-venv", "-s", "unit", "--", "tests/farm/nope.py")
    done = heard([sys.executable, "-m", *unit], cwd=reader.folder)
    assert "there is no tests/farm/nope.py" in done.stderr
