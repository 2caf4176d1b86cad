"""Refuse requests that a page of text never makes, before gradio handles them.

Gradio serves more than such a page needs: files of any address in the page's own name, an upload
that keeps files of any visitor, values that it takes for files and downloads, and handlers that end
in a traceback when a program calls them with other values than the page does. Each refusal is one
line for the caller, and at most one line in the log.

``page.launch(**guard.options(max_chars))`` is all that an app needs. The module needs gradio, which
brings Starlette along; nothing else of ``llama_space`` imports it.
"""

from __future__ import annotations

import asyncio
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
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from llama_loader.errors import safe
from llama_space import gradio_bounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MCP: Final = r"mcp(?:/(?:schema)?)?"
_NAME: Final = r"[^/\s]{1,100}"
_POSTED: Final = re.compile(
    rf"/gradio_api/(?:queue/join|cancel|reset|run/predict|call/(?:v2/)?{_NAME}|{_MCP})/?"
)
"""Routes to which the page, callers of the API and MCP clients send data."""
_READ: Final = re.compile(
    r"/?|/(?:config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(?:/(?:192|512))?)/?"
    r"|/(?:static|assets|svelte)/.+"
    r"|/gradio_api/(?:info|openapi\.json|startup-events|app_id|theme\.css|queue/(?:data|status)"
    rf"|heartbeat/{_NAME}|call/(?:v2/)?{_NAME}/{_NAME}|{_MCP})/?"
)
"""What they read."""
_CALLED: Final = re.compile(r"/gradio_api/(?:queue/join|run/predict)/?")
"""The routes of the page's own events."""
_ENDPOINT: Final = re.compile(r"/gradio_api/call/(?P<named>v2/)?(?P<name>[^/]+)/?")
"""Routes to which programs send a list of values, or under ``v2`` values with names."""
_OF_A_CHAT: Final = {"role", "content", "metadata", "options", "type", "text"}
"""Names in a message; with others, such as ``path``, it would stand for a file or a component."""
_BYTES_EACH: Final = 12
"""Most bytes of a character in JSON: two escapes such as ``\\ud83d``."""
_BESIDE: Final = 64 * 1024
"""Bytes of a request beside the text."""
_DEEPEST: Final = 32
"""Levels of lists and objects in each other: gradio and MCP walk through them by recursion."""
_MOST: Final = {"session_hash": 64, "event_id": 64, "oauth_token": 4096}
"""Characters of what gradio keeps of a request beside its texts, and ``event_data``: a message."""
_SECONDS: Final = 30.0
"""Seconds for a whole body."""
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]{1,255})(?::[0-9]{1,5})?")
_FROM_GRADIO: Final = (
    *(AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(FnIndexInferError, gr.Error),
)
"""What gradio raises for values that no page sends, such as an unknown function or language."""
_SESSIONS: Final = 100
"""Visitors whose page gradio keeps, some 100 kB each; a program can act as any number."""
_THREADS: Final = 41
"""Threads for events: with any number but 40, gradio's routes have a separate pool."""
_OPEN: Final = 400
"""Requests that are answered at the same time: each has a descriptor, of which there are 1,024."""
_IMAGES: Final = b"img-src 'self' data: blob:; media-src 'self' data: blob:"
"""A model's answer that names an image elsewhere would have the browser send the chat there."""


def options(max_chars: int, *routes: Route) -> dict[str, Any]:
    """Return the options with which gradio's ``launch`` serves a page of texts, and nothing else.

    Args:
        max_chars: the longest text that the page takes, in characters.
        routes: what the app serves beside gradio, read with GET.
    """
    guard = Middleware(Guard, max_chars=max_chars, own=[one.path for one in routes])
    return {
        "app_kwargs": {"middleware": [guard], "routes": list(routes)},
        "ssr_mode": False,  # Node would answer in front of the guard
        "run_history": False,  # it would send texts to the Hub with the token of this machine
        "state_session_capacity": _SESSIONS,
        "max_threads": _THREADS,
    }


class Guard:
    """An ASGI middleware.

    Args:
        application: what answers the requests that are let through.
        max_chars: the longest text that the page takes, in characters.
        own: paths that the app serves beside gradio.
    """

    def __init__(self, application: ASGIApp, *, max_chars: int, own: Sequence[str] = ()) -> None:
        self._application = application
        self._own = own
        self._open = 0
        self._limit = max_chars * _BYTES_EACH + _BESIDE
        self._most = {**_MOST, "event_data": 2 * max_chars + 4096}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        began = False

        async def receiving() -> Message:  # the body once, then what becomes of the connection
            return messages.pop() if messages else await receive()

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", _IMAGES)]
                message = {**message, "headers": headers}
            await send(message)

        if self._open >= _OPEN:
            await _answer(503, "too many requests are open: try later")(scope, receive, send)
            return
        self._open += 1
        try:
            messages = [await self._checked(scope, receive)]
            await self._application(scope, receiving, sending)
        except HTTPException as error:
            await _answer(error.status_code, error.detail)(scope, receive, send)
        except _FROM_GRADIO as error:
            line = f"refused {scope['method']} {scope['path']}: {type(error).__name__}: {error}"
            sys.stderr.write(f"{safe(line)[:300]}\n")
            if began:
                # or uvicorn logs that the end is missing
                await send({"type": "http.response.body"})
            else:
                await _answer(400, "this request is none that the page makes")(scope, receive, send)
        finally:
            self._open -= 1

    async def _checked(self, scope: Scope, receive: Receive) -> Message:
        """Return the message with the body of a request that the page, or a program, may send."""
        _require_host(scope)
        self._require_route(scope)
        limit = self._limit if scope["method"] == "POST" else 0
        try:
            body = await asyncio.wait_for(_read(receive, limit), _SECONDS)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, "too slow") from error
        asked = _parsed(body, self._most)
        _require_values(scope, asked)
        _require_arguments(scope, asked)
        gradio_bounds.require_read(scope, asked)
        return {"type": "http.request", "body": body, "more_body": False}

    def _require_route(self, scope: Scope) -> None:
        """Refuse what is on neither list; paths as gradio's router sees them."""
        path, method = get_route_path(scope), scope["method"]
        if method == "DELETE":  # ends the session of an MCP client
            known = path.startswith("/gradio_api/mcp") and bool(_POSTED.fullmatch(path))
        else:
            listed = _READ if method in {"GET", "HEAD", "OPTIONS"} else _POSTED
            known = bool(listed.fullmatch(path)) or (listed is _READ and path in self._own)
        if not known:
            raise HTTPException(404, "the page has no such route")


def _require_host(scope: Scope) -> None:
    """Refuse a Host that is not this machine's: gradio writes it into the page; and other Origins.

    On a Space the Hub's proxy chooses the Space by the Host.
    """
    own = {b"x-gradio-server", b"x-gradio-history-bucket"}  # the page's address; where texts go
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in own]
    hosts = {urlsplit(os.environ.get("GRADIO_ROOT_PATH", "")).netloc}
    for name, value in scope["headers"]:
        if name in {b"host", b"x-forwarded-host"}:
            for text in value.decode("latin-1").split(","):
                if name == b"host":  # a page of another origin can send the other one
                    hosts.add(text.strip().lower())
                found = _HOST.fullmatch(text.strip())
                if found is None or not ("SPACE_ID" in os.environ or _is_own(found["name"])):
                    raise HTTPException(
                        421,
                        "this address is not the page's: open it by the machine's name or address,"
                        " or set GRADIO_ROOT_PATH to the address that a proxy gives it",
                    )
    for name, value in scope["headers"]:
        own_page = value.decode("latin-1").lower().partition("://")[2] in hosts - {""}
        if name == b"origin" and not own_page and "SPACE_ID" not in os.environ:
            sentence = "pages of other addresses may not use this one; a proxy's: GRADIO_ROOT_PATH"
            raise HTTPException(403, sentence)


def _is_own(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        here = socket.gethostname().lower()
        public = urlsplit(os.environ.get("GRADIO_ROOT_PATH", "")).hostname
        return host.lower() in {"localhost", here, f"{here}.local", public}
    return True


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


def _parsed(body: bytes, most: dict[str, int]) -> Any:
    """Return a body's parsed JSON, None for an empty one."""
    try:
        asked = json.loads(body or b"null")
        json.dumps(asked, ensure_ascii=False).encode()  # gradio could not send it back
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "a request is JSON, without lone surrogates") from error
    if sum(1 for _ in _levels(asked)) > _DEEPEST:
        raise HTTPException(400, f"a request has at most {_DEEPEST} levels")
    for name, limit in most.items() if isinstance(asked, dict) else ():
        if len(str(asked.get(name))) > limit:
            raise HTTPException(400, f"{name} has at most {limit} characters")
    return asked


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yield the lists and objects in each other, the outermost first."""
    level = [value] if isinstance(value, dict | list) else []
    while level:
        yield level
        inside = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for many in inside for one in many if isinstance(one, dict | list)]


def _require_values(scope: Scope, asked: Any) -> None:
    """Refuse values that no component of the page sends: gradio prints a traceback for them."""
    path = get_route_path(scope)
    if not _CALLED.fullmatch(path):
        return
    function = scope["app"].get_blocks().fns[asked["fn_index"]]
    event = asked.get("event_data")
    about = list(event.values()) if isinstance(event, dict) else event
    objects = [one for level in _levels([asked["data"], about]) for one in level]
    if any(isinstance(one, dict) and set(one) - _OF_A_CHAT for one in objects):
        raise TypeError("a value that is no text")
    for component, value in zip(function.inputs, asked["data"], strict=True):
        if isinstance(component, gr.Dropdown | gr.Textbox):
            if not isinstance(value, str if isinstance(component, gr.Dropdown) else str | None):
                raise TypeError("a value that is no text")
            component.preprocess(value)
    if function.queue and path.startswith("/gradio_api/run"):
        raise HTTPException(404, "this function has a queue: use queue/join")


def _require_arguments(scope: Scope, asked: Any) -> None:
    """Refuse a program's call that gradio would end with ``null`` and a traceback."""
    path = get_route_path(scope)
    if path.startswith("/gradio_api/mcp"):
        for one in (one for level in _levels(asked) for one in level):
            if isinstance(one, dict) and "arguments" in one:
                _require_texts(one["arguments"])
    called = _ENDPOINT.fullmatch(path)
    if called is None or scope["method"] != "POST":
        return
    public = scope["app"].get_blocks().get_api_info()["named_endpoints"]
    if f"/{called['name']}" not in public:
        known = ", ".join(name.lstrip("/") for name in public)
        raise HTTPException(404, f"there is no such endpoint; there are: {known}")
    names = [one["parameter_name"] for one in public[f"/{called['name']}"]["parameters"]]
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
    _require_texts(given)


def _require_texts(given: Any) -> None:
    """Refuse an argument that gradio could take for a file: a list or an object."""
    if sum(len(level) for level in _levels(given)) > 1:
        raise HTTPException(400, "an argument is a text, not a list or an object")


def _answer(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status, headers={"Connection": "close"})
