"""Upload ``spaces/`` to a Space on the Hub as one commit, and set the Space's variables.

A record in the Space (``.deployed.json``) lists what was uploaded. A later deployment deletes a
file only if the record lists it and its content is still what was uploaded.

Secrets are never set here: every process of the machine can read a command line, and it ends up in
logs. They belong on the Space's own settings page.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal

import msgspec
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceHardware, Volume
from huggingface_hub.errors import RepositoryNotFoundError

from farm import PROJECT_ROOT, loader
from farm.errors import FarmError, PublishError, UsageError
from farm.inputs import git
from farm.options import Deploy
from farm.publish import hub, places
from llama_loader import gguf_header

ROOT: Final = PROJECT_ROOT / "spaces"
NEEDED: Final = ("app.py", "README.md", "requirements.txt")
_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.ASCII)
_TOKEN: Final = re.compile(r"\b(?:hf_|gh[opsru]_|github_pat_|sk-)\w{8}", re.ASCII)
"""How tokens of the Hub, of GitHub and of the usual model services begin."""
_HIDDEN: Final = re.compile(r"(?:^|/)(?:\.|__pycache__(?:/|$))")
_RECORD: Final = ".deployed.json"
_EMPTY_SPACE: Final = frozenset({".gitattributes", "README.md"})
"""Files that the Hub itself puts into a new Space."""
_SETTING_INVALID: Final = re.compile(r"^error\[(\w+)\]: (\w+ is .*)\nhint: (.*)", re.MULTILINE)
"""How the loader refuses a variable's value; other settings may be in the Space already."""
_LOCAL_PIN: Final = re.compile(r"file:|https?://(?:localhost|127\.|\[::1\])", re.IGNORECASE)
_MODEL: Final = re.compile(
    r"(?P<bucket>bucket:)?(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w.-]+(?:/[\w.-]+)*)", re.ASCII
)
_SIZES: Final = ("4b", "12b", "27b")
"""Sizes of TranslateGemma that ``--model`` takes."""
_BY_SIZE: Final = "mradermacher/translategemma-{0}-it-i1-GGUF:translategemma-{0}-it.i1-Q4_K_M.gguf"
_PREFIXES: Final = ("YAKULINGO_SPACES_", "LLAMA_SPACE_")
_ALLOW_CPU: Final = f"{_PREFIXES[0]}ALLOW_CPU"
_OF_MODEL: Final = ("GGUF_REPO_ID", "GGUF_FILENAME", "GGUF_REVISION", "GGUF_SHA256", "GGUF_PATH")
_OF_RELEASE: Final = ("LLAMA_CPP_URL", "LLAMA_CPP_SHA256", "LLAMA_CPP_MANIFEST_URL",
                      "LLAMA_CPP_MANIFEST_SHA256")  # fmt: skip
"""Variables that win over ``release.json``."""
_MOUNT: Final = "/models"
_LINES: Final = re.compile(r"^(?:(?:models|preload_from_hub):\n(?:  - .*\n)+)+", re.MULTILINE)
"""The lines at the top of README.md that name the model, which the Hub puts into the image."""
HARDWARE: Final = SpaceHardware.ZERO_A10G
"""The Hub's name for ZeroGPU; a Space that is created without it starts on CPU Basic."""
_NAMED: Final = {"zerogpu": HARDWARE.value}
_REFUSED: Final = (
    "may HF_TOKEN write to it, and may the account use that hardware? ZeroGPU needs an account that"
    " is 30 days old, or PRO; --hardware cpu-basic asks for none. The same command resumes"
)


@dataclass(frozen=True)
class Deployment:
    """The files and settings to upload to a Space.

    Attributes:
        files: their contents, by path.
        variables: values to set, by name.
        replaced: names of variables that would contradict these; removed unless they are set.
        volume: the volume to mount; None for no change.
        model: the model, for people.
        left_out: files that are ignored, and stay here.
    """

    space: str
    files: Mapping[str, bytes]
    variables: Mapping[str, str]
    replaced: frozenset[str] = frozenset()
    volume: Volume | None = None
    model: str = ""
    left_out: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))

    @property
    def names_release(self) -> bool:
        """Whether ``release.json`` or a variable names the release to run."""
        return "release.json" in self.files or bool(self.variables.keys() & _both(_OF_RELEASE))

    @property
    def pins(self) -> bool:
        """Whether ``release.json``, and no variable, names the release to run."""
        return "release.json" in self.files and not self.variables.keys() & _both(_OF_RELEASE)

    def unknown(self) -> list[str]:
        """Return a warning for each variable that is no setting, or is one without its prefix.

        Raises:
            UsageError: ``SETTING_INVALID``: the loader cannot read a variable's value.
        """
        # NAME_ with the prefix is never a setting, and NAME is near it if that is one
        bare = {f"{_PREFIXES[0]}{name}_": name for name in self.variables}
        own = {name: "" for name in os.environ if name.startswith(_PREFIXES)}
        asked = {**own, **dict.fromkeys(bare, "1"), **self.variables}
        done = loader.run("verify", "/", variables=asked)
        if invalid := _SETTING_INVALID.match(done.stderr):
            raise UsageError(invalid[1], invalid[2], hint=invalid[3])
        found = r"(warning\[SETTING_UNKNOWN\]: )(\w+) (is no setting.*near ones: (.*))"
        told = []
        for said, name, rest, near in re.findall(found, done.stderr):
            if name in self.variables:
                told.append(f"{said}{name} {rest}")
            elif bare.get(name) in near.split(", "):
                meant = f"{_PREFIXES[0]}{bare[name]}"
                told.append(f"{said}{bare[name]} is no setting: did you mean {meant}?")
        return told


def plan(
    wanted: Deploy, root: Path = ROOT, *, release: Mapping[str, object] | None = None
) -> Deployment:
    """Read what would be uploaded; hidden and ignored files and Python's caches are not.

    ``release`` is the content of the Space's ``release.json``; empty for none, None for the
    folder's. The variable that allows the CPU is set for such hardware, and removed for another.

    Raises:
        UsageError: a name or a variable cannot be one, or it would be a secret.
        PublishError: the folder is no Space.
    """
    space, hardware = wanted.to, wanted.hardware or ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", space, re.ASCII) or ".." in space:
        raise UsageError("SPACE_INVALID", space=space)
    if wanted.mount and wanted.model is None:
        raise UsageError("OPTION_MISSING/mount")
    files, left_out = _files(root, release)
    asked = dict(_variable(*given) for given in enumerate(wanted.variable, 1))
    for name, value in asked.items():
        if name.endswith(("LLAMA_CPP_URL", "LLAMA_CPP_MANIFEST_URL")):
            _require_public(name, json.dumps({"manifest_url": value}).encode())
    by_url = any(f"{prefix}LLAMA_CPP_URL" in asked for prefix in _PREFIXES)
    replaced = _both(_OF_RELEASE if release is not None or by_url else ())
    named = {_ALLOW_CPU: "1"} if hardware.startswith("cpu") else {}
    if hardware and not named:
        replaced |= {_ALLOW_CPU}
    values, volume = {**named, **asked}, None
    readme = files["README.md"].decode()
    found = _LINES.search(readme)
    default = found[0].split(" - ")[-1].strip() if found else "none is named in README.md"
    model = _named(asked) or default
    if wanted.model is not None:
        chosen = _Model.parse(wanted.model, mount=wanted.mount)
        named = chosen.variables()
        twice = [name for name in named if asked.get(name, named[name]) != named[name]]
        if twice:
            raise UsageError("VARIABLE_TWICE", twice=twice[0])
        files["README.md"] = _LINES.sub(chosen.lines(), readme, count=1).encode()
        replaced, values, volume = replaced | _both(_OF_MODEL), named | values, chosen.volume()
        model = f"{chosen.repo} {chosen.file}"
    return Deployment(space, files, values, replaced, volume, model, left_out)


def _files(
    root: Path, release: Mapping[str, object] | None
) -> tuple[dict[str, bytes], tuple[Path, ...]]:
    """Return a Space's files, and those left out: what git ignores, without it models and wheels.

    ``release`` is that of ``plan``. Hidden files and Python's caches are in neither.
    """
    try:
        ignored = {*git.ignored(root.parent)} - {root / "release.json"}
    except FarmError:  # the folder is in no clone
        ignored = {*root.rglob("*.gguf"), *root.rglob("*.whl")} - {*root.rglob("tiny.gguf")}
    every = ((one.relative_to(root).as_posix(), one) for one in sorted(root.rglob("*")))
    shown = {name: one for name, one in every if one.is_file() and not _HIDDEN.search(name)}
    left = {name: one for name, one in shown.items() if ignored & {one, *one.parents}}
    files = {name: shown[name].read_bytes() for name in shown if name not in left}
    for name, content in files.items():
        if re.match(rb".{,244}(?:secret key|private key-----)", content, re.IGNORECASE):
            raise PublishError("SPACE_HAS_KEY", name=root.name, keys=name)
    if release is not None:
        files.pop("release.json", None)
    if release:
        files["release.json"] = f"{json.dumps(release, indent=2)}\n".encode()
    _require_public("release.json", files.get("release.json", b""))
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise PublishError("SPACE_INCOMPLETE", name=root.name, missing=", ".join(missing))
    return files, tuple(left.values())


def _named(variables: Mapping[str, str]) -> str:
    """Return the model that a Space's variables name; empty without one."""
    names = (f"{prefix}{name}" for name in _OF_MODEL for prefix in _PREFIXES)
    return " ".join(filter(None, (variables.get(name) for name in names)))


def _both(names: Iterable[str]) -> frozenset[str]:
    """Return variables' names with either prefix."""
    return frozenset(f"{prefix}{name}" for prefix in _PREFIXES for name in names)


@dataclass(frozen=True)
class Changes:
    """What a deployment changes in a Space, by path.

    Attributes:
        deployment: what is uploaded.
        head: the Space's current commit, None for a Space that does not exist yet.
        added, changed, deleted: files of the Space that the commit touches.
        kept: files that an earlier deployment uploaded and another person changed since; they
            stay although ``spaces/`` no longer has them.
        unset: variables of the Space that are removed.
        hardware: the hardware that the Space requested or runs on; empty if new or unknown.
    """

    deployment: Deployment
    head: str | None
    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    unset: tuple[str, ...] = ()
    hardware: str = ""


def found_model(text: str | None) -> str | None:
    """Ask the Hub for the file that ``--model`` names, also in a bucket.

    ``OWNER/REPO:Q4_K_M`` is returned with the name of the file that the loader would choose.

    Raises:
        UsageError: ``MODEL_INVALID``: the Hub has no such file, or shows it to others only.
        PublishError: the Hub refuses, or does not answer.
    """
    if text is None:
        return None
    chosen, api = _Model.parse(text, mount=False), hub.api()
    hint = "check the model's name; a private or gated one needs a token that may read it"
    with hub.hub_errors(f"--model {text}", hint):
        if chosen.mounted:
            found = [one.path for one in api.get_bucket_paths_info(chosen.repo, [chosen.file])]
        elif chosen.file.endswith(".gguf"):
            found = [chosen.file] if api.file_exists(chosen.repo, chosen.file) else []
        else:
            found = gguf_header.of_quantisation(hub.tree(api, chosen.repo, "main"), chosen.file)
    if not found:
        raise UsageError("MODEL_INVALID/hub", text=text, file=chosen.file, repo=chosen.repo)
    return text if chosen.mounted else f"{chosen.repo}:{found[0]}"


def compare(deployment: Deployment, *, adopt: bool = False) -> Changes:
    """Compare what would be uploaded with the Space's files.

    ``adopt``: also accept a Space that no earlier deployment wrote to. Nothing of it is deleted.

    Raises:
        PublishError: ``SPACE_NOT_OURS``: the Space holds files and no record of an earlier
            deployment; or the Hub refuses.
        UsageError: ``VARIABLE_INVALID``: the Space will not have the model's file.
    """
    api = hub.api()
    with hub.understood("Space"), hub.hub_errors(f"Space {deployment.space}"):
        try:
            head = api.space_info(deployment.space).sha
        except RepositoryNotFoundError:
            _require_model(deployment, ())
            return Changes(deployment, None, tuple(deployment.files), (), (), ())
        listed = hub.tree(api, deployment.space, head or "main", repo_type="space")
        there = {path: one.lfs.oid if one.lfs else one.oid for path, one in listed.items()}
        record = _record(api, deployment.space, head) if _RECORD in there else None
        present = api.get_space_variables(deployment.space)
        runtime = api.get_space_runtime(deployment.space)
        _require_model(deployment, runtime.volumes or (), data=bool(runtime.storage))
        if not deployment.replaced & _both(_OF_MODEL):  # no --model
            own = {name: one.value for name, one in present.items()} | dict(deployment.variables)
            deployment = _keeping(api, deployment, _named(own), head)
        chosen = deployment.names_release or deployment.replaced & _both(_OF_RELEASE)
        if "release.json" in there and not chosen:
            own_pin = _content(api, deployment.space, "release.json", head)
            files = {**deployment.files, "release.json": own_pin}
            deployment = replace(deployment, files=files)
    if record is None and not adopt and there.keys() - _EMPTY_SPACE:
        theirs = ", ".join(sorted(there.keys() - _EMPTY_SPACE)[:5])
        raise PublishError("SPACE_NOT_OURS", space=deployment.space, theirs=theirs)
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
        unset=tuple(sorted((present.keys() & deployment.replaced) - deployment.variables.keys())),
        hardware=str(runtime.requested_hardware or runtime.hardware or ""),
    )


def _require_model(
    deployment: Deployment, volumes: Iterable[Volume], *, data: bool = False
) -> None:
    """Refuse a model's path that is neither a file of the Space nor below a volume.

    ``data``: the Space has persistent storage, which the Hub mounts at ``/data``.
    """
    mounted = [one.mount_path for one in (*volumes, deployment.volume) if one]
    folders = [*mounted, *(["/data"] if data else [])]
    for name in sorted(_both(("GGUF_PATH",)) & deployment.variables.keys()):
        path = PurePosixPath(deployment.variables[name])
        is_there = str(path) in deployment.files or any(map(path.is_relative_to, folders))
        if deployment.variables[name] and not is_there:
            there = ", ".join(folders) or "none"
            raise UsageError("VARIABLE_INVALID/path", name=name, path=path, there=there)


def _keeping(api: HfApi, deployment: Deployment, model: str, head: str | None) -> Deployment:
    """Keep a Space's own model, and README.md's lines about a model that its variables name."""
    files = dict(deployment.files)
    told = f"the Space's own: {model}" if model else f"{deployment.model} (README.md's)"
    if model:
        theirs = _content(api, deployment.space, "README.md", head).decode("utf-8", "replace")
        own, readme = "".join(_LINES.findall(theirs)), files["README.md"].decode()
        files["README.md"] = _LINES.sub(lambda _: own, readme, count=1).encode()
    return replace(deployment, files=files, model=told)


def deploy(changes: Changes, *, hardware: SpaceHardware | None = None) -> str:
    """Apply the changes as one commit and return the address of the Space once it is built.

    The Hub reports the address, ``https://OWNER-NAME.hf.space``; until then it is the Space's page.
    If another commit came in between, the Hub refuses. ``hardware`` is the Hub's name of it; None
    means ZeroGPU for a new Space, and no change for an existing one.

    Raises:
        PublishError: the Hub refuses.
    """
    api, deployment = hub.api(), changes.deployment
    with hub.hub_errors(f"Space {deployment.space}", _REFUSED):
        made = api.create_repo(
            deployment.space,
            repo_type="space",
            space_sdk="gradio",
            space_hardware=hardware or HARDWARE,
            exist_ok=True,
        )
        if changes.head is not None and hardware is not None:
            api.request_space_hardware(deployment.space, hardware)
        # volume and variables first: the commit starts the Space
        if deployment.volume is not None:
            mounted = api.get_space_runtime(deployment.space).volumes or ()
            others = [one for one in mounted if one.mount_path != _MOUNT]
            api.set_space_volumes(deployment.space, [*others, deployment.volume])
        for name in changes.unset:
            api.delete_space_variable(deployment.space, name)
        for name, value in deployment.variables.items():
            api.add_space_variable(deployment.space, name, value)
        additions = [CommitOperationAdd(*one) for one in deployment.files.items()]
        uploaded = {name: _identities(path) for name, path in deployment.files.items()}
        record = json.dumps({"files": uploaded}, indent=1).encode()
        additions.append(CommitOperationAdd(_RECORD, record))
        api.create_commit(
            deployment.space,
            [*map(CommitOperationDelete, changes.deleted), *additions],
            repo_type="space",
            commit_message="Deploy the loader and its page",
            parent_commit=changes.head,
        )
        return str(api.space_info(deployment.space).host or made)


def _identities(content: bytes) -> list[str]:
    """Return the two ids that the Hub may use for a content: git's blob id, and LFS's sha256."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return [blob.hexdigest(), hashlib.sha256(content).hexdigest()]


def _content(api: HfApi, space: str, name: str, revision: str | None) -> bytes:
    blocks = hub.content(api, space, name, revision or "main", repo_type="space")
    return places.small(blocks, f"Space {space}: {name}")


def _record(api: HfApi, space: str, revision: str | None) -> dict[str, list[str]]:
    """Return what earlier deployments uploaded, by path."""
    content = _content(api, space, _RECORD, revision)  # some of its errors are ValueErrors, too
    try:
        found = msgspec.json.decode(content, type=_Record)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        what = f"Space {space}: {_RECORD}"
        raise PublishError("SPACE_RECORD_DAMAGED", what=what, error=error) from error
    return found.files


class _Record(msgspec.Struct, frozen=True):
    """Every file that a deployment uploaded, with both ids that the Hub may use for its content."""

    files: dict[str, list[str]]


def hardware(name: str | None) -> SpaceHardware | None:
    """Return the hardware of that name, also of ``zerogpu``; None for no name.

    Raises:
        UsageError: the Hub has no hardware of that name.
    """
    try:
        return None if name is None else SpaceHardware(_NAMED.get(name, name))
    except ValueError as error:
        known = ", ".join(one.value for one in SpaceHardware if one is not HARDWARE)
        zero = HARDWARE.value
        raise UsageError("HARDWARE_UNKNOWN", name=name, zero_gpu=zero, known=known) from error


def _variable(number: int, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:  # not quoted: it may be a secret whose name was forgotten
        raise UsageError("VARIABLE_INVALID", number=number)
    if not _VARIABLE.fullmatch(name):
        raise UsageError("VARIABLE_INVALID/name", name=name[:64])
    if _SECRET.search(name) or _TOKEN.search(value):
        raise UsageError("VARIABLE_IS_SECRET", name=name)
    return name, value


@dataclass(frozen=True)
class _Model:
    """The file that ``--model`` names, and how it gets into the Space.

    Attributes:
        mounted: as a ``bucket``, as a ``model`` repository, or not: then it is in the image.
    """

    repo: str
    file: str
    mounted: Literal["bucket", "model"] | None

    @classmethod
    def parse(cls, text: str, *, mount: bool) -> _Model:
        found = _MODEL.fullmatch(_BY_SIZE.format(text) if text in _SIZES else text)
        if found is None or ".." in text:
            raise UsageError("MODEL_INVALID", text=text[:200], sizes=", ".join(_SIZES))
        mounted: Literal["bucket", "model"] | None = "model" if mount else None
        return cls(found["repo"], found["file"], "bucket" if found["bucket"] else mounted)

    def variables(self) -> dict[str, str]:
        if self.mounted:
            return {f"{_PREFIXES[0]}GGUF_PATH": f"{_MOUNT}/{self.file}"}
        names = (f"{_PREFIXES[0]}{name}" for name in _OF_MODEL)
        return dict(zip(names, (self.repo, self.file), strict=False))

    def volume(self) -> Volume | None:
        if self.mounted is None:
            return None
        return Volume(type=self.mounted, source=self.repo, mount_path=_MOUNT, read_only=True)

    def lines(self) -> str:
        """Return README.md's lines about the model; a mounted one is not put into the image."""
        models = "" if self.mounted == "bucket" else f"models:\n  - {self.repo}\n"
        image = "" if self.mounted else f"preload_from_hub:\n  - {self.repo} {self.file}\n"
        return models + image


def _require_public(what: str, pin: bytes) -> None:
    """Refuse a value that names a file of this machine: no Space could read it."""
    found = re.search(r'"manifest_url"\s*:\s*"([^"]*)"', pin.decode("utf-8", "replace"))
    if found and _LOCAL_PIN.match(found[1]):
        more = "; a release.json of a trial may be deleted" if what == "release.json" else ""
        raise PublishError("PIN_IS_LOCAL", what=what, url=found[1], more=more)
