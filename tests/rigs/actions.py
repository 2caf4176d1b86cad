"""Stand-ins for the actions that the workflows use: caches, artifacts and Pages are folders.

Each refuses inputs that the action's own action.yml does not have (``actions.toml``).
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import tomllib

from tests.rigs.github_runner import Machine

INPUTS: Final[dict[str, dict[str, list[str]]]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text("utf-8")
)


class ActionError(Exception):
    """The action ends with an error, and so does its step."""


@dataclass
class Place:
    """What GitHub keeps between jobs."""

    origin: Path  # the repository, bare
    kept: Path  # caches, artifacts and Pages, a folder each
    attested: list[str] = field(default_factory=list)

    def caches(self) -> list[str]:
        """Return the caches' keys, oldest first."""
        return [path.name for path in self._folders("caches")]

    def artifacts(self) -> dict[str, Path]:
        """Return the artifacts' folders by their names."""
        return {path.name: path for path in self._folders("artifacts")}

    def _folders(self, kind: str) -> list[Path]:
        folder = self.kept / kind
        folder.mkdir(parents=True, exist_ok=True)
        return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def perform(uses: str, given: Mapping[str, str], place: Place, machine: Machine) -> None:
    """Do what an action does, as far as the steps after it can see."""
    name = uses.partition("@")[0].removeprefix("actions/")
    known = INPUTS[name]
    required = known.get("required", [])
    if unknown := given.keys() - {*required, *known["optional"]}:
        raise ActionError(f"{name}: Unexpected input(s) {sorted(unknown)}")
    if missing := set(required) - given.keys():
        raise ActionError(f"{name}: Input required and not supplied: {sorted(missing)}")
    _ACTIONS[name](given, place, machine)
    machine.own()


def _checkout(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    if given.get("persist-credentials") != "false":
        raise ActionError("checkout: the token would stay in .git/config")
    fetch = f"git fetch --quiet --depth=1 file://{place.origin} {given.get('ref') or 'main'}"
    done = machine.run(f"git init --quiet; {fetch}; git checkout --quiet --detach FETCH_HEAD", {})
    if done.returncode != 0:
        raise ActionError(f"checkout: {done.stderr}")


def _restore(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    prefixes = [given["key"], *given.get("restore-keys", "").split()]
    for prefix in prefixes:
        for key in reversed(place.caches()):
            if key.startswith(prefix):
                shutil.copytree(
                    place.kept / "caches" / key,
                    machine.workspace / given["path"],
                    dirs_exist_ok=True,
                )
                return


def _save(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    source = machine.workspace / given["path"]
    if source.is_dir():  # the action warns where there is nothing
        shutil.copytree(source, place.kept / "caches" / given["key"])


def _upload(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    target = place.kept / "artifacts" / given.get("name", "artifact")
    if target.exists():
        raise ActionError(f"upload-artifact: {target.name} exists already")
    hidden = given.get("include-hidden-files") == "true"
    found = [
        path
        for pattern in given["path"].split()
        for match in machine.workspace.glob(pattern)
        for path in ([match] if match.is_file() else match.rglob("*"))
        if path.is_file()
        and (hidden or not any(p.startswith(".") for p in _below(path, machine).parts))
    ]
    if not found and given.get("if-no-files-found", "warn") == "error":
        raise ActionError(f"upload-artifact: No files were found: {given['path']}")
    common = Path(*_common([_below(path, machine).parent.parts for path in found]))
    for path in found:
        copy = target / _below(path, machine).relative_to(common)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _below(path: Path, machine: Machine) -> Path:
    return path.relative_to(machine.workspace)


def _common(folders: list[tuple[str, ...]]) -> list[str]:
    """Return the folders that all files have in common: the artifact begins below them."""
    return [names[0] for names in zip(*folders, strict=False) if len(set(names)) == 1]


def _download(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    found = {n: p for n, p in place.artifacts().items() if fnmatch(n, given.get("pattern", "*"))}
    merged = given.get("merge-multiple") == "true"
    for name, path in found.items():
        target = machine.workspace / given.get("path", ".")
        shutil.copytree(path, target if merged else target / name, dirs_exist_ok=True)


def _attest(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    sums = machine.workspace / given["subject-checksums"]
    for line in sums.read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        content = (sums.parent / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ActionError(f"attest-build-provenance: {name} is not what {sums.name} says")
        place.attested.append(name)


def _upload_pages(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    shutil.copytree(machine.workspace / given["path"], place.kept / "artifacts" / "github-pages")


def _deploy_pages(given: Mapping[str, str], place: Place, machine: Machine) -> None:
    del given, machine
    shutil.copytree(place.artifacts()["github-pages"], place.kept / "pages")


_ACTIONS: Final[dict[str, Callable[[Mapping[str, str], Place, Machine], Any]]] = {
    "checkout": _checkout,
    "setup-python": lambda *_: None,  # ``Runner`` puts that Python on PATH
    "cache/restore": _restore,
    "cache/save": _save,
    "upload-artifact": _upload,
    "download-artifact": _download,
    "attest-build-provenance": _attest,
    "upload-pages-artifact": _upload_pages,
    "deploy-pages": _deploy_pages,
}
