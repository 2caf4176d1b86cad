"""The page of ``held_page.py`` in a process of its own, for tests that need no model."""

import queue
import subprocess
import sys
import threading
from typing import IO

from verbs import PROJECT

from llama_loader.server import free_port


class Held:
    """The page of rigs/held_page.py, in a process of its own."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._running = 0
        self._process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests/rigs/held_page.py"), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._running += line.strip() == "begun"
            self._lines.put(line.strip())

    def await_line(self, wanted: str) -> None:
        while self._lines.get(timeout=300) != wanted:
            pass

    def begun(self) -> int:
        """How many answers began since they were last counted."""
        return sum(self._lines.get() == "begun" for _ in range(self._lines.qsize()))

    def let_go(self, count: int | None = None) -> None:
        """Have so many answers end, or all that began and were not let go yet."""
        count = self._running if count is None else count
        self._running -= count
        self._tell(str(count))

    def be(self, state: str) -> None:
        """Have the engine say that it is in one of the states of rigs/held_page.py."""
        self._tell(state)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._reader.join()
