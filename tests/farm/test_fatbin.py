"""CUDA sections: those of a real nvcc as cuobjdump lists them, and damaged ones."""

import io
import json
import struct
from collections import Counter

import pytest
from binaries import FATBINS, container, entry
from hypothesis import given, settings
from hypothesis import strategies as st

from farm import fatbin
from farm.errors import InspectError
from tests.rigs.refusals import refused

CORPUS = {
    str((path.parent / name).relative_to(FATBINS)): case
    for path in (FATBINS / "corpus.json", FATBINS / "cu124" / "corpus.json")
    for name, case in json.loads(path.read_text("utf-8"))["cases"].items()
}
PTX, SASS, LTO = 1, 2, 8


def read(*sections: bytes, links: int = 0) -> fatbin.Contents:
    data = b"\xff" * 24 + b"".join(sections)
    spans = []
    at = 24
    for section in sections:
        spans.append((at, len(section)))
        at += len(section)
    return fatbin.read(io.BytesIO(data), spans, what="libx.so", links=links)


def corrupt(data: bytes) -> str:
    with refused("FATBIN_CORRUPT", InspectError) as caught:
        read(data)
    assert caught.value.message.startswith("libx.so: CUDA code at byte ")
    return caught.value.message


@pytest.mark.parametrize("name", CORPUS)
def test_real_section_holds_what_cuobjdump_lists(name: str) -> None:
    found = read((FATBINS / f"{name}.fatbin").read_bytes())
    listed = CORPUS[name]["cuobjdump"]
    # cuobjdump names family code (100f) with its letter for PTX only.
    assert [arch.rstrip("f") for arch in found.sass] == sorted(listed["sass"], key=_number)
    assert list(found.ptx) == sorted(listed["ptx"], key=_number)
    assert found.containers == 1
    assert found.partial == ()
    theirs = Counter(f"{kind} {arch}" for kind in ("sass", "ptx") for arch in listed[kind])
    ours = {name.rstrip("f") if name.startswith("sass") else name: n for name, n in found.entries}
    assert {name: n for name, n in ours.items() if not name.startswith("kind")} == theirs


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def test_letters_come_from_the_flags() -> None:
    found = read(
        container(
            entry(SASS, 120, flags=0x1100011),
            entry(SASS, 100, flags=0x1200011),
            entry(SASS, 120, flags=0x1000011),
            entry(SASS, 90),
        )
    )
    assert found.sass == ("90", "100f", "120", "120a")


def test_code_of_another_kind_is_told_apart() -> None:
    found = read((FATBINS / "lto-and-sass-90.fatbin").read_bytes())
    assert found.other == ("kind 8 for 90",)
    assert found.sass == ("90",)


def test_several_containers_with_padding_between_and_behind() -> None:
    one, other = container(entry(SASS, 80)), container(entry(SASS, 80), entry(PTX, 80))
    found = read(b"\0" * 8 + one + b"\0" * 72 + other + b"\0" * 100_000)
    assert (found.sass, found.ptx, found.containers) == (("80",), ("80",), 2)


def test_container_that_ends_off_the_grid_is_followed_by_padding() -> None:
    odd = struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, 67) + entry(SASS, 90, payload=b"")[:64] + b"abc"
    odd = bytearray(odd)
    struct.pack_into("<Q", odd, 16 + 8, 3)
    found = read(bytes(odd) + b"\0" * 5 + container(entry(SASS, 90)))
    assert (found.sass, found.containers) == (("90",), 2)


BOTH, PLAIN, ONLY_PTX = (
    container(*(entry(kind, 90) for kind in kinds)) for kinds in ((SASS, PTX), (SASS,), (PTX,))
)


@pytest.mark.parametrize(
    ("sections", "links", "gaps"),
    [
        ([container(entry(SASS, 80)), PLAIN], 0, (("sass 80", 1), ("sass 90", 1))),
        ([container(entry(SASS, 80), entry(SASS, 90)), PLAIN], 0, (("sass 80", 1),)),
        ([BOTH, BOTH], 0, ()),
        ([BOTH, PLAIN, PLAIN], 0, (("ptx 90", 2),)),
        ([BOTH, ONLY_PTX], 0, (("sass 90", 1),)),
        # a device link has no PTX, and nothing at all where only PTX was linked
        ([PLAIN, BOTH, BOTH], 1, ()),
        ([PLAIN, BOTH, PLAIN], 1, (("ptx 90", 1),)),
        ([container(), ONLY_PTX], 1, ()),
        ([container(), ONLY_PTX], 0, (("ptx 90", 1),)),
        ([container(), PLAIN], 0, (("sass 90", 1),)),
    ],
)
def test_code_that_only_some_containers_hold_is_a_gap(
    sections: list[bytes], links: int, gaps: tuple[tuple[str, int], ...]
) -> None:
    found = read(*sections, links=links)
    assert found.gaps == gaps
    assert found.partial == tuple(code for code, _ in gaps)


def test_registration_tells_device_links_from_objects() -> None:
    rows = b"".join(struct.pack("<II16x", 0x466243B1, version) for version in (2, 1, 1))
    assert fatbin.read_registration(rows) == fatbin.Registered(containers=3, links=1)
    assert fatbin.read_registration(b"") == fatbin.Registered()
    assert fatbin.read_registration(bytes(30)) == fatbin.Registered(containers=2)


@pytest.mark.parametrize("empty", [b"", b"\0" * 7, b"\0" * 4096, container()])
def test_no_code_at_all(empty: bytes) -> None:
    found = read(empty)
    assert (found.sass, found.ptx, found.other) == ((), (), ())


@pytest.mark.parametrize(
    ("problem", "data"),
    [
        ("no container starts here", b"\x01" * 64),
        ("are needed", container(entry(SASS, 90))[:12]),
        ("container version 9", struct.pack("<IHHQ", fatbin.MAGIC, 9, 16, 0)),
        ("header 4 bytes", struct.pack("<IHHQ", fatbin.MAGIC, 1, 4, 0)),
        ("runs past", container(entry(SASS, 90))[:-1]),
        ("runs past", struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, 2**64 - 1)),
        ("no room for an entry", container(entry(SASS, 90), b"\0" * 8)),
        ("does not fit", container(entry(SASS, 90, header=63))),
        ("does not fit", container(entry(SASS, 90), struct.pack("<HHIQ48x", 2, 1, 64, 2**64 - 64))),
        ("does not fit", container(struct.pack("<HHIQ48x", 2, 1, 0, 0))),
        ("architecture 0", container(entry(SASS, 0))),
        ("architecture 4294967295", container(entry(SASS, 2**32 - 1))),
    ],
)
def test_damaged_section_is_one_error(problem: str, data: bytes) -> None:
    assert problem in corrupt(data)


def test_code_of_more_pieces_than_any_file_has_is_not_summed_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "1001 kinds of code" in corrupt(container(*(entry(kind, 90) for kind in range(1001))))
    monkeypatch.setattr(fatbin, "MOST_READS", 50)
    assert "more than 50" in corrupt(container(*[entry(SASS, 90)] * 60))
    assert "more than 50" in corrupt(container() * 60)


def test_file_that_ends_inside_the_section() -> None:
    data = container(entry(SASS, 90, payload=b"x" * 64), entry(SASS, 80))
    with pytest.raises(InspectError, match="the file ends inside the section"):
        fatbin.read(io.BytesIO(data[:100]), [(0, len(data))], what="libx.so")


KINDS = st.sampled_from([PTX, SASS])
SUFFIXES = st.sampled_from([("", 0x11), ("a", 0x100011), ("f", 0x208011)])
ENTRIES = st.tuples(KINDS, st.integers(10, 999), SUFFIXES, st.binary(max_size=40))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(ENTRIES, min_size=1, max_size=4), max_size=4), st.integers(0, 5))
def test_what_is_written_is_read(
    rows: list[list[tuple[int, int, tuple[str, int], bytes]]], gap: int
) -> None:
    section = b"".join(
        container(*(entry(k, a, flags=s[1], payload=p) for k, a, s, p in row)) + b"\0" * 8 * gap
        for row in rows
    )
    found = read(section)
    for kind, held in ((SASS, found.sass), (PTX, found.ptx)):
        assert set(held) == {f"{a}{s[0]}" for row in rows for k, a, s, _ in row if k == kind}
    assert found.containers == len(rows)
