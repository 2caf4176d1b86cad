"""A source tree whose build tells in its log which bound ccache was given."""

import re
import shutil
from pathlib import Path

TINY = Path(__file__).parent / "tiny_llama"
_ASKS = """
execute_process(COMMAND ccache --get-config max_size OUTPUT_VARIABLE bound)
message(STATUS "ccache's bound is ${bound}")
"""


def tree(folder: Path) -> Path:
    """Make the tree."""
    made = Path(shutil.copytree(TINY, folder / "llama.cpp"))
    with (made / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(_ASKS)
    return made


def told(log: Path) -> str:
    """Return what ccache said in a build's log, as 4.7 writes it: 4.14 writes ``20.0 GB``."""
    found = re.findall(r"^-- ccache's bound is (.+)$", log.read_text("utf-8"), re.MULTILINE)
    assert len(found) == 1
    return str(found[0]).replace(" ", "").removesuffix("B")
