"""The parts of the page that say what is running, as HTML; everything foreign is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from translator import advice, picture, texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llama_loader.events import Note
    from llama_space.values import Failure, Status
    from translator.texts import Said

_MIB: Final = 1024**2
_GIB: Final = 1024**3
_SHOWN_PROGRESS: Final = 4
_TEN: Final = 10


def masthead(words: Mapping[str, str]) -> str:
    """The seal, the name, one sentence."""
    return (
        '<header class="masthead"><span class="seal" aria-hidden="true">訳</span>'
        f"<div><h1>{escape(words['title'])}</h1><p>{escape(words['subtitle'])}</p></div></header>"
    )


def pill(state: Status, words: Mapping[str, str]) -> str:
    """One line for visitors that opens the colophon: can it translate, is it verified."""
    parts = [words[state.phase]]
    trust = _trust(state)
    if state.phase == "ready":
        parts.append(words[trust])
        if state.server_pid is not None and not state.warm:
            parts.append(words["asleep"])
    elif state.phase == "preparing":
        so_far = [] if state.elapsed is None else [picture.seconds(state.elapsed)]
        parts += [*so_far, *(texts.patience(one, words["locale"]) for one in state.progress[-1:])]
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
    """What happened and what to do, apart for visitors and the owner; nothing where all is well."""
    if found is None:
        return ""
    said = texts.say(found, words["locale"])
    hint = escape(said.hint or words["no_hint"])
    told = (
        f"<p class='what'>{escape(said.what)}</p>"
        f"<p><b>{escape(words['what_to_do'])}</b> {hint}</p>"
        f"{advices(advice.of_code(found.code), words)}"
    )
    code = f'<p class="code">{escape(found.code)}</p>'
    if advice.is_owners(found):
        told = (
            f'<p class="lead">{escape(words["fault"])}</p>'
            f'<section class="owner"><h2>{escape(words["for_owner"])}</h2>'
            f"{told}{_settings_link(words)}{_original(said, words)}{code}</section>"
        )
    else:
        told += _original(said, words) + code
    return f'<div class="failure" role="alert">{told}</div>'


def _settings_link(words: Mapping[str, str]) -> str:
    address = advice.settings_page()
    if not address:
        return ""
    shown = escape(words["settings_link"])
    return f'<p><a href="{address}" target="_blank" rel="noopener">{shown}</a></p>'


def _original(said: Said, words: Mapping[str, str]) -> str:
    """The loader's own words under a translation: they are what can be searched for."""
    if not said.original:
        return ""
    return (
        f'<details class="original" open><summary>{escape(words["original"])}</summary>'
        f'<p lang="en">{"<br>".join(map(escape, said.original.splitlines()))}</p></details>'
    )


def advices(names: Iterable[str], words: Mapping[str, str]) -> str:
    """What to set, with the lines to copy."""
    parts = []
    for name in names:
        title, text = words[f"advice_{name}_title"], words[f"advice_{name}"]
        lines = "\n".join(advice.ADVICES[name].settings)
        shown = f"<pre><code>{escape(lines)}</code></pre>" if lines else ""
        parts.append(
            f'<section class="advice"><h3>{escape(title)}</h3><p>{escape(text)}</p>'
            f"{shown}</section>"
        )
    return "".join(parts)


def colophon(state: Status, words: Mapping[str, str]) -> str:
    """What is running: facts on one side, what they took on the other."""
    facts = "".join(
        f"<div><dt>{escape(words[name])}</dt><dd>{value}</dd></div>"
        for name, value in _facts(state, words)
    )
    return (
        f'<section class="colophon" id="colophon"><h2>{escape(words["colophon"])}'
        f"<small>{escape(words['colophon_mark'])}</small></h2>"
        f'<div class="columns"><dl>{facts}</dl>'
        f'<div class="times">{_times(state, words)}</div></div>'
        f"{_notes(state, words)}</section>"
    )


def status(kind: str, text: str, aside: str = "", source: str = "") -> str:
    """The line under the right page. The script reads out how it begins and how it ends.

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


def rate(speed: float) -> str:
    """Write tokens per second with as many digits as mean something."""
    return f"{speed:.1f}" if speed < _TEN else f"{speed:.0f}"


def _architecture(state: Status) -> str:
    name = state.architecture
    if not name:
        return ""
    return "CPU" if name == "cpu" else f"sm_{name}" if name[:1].isdigit() else name


def _facts(state: Status, words: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    unknown, later, not_pinned = (
        f"<i>{escape(words[name])}</i>" for name in ("not_yet", "after_first", "not_pinned")
    )
    yield "release", escape(state.release or "") or unknown
    yield "architecture", escape(_architecture(state)) or unknown
    yield "digest", _digest(state, words) if state.digest else unknown
    yield "device", escape(state.device or "") or later
    memory = [f"{escape(name)} {_size(size)}" for name, size in state.memory.items() if size]
    yield "memory", "<br>".join(memory) or later
    yield "model", escape(state.model or "") or unknown
    yield "model_digest", _hash(state.model_sha256) if state.model_sha256 else not_pinned
    speed = state.tokens_per_second
    yield "speed", later if speed is None else f"{rate(speed)} {escape(words['speed_unit'])}"
    if state.gpu_seconds_reserved:
        used, reserved = f"{state.gpu_seconds_used:.1f}", f"{state.gpu_seconds_reserved:.0f}"
        yield "gpu_seconds", escape(words["gpu_sum"].format(used=used, reserved=reserved))


def _hash(digest: str | None) -> str:
    """All of it, in a form that a phone can break."""
    shown = escape(digest or "")
    return f'<code title="{shown}">{shown}</code>'


def _digest(state: Status, words: Mapping[str, str]) -> str:
    trust = _trust(state)
    if trust == "verified":
        return f'<span class="stamp">{escape(words[trust])}</span> {_hash(state.digest)}'
    return (
        f'<span class="stamp {trust}">{escape(words[trust])}</span> {_hash(state.digest)}'
        f"<em>{escape(words[f'{trust}_text'])}</em>"
    )


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def _times(state: Status, words: Mapping[str, str]) -> str:
    parts = []
    if state.phase == "preparing":
        latest = [texts.progress(one, words["locale"]) for one in state.progress]
        lines = "".join(f"<li>{escape(one)}</li>" for one in latest[-_SHOWN_PROGRESS:])
        parts.append(f'<ol class="progress">{lines}</ol>' if lines else "")
    if state.timeline:
        parts.append(_figure(words["this_start"], picture.start(state.timeline, words)))
    if state.calls:
        legend = (
            f'<span class="key wait">{escape(words["first_words"])}</span>'
            f'<span class="key answer">{escape(words["whole_answer"])}</span>'
        )
        parts.append(_figure(words["last_calls"], picture.calls(state.calls, words), legend))
    elif state.phase == "ready":
        parts.append(_figure(words["last_calls"], f"<p>{escape(words['no_calls'])}</p>"))
    return "".join(parts)


def _figure(title: str, drawing: str, legend: str = "") -> str:
    return f"<figure><figcaption>{escape(title)}{legend}</figcaption>{drawing}</figure>"


def _notes(state: Status, words: Mapping[str, str]) -> str:
    lines = "".join(_note(note, words) for note in state.notes)
    known = advices(advice.of_status(state), words) if state.failure is None else ""
    shown = f"<h3>{escape(words['notes'])}</h3><ul>{lines}</ul>" if lines else ""
    return f'<div class="notes">{shown}{known}</div>' if shown or known else ""


def _note(note: Note, words: Mapping[str, str]) -> str:
    said = texts.say(note, words["locale"])
    hint = f"<p>{escape(said.hint)}</p>" if said.hint else ""
    return (
        f"<li><code>{escape(note.code)}</code><p>{escape(said.what)}</p>{hint}"
        f"{_original(said, words)}</li>"
    )
