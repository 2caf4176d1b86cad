"""Faults 18 and 20: texts that two readers would read differently, or that never end."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_loader import strict_json
from llama_loader.errors import IntegrityError


def loads(data: bytes, max_bytes: int = 1 << 20) -> object:
    return strict_json.loads(data, what="the text", max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("text", "code", "match"),
    [
        (b"", "JSON_MALFORMED", "is not JSON"),
        (b"{", "JSON_MALFORMED", "is not JSON"),
        (b'{"a": 1,}', "JSON_MALFORMED", "is not JSON"),
        (b"{} {}", "JSON_MALFORMED", "is not JSON"),
        (b"'a'", "JSON_MALFORMED", "is not JSON"),
        (b"\xef\xbb\xbf{}", "JSON_MALFORMED", "is not JSON"),
        (b'"\x01"', "JSON_MALFORMED", "is not JSON"),
        (b'"\xff"', "JSON_NOT_UTF8", "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "JSON_NOT_UTF8", "not UTF-8"),
        (b'{"a": {"b": 1, "b": 1}}', "JSON_AMBIGUOUS", r"\$\.a\.b: the key stands here twice"),
        (b'[{"a": 1, "\\u0061": 2}]', "JSON_AMBIGUOUS", r"\$\[0\]\.a: the key stands"),
        (b'{"a": [0, NaN]}', "JSON_AMBIGUOUS", r"\$\.a\[1\]: NaN"),
        (b"[Infinity]", "JSON_AMBIGUOUS", "Infinity"),
        (b"[-Infinity]", "JSON_AMBIGUOUS", "Infinity"),
        (b"[1e999]", "JSON_AMBIGUOUS", "1e999"),
        (b'["\\ud800"]', "JSON_AMBIGUOUS", "lone surrogate"),
        (b'{"\\udfff": 1}', "JSON_AMBIGUOUS", "lone surrogate"),
        (b"[" * 10_000 + b"]" * 10_000, "JSON_TOO_DEEP", "deep|levels"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "JSON_TOO_DEEP", "deep|levels"),
        (b"[" * 66 + b"]" * 66, "JSON_TOO_DEEP", "64 levels"),
        (b"1" * 5000, "JSON_MALFORMED", "is not JSON"),
    ],
)
def test_refused(text: bytes, code: str, match: str) -> None:
    with pytest.raises(IntegrityError, match=match) as caught:
        loads(text)
    assert caught.value.code == code
    assert caught.value.message.startswith("the text")
    assert len(caught.value.message) < 300


def test_the_size_is_limited_before_anything_is_parsed() -> None:
    assert loads(b"[1]", 3) == [1]
    with pytest.raises(IntegrityError, match="is 4 bytes; at most 3") as caught:
        loads(b"[12]", 3)
    assert caught.value.code == "JSON_TOO_LARGE"


@pytest.mark.parametrize("depth", [1, 64, 65])
def test_the_depth_that_is_accepted(depth: int) -> None:
    assert json.dumps(loads(b"[" * depth + b"]" * depth)) == "[" * depth + "]" * depth


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"é"', "[1.5, -0, 1e3, true, null]"])
def test_plain_json_is_read_as_ever(text: str) -> None:
    assert loads(text.encode()) == json.loads(text)


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(tree=TREES)
def test_what_json_writes_is_read_back(tree: object) -> None:
    try:
        data = json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate in a key
        return
    assert loads(data) == tree


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=60)
    | st.text('{}[]",:0123456789eE+-.truefalsnNaIity\\ud8', max_size=60).map(str.encode)
)
def test_any_bytes_end_in_a_value_or_a_typed_error(data: bytes) -> None:
    try:
        found = loads(data)
    except IntegrityError:
        return
    assert found == json.loads(data)
