"""Bound what gradio keeps, and runs beside the requests of a page: answers, and calls of tools.

Gradio has no options for that: importing this module replaces functions of its own. ``guard`` does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradio import http_server, queueing, routes, server_messages, utils
from gradio.mcp import GradioMCPServer
from gradio.queueing import Queue
from gradio.routes import App
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException

from llama_loader.disk import make_private_folder, reason
from llama_loader.errors import StoreError

if TYPE_CHECKING:
    from starlette.types import Scope

_UNREAD: Final = 20
"""Events of a session whose answers its client has not fetched."""
_UNREAD_BY_ALL: Final = 400
"""Such events of all sessions together; each takes up to some 400 kB, the translation of a file."""
_MESSAGES: Final = 500
"""Such messages of a session: 4 a second while its event waits, 25 while it is answered."""
_TOOLS: Final = 16
"""MCP calls at the same time: less than ``_UNREAD``, because gradio makes them in one session."""

if not os.environ.get("GRADIO_TEMP_DIR"):  # gradio's own is one for all users of the machine
    try:
        os.environ["GRADIO_TEMP_DIR"] = str(make_private_folder("gradio"))
    except OSError as error:
        place = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - only a name
        here = "the private folder of gradio's files (GRADIO_TEMP_DIR is not set)"
        sys.exit(StoreError("STORE_FAILED", root=here, why=reason(place, error)).render())
os.environ.pop("GRADIO_NUM_WORKERS", None)  # such processes serve files of any address, unguarded
logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it logs what a caller sends, unescaped
logging.getLogger().addFilter(lambda told: "/mcp/" not in told.pathname)  # by the root logger, too
_described: Final = ContextVar[Any]("_described", default=None)
# the description has the address of the client that asks: gradio would keep the first one's for all
_write: Any = lambda _, told: _described.set(told)  # noqa: E731
App.api_info = property(lambda _: _described.get(), _write)  # type: ignore[assignment]
_mcp_server: Final = GradioMCPServer.create_mcp_server
_send: Final = Queue.send_message
_close_server: Final[Any] = http_server.Server.close
_aside: Final = ThreadPoolExecutor()


def _bounded(self: Any) -> Any:
    """Return gradio's MCP server with tools alone; it refuses a call while many are running.

    Gradio treats an unknown prompt as a tool, and would run it outside that bound.
    """
    server, places, kind = _mcp_server(self), asyncio.Semaphore(_TOOLS), self.types.CallToolRequest
    call, making = server.request_handlers[kind], asyncio.Lock()

    async def calling(asked: Any) -> Any:
        if places.locked():
            raise RuntimeError("too many calls of tools are running: try later")
        async with places:
            async with making:  # the first calls would make a client each
                await asyncio.to_thread(self._get_or_create_client)
            return await call(asked)

    kept = [self.types.PingRequest, self.types.ListToolsRequest]
    server.request_handlers = {one: server.request_handlers[one] for one in kept} | {kind: calling}
    return server


async def _result(self: Any, job: Any) -> list[Any]:
    """Wait for an MCP call without a thread, and cancel it if its caller hangs up."""
    try:
        return [await asyncio.wrap_future(job.future)]
    except asyncio.CancelledError as error:
        done = job.future.done() and not job.future.cancelled()
        if done and isinstance(job.future.exception(), CancelledError):  # its stream has ended
            self._client_instance = None  # with the messages that it keeps of calls
            raise RuntimeError("the answer to this call was lost: send it again") from error
        _aside.submit(_cancel, job)  # it sends requests to this server, which is being ended
        raise


def _cancel(job: Any) -> None:
    """Cancel an event, once it has a number: ``job.cancel`` leaves its messages behind for ever."""
    while not job.communicator.event_id and wait([job.future], 0.05).not_done:
        pass
    job.cancel_fn()


async def _close(iterator: Any) -> None:
    """Close a generator in a thread: on ZeroGPU it waits for its worker and for the device API."""
    if iterator is not None:  # it has not come to its end
        _aside.submit(lambda: asyncio.run(utils.safe_aclose_iterator(iterator)))  # type: ignore[no-untyped-call]


def _keep(queue: Any, event: Any, message: Any) -> None:
    """Keep a message for its reader, or end all events of a session that reads none."""
    messages = queue.pending_messages_per_session.get(event.session_hash)  # None: its reader left
    if event.alive and (messages is None or messages.qsize() >= _MESSAGES):
        _forget(queue, event.session_hash)
    else:
        _send(queue, event, message)
        event.alive = event.alive and message.msg != "process_completed"  # cancelled: sent once


def _forget(queue: Any, session: str) -> None:
    """End a session's events, and keep none of its answers: their reader is told of an error."""
    for event in queue.event_ids_to_events.values():
        event.alive = event.alive and event.session_hash != session
    queue.pending_event_ids_session.pop(session, None)
    queue.pending_messages_per_session.pop(session, None)


def _end(server: Any) -> None:
    """Take no more events; end their streams, all after their present step, then the server."""
    queue = server.running_app.get_blocks()._queue  # noqa: SLF001
    queue.max_size = 0
    server.running_app.stop_event.set()  # its heartbeats would delay the end by 5 s
    for event in [*queue.event_ids_to_events.values()]:
        _keep(queue, event, server_messages.ProcessCompletedMessage(output={}, success=False))
    for _ in range(100):  # at most 5 s; a later step could restart llama-server
        time.sleep(0.05 * any(queue.active_jobs))
    _close_server(server)


_GRADIOS: Any = GradioMCPServer
_GRADIOS.create_mcp_server, _GRADIOS._execute_tool_without_progress = _bounded, _result  # noqa: SLF001
queueing.safe_aclose_iterator = routes.safe_aclose_iterator = _close  # type: ignore[attr-defined]
http_server.Server.close, Queue.send_message = _end, _keep  # type: ignore[method-assign, assignment]
# A cancelled event ends after its present step (``require_read``). Gradio would cancel the tasks of
# its session and function: one that has not begun then keeps its place for ever, one that closes
# its generator keeps that, and a session whose name has gradio's separator is an error for all.
routes.cancel_tasks = lambda _: asyncio.sleep(0, [])  # type: ignore[attr-defined, assignment]


def require_read(scope: Scope, asked: Any) -> None:
    """Refuse a further event of a session that fetches no answers: gradio keeps all of them.

    gradio's data of a session without any is removed here. When there are too many answers,
    the oldest are that are whole, else those of the session with the most unread messages. A
    cancellation that ends no running event would be one more answer.
    """
    if scope["method"] != "POST" or not isinstance(asked, dict):
        return
    queue = scope["app"].get_blocks()._queue  # noqa: SLF001 - gradio has no bound of its own
    unread, answers = queue.pending_event_ids_session, queue.pending_messages_per_session
    path, known = get_route_path(scope), queue.event_ids_to_events
    if path.startswith("/gradio_api/cancel"):
        event = known.get(asked["event_id"])
        named = asked["session_hash"], asked["fn_index"]
        if not (event and event.alive) or named != (event.session_hash, event.fn._id):  # noqa: SLF001
            raise HTTPException(404, "this event has ended")
        event.alive = False
        scope["app"].iterators.pop(asked["event_id"], None)  # its last step brings it back
    for name in {*unread, *answers}:  # of 2,000 gradio would drop one whose event waits
        if not unread.get(name) or name not in answers:
            _forget(queue, name)
    total = sum(map(len, unread.values()))

    def worth(name: str) -> float:
        return math.inf if unread[name].isdisjoint(known) else answers[name].qsize()

    while total >= _UNREAD_BY_ALL:
        total -= len(unread[name := max(unread, key=worth)])
        _forget(queue, name)
    session = len(unread.get(asked.get("session_hash"), ()))
    if path.startswith(("/gradio_api/queue", "/gradio_api/call")) and session >= _UNREAD:
        raise HTTPException(429, "fetch the answers to your events before you send another")
