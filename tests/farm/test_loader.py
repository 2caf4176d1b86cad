"""The wheel ``llama-space``: what is in it, and the same bytes from the same sources."""

import os
import shutil
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from farm import loader
from farm.errors import PackError
from tests.rigs.refusals import refused

IGNORED = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loader.build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_loader_and_engine_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"llama_loader", "llama_space"}
    sources = loader.SOURCE.glob("llama_*/*")
    wanted = {str(path.relative_to(loader.SOURCE)) for path in sources if path.is_file()}
    assert set(names) == wanted


def test_module_in_the_folder_where_a_verb_is_typed_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("build", "llama_loader", "setuptools"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the folder ran')")
    monkeypatch.chdir(tmp_path)
    loader.build_wheel(tmp_path / "out")
    assert loader.run("--help").returncode == 0


def test_wheel_requires_what_the_space_requires(built: Path) -> None:
    with zipfile.ZipFile(built) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(opened.read(name).decode())
    listed = (loader.SOURCE / "requirements.txt").read_text().splitlines()
    wanted = [line.partition("#")[0].strip() for line in listed]
    found = metadata.get_all("Requires-Dist") or []
    assert sorted(map(_plain, found)) == sorted(map(_plain, filter(None, wanted)))


def _plain(requirement: str) -> str:
    return requirement.replace(" ", "").replace("'", '"')


def test_wheel_has_the_same_bytes_from_another_place_and_umask(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(loader.SOURCE, copy, ignore=IGNORED)
    for path in copy.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before = os.umask(0o077)
    try:
        again = loader.build_wheel(tmp_path / "out", copy)
    finally:
        os.umask(before)
    assert again.read_bytes() == built.read_bytes()


def test_source_that_cannot_be_built_is_one_error_and_leaves_no_wheel(tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(loader.SOURCE, copy, ignore=IGNORED)
    (copy / "pyproject.toml").write_text("[project]\nname = 3\n")
    with refused("WHEEL_FAILED", PackError):
        loader.build_wheel(tmp_path / "out", copy)
    assert list((tmp_path / "out").iterdir()) == []
