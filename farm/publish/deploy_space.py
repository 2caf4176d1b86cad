"""Upload ``spaces/`` to a Space on the Hub as one commit, and set the Space's variables.

A record in the Space (``.deployed.json``) lists what was uploaded. A later deployment deletes a
file only if the record lists it and its content is still what was uploaded.

Secrets are never set here: every process of the machine can read a command line, and it ends up in
logs. They belong on the Space's own settings page.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, SpaceHardware
from huggingface_hub.errors import RepositoryNotFoundError

from farm import PROJECT_ROOT
from farm.errors import PublishError, UsageError
from farm.publish import hub

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from huggingface_hub import HfApi

ROOT: Final = PROJECT_ROOT / "spaces"
NEEDED: Final = ("app.py", "README.md", "requirements.txt")
_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.ASCII)
_TOKEN: Final = re.compile(r"\b(?:hf_|gh[opsru]_|github_pat_|sk-)\w{8}", re.ASCII)
"""How tokens of the Hub, of GitHub and of the usual model services begin."""
_RECORD: Final = ".deployed.json"
_EMPTY_SPACE: Final = frozenset({".gitattributes", "README.md"})
"""Files that the Hub itself puts into a new Space."""
_LOCAL_PIN: Final = re.compile(r"file:|https?://(?:localhost|127\.|\[::1\])", re.IGNORECASE)
_MODEL: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w.-]+(?:/[\w.-]+)*)", re.ASCII)
_SIZES: Final = ("4b", "12b", "27b")
"""Of TranslateGemma: what ``--model`` takes by one word."""
_BY_SIZE: Final = "mradermacher/translategemma-{0}-it-i1-GGUF:translategemma-{0}-it.i1-Q4_K_M.gguf"
_PREFIX: Final = "YAKULINGO_SPACES_GGUF"
_FRONT_MATTER: Final = (
    (re.compile(r"^models:\n(?:  - .*\n)+", re.MULTILINE), "models:\n  - {repo}\n"),
    (
        re.compile(r"^preload_from_hub:\n(?:  - .*\n)+", re.MULTILINE),
        "preload_from_hub:\n  - {repo} {file}\n",
    ),
)
"""What of README.md's first lines names the model: the Hub puts that file into the image."""
HARDWARE: Final = SpaceHardware.ZERO_A10G
"""The Hub's name for ZeroGPU; a Space that is created without it starts on CPU Basic."""


@dataclass(frozen=True)
class Deployment:
    """What is to be uploaded to a Space: files, or their bytes where they are written for it."""

    space: str
    files: Mapping[str, Path | bytes]
    variables: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(
            len(one) if isinstance(one, bytes) else one.stat().st_size
            for one in self.files.values()
        )


def plan(
    space: str, variables: Iterable[str] = (), root: Path = ROOT, *, model: str | None = None
) -> Deployment:
    """Look at what would be uploaded.

    Args:
        space: ``OWNER/NAME``.
        variables: ``NAME=VALUE`` each.
        root: the folder; hidden files and Python's caches stay here.
        model: ``4b``, ``12b`` or ``27b`` of TranslateGemma, or ``OWNER/REPO:FILE``; None for the
            one that the folder names.

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
    _require_public_pin(root / "release.json")
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise PublishError("SPACE_INCOMPLETE", f"{root.name}/ has no {', '.join(missing)}")
    asked = dict(_variable(text) for text in variables)
    if model is None:
        return Deployment(space, files, asked)
    chosen = _model(model)
    named = {f"{_PREFIX}_REPO_ID": chosen["repo"], f"{_PREFIX}_FILENAME": chosen["file"]}
    twice = [name for name in named if asked.get(name, named[name]) != named[name]]
    if twice:
        raise UsageError("VARIABLE_TWICE", f"--model and --variable {twice[0]} contradict another")
    readme = files["README.md"].read_text("utf-8")
    for block, text in _FRONT_MATTER:
        readme = block.sub(text.format(**chosen), readme, count=1)
    return Deployment(space, {**files, "README.md": readme.encode()}, {**named, **asked})


@dataclass(frozen=True)
class Changes:
    """What a deployment changes in a Space, by path.

    Attributes:
        deployment: what is uploaded.
        head: the Space's present commit, None for a Space that does not exist yet.
        added, changed, deleted: files of the Space that the commit touches.
        kept: files that an earlier deployment uploaded and another person changed since; they
            stay although ``spaces/`` no longer has them.
    """

    deployment: Deployment
    head: str | None
    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]


def compare(deployment: Deployment, *, adopt: bool = False) -> Changes:
    """Compare what would be uploaded with what the Space holds.

    Args:
        deployment: what would be uploaded.
        adopt: also accept a Space that no earlier deployment wrote to. Nothing of it is deleted.

    Raises:
        PublishError: the Space holds files and no record of an earlier deployment
            (``SPACE_NOT_OURS``), or the Hub refuses.
    """
    api = hub.api()
    with hub.hub_errors(f"Space {deployment.space}"):
        try:
            head = api.space_info(deployment.space).sha
        except RepositoryNotFoundError:
            return Changes(deployment, None, tuple(deployment.files), (), (), ())
        there = _files(api, deployment.space, head)
        record = _record(api, deployment.space, head) if _RECORD in there else None
    if record is None and not adopt and there.keys() - _EMPTY_SPACE:
        raise PublishError(
            "SPACE_NOT_OURS",
            f"Space {deployment.space} holds files that no deployment uploaded:"
            f" {', '.join(sorted(there.keys() - _EMPTY_SPACE)[:5])}",
            hint="give --adopt to upload beside them; files of the same name are replaced, nothing"
            " is deleted",
        )
    ours = record or {}
    gone = [name for name in ours if name in there and name not in deployment.files]
    contents = {name: _identities(path) for name, path in deployment.files.items()}
    return Changes(
        deployment,
        head,
        added=tuple(name for name in contents if name not in there),
        changed=tuple(n for n in contents if n in there and there[n] not in contents[n]),
        deleted=tuple(name for name in gone if there[name] in ours[name]),
        kept=tuple(name for name in gone if there[name] not in ours[name]),
    )


def deploy(changes: Changes, *, hardware: SpaceHardware | None = None) -> str:
    """Apply the changes as one commit and return where the Space runs once it is built.

    That is the Hub's word for it, ``https://OWNER-NAME.hf.space``; the Space's page where the Hub
    has not said it yet.

    Args:
        changes: what ``compare`` found. If another commit came in between, the Hub refuses.
        hardware: the Hub's name for the Space's hardware; None for ZeroGPU where the Space is
            created, and for no change where it exists.

    Raises:
        PublishError: the Hub refuses.
    """
    api, deployment = hub.api(), changes.deployment
    with hub.hub_errors(f"Space {deployment.space}"):
        made = api.create_repo(
            deployment.space,
            repo_type="space",
            space_sdk="gradio",
            space_hardware=hardware or HARDWARE,
            exist_ok=True,
        )
        if changes.head is not None and hardware is not None:
            api.request_space_hardware(deployment.space, hardware)
        # variables first: the commit starts the Space
        for name, value in deployment.variables.items():
            api.add_space_variable(deployment.space, name, value)
        additions = [
            CommitOperationAdd(name, one if isinstance(one, bytes) else str(one))
            for name, one in deployment.files.items()
        ]
        additions.append(CommitOperationAdd(_RECORD, _new_record(deployment)))
        api.create_commit(
            deployment.space,
            [*map(CommitOperationDelete, changes.deleted), *additions],
            repo_type="space",
            commit_message="Deploy the loader and its page",
            parent_commit=changes.head,
        )
        return str(api.space_info(deployment.space).host or made)


def _files(api: HfApi, space: str, revision: str | None) -> dict[str, str]:
    """Return every file of a Space with the identity that the Hub knows it by."""
    found = hub.tree(api, space, revision, repo_type="space")
    return {path: one.lfs.sha256 if one.lfs else one.blob_id for path, one in found.items()}


def _identities(file: Path | bytes) -> list[str]:
    """Return the two names that the Hub may give a content: git's blob id, and LFS's sha256."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return [blob.hexdigest(), hashlib.sha256(content).hexdigest()]


def _new_record(deployment: Deployment) -> bytes:
    files = {name: _identities(path) for name, path in deployment.files.items()}
    return json.dumps({"files": files}, indent=1).encode()


def _record(api: HfApi, space: str, revision: str | None) -> dict[str, list[str]]:
    """Return what earlier deployments uploaded, by path.

    Raises:
        PublishError: the record is damaged, so nothing says which files are ours.
    """
    with tempfile.TemporaryDirectory(prefix="llama-farm-read-") as cache:
        path = api.hf_hub_download(
            space, _RECORD, repo_type="space", revision=revision, cache_dir=cache
        )
        content = Path(path).read_bytes()
    try:
        found = msgspec.json.decode(content, type=_Record)
    except msgspec.MsgspecError as error:
        raise PublishError(
            "SPACE_RECORD_DAMAGED",
            f"Space {space}: {_RECORD} cannot be read: {error}",
            hint=f"delete {_RECORD} in the Space and give --adopt",
        ) from error
    return found.files


class _Record(msgspec.Struct, frozen=True):
    """Every file that a deployment uploaded, with both names that the Hub may give its content."""

    files: dict[str, list[str]]


def hardware(name: str | None) -> SpaceHardware | None:
    """Return the hardware of that name; None for no name.

    Raises:
        UsageError: the Hub has no hardware of that name.
    """
    try:
        return None if name is None else SpaceHardware(name)
    except ValueError as error:
        known = ", ".join(one.value for one in SpaceHardware)
        raise UsageError(
            "HARDWARE_UNKNOWN", f"--hardware {name!r} is none of the Hub's", hint=f"one of {known}"
        ) from error


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:  # not quoted: it may be a secret whose name was forgotten
        raise UsageError("VARIABLE_INVALID", "--variable takes NAME=VALUE, and one has no '='")
    if not _VARIABLE.fullmatch(name):
        raise UsageError("VARIABLE_INVALID", f"--variable {name[:64]!r} is no variable's name")
    if _SECRET.search(name) or _TOKEN.search(value):
        raise UsageError(
            "VARIABLE_IS_SECRET",
            f"{name} looks like a secret: it is not set from a command line, which others can read",
            hint="set it as a secret on the Space's settings page",
        )
    return name, value


def _model(text: str) -> dict[str, str]:
    """Return the repository and the file that ``--model`` means."""
    found = _MODEL.fullmatch(_BY_SIZE.format(text) if text in _SIZES else text)
    if found is None or ".." in text:
        raise UsageError(
            "MODEL_INVALID",
            f"--model {text[:200]!r}",
            hint=f"it is {', '.join(_SIZES)} (TranslateGemma, Q4_K_M), or OWNER/REPO:FILE",
        )
    return found.groupdict()


def _require_public_pin(pin: Path) -> None:
    """Refuse a release.json that names a manifest of this machine: no Space could read it."""
    if not pin.is_file():
        return
    found = re.search(r'"manifest_url"\s*:\s*"([^"]*)"', pin.read_text("utf-8", "replace"))
    if found and _LOCAL_PIN.match(found[1]):
        raise PublishError(
            "PIN_IS_LOCAL",
            f"{pin.name} pins {found[1]}, which only this machine can read",
            hint="publish the release, then pin it: invoke pin-space --to hf:OWNER/REPO --release"
            " NAME",
        )


def _is_key(path: Path) -> bool:
    with path.open("rb") as stream:
        first = stream.readline(256).lower()
    return b"secret key" in first or b"private key-----" in first


def _is_left_out(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
