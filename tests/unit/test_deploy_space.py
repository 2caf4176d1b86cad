"""Uploading a Space: its folder alone, its variables, never a secret."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from farm import trust
from farm.errors import PublishError, UsageError
from farm.publish import deploy_space
from tests.rigs import hub_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_repository.Hub]:
    with hub_repository.Hub().serve() as hub:
        monkeypatch.setenv("HF_TOKEN", hub_repository.TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def space(tmp_path: Path) -> Path:
    root = tmp_path / "spaces"
    for name in ("app.py", "requirements.txt", "loader/x.py", "loader/__pycache__/x.pyc", ".env"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "README.md").write_text("A Space.\n")
    return root


FILES = ["README.md", "app.py", "loader/x.py", "requirements.txt"]


def test_what_is_deployed(hub: hub_repository.Hub, space: Path) -> None:
    deploy_space.deploy(deploy_space.plan("me/space", ["YAKULINGO_SPACES_N_CTX=2048"], space))
    repository = hub.repositories["me/space"]
    assert sorted(repository.commits[-1]) == FILES
    assert repository.variables == {"YAKULINGO_SPACES_N_CTX": "2048"}


def test_what_is_gone_here_goes_there(hub: hub_repository.Hub, space: Path) -> None:
    deploy_space.deploy(deploy_space.plan("me/space", (), space))
    hub.repositories["me/space"].commits[-1][".gitattributes"] = b"the Hub's own"
    (space / "loader" / "x.py").unlink()
    deploy_space.deploy(deploy_space.plan("me/space", (), space))
    assert sorted(hub.repositories["me/space"].commits[-1]) == [
        ".gitattributes",
        "README.md",
        "app.py",
        "requirements.txt",
    ]


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_SECRET", "OPENAI_API_KEY", "DB_PASSWORD"])
def test_a_secret_is_refused_and_not_repeated(name: str, space: Path) -> None:
    with pytest.raises(UsageError) as refused:
        deploy_space.plan("me/space", [f"{name}=hush"], space)
    assert refused.value.code == "VARIABLE_IS_SECRET"
    assert "hush" not in refused.value.render()


@pytest.mark.parametrize(
    "value", ["hf_abcdefgh1", "ghp_abcdefgh1", "github_pat_1234567890", "sk-12345678"]
)
def test_a_token_under_any_name_is_refused_and_not_repeated(value: str, space: Path) -> None:
    for text in (f"HARMLESS={value}", value):
        with pytest.raises(UsageError) as refused:
            deploy_space.plan("me/space", [text], space)
        assert value not in refused.value.render()


@pytest.mark.parametrize("text", ["x", "lower=1", "=1", "A B=1"])
def test_what_is_no_variable(text: str, space: Path) -> None:
    with pytest.raises(UsageError):
        deploy_space.plan("me/space", [text], space)


@pytest.mark.parametrize("name", ["me", "me/a/b", "../x", "me/.."])
def test_what_is_no_space(name: str, space: Path) -> None:
    with pytest.raises(UsageError):
        deploy_space.plan(name, (), space)


def test_a_folder_that_is_no_space(space: Path) -> None:
    (space / "app.py").unlink()
    with pytest.raises(PublishError) as refused:
        deploy_space.plan("me/space", (), space)
    assert "app.py" in refused.value.message


def test_a_signing_key_is_not_uploaded(space: Path) -> None:
    trust.generate(space / "farm.key")
    with pytest.raises(PublishError) as refused:
        deploy_space.plan("me/space", (), space)
    assert refused.value.code == "SPACE_HAS_KEY"
    assert "farm.key" in refused.value.message
    (space / "farm.key").unlink()
    assert "farm.key.pub" in deploy_space.plan("me/space", (), space).files


def test_a_hub_that_refuses(hub: hub_repository.Hub, space: Path) -> None:
    hub.refuse = "/commit/"
    with pytest.raises(PublishError) as refused:
        deploy_space.deploy(deploy_space.plan("me/space", (), space))
    assert refused.value.code == "HUB_REFUSED"
    assert len(hub.repositories["me/space"].commits) == 1
