"""``spaces/`` alone, as the Hub would install it: a copy, its requirements, the SDK's packages."""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import space
from verbs import PROJECT

SDK = ("gradio[mcp]", "spaces", "huggingface_hub")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The copied folder, and the interpreter of an environment that has nothing else."""
    root = tmp_path_factory.mktemp("alone")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "spaces", root / "space", ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    python = str(root / "venv/bin/python")
    listed = str(root / "space/requirements.txt")
    install = [python, "-m", "pip", "install", "--quiet", "-r", listed, *SDK]
    subprocess.run(install, check=True, capture_output=True)
    return root / "space", python


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_folder_alone_serves_its_page_and_says_that_no_release_is_set(
    alone: tuple[Path, str], tmp_path: Path
) -> None:
    root, python = alone
    with space.serving(tmp_path / "home", python=python, root=root) as served:
        with urllib.request.urlopen(served.url) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{served.url}/gradio_api/mcp/schema") as answer:
            tools = json.load(answer)
        said = served.said()
    assert [tool["name"] for tool in tools] == ["translate", "detect"]
    assert "RELEASE_NOT_CHOSEN" in said
    assert "Traceback" not in said
