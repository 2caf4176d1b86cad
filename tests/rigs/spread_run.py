"""A run over many hosts in the background, and a source whose build waits for the test."""

import io
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from verbs import PROJECT
from waiting import until

from farm import pipeline, source, targets
from farm.cluster.dispatch import build_spread
from farm.errors import FarmError
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.targets import ArchSet
from farm.terminal.progress import BuildReport

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
LINE = targets.load().line("cpu")
MARKS = [
    pytest.mark.timeout(600),
    # distributed and tornado leave sockets to the garbage collector when a peer is killed.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
"""Of tests that talk to a Dask cluster."""


@dataclass
class Held:
    """A source whose build waits, in a custom target, until the test lets it go."""

    folder: Path

    @property
    def tree(self) -> Path:
        return self.folder / "llama.cpp"

    @property
    def begun(self) -> int:
        marks = self.folder / "begun"
        return len(marks.read_text().splitlines()) if marks.exists() else 0

    def await_begun(self, number: int, run: "Run | None" = None, seconds: float = 180) -> None:
        """Wait until so many builds have come to the step that waits."""
        told = (lambda: f"builds do not begin: {run.told}") if run else "builds do not begin"
        until(lambda: self.begun == number, told, seconds)

    def let_go(self) -> None:
        (self.folder / "go").touch()


class Run(threading.Thread):
    """``build_spread`` in the background; ``told`` is what a person saw, piped."""

    def __init__(self, tree: Path, names: tuple[str, ...], request: BuildRequest) -> None:
        super().__init__(daemon=True)
        line = pipeline.promise_of_this_host(LINE, BuildReport(Console(quiet=True)))
        origin = source.from_folder(tree)
        self.plans = [BuildPlan(ArchSet(name, ""), line, origin) for name in names]
        self.request = request
        self.stream = io.StringIO()
        self.error: FarmError | None = None

    def run(self) -> None:
        with BuildReport(Console(file=self.stream, width=300)) as report:
            try:
                build_spread(self.plans, self.request, report)
            except FarmError as error:
                self.error = error

    @property
    def told(self) -> str:
        return self.stream.getvalue()

    def finish(self) -> str:
        self.join(400)
        assert not self.is_alive(), self.told
        return self.told

    def succeed(self, *names: str) -> str:
        """Wait for the end: these sets, and no others, are built and packed."""
        told = self.finish()
        assert self.error is None, told
        assert tarballs(self.request) == set(names), told
        return told

    def fail(self, code: str = "SETS_FAILED", *, words: str = "") -> str:
        """Wait for the end, which is this error."""
        told = self.finish()
        assert self.error is not None, told
        assert (self.error.code, words in self.error.message) == (code, True), self.error.render()
        return told


def tarballs(request: BuildRequest) -> set[str]:
    return {path.name.split("-")[4] for path in request.out.glob("*.tar.zst")}
