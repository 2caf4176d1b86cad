"""Manifests and archives that hypothesis makes up, and what must hold for each of them.

An archive goes the whole way: from a ``file://`` URL through the chunks' digests, the unpacker and
the store. Whatever it is, the error is the loader's own, nothing outside the store is touched, and
the store holds the runtime as it is listed, or nothing.
"""

import copy
import hashlib
import io
import json
import stat
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from llama_loader import manifest
from llama_loader.errors import IntegrityError, LoaderError
from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact
from llama_loader.store import Store
from tests.rigs import archives, writes
from tests.rigs.archives import GOOD, Entry, compress, describe, tar

_, _ARTIFACT = archives.release()
MANIFEST: dict[str, Any] = json.loads(archives.manifest(_ARTIFACT))
"""A good one, to be changed."""


# manifests


def _places(tree: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += _places(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            found += _places(value, (*path, index))
    return found


_VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=12)
    | st.sampled_from(["../x", "/x", "a/../b", "0" * 64, "9" * 65, "2.34", "90", "..", "\n"])
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=3)
)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """A good manifest with some values replaced, removed or repeated, sometimes cut or flipped."""
    tree = copy.deepcopy(MANIFEST)
    for _ in range(draw(st.integers(0, 3))):
        *heads, last = draw(st.sampled_from(_places(tree)))
        place: Any = tree
        for head in heads:
            place = place[head]
        what = draw(st.integers(0, 3))
        if what == 0:
            del place[last]
        elif what == 1 and isinstance(place, list):
            place.append(place[last])
        else:
            place[last] = draw(_VALUES)
        if not tree:
            break
    data = bytearray(json.dumps(tree).encode())
    damage = draw(st.integers(0, 20))
    if damage == 0:
        del data[draw(st.integers(0, len(data))) :]
    elif damage == 1:
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def check_manifest(data: bytes) -> str:
    """Parse it; return ``fine`` or the error's code. What is fine is safe to use as it stands."""
    try:
        parsed = manifest.parse(data)
    except IntegrityError as error:
        return error.code
    for artifact in parsed.artifacts:
        assert "/" not in artifact.name
        assert len(artifact.sha256) == 64
        assert sum(entry.size for entry in artifact.files) == artifact.unpacked_size
        for entry in artifact.files:
            assert not entry.path.startswith("/")
            assert not {"..", ".", ""} & set(entry.path.split("/"))
    assert manifest.parse(manifest.dump(parsed)) == parsed
    return "fine"


# archives

_PATHS = st.sampled_from(
    [
        *(entry.path for entry in GOOD),
        *("../x", "/etc/x", "a/../../x", "runtime", "runtime/", "runtime/lib", "runtime/lib/x"),
        *("runtime/LLAMA-SERVER", "./x", ".", "..", "", "runtime/llama-server/x", "\\x", "x\ny"),
    ]
) | st.text(max_size=20)

_MEMBERS = st.builds(
    Entry,
    path=_PATHS,
    data=st.binary(max_size=600),
    mode=st.sampled_from([0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o777, 0]),
    kind=st.sampled_from([b"0", b"0", b"0", b"1", b"2", b"2", b"3", b"4", b"5", b"6", b"S", b"7"]),
    target=_PATHS,
    pax=st.dictionaries(
        st.sampled_from(["path", "linkpath", "size", "mtime", "GNU.sparse.major", "x"]),
        _PATHS.filter(lambda text: "\0" not in text) | st.sampled_from(["1", "21", "-1", "9" * 30]),
        max_size=1,
    ),
)
DAMAGES = ("none", "none", "none", "cut", "bits", "behind", "twice")


@dataclass(frozen=True)
class Case:
    """An archive, what its manifest says of it, and what was done to it, for the counts."""

    packed: bytes
    artifact: Artifact
    damage: str
    listed: str


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Members of any kind among good ones, sometimes with changed bytes, sometimes cut."""
    entries = draw(st.lists(_MEMBERS, max_size=4)) + draw(st.permutations(GOOD))
    if draw(st.booleans()):
        entries = draw(st.permutations(entries))
    style = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with_content = (b"0", b"S", b"7")
    plain = bytearray(
        tar([e if e.kind in with_content else replace(e, data=b"") for e in entries], style)
    )
    if draw(st.integers(0, 3)) == 0:
        for at in draw(st.lists(st.integers(0, len(plain) - 1), max_size=3)):
            plain[at] = draw(st.integers(0, 255))
    if draw(st.integers(0, 5)) == 0:
        del plain[draw(st.integers(0, len(plain))) :]
    return bytes(plain)


def _damaged(draw: st.DrawFn, packed: bytes, damage: str) -> bytes:
    data = bytearray(packed)
    if damage == "cut":
        del data[draw(st.integers(1, len(data) - 1)) :]
    elif damage == "bits":
        for at in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=3)):
            data[at] ^= 1 << draw(st.integers(0, 7))
    elif damage == "behind":
        data += draw(st.binary(min_size=1, max_size=600))
    elif damage == "twice":
        data *= 2
    return bytes(data)


def _listing(draw: st.DrawFn, listed: str) -> tuple[Entry, ...]:
    """What the manifest says is in it: the good files, or something beside them."""
    entries = list(GOOD)
    at = draw(st.integers(0, len(entries) - 1))
    one = entries[at]
    other = {
        "content": replace(one, data=one.data[::-1] + b"x"),
        "size": replace(one, data=one.data + b"x"),
        "mode": replace(one, mode=0o644 if one.mode == 0o755 else 0o755),
        "path": replace(one, path="runtime/another"),
    }
    if listed in other:
        entries[at] = other[listed]
    elif listed == "fewer":
        del entries[at]
    elif listed == "more":
        entries.append(Entry("runtime/more", b"more"))
    return tuple(entries)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """An archive of any format and its manifest's entry, which may be about something else."""
    form = draw(st.sampled_from(["tar.gz", "tar.xz", "tar.zst"]))
    plain = draw(st.just(tar(GOOD)) | tars() | tars() | tars())
    damage = draw(st.sampled_from(DAMAGES))
    listed = draw(
        st.sampled_from([*["right"] * 6, "content", "size", "mode", "path", "fewer", "more"])
    )
    packed = _damaged(draw, compress(plain, form), damage)
    artifact = describe(packed, _listing(draw, listed), form, draw(st.sampled_from([100, 65536])))
    return Case(packed, artifact, damage, listed)


@st.composite
def theirs(draw: st.DrawFn) -> tuple[str, bytes]:
    """An archive that no manifest describes: its format, and its bytes. A zip now and then."""
    form = draw(st.sampled_from(["tar.gz", "tar.xz", "tar.zst", "zip"]))
    packed = _zip(draw) if form == "zip" else compress(draw(tars()), form)
    return form, _damaged(draw, packed, draw(st.sampled_from(DAMAGES)))


def _zip(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        paths = st.text(max_size=20).filter(lambda text: "\0" not in text) | _PATHS
        for path in draw(st.lists(paths, max_size=4, unique=True)):
            info = zipfile.ZipInfo(path or "x")
            kind = draw(st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, 0]))
            info.external_attr = (kind | draw(st.sampled_from([0o644, 0o755, 0o4755]))) << 16
            archive.writestr(info, draw(st.binary(max_size=100) | st.just(b"../../x")))
        if draw(st.booleans()):
            archive.writestr("build/bin/llama-server", archives.SCRIPT)
    return buffer.getvalue()


def check_case(case: Case) -> str:
    """Install it into an empty store; return ``fine`` or the error's code."""

    def install(store: Store, url: str) -> None:
        installed = store.install(case.artifact, [url], Fetcher(sleep=lambda _: None), release="r")
        files = {
            str(path.relative_to(installed.root / "files")): path.read_bytes()
            for path in installed.root.glob("files/**/*")
            if path.is_file()
        }
        listed = {entry.path: entry.sha256 for entry in case.artifact.files}
        assert {path: hashlib.sha256(data).hexdigest() for path, data in files.items()} == listed

    return _check(case.packed, install)


def check_theirs(packed: bytes) -> str:
    """Install it by its URL into an empty store; return ``fine`` or the error's code."""
    return _check(
        packed, lambda store, url: store.install_archive(url, None, Fetcher(sleep=lambda _: None))
    )


def _check(packed: bytes, install: Any) -> str:
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        root, source = Path(folder) / "store", Path(folder) / "archive"
        source.write_bytes(packed)
        with writes.watched() as changed:
            try:
                install(Store(root), source.as_uri())
                outcome = "fine"
            except LoaderError as error:
                outcome = error.code
        assert changed, "the watch sees nothing"
        assert writes.outside(root, changed) == []
        assert sorted(path.name for path in Path(folder).iterdir()) == ["archive", "store"]
        _require_clean(root, installed=outcome == "fine")
    return outcome


def _require_clean(root: Path, *, installed: bool) -> None:
    """One runtime of plain files and folders, or none; nothing in the making."""
    assert len(list((root / "runtimes").iterdir())) == installed
    assert [path for path in (root / "staging").iterdir() if path.is_dir()] == []
    for place in root.rglob("*"):
        status = place.lstat()
        assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        assert not status.st_mode & 0o7000
