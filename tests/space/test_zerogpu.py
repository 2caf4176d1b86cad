"""ZeroGPU's package as the engine meets it: absent, or with errors of its own."""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from spaces.utils import SimpleQueue

from llama_loader.errors import SettingError
from llama_space import Engine, zerogpu
from llama_space.request import Request
from llama_space.values import Progress, Reserved
from tests.rigs.refusals import refused


def test_zerogpu_without_its_package_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", None)
    with refused("SPACES_MISSING", SettingError, "spaces"):
        Engine()


@pytest.mark.parametrize("error", [RuntimeError("HTTP 500"), ValueError("HTTP\n500"), OSError(5)])
def test_an_error_of_the_package_without_a_title_is_a_failure(error: Exception) -> None:
    failure = zerogpu._explained(error)
    assert (failure.code, failure.exit_status) == ("ZEROGPU_FAILED", 5)
    assert failure.message
    assert "\n" not in failure.message
    assert failure.hint


@pytest.mark.parametrize("error", [TypeError("its queue is closed"), BrokenPipeError(32)])
def test_request_is_sent_once_more_if_its_worker_ended_before_it_began(error: Exception) -> None:
    tried: list[Request] = []

    def answer(_: Any, request: Request) -> Iterator[Progress]:
        tried.append(request)
        if len(tried) == 1:
            raise error
        yield Progress("load")

    items = zerogpu.call(answer, None, Request(["x"], {}, Reserved(15, 5)))  # type: ignore[arg-type]
    assert [*items][-1] == Progress("load")
    assert len(tried) == 2


def test_pipe_to_a_worker_holds_a_request_that_no_worker_reads() -> None:
    class Queue(SimpleQueue):  # type: ignore[misc,type-arg]
        pass

    zerogpu._widen_pipes(Queue)
    queue = Queue()
    writing = threading.Thread(target=queue.put, args=("訳" * 60_000,), daemon=True)
    writing.start()
    writing.join(10)
    assert not writing.is_alive()
    queue.close()
