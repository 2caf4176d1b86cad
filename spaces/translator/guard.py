"""Refuse requests that the page never makes, before gradio handles them.

Gradio serves more routes than a page of text needs: an upload that keeps files of any visitor, and
handlers that end in a traceback when a program calls them with other values than the page does.
Each refusal is one line for the caller, and at most one line in the log.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import json
import os
import re
import socket
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import gradio as gr
from gradio.route_utils import FnIndexInferError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from llama_loader.errors import safe

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POSTED: Final = re.compile(
    r"/gradio_api/(?:queue/join|cancel|reset|run/predict|call/.+|mcp(?:/.*)?)/?"
)
"""Where the page, the API's callers and MCP clients send something to."""
_CALLED: Final = re.compile(r"/gradio_api/(?:queue/join|run/predict)/?")
"""Where the page's own events go."""
_ENDPOINT: Final = re.compile(r"/gradio_api/call/(?P<named>v2/)?(?P<name>[^/]+)/?")
"""Where programs send a list of values to, or under ``v2`` values with names."""
_CLOSED: Final = re.compile(r"/monitoring.*|/gradio_api/(?:deep_link|(?:upload|runs|run-).*)")
"""Routes that are read with GET, and that no part of the page uses."""
_BYTES_EACH: Final = 12
"""Most bytes of a character in JSON: two escapes such as ``\\ud83d``."""
_BESIDE: Final = 64 * 1024
"""Bytes of a request beside the text."""
_DEEPEST: Final = 32
"""Levels of lists and objects in each other: gradio and MCP walk through them by recursion."""
_MOST: Final = {"session_hash": 64, "event_id": 64, "event_data": 4096, "oauth_token": 4096}
"""Characters of what gradio keeps of a request beside its texts."""
_SECONDS: Final = 30.0
"""For a whole body."""
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]{1,255})(?::[0-9]{1,5})?")
_FROM_GRADIO: Final = (
    *(AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(FnIndexInferError, gr.Error),
)
"""What gradio raises for values that no page sends, such as an unknown function or language."""


class Guard:
    """An ASGI middleware.

    Args:
        application: what answers the requests that are let through.
        max_chars: the longest text that the page takes, in characters.
    """

    def __init__(self, application: ASGIApp, *, max_chars: int) -> None:
        self._application = application
        self._limit = max_chars * _BYTES_EACH + _BESIDE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        began = False

        async def receiving() -> Message:  # the body once, then what becomes of the connection
            return next(messages, None) or await receive()

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            _require_host(scope)
            _require_route(scope)
            body = await asyncio.wait_for(_read(receive, self._limit), _SECONDS)
            asked = _parsed(body)
            _require_values(scope, asked)
            _require_arguments(scope, asked)
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])
            await self._application(scope, receiving, sending)
        except (HTTPException, asyncio.TimeoutError) as error:
            refused = error if isinstance(error, HTTPException) else HTTPException(408, "too slow")
            await _answer(refused.status_code, refused.detail)(scope, receive, send)
        except _FROM_GRADIO as error:
            line = f"refused {scope['method']} {scope['path']}: {type(error).__name__}: {error}"
            sys.stderr.write(f"{safe(line)[:300]}\n")
            if not began:
                await _answer(400, "this request is none that the page makes")(scope, receive, send)


def _require_host(scope: Scope) -> None:
    """Refuse a Host that is not this machine's: gradio writes it into the page.

    On a Space the Hub's proxy chooses the Space by it.
    """
    own = {b"x-gradio-server", b"x-gradio-history-bucket"}  # the page's address; where texts go
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in own]
    for name, value in scope["headers"]:
        if name in {b"host", b"x-forwarded-host"}:
            for text in value.decode("latin-1").split(","):
                found = _HOST.fullmatch(text.strip())
                if found is None or not ("SPACE_ID" in os.environ or _is_own(found["name"])):
                    raise HTTPException(
                        421,
                        "this address is not the page's: open it by the machine's name or address,"
                        " or set GRADIO_ROOT_PATH to the address that a proxy gives it",
                    )


def _is_own(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        here = socket.gethostname().lower()
        public = urlsplit(os.environ.get("GRADIO_ROOT_PATH", "")).hostname
        return host.lower() in {"localhost", here, f"{here}.local", public}
    return True


def _require_route(scope: Scope) -> None:
    path, reads = scope["path"], scope["method"] in {"GET", "HEAD", "OPTIONS", "DELETE"}
    if _CLOSED.fullmatch(path) or not (reads or _POSTED.fullmatch(path)):
        raise HTTPException(404, "the page has no such route")


async def _read(receive: Receive, limit: int) -> bytes:
    """Read a whole body of at most ``limit`` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            raise HTTPException(413, f"a request may have {limit} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _parsed(body: bytes) -> Any:
    """Return what a body's JSON says, None for an empty one."""
    try:
        asked = json.loads(body or b"null")
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "a request is JSON") from error
    level: list[Any] = [[asked]]
    for _ in range(_DEEPEST + 1):
        inside = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for many in inside for one in many if isinstance(one, dict | list)]
    if level:
        raise HTTPException(400, f"a request has at most {_DEEPEST} levels")
    for name, most in _MOST.items() if isinstance(asked, dict) else ():
        if len(str(asked.get(name))) > most:
            raise HTTPException(400, f"{name} has at most {most} characters")
    return asked


def _require_values(scope: Scope, asked: Any) -> None:
    """Refuse values that no component of the page sends: gradio prints a traceback for them."""
    if _CALLED.fullmatch(scope["path"]):
        function = scope["app"].get_blocks().fns[asked["fn_index"]]
        for component, value in zip(function.inputs, asked["data"], strict=True):
            kind = str if isinstance(component, gr.Dropdown) else str | None
            if not isinstance(value, kind):
                raise TypeError("a value that is no text")
            component.preprocess(value)


def _require_arguments(scope: Scope, asked: Any) -> None:
    """Refuse a program's call that gradio would end with ``null`` and a traceback."""
    called = _ENDPOINT.fullmatch(scope["path"])
    if called is None or scope["method"] != "POST":
        return
    every = scope["app"].get_blocks().fns.values()
    public = {one.api_name: one for one in every if one.api_visibility == "public"}
    if called["name"] not in public:
        raise HTTPException(404, f"there is no such endpoint; there are: {', '.join(public)}")
    names = list(inspect.signature(public[called["name"]].fn).parameters)
    given = asked if called["named"] else asked.get("data") if isinstance(asked, dict) else None
    came = "none came"
    if called["named"] and isinstance(given, dict):
        unknown = ", ".join(sorted(set(given) - set(names)))
        came = unknown and f"unknown: {safe(unknown)[:100]}"
    elif isinstance(given, list) and not called["named"]:
        came = "" if len(given) == len(names) else f"{len(given)} came"
    if came:
        form = "by these names" if called["named"] else 'in this order, as {"data": […]}'
        takes = f"{called['name']} takes {len(names)} values: {', '.join(names)}"
        raise HTTPException(400, f"{takes}, {form}; {came}")


def _answer(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status, headers={"Connection": "close"})
