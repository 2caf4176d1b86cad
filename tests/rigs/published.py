"""The three kinds of places that a release can be published to, with local servers behind them."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from farm.publish import places, publishing
from farm.publish.places import Destination
from tests.rigs import github_releases, hub_repository
from tests.rigs.heard import heard

SPACES = Path(__file__).parent.parent.parent / "spaces"
KINDS = ("folder", "github", "hub")
ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass
class Place:
    """A place to publish to, the server behind it, and what a loader there needs to see."""

    kind: str
    to: str
    server: Any
    root: Path

    def open(self) -> Destination:
        return places.parse(self.to)

    def kept(self) -> Callable[[], None]:
        """Return what gives the place back the content that it has now."""
        if self.server is None:
            held = self.root.with_name(f"{self.root.name}-kept")
            self.root.mkdir(exist_ok=True)
            shutil.copytree(self.root, held)

            def back() -> None:
                shutil.rmtree(self.root)
                shutil.copytree(held, self.root)
        else:
            there = copy.deepcopy(vars(self.server))

            def back() -> None:
                vars(self.server).update(copy.deepcopy(there))

        return back

    def large_files_sent(self) -> int:
        """How many tarballs were sent whole."""
        if self.kind == "github":
            return sum(name.endswith(".tar.zst") for name in self.server.uploads)
        if self.kind == "hub":
            return sum(self.server.large[one].startswith(ZSTD) for one in self.server.sent)
        return len(list(self.root.rglob("*.tar.zst")))


@contextmanager
def serving(kind: str, root: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Serve a place, empty, and point the farm at it."""
    if kind == "folder":
        yield Place(kind, str(root), None, root)
    elif kind == "github":
        with github_releases.GitHub().serve() as server:
            patch.setenv("GITHUB_TOKEN", github_releases.TOKEN)
            patch.setenv("GITHUB_API_URL", server.url)
            patch.setenv("GITHUB_SERVER_URL", server.url)
            yield Place(kind, f"github:{github_releases.REPOSITORY}", server, root)
    else:
        # Through LFS, as its documentation has it; Xet's protocol is a program of the Hub's own.
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr(hub_repository, "LARGE", 3000)
        with hub_repository.Hub().serve() as hub:
            patch.setenv("HF_TOKEN", hub_repository.TOKEN)
            patch.setenv("HF_ENDPOINT", hub.url)
            yield Place(kind, "hf:owner/name", hub, root)


def publish(place: Place | Destination, folder: Path) -> str:
    """Publish a folder; returns the manifest's URL."""
    to = place.open() if isinstance(place, Place) else place
    plan = publishing.prepare(folder, to, lambda _: None)
    to.publish(plan, lambda _: None)
    return to.manifest_url(plan.release)


@contextmanager
def edited(folder: Path) -> Iterator[dict[str, Any]]:
    """Give the manifest of a release's folder, and write what became of it."""
    found = json.loads((folder / "manifest.json").read_bytes())
    yield found
    (folder / "manifest.json").write_text(json.dumps(found))


def environment() -> dict[str, str]:
    """Return a Space's variables: what is served here, and its own modules alone."""
    return {**os.environ, "PYTHONPATH": str(SPACES)}


def fetch(url: str, store: Path, *options: str) -> dict[str, Any]:
    """What a Space does with a manifest's URL; it must succeed."""
    named = ("--store", str(store), "--manifest", url)
    done = heard(
        [
            *(sys.executable, "-m", "llama_loader", "fetch", "--json", "--allow-cpu"),
            *("--no-test-run", *named, *options),
        ],
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told
