"""Upload ``spaces/`` to a Space on the Hub, alone, as one commit, and set its variables.

Secrets are never set here: a command line can be read by every process of the machine, and ends up
in logs. They belong on the Space's own settings page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from farm import PROJECT_ROOT
from farm.errors import PublishError, UsageError
from farm.publish import hub

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from huggingface_hub import HfApi

ROOT: Final = PROJECT_ROOT / "spaces"
NEEDED: Final = ("app.py", "README.md", "requirements.txt")
_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.ASCII)
_TOKEN: Final = re.compile(r"\b(?:hf_|gh[opsru]_|github_pat_|sk-)\w{8}", re.ASCII)
"""How tokens of the Hub, of GitHub and of the usual model services begin."""
_KEPT: Final = frozenset({".gitattributes"})
"""Files of the Hub's own that are in no folder of ours."""


@dataclass(frozen=True)
class Deployment:
    """What is to be uploaded to a Space."""

    space: str
    files: Mapping[str, Path]
    variables: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def plan(space: str, variables: Iterable[str] = (), root: Path = ROOT) -> Deployment:
    """Look at what would be uploaded.

    Args:
        space: ``OWNER/NAME``.
        variables: ``NAME=VALUE`` each.
        root: the folder; hidden files and Python's caches stay here.

    Raises:
        UsageError: a name or a variable cannot be one, or it would be a secret.
        PublishError: the folder is no Space.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", space, re.ASCII) or ".." in space:
        raise UsageError("SPACE_INVALID", f"--to {space!r} is not OWNER/NAME")
    files = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not _is_left_out(path.relative_to(root))
    }
    keys = [name for name, path in files.items() if _is_key(path)]
    if keys:
        raise PublishError(
            "SPACE_HAS_KEY",
            f"{root.name}/{keys[0]} is a secret key: everything in the folder would be public",
            hint="move it out of the folder; a Space needs the public key alone",
        )
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise PublishError("SPACE_INCOMPLETE", f"{root.name}/ has no {', '.join(missing)}")
    return Deployment(space, files, dict(_variable(text) for text in variables))


def deploy(deployment: Deployment) -> str:
    """Upload; what is no longer here is removed there. Returns the Space's URL.

    Raises:
        PublishError: the Hub refuses.
    """
    api = hub.api()
    with hub.hub_errors(f"Space {deployment.space}"):
        made = api.create_repo(
            deployment.space, repo_type="space", space_sdk="gradio", exist_ok=True
        )
        # variables first: the commit starts the Space
        for name, value in deployment.variables.items():
            api.add_space_variable(deployment.space, name, value)
        additions = [CommitOperationAdd(name, str(path)) for name, path in deployment.files.items()]
        gone = [CommitOperationDelete(name) for name in _gone(api, deployment)]
        api.create_commit(
            deployment.space,
            [*gone, *additions],
            repo_type="space",
            commit_message="Deploy the loader and its page",
        )
    return str(made)


def _gone(api: HfApi, deployment: Deployment) -> list[str]:
    try:
        tree = api.list_repo_tree(deployment.space, recursive=True, repo_type="space")
        there = [one.path for one in tree if isinstance(one, RepoFile)]
    except (EntryNotFoundError, RepositoryNotFoundError):
        return []
    return [name for name in there if name not in deployment.files and name not in _KEPT]


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:  # not quoted: it may be a secret whose name was forgotten
        raise UsageError("VARIABLE_INVALID", "--set takes NAME=VALUE, and one has no '='")
    if not _VARIABLE.fullmatch(name):
        raise UsageError("VARIABLE_INVALID", f"--set {name[:64]!r} is no variable's name")
    if _SECRET.search(name) or _TOKEN.search(value):
        raise UsageError(
            "VARIABLE_IS_SECRET",
            f"{name} looks like a secret: it is not set from a command line, which others can read",
            hint="set it as a secret on the Space's settings page",
        )
    return name, value


def _is_key(path: Path) -> bool:
    with path.open("rb") as stream:
        first = stream.readline(256).lower()
    return b"secret key" in first or b"private key-----" in first


def _is_left_out(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
