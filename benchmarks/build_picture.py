"""A picture of a terminal on which three sets are built: docs/figures/build-three-sets.svg.

    python3 -m nox -s build-picture

A real `invoke build-cuda --arch-set blackwell` with the local engine and NVIDIA's wheels, of a
small source with six CUDA files (tests/rigs/tiny_cuda.py), on a pseudo-terminal. What one shows of
the bytes is worked out by pyte; the picture is of the moment at which the second set is compiled.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyte
from rich.console import Console
from rich.text import Text

from tests.rigs import terminal, tiny_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS: Final = 100
UNITS: Final = ("argsort", "concat", "norm", "rope", "scale", "softmax")
GROUP: Final = "blackwell"
COMMAND: Final = ("build-cuda", "--arch-set", GROUP, "--line", "cu130")
MOMENT: Final = re.compile(r"1 of 3 sets.* compile +(?:[6-9]|1[0-3])/\d+ .* waiting", re.DOTALL)


def written(folder: Path) -> str:
    """Build in a pseudo-terminal; returns every byte that came."""
    source, out = tiny_cuda.tree(folder, UNITS), folder / "dist"
    where = ("--engine", "local", "--toolkit", "pypi", "--source", str(source), "--out", str(out))
    argv = [sys.executable, "-m", "invoke", *COMMAND, *where, "--fresh"]
    status, told = terminal.run(argv, COLUMNS, os.environ, limit=900)
    if status != 0:
        sys.exit(told)
    return told.replace(f"{folder}/", "")


def screens(told: str) -> Iterator[list[Text]]:
    """Give the screen after each line or redrawing, as coloured lines."""
    screen = pyte.Screen(COLUMNS, terminal.ROWS)
    stream = pyte.Stream(screen)
    for piece in re.split(r"(?<=\n)(?=\r?\x1b\[2K|\S)|(?<=\S)(?=\r\x1b\[2K)", told):
        stream.feed(piece)
        yield [_line(screen, row) for row in range(screen.cursor.y + 1)]


def _line(screen: pyte.Screen, row: int) -> Text:
    text = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[row][column]
        colour = "" if cell.fg == "default" else cell.fg
        text.append(cell.data, f"{'bold ' if cell.bold else ''}{colour}".strip())
    text.rstrip()
    return text


def main() -> None:
    """Build, find the moment, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/build-three-sets.svg"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="build-picture-") as folder:
        told = written(Path(folder))
    shown = [one for one in screens(told) if MOMENT.search("\n".join(map(str, one)))]
    if not shown:
        sys.exit("the second set was never seen compiling")
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text(f"$ invoke {' '.join(COMMAND)}", style="bold"))
    for line in shown[0]:
        console.print(line)
    svg = console.export_svg(title="three sets on one machine", unique_id="build")
    # rich names fonts of a content network: a picture in a README must ask for nothing
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    options.out.write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
