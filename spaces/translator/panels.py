"""The parts of the page that say what is running, as HTML; everything foreign is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from llama_loader.events import size
from llama_loader.settings import prefixed
from translator import advice, texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llama_loader.events import Note
    from llama_space.values import Failure, Figures, Status

_CALLS: Final = 8
_TENTH, _TEN = 0.1, 10.0


def masthead(words: Mapping[str, str]) -> str:
    """Return the page's head: the seal, the name, one sentence."""
    return (
        '<header class="masthead"><span class="seal" aria-hidden="true">訳</span>'
        f"<div><h1>{escape(words['title'])}</h1><p>{escape(words['subtitle'])}</p></div></header>"
    )


def pill(state: Status, words: Mapping[str, str]) -> str:
    """Return the line that opens the colophon: can the page translate, is it verified."""
    parts, trust = [words[state.phase]], _trust(state)
    if state.phase == "ready":
        parts.append(words[trust])
        if state.server_pid is not None and not state.warm:
            parts.append(words["asleep"])
    elif state.phase == "preparing":
        parts += [] if state.elapsed is None else [seconds(state.elapsed)]
        parts += [texts.patience(state.progress, words["locale"])] if state.progress else []
    loud = f" {trust}" if state.phase == "ready" and trust != "verified" else ""
    line = " · ".join(map(escape, parts))
    # what changes every second is not read out
    live = "off" if state.phase == "preparing" else "polite"
    return (
        f'<a class="pill {state.phase}{loud}" href="#colophon" aria-live="{live}">'
        f'<span class="dot" aria-hidden="true"></span><span class="line">{line}</span></a>'
    )


def _trust(state: Status) -> str:
    """Name the words for what vouches for the release: a pin or a signature, digests, nothing."""
    if state.verified:
        return "verified"
    return "unverified" if state.release else "unchecked"


def failure(found: Failure | None, words: Mapping[str, str]) -> str:
    """Return what happened and what to do, for visitors and for the owner; empty if all is well."""
    if found is None:
        return ""
    what, hint, original = texts.say(found, words["locale"])
    owners = advice.is_owners(found)
    told = (
        f"<p class='what'>{escape(what)}</p>"
        f"<p><b>{escape(words['what_to_do'])}</b> {escape(hint or words['no_hint'])}</p>"
        f"{advices(advice.of_code(found.code), words)}{_settings_link(words) if owners else ''}"
        f'{_original(original, words)}<p class="code">{escape(found.code)}</p>'
    )
    if owners:
        told = (
            f'<p class="lead">{escape(words["fault"])}</p>'
            f'<section class="owner"><h2>{escape(words["for_owner"])}</h2>{told}</section>'
        )
    return f'<div class="failure" role="alert">{told}</div>'


def _settings_link(words: Mapping[str, str]) -> str:
    address = advice.settings_page()
    if not address:
        return ""
    shown = escape(words["settings_link"])
    return f'<p><a href="{address}" target="_blank" rel="noopener">{shown}</a></p>'


def _original(original: str, words: Mapping[str, str]) -> str:
    """Return the loader's English text, for under a translation: people search for it."""
    if not original:
        return ""
    return (
        f'<details class="original" open><summary>{escape(words["original"])}</summary>'
        f'<p lang="en">{"<br>".join(map(escape, original.splitlines()))}</p></details>'
    )


def advices(names: Iterable[str], words: Mapping[str, str]) -> str:
    """Return which settings to change, with the lines to copy."""
    parts = []
    for name in names:
        title, text = words[f"advice_{name}_title"], words[f"advice_{name}"]
        lines = prefixed("\n".join(advice.ADVICES[name].settings))
        shown = f"<pre><code>{escape(lines)}</code></pre>" if lines else ""
        parts.append(
            f'<section class="advice"><h3>{escape(title)}</h3><p>{escape(text)}</p>'
            f"{shown}</section>"
        )
    return "".join(parts)


def colophon(state: Status, words: Mapping[str, str]) -> str:
    """Return the colophon: what is running, and how long each stage took."""
    facts = "".join(
        f'<div class="{name}"><dt>{escape(words[name])}</dt><dd>{value}</dd></div>'
        for name, value in _facts(state, words)
    )
    return (
        f'<section class="colophon" id="colophon"><h2>{escape(words["colophon"])}'
        f"<small>{escape(words['colophon_mark'])}</small></h2>"
        f"<dl>{facts}</dl>{_notes(state, words)}</section>"
    )


def status(kind: str, text: str, aside: str = "", source: str = "") -> str:
    """Return the line under the right page; the script reads out its begin and its end.

    Args:
        kind: a class: waiting, working, done, stopped, failed.
        text: what happens.
        aside: more, for the eyes alone.
        source: the code of the language that the text is in, where it is known by now.
    """
    # a name in a script that goes from right to left turns nothing beside it round
    shown = escape(aside).translate({0x2068: "<bdi>", 0x2069: "</bdi>"})
    side = f"<span>{shown}</span>" if aside else ""
    heard = f' data-source="{escape(source)}"' if source else ""
    return f'<div class="status {kind}"{heard}><b>{escape(text)}</b>{side}</div>'


def seconds(value: float) -> str:
    """Write a duration with as many digits as mean something."""
    if value < _TENTH:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < _TEN else f"{value:.0f} s"


def rate(speed: float) -> str:
    """Write tokens per second with as many digits as mean something."""
    return f"{speed:.1f}" if speed < _TEN else f"{speed:.0f}"


def gpu(made: Sequence[Figures], words: Mapping[str, str]) -> list[str]:
    """Return the GPU seconds that calls used and reserved, and those left before; or nothing."""
    if not any(call.reserved for call in made):
        return []
    used, reserved = (sum(getattr(call, name) for call in made) for name in ("used", "reserved"))
    said = [words["gpu_of"].format(used=f"{used:.1f}", reserved=f"{reserved:.0f}")]
    left = [call.left for call in made if call.left is not None]
    return [*said, words["gpu_left"].format(left=left[0])] if left else said


def lately(made: Sequence[Figures], words: Mapping[str, str]) -> list[str]:
    """Return how long the last calls took, for who waits for a turn; nothing before the first."""
    took = [call.seconds for call in made[-_CALLS:]]
    if not took:
        return []
    return [words["lately"].format(shortest=seconds(min(took)), longest=seconds(max(took)))]


def _call(call: Figures, words: Mapping[str, str]) -> str:
    said = [seconds(call.seconds)]
    if call.first_token is not None:
        said.append(f"{words['first_words']} {seconds(call.first_token)}")
    if call.tokens is not None:
        said.append(f"{call.tokens} tok")
    return " · ".join([*said, *gpu([call], words)[:1], *([] if call.warm else [words["cold"]])])


def _facts(state: Status, words: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    unknown, later, not_pinned = (
        f"<i>{escape(words[name])}</i>" for name in ("not_yet", "after_first", "not_pinned")
    )
    yield "release", escape(state.release or "") or unknown
    name = state.architecture or ""
    yield "architecture", escape(f"sm_{name}" if name[:1].isdigit() else name) or unknown
    yield "digest", _digest(state, words) if state.digest else unknown
    yield "device", escape(state.device or "") or later
    memory = [f"{escape(name)} {size(held)}" for name, held in state.memory.items() if held]
    yield "memory", "<br>".join(memory) or later
    yield "model", escape(state.model or "") or unknown
    pinned = state.model_sha256
    yield "model_digest", f"<code>{escape(pinned)}</code>" if pinned else not_pinned
    speed = state.tokens_per_second
    yield "speed", later if speed is None else f"{rate(speed)} {escape(words['speed_unit'])}"
    if state.gpu_seconds_reserved:
        used, reserved = f"{state.gpu_seconds_used:.1f}", f"{state.gpu_seconds_reserved:.0f}"
        yield "gpu_seconds", escape(words["gpu_sum"].format(used=used, reserved=reserved))
    stages = [f"{words.get(f'stage_{one}', one)} {seconds(took)}" for one, took in state.timeline]
    yield "this_start", "<br>".join(map(escape, stages)) or unknown
    calls = [_call(call, words) for call in reversed(state.calls[-_CALLS:])]
    yield "last_calls", "<br>".join(map(escape, calls)) or later


def _digest(state: Status, words: Mapping[str, str]) -> str:
    trust = _trust(state)
    why = "" if state.verified else f"<em>{escape(words[f'{trust}_text'])}</em>"
    digest = f"<code>{escape(state.digest or '')}</code>"
    return f'<span class="stamp {trust}">{escape(words[trust])}</span> {digest}{why}'


def _notes(state: Status, words: Mapping[str, str]) -> str:
    lines = "".join(_note(note, words) for note in state.notes)
    known = advices(advice.of_status(state), words) if state.failure is None else ""
    shown = f"<h3>{escape(words['notes'])}</h3><ul>{lines}</ul>" if lines else ""
    return f'<div class="notes">{shown}{known}</div>' if shown or known else ""


def _note(note: Note, words: Mapping[str, str]) -> str:
    what, hint, original = texts.say(note, words["locale"])
    todo = f"<p>{escape(hint)}</p>" if hint else ""
    happened = f"<code>{escape(note.code)}</code><p>{escape(what)}</p>"
    return f"<li>{happened}{todo}{_original(original, words)}</li>"
