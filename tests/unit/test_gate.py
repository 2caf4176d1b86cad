"""A release comes into a channel with a report of its checks, or not at all."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from farm import figures, gate, promotion
from farm.errors import FarmError, PublishError
from farm.figures import Figures
from farm.publish import last_report, parts, places, publishing
from tests.rigs.published import Place, publish
from tests.rigs import tiny_release

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def report(folder: Path, *, passed: bool = True) -> None:
    content = (folder / "manifest.json").read_bytes()
    made = gate.Report(
        "b11549-1",
        hashlib.sha256(content).hexdigest(),
        "2026-11-23T00:00:00+00:00",
        (gate.Check("starts", passed, "it does"), gate.Check("is fast", None, "no GPU")),
    )
    (folder / "gate.json").write_bytes(msgspec.json.encode(made))


def test_a_report_of_these_bytes_lets_it_through(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    assert "gate.json" in place.open().present("b11549-1")
    promotion.require_gate(place.open(), "b11549-1", lambda _: None)


def test_a_failed_check_does_not(place: Place, released: Path) -> None:
    report(released, passed=False)
    publish(place, released)
    with pytest.raises(PublishError) as refused:
        promotion.require_gate(place.open(), "b11549-1", lambda _: None)
    assert refused.value.code == "GATE_FAILED"
    assert "starts" in refused.value.message


def test_a_second_report_does_not_stand_in_the_way(place: Place, released: Path) -> None:
    report(released)
    publish(place, released)
    (released / "gate.json").write_bytes((released / "gate.json").read_bytes() + b" ")
    assert publishing.prepare(released, place.open()).new == ()


def test_a_report_of_nothing_does_not(released: Path) -> None:
    manifest = (released / "manifest.json").read_bytes()
    empty = gate.Report("b11549-1", hashlib.sha256(manifest).hexdigest(), "", ())
    with pytest.raises(PublishError) as refused:
        gate.require_passed(msgspec.json.encode(empty), manifest, what="it")
    assert refused.value.code == "GATE_FAILED"


def test_a_report_of_other_bytes_does_not(released: Path) -> None:
    report(released)
    report = (released / "gate.json").read_bytes()
    with pytest.raises(PublishError) as refused:
        gate.require_passed(report, b"another manifest", what="it")
    assert refused.value.code == "GATE_OF_OTHER_BYTES"


def test_without_a_report_it_is_checked_then_and_there(released: Path, tmp_path: Path) -> None:
    """The tiny tree's llama-server is none: the check finds that, and nothing is promoted."""
    to = places.parse(str(tmp_path / "published"))
    publishing.publish(publishing.prepare(released, to), to, lambda _: None)
    made: list[gate.Check] = []
    with pytest.raises(PublishError) as refused:
        promotion.require_gate(to, "b11549-1", made.append)
    assert refused.value.code == "GATE_FAILED"
    assert [check.passed for check in made[:3]] == [True, True, False]
    assert "gate.json" not in to.present("b11549-1")
