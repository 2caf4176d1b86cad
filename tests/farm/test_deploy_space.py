"""Uploading a Space: its folder alone, its variables, never a secret."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from farm import trust
from farm.errors import PublishError, UsageError
from farm.options import Deploy
from farm.publish import deploy_space
from farm.publish.deploy_space import Changes
from farm.terminal import show
from tests.rigs import hub_repository
from tests.rigs.refusals import refused


@pytest.fixture
def space(tmp_path: Path) -> Path:
    root = tmp_path / "spaces"
    for name in ("app.py", "requirements.txt", "loader/x.py", "loader/__pycache__/x.pyc", ".env"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "README.md").write_text("A Space.\n")
    return root


RECORD = ".deployed.json"
FILES = [RECORD, "README.md", "app.py", "loader/x.py", "requirements.txt"]


def compared(root: Path, *variables: str, adopt: bool = False) -> Changes:
    return deploy_space.compare(
        deploy_space.plan(Deploy("me/space", variable=variables), root), adopt=adopt
    )


@pytest.fixture
def content(hub: hub_repository.Hub, space: Path) -> dict[str, bytes]:
    """A Space after its first deployment; the dictionary is its present tree."""
    deploy_space.deploy(compared(space))
    return hub.repositories["me/space"].commits[-1]


def test_first_deployment_uploads_folder_and_sets_variables_and_hardware(
    hub: hub_repository.Hub, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, told in (
        ("LLAMA_SPACE_LLAMA_CPP_URL=https://x/y", False),
        ("YAKULINGO_SPACES_N_CTX=2048", True),
    ):
        changes = compared(space, variable)
        assert (changes.head, sorted(changes.added)) == (None, FILES[1:])
        show.deployment(changes, None)
        assert ("note[RELEASE_NOT_CHOSEN]: " in capsys.readouterr().err) == told
    deploy_space.deploy(changes)
    repository = hub.repositories["me/space"]
    assert sorted(repository.commits[-1]) == FILES
    assert repository.variables == {"YAKULINGO_SPACES_N_CTX": "2048"}
    assert repository.hardware == "zero-a10g"


MATTER = """---
title: Any
models:
  - them/large-GGUF
preload_from_hub:
  - them/large-GGUF large.gguf
---
"""


@pytest.mark.parametrize(
    ("model", "repo", "file"),
    [
        ("4b", "mradermacher/translategemma-4b-it-i1-GGUF", "translategemma-4b-it.i1-Q4_K_M.gguf"),
        ("me/small-GGUF:q4/small.gguf", "me/small-GGUF", "q4/small.gguf"),
    ],
)
def test_model_becomes_variables_and_what_the_image_preloads(
    model: str, repo: str, file: str, hub: hub_repository.Hub, space: Path
) -> None:
    (space / "README.md").write_text(MATTER + "The text.\n")
    wanted = Deploy("me/space", model=model, variable=("YAKULINGO_SPACES_N_CTX=1",))
    planned = deploy_space.plan(wanted, space)
    address = deploy_space.deploy(deploy_space.compare(planned))
    assert address == "https://me-space.hf.space"
    repository = hub.repositories["me/space"]
    assert repository.variables == {
        "YAKULINGO_SPACES_GGUF_REPO_ID": repo,
        "YAKULINGO_SPACES_GGUF_FILENAME": file,
        "YAKULINGO_SPACES_N_CTX": "1",
    }
    assert repository.commits[-1]["README.md"].decode() == (
        MATTER.replace("large-GGUF large.gguf", f"large-GGUF {file}").replace(
            "them/large-GGUF", repo
        )
        + "The text.\n"
    )
    assert deploy_space.compare(planned).changed == ()
    again = deploy_space.compare(deploy_space.plan(Deploy("me/space"), space))
    assert (again.changed, again.unset) == ((), ())
    assert again.deployment.model == f"the Space's own: {repo} {file}"


def test_space_that_has_its_release_keeps_it_until_another_one_is_named(
    hub: hub_repository.Hub, space: Path
) -> None:
    pinned = {"manifest_url": "https://h.example/manifest.json"}
    deploy_space.deploy(
        deploy_space.compare(deploy_space.plan(Deploy("me/space"), space, release=pinned))
    )
    assert "release.json" in hub.repositories["me/space"].commits[-1]
    for planned, deleted in (
        (deploy_space.plan(Deploy("me/space"), space), ()),
        (deploy_space.plan(Deploy("me/space"), space, release={}), ("release.json",)),
    ):
        changes = deploy_space.compare(planned)
        assert (changes.deleted, changes.deployment.names_release) == (deleted, not deleted)
        deploy_space.deploy(changes)


def test_models_of_the_real_space_are_all_replaced() -> None:
    planned = deploy_space.plan(Deploy("me/space", model="12b"))
    front = planned.files["README.md"].decode().split("---")[1]
    assert front.count("translategemma-12b-it") == 3
    assert "27b" not in front


@pytest.mark.parametrize(
    ("model", "kind", "front"),
    [
        ("me/small-GGUF:q4/small.gguf", "model", "title: Any\nmodels:\n  - me/small-GGUF\n---"),
        ("bucket:me/small-GGUF:q4/small.gguf", "bucket", "title: Any\n---"),
    ],
)
def test_mounted_model_is_a_read_only_volume_and_a_path_and_not_in_the_image(
    model: str, kind: str, front: str, hub: hub_repository.Hub, space: Path
) -> None:
    (space / "README.md").write_text(MATTER + "The text.\n")
    planned = deploy_space.plan(Deploy("me/space", model="4b"), space)
    deploy_space.deploy(deploy_space.compare(planned))
    repository = hub.repositories["me/space"]
    own = {"type": "bucket", "source": "me/data", "mountPath": "/data"}
    repository.volumes = [own, {"type": "model", "source": "me/old", "mountPath": "/models"}]
    planned = deploy_space.plan(Deploy("me/space", model=model, mount=kind == "model"), space)
    changes = deploy_space.compare(planned)
    deploy_space.deploy(changes)
    assert repository.volumes == [
        own,
        {"type": kind, "source": "me/small-GGUF", "mountPath": "/models", "readOnly": True},
    ]
    assert repository.variables == {"YAKULINGO_SPACES_GGUF_PATH": "/models/q4/small.gguf"}
    assert changes.unset == ("YAKULINGO_SPACES_GGUF_FILENAME", "YAKULINGO_SPACES_GGUF_REPO_ID")
    assert repository.commits[-1]["README.md"].decode() == f"---\n{front}\nThe text.\n"
    again = deploy_space.compare(deploy_space.plan(Deploy("me/space"), space))
    assert (again.changed, again.unset) == ((), ())
    assert again.deployment.model == "the Space's own: /models/q4/small.gguf"
    for path in ("/models/b.gguf", "/data/c.gguf", "app.py"):
        assert compared(space, f"LLAMA_SPACE_GGUF_PATH={path}").changed == ()
    with refused("VARIABLE_INVALID", UsageError, r"\(the Space's volumes: /data, /models\)"):
        compared(space, "LLAMA_SPACE_GGUF_PATH=/home/me/a.gguf")
    with refused("VARIABLE_INVALID", UsageError, hint="--model OWNER/REPO:FILE"):
        deploy_space.compare(
            deploy_space.plan(Deploy("me/new", variable=("LLAMA_SPACE_GGUF_PATH=a.gguf",)), space)
        )


def test_model_and_variable_that_contradict_another_are_refused(space: Path) -> None:
    with refused("VARIABLE_TWICE", UsageError):
        deploy_space.plan(
            Deploy("me/space", model="4b", variable=("YAKULINGO_SPACES_GGUF_FILENAME=x.gguf",)),
            space,
        )


def test_second_deployment_deletes_only_what_the_first_uploaded(
    hub: hub_repository.Hub, space: Path, content: dict[str, bytes]
) -> None:
    content.update({".gitattributes": b"the Hub's own", "mine/data.csv": b"a person's"})
    (space / "loader" / "x.py").unlink()
    (space / "app.py").write_text("# another\n")
    changes = compared(space)
    assert (changes.added, changes.changed) == ((), ("app.py",))
    assert (changes.deleted, changes.kept) == (("loader/x.py",), ())
    deploy_space.deploy(changes)
    assert sorted(hub.repositories["me/space"].commits[-1]) == sorted(
        [RECORD, ".gitattributes", "README.md", "app.py", "mine/data.csv", "requirements.txt"]
    )


def test_file_that_was_edited_in_the_space_is_kept(
    hub: hub_repository.Hub, space: Path, content: dict[str, bytes]
) -> None:
    content["loader/x.py"] = b"# edited on the Hub\n"
    (space / "loader" / "x.py").unlink()
    changes = compared(space)
    assert (changes.deleted, changes.kept) == ((), ("loader/x.py",))
    deploy_space.deploy(changes)
    assert hub.repositories["me/space"].commits[-1]["loader/x.py"] == b"# edited on the Hub\n"


def test_large_file_is_recognised_by_its_sha256(space: Path, content: dict[str, bytes]) -> None:
    del content
    (space / "model.bin").write_bytes(b"x" * hub_repository.LARGE)
    deploy_space.deploy(compared(space))
    assert compared(space) == replace(compared(space), added=(), changed=(), deleted=(), kept=())


@pytest.mark.usefixtures("hub")
def test_what_git_ignores_stays_here_and_without_git_models_and_wheels(
    space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (space / "out").mkdir()
    for name in ("model.gguf", "x.whl", "loader/tiny.gguf", "release.json", "out/a.bin"):
        (space / name).write_bytes(b"{}" + b" " * 600_000)
    uploaded = {*FILES[1:], "loader/tiny.gguf", "release.json"}
    assert set(compared(space).added) == {*uploaded, "out/a.bin"}
    own = "-c user.name=me -c user.email=me@x.invalid commit -q --allow-empty -m first"
    for argv in ("init -q", own):
        subprocess.run(["git", "-C", space.parent, *argv.split()], check=True)
    (space.parent / ".gitignore").write_text("*.gguf\n*.whl\n!tiny.gguf\nout/\nrelease.json\n")
    changes = compared(space)
    assert set(changes.added) == uploaded
    show.deployment(changes, None)
    assert "FILES_LEFT_OUT]: model.gguf, a.bin, x.whl (2 MB)" in capsys.readouterr().err


def test_variable_that_allows_the_cpu_goes_with_the_hardware(
    hub: hub_repository.Hub, space: Path
) -> None:
    def with_(hardware: str | None, *variable: str) -> Changes:
        wanted = Deploy("me/space", hardware=hardware, variable=variable)
        return deploy_space.compare(deploy_space.plan(wanted, space))

    deploy_space.deploy(with_("cpu-basic"))
    ((name, value),) = hub.repositories["me/space"].variables.items()
    assert with_("zerogpu", f"{name}={value}").unset == with_(None).unset == ()
    assert with_("zerogpu").unset == (name,) == ("YAKULINGO_SPACES_ALLOW_CPU",)


def test_space_of_another_person_is_refused_until_adopted(
    hub: hub_repository.Hub, space: Path
) -> None:
    theirs = {"README.md": b"theirs", "app.py": b"theirs", "release.json": b"{}"}
    hub.repositories["me/space"] = hub_repository.Repository(commits=[theirs])
    with refused("SPACE_NOT_OURS", PublishError) as caught:
        compared(space)
    assert "release.json" in caught.value.message
    assert hub.repositories["me/space"].commits == [theirs]
    deploy_space.deploy(compared(space, adopt=True))
    assert hub.repositories["me/space"].commits[-1]["release.json"] == b"{}"


def test_new_space_with_the_hubs_own_files_alone_is_accepted(
    hub: hub_repository.Hub, space: Path
) -> None:
    own = {".gitattributes": b"*.gguf filter=lfs", "README.md": b"---"}
    hub.repositories["me/space"] = hub_repository.Repository(commits=[own])
    assert compared(space).changed == ("README.md",)


@pytest.mark.parametrize(
    "record",
    [b'{"files": 3}', b'{"x":' + b"[" * 99_999, b'{"files":["\xff"]}'],
    ids=["kind", "depth", "bytes"],
)
def test_damaged_record_deletes_nothing(
    space: Path, content: dict[str, bytes], record: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content[RECORD] = record
    with refused("SPACE_RECORD_DAMAGED", PublishError):
        compared(space)

    def redirected(*_: object, **__: object) -> Iterator[bytes]:
        raise requests.exceptions.InvalidURL("redirected to ftp://x/")
        yield

    monkeypatch.setattr(deploy_space.hub, "content", redirected)
    with refused("HUB_REFUSED", PublishError, "redirected to ftp://x/"):
        compared(space)


def test_variable_of_another_type_is_an_answer_that_the_farm_cannot_use(
    hub: hub_repository.Hub, space: Path
) -> None:
    deploy_space.deploy(compared(space))
    hub.repositories["me/space"].variables["LLAMA_SPACE_GGUF_REPO_ID"] = 5  # type: ignore[assignment]
    with refused("PLACE_UNUSABLE", PublishError, "TypeError"):
        compared(space)


def test_commit_since_the_comparison_is_not_overwritten(
    hub: hub_repository.Hub, space: Path, content: dict[str, bytes]
) -> None:
    changes = compared(space)
    hub.repositories["me/space"].commits.append({**content, "new.py": b""})
    with pytest.raises(PublishError):
        deploy_space.deploy(changes)
    assert "new.py" in hub.repositories["me/space"].commits[-1]


def test_hardware_of_an_existing_space_changes_only_if_asked(
    hub: hub_repository.Hub, space: Path, content: dict[str, bytes]
) -> None:
    del content
    hub.repositories["me/space"].hardware = "l4x1"
    deploy_space.deploy(compared(space))
    assert hub.repositories["me/space"].hardware == "l4x1"
    deploy_space.deploy(compared(space), hardware=deploy_space.hardware("t4-small"))
    assert hub.repositories["me/space"].hardware == "t4-small"
    assert deploy_space.hardware("zerogpu") is deploy_space.HARDWARE


@pytest.mark.parametrize(
    "url",
    ["file:///tmp/manifest.json", "http://127.0.0.1:8000/m.json", "FILE:/x", "http://[::1]/m"],
)
def test_pin_that_only_this_machine_can_read_is_refused(url: str, space: Path) -> None:
    (space / "release.json").write_text(json.dumps({"manifest_url": url}))
    with refused("PIN_IS_LOCAL", PublishError, hint="invoke publish --to hf:OWNER/REPO"):
        deploy_space.plan(Deploy("me/space"), space)


TOKENS = ("hf_abcdefgh1", "ghp_abcdefgh1", "github_pat_1234567890", "sk-12345678")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        *((f"{name}=hush", "hush") for name in ("HF_TOKEN", "MY_SECRET")),
        *((f"{name}=hush", "hush") for name in ("OPENAI_API_KEY", "DB_PASSWORD")),
        *((f"HARMLESS={token}", token) for token in TOKENS),
    ],
)
def test_a_secret_is_refused_and_not_repeated(text: str, secret: str, space: Path) -> None:
    with refused("VARIABLE_IS_SECRET", UsageError) as caught:
        deploy_space.plan(Deploy("me/space", variable=(text,)), space)
    assert secret not in caught.value.render()


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        *((name, "A=1") for name in ("me", "me/a/b", "../x", "me/..")),
        *(("me/space", text) for text in ("x", "lower=1", "=1", "A B=1", *TOKENS)),
    ],
)
def test_what_is_no_space_or_no_variable(name: str, variable: str, space: Path) -> None:
    with pytest.raises(UsageError) as caught:
        deploy_space.plan(Deploy(name, variable=(variable,)), space)
    assert variable not in TOKENS or variable not in caught.value.render()


def test_a_folder_that_is_no_space(space: Path) -> None:
    (space / "app.py").unlink()
    with pytest.raises(PublishError, match=r"app\.py"):
        deploy_space.plan(Deploy("me/space"), space)


def test_a_signing_key_is_not_uploaded(space: Path) -> None:
    trust.generate(space / "farm.key")
    with refused("SPACE_HAS_KEY", PublishError, r"farm\.key"):
        deploy_space.plan(Deploy("me/space"), space)
    (space / "farm.key").unlink()
    assert "farm.key.pub" in deploy_space.plan(Deploy("me/space"), space).files
