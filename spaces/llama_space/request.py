"""One request: what is sent to llama-server, and the GPU seconds that it reserves.

ZeroGPU cuts off a call that takes longer than it reserved. A call that reserves more waits longer
in the queue, and is refused if it reserves more than the visitor has left (docs/zerogpu.md). So
the seconds are estimated from what this machine has shown.

A malformed request raises ``SettingError`` at once; its hint names what is accepted.
"""

import difflib
import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from llama_loader.errors import LoaderError, SettingError
from llama_loader.settings import Settings
from llama_loader.store import Store
from llama_space.values import Figures, Reserved

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
    "temperature": (lambda value: isinstance(value, int | float) and 0 <= value <= 10, "0 to 10"),  # noqa: PLR2004
    "seed": (lambda value: type(value) is int, "a whole number"),
    "stop": (lambda value: _all(value, str), "a text, or a list of texts"),
}

SHORTEST, LONGEST, LONGEST_WORK = 15, 120, 60
"""Seconds; ZeroGPU's own default is 60. The least leaves room for a start where ZeroGPU gives a
call to another worker than the warm one. A ``Work`` ends in time and is called again."""
_TOKENS: Final = ((0x250, 0.25), (0x2E80, 0.5), (0x110000, 0.7))
"""Tokens a character below each code point: Latin script, other alphabets, CJK. Gemma's tokenizer
makes 0.20 of English, 0.23 of German, 0.56 of Japanese, 0.70 of Chinese (docs/zerogpu.md)."""
_TEMPLATE_TOKENS: Final = 64
"""Tokens of a short answer, and of what a chat template and a prompt add to a text."""
_FIRST_FLOOR, _FIRST_RATE = 1.0, 3e9
"""Seconds of a start without a model, and bytes of a model that a start loads in a second. A model
of 27B's size (17.7 GB, ``benchmarks/noise_model.py --size 27b``) took 3.8 to 4.8 s on one H200 with
its file in the page cache."""
_FIRST_BANDWIDTH, _FIRST_SPEED = 0.7e12, 150.0
"""Bytes of weights that a GPU is assumed to read in a second, of the 0.9 TB/s of half an RTX PRO
6000; and the tokens a second that are assumed of any small model."""
_PROMPT_SPEED: Final = 40.0
"""A prompt is read at least so many times faster than an answer is written."""
MARGIN, _SPARE = 1.2, 3.0
"""A factor for a busy GPU; seconds for the fork, the connection and the end."""
_KEPT: Final = 5
"""Starts and answers that are remembered; the slowest counts."""
_MEASURABLE: Final = 16
"""Tokens of the shortest answer whose speed counts."""
_MAX_BYTES: Final = 4096
_Seconds = Annotated[float, Meta(gt=0, le=86400)]
_Speed = Annotated[float, Meta(gt=0, le=1e6)]
Work = Callable[[Callable[..., Iterator[Any]], Callable[[], bool]], Iterator[Any]]
"""Several requests on one GPU: ``work(ask, enough)``; see ``Engine.together``."""


@dataclass(frozen=True)
class Request:
    """A request to llama-server."""

    # the messages of a chat, or a text to continue; for ``work``, its texts
    asked: list[dict[str, Any]] | list[str] | str
    # ``max_tokens``, ``temperature``, and further fields of llama-server's request
    options: Mapping[str, Any]
    reserved: Reserved = field(default_factory=Reserved)  # GPU seconds, to ask ZeroGPU for
    work: Work | None = None  # makes the requests, one after another


def checked(asked: object, options: Mapping[str, Any], settings: Settings) -> Request:
    """Return the request for a chat's answer, or for a text's continuation."""
    return (completion if isinstance(asked, str) else chat)(asked, options, settings)


def chat(messages: object, options: Mapping[str, Any], settings: Settings) -> Request:
    """Return the request for a chat's answer."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise _invalid(f"messages is {reprlib.repr(messages)}, which is not a list of messages")
    asked = [_message(number, one) for number, one in enumerate(messages, 1)]
    if not asked:
        raise _invalid("the list of messages is empty")
    return _checked(asked, options, settings)


def completion(prompt: object, options: Mapping[str, Any], settings: Settings) -> Request:
    """Return the request for a text's continuation."""
    if not isinstance(prompt, str):
        raise SettingError("REQUEST_INVALID/prompt", prompt=reprlib.repr(prompt))
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
    for name in given.keys() - _OPTIONS.keys():
        # llama-server would ignore what is misspelt
        if near := difflib.get_close_matches(name, _OPTIONS, 1, _ALIKE):
            raise SettingError("REQUEST_INVALID/option", name=name, near=near[0])
        if name in _SET_BY_THE_ENGINE:
            raise SettingError("REQUEST_INVALID/engine", name=name)
    for name, (fits, accepts) in _OPTIONS.items():
        if name in given and not fits(given[name]):
            value = reprlib.repr(given[name])
            raise SettingError("REQUEST_INVALID/value", name=name, value=value, accepts=accepts)
    try:  # as plain data: it crosses a process, and goes to the server as JSON
        plain, extra = json.loads(json.dumps([asked, given], allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SettingError("REQUEST_INVALID/json", error=error) from error
    return Request(plain, extra)


def _all(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, kind) for one in value)


def _invalid(message: str) -> SettingError:
    return SettingError("MESSAGE_INVALID", why=message, roles=", ".join(_ROLES))


class Shown(msgspec.Struct, frozen=True):
    """What starts and answers took: seconds until the first token, and tokens a second."""

    starts: tuple[_Seconds, ...] = ()
    speeds: tuple[_Speed, ...] = ()

    def reserve(self, request: Request, size: int, *, warm: bool) -> Reserved:
        """Return the GPU seconds for one answer, which is assumed to be as long as its prompt.

        The first guess follows from ``size``, the bytes of the model. ``warm``: a server runs that
        may get the call.
        """
        start = max(self.starts, default=_FIRST_FLOOR + size / _FIRST_RATE)
        speed = min(self.speeds or [min(_FIRST_SPEED, _FIRST_BANDWIDTH / max(1, size))])

        def work(asked: object) -> float:
            prompt = tokens(asked) + _TEMPLATE_TOKENS
            answer = min(prompt, request.options.get("max_tokens") or prompt)
            return (0.0 if warm else start) + answer / speed + prompt / (speed * _PROMPT_SPEED)

        longest = LONGEST_WORK if request.work else LONGEST
        wished = math.ceil(work(request.asked) * MARGIN + _SPARE)
        seconds = max(SHORTEST, min(wished, longest))
        least = work(request.asked[:1] if request.work else request.asked)
        return Reserved(seconds, min(math.ceil(least), seconds))

    def after(self, call: Figures, start: float) -> "Shown":
        """Return what is known after a call, whose server took ``start`` seconds to start."""
        starts, speeds = self.starts, self.speeds
        if start and not call.warm:
            starts = (*starts, round(start, 2))
        if call.tokens_per_second and (call.tokens or 0) >= _MEASURABLE:
            speeds = (*speeds, round(call.tokens_per_second, 1))
        return Shown(starts[-_KEPT:], speeds[-_KEPT:])


def recall(store: Path, model: Path, size: int) -> Shown:
    """Return what this machine has shown of a model; nothing where nothing readable is kept."""
    try:
        data = Store(store).read("shown", _name(model, size), limit=_MAX_BYTES)
        return msgspec.json.decode(data or b"{}", type=Shown)
    except (LoaderError, msgspec.MsgspecError, UnicodeDecodeError):
        return Shown()


def remember(store: Path, model: Path, size: int, shown: Shown) -> None:
    """Keep what this machine has shown for the app's next start; ``StoreError`` if it cannot."""
    Store(store).write("shown", _name(model, size), data=msgspec.json.encode(shown))


def tokens(asked: object) -> int:
    """Estimate the tokens of a text, or of a chat whose contents are texts or lists of parts."""
    if isinstance(asked, str):
        below = [sum(ord(one) < limit for one in asked) for limit, _ in _TOKENS]
        each = (part - less for part, less in zip(below, (0, *below), strict=False))
        return math.ceil(sum(count * rate for count, (_, rate) in zip(each, _TOKENS, strict=True)))
    parts: Iterable[object] = asked.values() if isinstance(asked, Mapping) else ()
    return sum(map(tokens, asked if isinstance(asked, list) else parts))


def _name(model: Path, size: int) -> str:
    return f"{hashlib.sha256(f'{model.name} {size}'.encode()).hexdigest()[:32]}.json"
