"""One request: checks what a caller asks for. No side effects."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from llama_loader.errors import SettingError
from llama_space.reservation import Reserved

if TYPE_CHECKING:
    from llama_loader.settings import Settings

STAGES_OF_A_START: Final = ("devices", "start", "first token")
"""What the start of a server takes, after everything that needs no GPU."""
_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_OF_A_MESSAGE: Final = ("role", "content", "name", "tool_calls", "tool_call_id")
"""What llama-server reads of a message; gradio's ``metadata`` and ``options`` are for its page."""
_SET_BY_THE_ENGINE: Final = ("messages", "n", "prompt", "stream", "stream_options")
_ALIKE: Final = 0.85
"""``max_token`` is 0.95 like ``max_tokens``; ``top_k`` is 0.67 like ``stop``."""
_OPTIONS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    # what a value must be; in words
    "max_tokens": (lambda value: type(value) is int and value > 0, "a number of tokens above 0"),
    "temperature": (lambda value: isinstance(value, int | float) and value >= 0, "0 or more"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "stop": (lambda value: _all(value, str), "a text, or a list of texts"),
}

_NOTHING: Final = Reserved(0, 0)


@dataclass(frozen=True)
class Request:
    """What llama-server is asked.

    Attributes:
        asked: the messages of a chat, or a text to continue.
        options: ``max_tokens``, ``temperature``, and further fields of llama-server's request.
        reserved: GPU seconds, to ask ZeroGPU for.
    """

    asked: list[dict[str, Any]] | str
    options: Mapping[str, Any]
    reserved: Reserved = _NOTHING


def chat(messages: object, options: Mapping[str, Any], settings: Settings) -> Request:
    """Return the request for a chat's answer.

    Raises:
        SettingError: something in it cannot be sent; the hint says what would be right.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise _invalid(f"messages is {reprlib.repr(messages)}, which is not a list of messages")
    asked = [_message(number, one) for number, one in enumerate(messages, 1)]
    if not asked:
        raise _invalid("the list of messages is empty")
    return _checked(asked, options, settings)


def completion(prompt: object, options: Mapping[str, Any], settings: Settings) -> Request:
    """Return the request for a text's continuation; raises as ``chat`` does."""
    if not isinstance(prompt, str):
        hint = 'a prompt is a text such as "Once upon a time"; engine.chat() takes messages'
        raise SettingError("REQUEST_INVALID", f"the prompt is {reprlib.repr(prompt)}", hint=hint)
    return _checked(prompt, options, settings)


def _message(number: int, given: object) -> dict[str, Any]:
    """Return what llama-server reads of a message."""
    if not isinstance(given, Mapping):
        raise _invalid(f"message {number} is {reprlib.repr(given)}, which is not a dictionary")
    if given.get("role") not in _ROLES:
        raise _invalid(f"the role of message {number} is {reprlib.repr(given.get('role'))}")
    content = given.get("content")
    if not (isinstance(content, str) or _all(content, Mapping) or given.get("tool_calls")):
        raise _invalid(f"the content of message {number} is {reprlib.repr(content)}")
    return {name: given[name] for name in _OF_A_MESSAGE if given.get(name) is not None}


def _checked(
    asked: list[dict[str, Any]] | str, options: Mapping[str, Any], settings: Settings
) -> Request:
    most = settings.max_new_tokens or settings.n_ctx  # it ends where the context ends, too
    usual = {"max_tokens": most, "temperature": settings.temperature}
    given = {**usual, **{name: one for name, one in options.items() if one not in (None, (), [])}}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    _require_known(given)
    for name, (fits, accepts) in _OPTIONS.items():
        if name in given and not fits(given[name]):
            message, hint = f"{name} is {reprlib.repr(given[name])}", f"{name} takes {accepts}"
            raise SettingError("REQUEST_INVALID", message, hint=hint)
    try:  # as plain data: it crosses a process, and goes to the server as JSON
        plain, extra = json.loads(json.dumps([asked, given], allow_nan=False))
    except (TypeError, ValueError) as error:
        message = f"the request cannot be written as JSON: {error}"
        hint = "messages and sampling options are texts, numbers, lists and dictionaries"
        raise SettingError("REQUEST_INVALID", message, hint=hint) from error
    return Request(plain, extra)


def _require_known(given: Mapping[str, Any]) -> None:
    """Refuse a misspelt option, which llama-server would ignore, and what the engine sets."""
    for name in given.keys() - _OPTIONS.keys():
        near = difflib.get_close_matches(name, _OPTIONS, 1, _ALIKE)
        if near:
            message, hint = f"there is no option {name!r}", f"did you mean {near[0]}?"
            raise SettingError("REQUEST_INVALID", message, hint=hint)
        if name in _SET_BY_THE_ENGINE:
            message = f"{name} cannot be chosen: the engine streams one answer to one request"
            raise SettingError("REQUEST_INVALID", message, hint="leave it out")


def _all(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, kind) for one in value)


def _invalid(message: str) -> SettingError:
    return SettingError(
        "MESSAGE_INVALID",
        message,
        hint='messages is a list such as [{"role": "user", "content": "Hello"}]; a role is one of'
        f" {', '.join(_ROLES)}; engine.complete() takes a text",
    )
