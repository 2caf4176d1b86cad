"""Where a model goes on a host whose Hub cache cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llama_loader import self_test
from tests.loader.test_model import SPACES
from tests.rigs.hub import Hub, serving
from tests.rigs.small_disk import mounted

TELL = (
    "from llama_loader import model, settings; s = settings.load();"
    "print(model.get(s, sink=lambda e: print(getattr(e, 'code', '-'))))"
)


def test_model_goes_to_a_private_folder_if_the_hubs_cache_cannot_be_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "temporary").mkdir()
    with mounted(tmp_path / "home", "1m"), serving(Hub(files={"m.gguf": BYTES})) as hub:
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "home")], check=True)
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "temporary"),
            "HF_ENDPOINT": hub.url,
            "PYTHONPATH": str(SPACES),
            "YAKULINGO_SPACES_GGUF_REPO_ID": "me/model",
            "YAKULINGO_SPACES_GGUF_FILENAME": "m.gguf",
        }
        argv = [sys.executable, "-c", TELL]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    told = done.stdout.splitlines()
    assert told[0] == "MODEL_CACHE_TEMPORARY"
    path = Path(told[-1])
    assert path.is_relative_to(tmp_path / "temporary" / f"llama-loader-hub-{os.geteuid()}")
    assert path.read_bytes() == BYTES
    assert path.parents[3].stat().st_mode & 0o077 == 0


BYTES = self_test.MODEL.read_bytes()
