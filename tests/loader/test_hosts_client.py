"""Variables with which the Hub's client cannot be used at all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from verbs import PROJECT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10s", "'10s'"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "socks"),
    ],
)
def test_client_of_the_hub_that_cannot_be_used_is_a_finding_and_no_defect(
    tmp_path: Path, variable: str, value: str, words: str
) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    argv = [sys.executable, "-m", "llama_loader", "doctor", "--url", "file:///nowhere/x.tar.gz"]
    done = subprocess.run(
        argv,
        cwd=PROJECT / "spaces",
        env={**environ, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    (line,) = (line for line in done.stdout.splitlines() if "FAIL model: " in line)
    assert words in line.lower()
    assert "verdict: a model cannot be served" in done.stdout
