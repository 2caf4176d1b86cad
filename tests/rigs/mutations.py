"""Changes real samples as their grammar allows: a hostile author knows the format that he breaks.

Each function takes a ``random.Random``, so that a seed gives the same input again.
"""

import base64
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Final

from tests.rigs.archives import GOOD, Entry, compress, tar

NUMBERS: Final = (
    *("0", "1", "-1", "-0", "00", "1e5", "1e999", "1.2.3", "0x10", "+1", "NaN", "Infinity"),
    *(str(2**power + more) for power in (16, 31, 32, 53, 63, 64) for more in (-1, 0)),
    *("9" * 20, "9" * 400, "9" * 5000, "\u0663", "1 2"),
)
TEXTS: Final = (
    *("", "a", "..", "../x", "/x", ".", "\\x", "x/" * 600, "a" * 300, "a" * 70_000, "\0", "\r\n"),
    *("\x1b[2J", "\x9b", "\u202e", "\u2028", "\ufeff", "\u0663", "e\u0301", "\ud800", "%00", "%2e"),
    *("https://[evil]/x", "http://[::1", "https://u:p@h/?t=s", "file:///dev/zero", "hf://o/r/p"),
    *("?" + ")" * 9000 + "x", "://" * 3000, "RTX PRO 1 " * 3000, "Blackwell", "version `" * 3000),
)


def flip(random: Random, data: bytes) -> bytes:
    """Change, remove, repeat or insert a few bytes anywhere; cut it now and then."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, what = random.randrange(len(changed) + 1), random.randrange(6)
        if what == 0:
            changed[at:] = b""
        elif what == 1:
            changed[at:at] = random.randbytes(random.choice((1, 4, 100)))
        elif what == 2:
            changed[at : at + random.choice((1, 4, 100))] = b""
        elif what == 3:
            changed[at:at] = changed[at : at + 40] * random.choice((1, 3, 100))
        elif at < len(changed):
            changed[at] = random.choice((0, 9, 10, 127, 128, 255, changed[at] ^ 1 << what))
    return bytes(changed)


def value(random: Random) -> str:
    """Return a text that some parser may misread."""
    return random.choice(random.choice((NUMBERS, TEXTS)))


# JSON


def json_text(random: Random, sample: bytes) -> bytes:
    """Replace, remove, repeat and nest values; keys twice, and numbers that JSON cannot have."""
    tree = json.loads(sample, object_pairs_hook=lambda pairs: [*map(list, pairs)] or {})
    for _ in range(random.choice((1, 1, 2, 4))):
        tree = _changed(random, tree)
    return _written(tree).encode("utf-8", "surrogatepass")


def _is_object(tree: object) -> bool:
    return isinstance(tree, list) and bool(tree) and all(map(_is_pair, tree))


def _is_pair(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)


class _Raw(str):
    """Written as it is."""

    __slots__ = ()


def _changed(random: Random, tree: Any) -> Any:
    """Return a copy with one place somewhere below changed; the rest is shared with the tree."""
    if isinstance(tree, list) and tree and random.random() < 0.85:
        at = random.randrange(len(tree))
        key = [tree[at][0]] if _is_object(tree) else []
        one = _changed(random, tree[at][1] if key else tree[at])
        return [*tree[:at], [*key, one] if key else one, *tree[at + 1 :]]
    if isinstance(tree, list) and tree and random.random() < 0.6:
        at = random.randrange(len(tree))
        times = random.choice((0, 2, 2, 300 if len(str(tree[at])) < 1000 else 2))
        return tree[:at] + [tree[at]] * times + tree[at + 1 :]
    return random.choices((_scalar, _nested, _crowd), (900, 100, 3))[0](random)


def _scalar(random: Random) -> str:
    odd = ("null", "true", "[]", "{}", '[{"":[]}]', "tru", "'x'", "\x00")
    what = random.randrange(3)
    return random.choice(TEXTS) if what == 0 else _Raw(random.choice(NUMBERS if what == 1 else odd))


def _nested(random: Random) -> str:
    depth = random.choice((3, 70, 1500, 20_000))
    begin, end = random.choice((("[", "]"), ('{"a":', "}")))
    return _Raw(begin * depth + "1" + end * depth)


def _crowd(random: Random) -> str:
    return _Raw("[" + ",".join([random.choice(("{}", '"a"', "1", "[]"))] * 40_000) + "]")


def _written(tree: Any) -> str:
    if isinstance(tree, _Raw):
        return str(tree)
    if _is_object(tree):
        return "{" + ",".join(f"{json.dumps(key)}:{_written(one)}" for key, one in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(_written, tree)) + "]"
    return json.dumps(tree, ensure_ascii=False)


# lines


def lines(random: Random, sample: bytes) -> bytes:
    """Repeat, remove and mix lines; replace words and numbers in them."""
    found = sample.decode("latin-1").split("\n")
    for _ in range(random.choice((1, 2, 4, 8))):
        at, what = random.randrange(len(found)), random.randrange(5)
        line = found[at]
        if what == 0:
            times = random.choices((0, 2, 300), (4, 4, 1))[0]
            found[at : at + 1] = [line] * times or [""]
        elif what == 1:
            found[at] = line[: random.randrange(len(line) + 1)] + random.choice(found)
        else:
            words = line.split(" ")
            word = value(random).encode("utf-8", "surrogatepass").decode("latin-1")
            words[random.randrange(len(words))] = word
            found[at] = (
                random.choice((" ", "", "\t", "\r")).join(words) if what == 4 else " ".join(words)
            )
    return "\n".join(found).encode("latin-1")


# HTTP


_HEADERS: Final = (
    *("Content-Length", "Transfer-Encoding", "Content-Range", "Content-Type", "Content-Encoding"),
    *("Retry-After", "Location", "ETag", "Last-Modified", "Set-Cookie", "Date", "Connection"),
    *("X-Linked-Size", "X-Linked-Etag", "X-Repo-Commit", "X-Error-Code", "X-Error-Message"),
    *("X-Xet-Hash", "X-Xet-Refresh-Route", "Link", "Alt-Svc", "WWW-Authenticate", "a b", "", ":"),
)
_VALUES: Final = (
    *("chunked", "gzip", "identity", "chunked, chunked", "bytes 0-9/10", "bytes 5-9/*", "close"),
    *("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 99 Nov 99999 99:99:99 +9999", "x; charset=\x80", ";"),
    *("a=b; expires=Sun, 06-Nov-99999; path=/; domain=.", 'W/"x', "RepoNotFound", "GatedRepo"),
    *("/again", "//h/x", "https://127.0.0.1:1/x", "http://127.0.0.1/x", "http://\u2100.com/"),
)
_CODES: Final = (200, 200, 200, 206, 204, 301, 302, 307, 401, 403, 404, 416, 429, 500, 503)
_SIZES: Final = (b"-1", b"-5", b"+3", b"0x3", b"ffffffffffffffff", b"", b"z", b"3;x=y", b"\xff")


def http(random: Random, body: bytes) -> bytes:
    """Return an answer with this body and an odd status, odd headers, odd chunks."""
    status = random.choice((*_CODES, value(random)))
    first = random.choice((f"HTTP/1.1 {status} OK", f"HTTP/1.1 {status}", f"HTTP/1.0 {status} x"))
    head = [random.choices((first, value(random)), (20, 1))[0]]
    if random.random() < 0.2:
        head = ["HTTP/1.1 100 Continue\r\n"] * random.choice((1, 3, 500)) + head
    for _ in range(random.choice((0, 1, 2, 5, 5, 120))):
        text = random.choice((random.choice(_VALUES), random.choice(_VALUES), value(random)))
        head.append(f"{random.choice(_HEADERS)}{random.choice((': ', ':', ' '))}{text}")
    if random.random() < 0.4:
        head.append("Transfer-Encoding: chunked")
        body = b"".join(_chunks(random, body))
    elif random.random() < 0.5:
        head.append(f"Content-Length: {random.choice((len(body), len(body) + 1, value(random)))}")
    told = "\r\n".join(head).encode("utf-8", "surrogatepass")
    data = told + b"\r\n\r\n" + body
    return flip(random, data) if random.random() < 0.1 else data


def _chunks(random: Random, body: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(body):
        piece = body[at : at + random.choice((1, 7, 1000, 100_000))]
        size = f"{len(piece):x}".encode()
        if random.random() < 0.1:
            size = random.choice(_SIZES)
        found.append(size + random.choice((b"\r\n", b"\n")) + piece + b"\r\n")
        at += len(piece)
        if len(found) > 200:
            break
    return [
        *found,
        random.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"0\r\n" + b"a:b\n" * 300)),
    ]


def events(random: Random, sample: bytes) -> bytes:
    """Return server-sent events that are changed as JSON, and as lines."""
    pieces = [random.choice((sample, json_text(random, sample))) for _ in range(3)]
    prefix = random.choice((b"data: ", b"data:", b"error: ", b"event: x\ndata: ", b": ", b""))
    text = b"".join(prefix + piece + random.choice((b"\n\n", b"\r\n", b"")) for piece in pieces)
    text += random.choice((b"data: [DONE]\n\n", b"data: [DONE]", b""))
    return lines(random, text) if random.random() < 0.2 else text


# signatures


def signature(random: Random, sample: bytes) -> bytes:
    """Change what the lines of base64 hold, or the lines."""
    if random.random() < 0.4:
        return random.choice((lines, flip))(random, sample)
    found = sample.split(b"\n")
    at = random.choice((1, 3))
    found[at] = base64.b64encode(flip(random, base64.b64decode(found[at])))
    return b"\n".join(found)


# GGUF


def gguf(random: Random, entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """Return a header with keys of any type; counts and lengths are claims."""
    keys = []
    for one in random.choices(entries, k=random.choice((1, 5, 20))):
        kind, payload = _gguf_value(random) if random.random() < 0.3 else one[1:]
        name = value(random) if random.random() < 0.1 else one[0]
        text = name.encode("utf-8", "surrogatepass")
        keys.append(_length(random, len(text)) + text + struct.pack("<I", kind) + payload)
    count = random.choices((len(keys), len(keys) + 1, 9999, 1 << 63), (20, 1, 1, 1))[0]
    version = random.choices((3, 2, 1, 4, 1 << 31), (20, 5, 1, 1, 1))[0]
    data = struct.pack("<4sIQQ", b"GGUF", version, 0, count) + b"".join(keys)
    return flip(random, data) if random.random() < 0.2 else data


def _length(random: Random, size: int) -> bytes:
    odd = (1 << 22, (1 << 22) + 1, 1 << 31, 1 << 63, (1 << 64) - 1)
    return struct.pack("<Q", random.choice(odd) if random.random() < 0.03 else size)


def _gguf_value(random: Random) -> tuple[int, bytes]:
    kind, count = random.choice((*range(14), 1 << 31)), random.choice((0, 1, 3, 4096, 4097))
    if random.random() < 0.5:
        return kind, random.randbytes(random.choice((1, 2, 4, 8, 9)))
    inner = random.choice((*range(13), 255))
    claim = random.choices((count, 1 << 28, 1 << 62, (1 << 64) - 1), (10, 1, 1, 1))[0]
    content = (b"\1" + bytes(7) + b"x") * count if inner == 8 else bytes(8) * min(count, 4096)
    return 9, struct.pack("<IQ", inner, claim) + content


# archives


def _entry(random: Random, good: Sequence[Entry]) -> Entry:
    one = random.choice(good)
    what = random.randrange(6)
    deep = "/".join(["d"] * random.choice((3, 40, 400)))
    path = random.choice((value(random), f"{deep}/{random.randrange(99)}", one.path.upper()))
    if what == 0:
        return replace(one, path=path)
    if what == 1:
        kind = random.choice((b"1", b"2", b"2", b"3", b"6", b"7", b"S", b"V", b"\0"))
        target = random.choice((value(random), random.choice(good).path, deep, "../x", "."))
        return Entry(random.choice((one.path, path)), kind=kind, target=target, mode=0o777)
    if what == 2:
        return replace(one, mode=random.choice((0, 0o4755, 0o2755, 0o1777, 0o777, 0o7777777)))
    if what == 3:
        key = random.choice(("path", "linkpath", "size", "mtime", "GNU.sparse.major", "x"))
        return replace(one, pax={key: value(random).replace("\0", "")})
    return replace(one, data=random.randbytes(random.choice((0, 1, 511, 512, 513, 3000))))


def tarball(random: Random, good: Sequence[Entry]) -> bytes:
    """Pack good members with odd ones among them; damage the headers now and then."""
    entries = [*good]
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        entries.insert(random.randrange(len(entries) + 1), _entry(random, good))
    entries = [one if one.kind in b"07S" else replace(one, data=b"") for one in entries]
    try:
        plain = tar(entries, random.choice((0, 1, 2)))
    except (ValueError, UnicodeError):  # what Python's tarfile does not write
        plain = tar(good)
    if random.random() < 0.3:
        at = random.randrange(len(plain) // 512) * 512 + random.choice((0, 100, 124, 148, 156, 257))
        plain = (
            plain[:at] + random.choice((b"\xff", b"8", b"\0", b"x", b"g", b"9")) + plain[at + 1 :]
        )
    if random.random() < 0.2:
        plain = flip(random, plain)
    if random.random() < 0.05:
        plain += bytes(random.choice((512, 10 << 20)))
    return plain


def packed(random: Random, plain: bytes, form: str) -> bytes:
    """Compress it; damage, repeat or cut what comes out now and then."""
    data = compress(plain, form)
    what = random.randrange(10)
    if what == 0:
        return flip(random, data)
    return data * 2 if what == 1 else data + flip(random, data[:60]) if what == 2 else data


_ZIP_FIELDS: Final = {b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x03\x04": 30, b"PK\x06\x06": 56}


def zipped(random: Random) -> bytes:
    """Pack good members and odd ones as a zip; change fields of its records."""
    buffer = io.BytesIO()
    methods = (zipfile.ZIP_STORED, *[zipfile.ZIP_DEFLATED] * 5, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", random.choice(methods)) as archive:
        warnings.simplefilter("ignore")  # the same name twice
        entries = [*GOOD]
        odd = [_entry(random, entries) for _ in range(random.choice((0, 1, 3)))]
        for one in (*entries, *odd):
            path = one.path.encode("utf-8", "replace").decode().replace("\0", "") or "x"
            info = zipfile.ZipInfo(path[:60_000])
            link = 0o120000 if one.kind in b"12" else random.choice((0o100000, 0, 0o010000))
            info.external_attr = ((link | one.mode) & 0xFFFF) << 16
            info.compress_type = archive.compression
            archive.writestr(info, one.target.encode("utf-8", "replace") or one.data)
    data = bytearray(buffer.getvalue())
    for _ in range(random.choice((0, 1, 1, 3))):
        signature, size = random.choice([*_ZIP_FIELDS.items()])
        places = [found.start() for found in re.finditer(re.escape(signature), data)]
        if places:
            at = random.choice(places) + random.randrange(4, size, 2)
            odd_number = random.choice((0, 1, 2, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 12345))
            width = random.choice((2, 4))
            data[at : at + width] = (odd_number & (1 << 8 * width) - 1).to_bytes(width, "little")
    return flip(random, bytes(data)) if random.random() < 0.1 else bytes(data)
