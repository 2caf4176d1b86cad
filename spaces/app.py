"""The Space: settings → engine → page. What each of them does is in ``translator/``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from llama_loader.errors import SettingError

if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print("python3 app.py: serves the translation page until it is interrupted; no options.")
        print("Variables set it, YAKULINGO_SPACES_… or LLAMA_SPACE_…: docs/settings.md lists them.")
        sys.exit()
    try:
        from translator import page
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if Path(__file__).with_name(package).is_dir():  # our own: a defect
            raise
        listed = shlex.quote(str(Path(__file__).with_name("requirements.txt")))
        missing = SettingError(
            "PACKAGE_MISSING",
            package=package,
            error=error,
            python=shlex.quote(sys.executable),
            wanted=f"-r {listed} 'gradio[mcp]' spaces huggingface_hub, best in an environment of"
            " its own (python3 -m venv)",
        )
        print(missing.render(), file=sys.stderr)
        sys.exit(missing.exit_status)
    page.run(page.app())
