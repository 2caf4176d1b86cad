"""Faults 18 to 20: manifests that are not what they should be (docs/faults.md)."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llama_loader import manifest
from llama_loader.errors import IntegrityError
from tests.rigs import archives
from tests.rigs.refusals import refused

SPACES = Path(manifest.__file__).parents[1]
_, ARTIFACT = archives.release()
GOOD: dict[str, Any] = json.loads(archives.manifest(ARTIFACT))
CUDA = {"toolkit": "12.8", "min_driver": "525.60", "sass": ["90", "120a"], "ptx": []}


def changed(path: str, value: object) -> bytes:
    """A good manifest with one value changed: ``artifacts.0.size``."""
    tree = copy.deepcopy(GOOD)
    *heads, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = tree
    for head in heads:
        place = place[head]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(tree).encode()


def test_a_good_manifest_goes_round_and_says_nothing_that_older_releases_did_not() -> None:
    """Releases of before a field existed keep their bytes, and with them their digests."""
    data = archives.manifest(ARTIFACT)
    parsed = manifest.parse(data)
    assert parsed.artifacts == (ARTIFACT,)
    assert manifest.dump(parsed) == data
    assert data == json.dumps(GOOD, indent=2).encode() + b"\n"
    assert not {"kind", "provides"} & GOOD["artifacts"][0].keys()
    assert GOOD["artifacts"][0]["sbom"] is None
    assert set(GOOD["artifacts"][0]["files"][0]) == {"path", "size", "sha256", "executable"}
    told = manifest.parse(changed("artifacts.0.kind", "llama-server"))
    assert told.artifacts == (ARTIFACT,)
    for field, value in (("kind", "a-later-one"), ("backend", "vulkan")):
        assert manifest.parse(changed(f"artifacts.0.{field}", value)).release == "b1-1"


def libraries(**changes: Any) -> bytes:
    """A good manifest whose artifact is of the kind ``cuda-runtime``."""
    tree = copy.deepcopy(GOOD)
    tree["artifacts"][0].update({"kind": "cuda-runtime", "provides": ["libllama.so.0"]} | changes)
    return json.dumps(tree).encode()


def test_a_cuda_runtime_goes_round() -> None:
    parsed = manifest.parse(libraries())
    found = parsed.artifacts[0]
    assert (found.kind, found.provides) == ("cuda-runtime", ("libllama.so.0",))
    assert manifest.parse(libraries(backend="cuda", cuda=CUDA)).artifacts[0].cuda is not None
    assert found.library_folder == "runtime"
    assert manifest.parse(manifest.dump(parsed)) == parsed


def test_what_was_parsed_cannot_be_changed_and_is_made_by_keyword() -> None:
    for kind in (manifest._Frozen, *manifest._Frozen.__subclasses__()):
        assert kind.__struct_config__.frozen
        with pytest.raises(TypeError, match="positional"):
            kind("x")


@pytest.mark.parametrize("path", ["x", "source.x", "artifacts.0.x", "artifacts.0.files.0.x"])
def test_unknown_fields_are_ignored(path: str) -> None:
    assert manifest.parse(changed(path, {"a": [1]})).artifacts == (ARTIFACT,)


def test_patches_go_round_and_a_reader_takes_those_that_it_does_not_know() -> None:
    one = {"name": "of-tomorrow", "sha256": "1" * 64}
    parsed = manifest.parse(changed("source.patches", [one | {"x": 1}]))
    assert parsed.source.patches == (manifest.Patch(**one),)
    assert json.loads(manifest.dump(parsed))["source"]["patches"] == [one]
    empty = manifest.parse(changed("source.patches", []))
    assert empty.source.patches == ()
    assert b"patches" not in manifest.dump(empty)


@pytest.mark.parametrize("version", [2, 3, 0, -1, 1000])
def test_an_unknown_schema_says_to_update(version: int) -> None:
    with refused("MANIFEST_SCHEMA_UNKNOWN", IntegrityError) as caught:
        manifest.parse(changed("schema_version", version), what="manifest here")
    assert "update the loader" in caught.value.hint
    assert "manifest here" in caught.value.message


BAD = {
    "schema_version": ["1", 1.5, True, None, ...],
    "release": ["../x", "", "a/b"],
    "serial": ["7"],
    "created": ["yesterday", "2026-10-10T15:54:57"],
    "expires": [1],
    "source": [None],
    "source.commit": ["", "b1", "A" * 40, "0" * 40 + "\n", 'a"+x+"'],
    "source.sha256": ["0" * 63],
    "source.patches": [{}, [None], [{"name": "x"}], [{"name": "../x", "sha256": "0" * 64}]],
    "artifacts": [{}, [None]],
    "artifacts.0.name": ["../x", "/x", "..", "a\\b", "a\nb", "a\u0000b"],
    "artifacts.0.urls": [["x", 1]],
    "artifacts.0.urls.0": [""],
    "artifacts.0.size": [-1, 1.0, "1"],
    "artifacts.0.sha256": ["0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"],
    "artifacts.0.chunks.0": ["zz"],
    "artifacts.0.unpacked_size": [-1],
    "artifacts.0.platform.glibc": ["two", "2.34 "],
    "artifacts.0.needs": ["libx.so", ["../libx.so"]],
    "artifacts.0.files": [[]],
    "artifacts.0.files.0.path": [
        *("/etc/passwd", "runtime/../../x", "./x", "x/.", "x//y", "x/", "x\\..\\y", ""),
    ],
    "artifacts.0.files.0.size": [-1],
    "artifacts.0.files.0.sha256": [""],
    "artifacts.0.files.0.executable": [1, "yes"],
    "artifacts.0.sbom": [{"url": "x"}],
    "artifacts.0.kind": ["", None],
    "artifacts.0.provides": ["libcudart.so.13", ["../libcudart.so.13"]],
}


def dollar(path: str) -> str:
    return "$" + re.sub(r"\.(\d+)", r"[\1]", f".{path}")


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in BAD.items() for value in values]
)
def test_a_bad_value_is_named_by_its_place(path: str, value: object) -> None:
    with refused("MANIFEST_INVALID", IntegrityError) as caught:
        manifest.parse(changed(path, value), what="manifest here")
    head = dollar(path.rpartition(".")[0]) if value is ... else dollar(path)
    assert caught.value.message.startswith("manifest here: $")
    assert head.removesuffix("[0]").replace("$.", "$") in caught.value.message.replace("$.", "$")
    assert "regex" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("artifacts.0.chunks", [], "chunks: their number"),
        ("artifacts.0.chunks", ["0" * 64] * 9, "chunks: their number"),
        ("artifacts.0.unpacked_size", 1, "unpacked_size: is not the sum"),
        ("artifacts.0.unpacked_size", 1 << 30, "unpacked_size: is not the sum"),
        ("artifacts.0.files.3.path", "runtime", "'runtime' is a file and a folder"),
        ("artifacts.0.files.3.path", "runtime/LLAMA-server", "differ in case only"),
        ("artifacts.0.files.3.path", "runtime/llama-server", "equal or differ"),
        ("artifacts.0.cuda", CUDA, "cuda: must be given"),
        ("artifacts.0.backend", "cuda", "cuda: must be given"),
        ("artifacts.0.files.0.chunks", ["0" * 64] * 9, "do not follow from its size"),
        ("artifacts", [GOOD["artifacts"][0]] * 2, "two have the same name"),
        ("artifacts.0.size", (1 << 40) + 1, f"<= {1 << 40}"),
        ("source.patches", [{"name": "x", "sha256": "0" * 64}] * 101, "<= 100"),
    ],
)
def test_values_that_contradict_one_another(path: str, value: object, match: str) -> None:
    with refused("MANIFEST_INVALID", IntegrityError, match) as caught:
        manifest.parse(changed(path, value))
    assert "$" in caught.value.message


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"1", b'"x"', b"null", b"<html>", archives.manifest(ARTIFACT)[:-30]]
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        manifest.parse(data)


@pytest.mark.parametrize(
    ("base", "url", "found"),
    [
        ("https://h/r/manifest.json", "a.tar", "https://h/r/a.tar"),
        ("https://h/r/manifest.json", "/a.tar", "https://h/a.tar"),
        ("https://h/r/manifest.json", "//m/a.tar", "https://m/a.tar"),
        ("https://h/r/manifest.json?x=1", "a.tar", "https://h/r/a.tar"),
        ("https://h/r/manifest.json", "http://m/a.tar", "http://m/a.tar"),
        ("file:///r/manifest.json", "a.tar", "file:///r/a.tar"),
        ("hf://o/n@v1/r/manifest.json", "a.tar", "hf://o/n@v1/r/a.tar"),
        ("hf://o/n/manifest.json", "https://m/a.tar", "https://m/a.tar"),
        ("hf://o/n/hf:/manifest.json", "a.tar", "hf://o/n/hf:/a.tar"),
        ("hf://o/n/https:/manifest.json", "a.tar", "hf://o/n/https:/a.tar"),
        ("hf://o/n/manifest.json", "hf://p/q/a.tar", "hf://p/q/a.tar"),
    ],
)
def test_urls_resolve_against_the_manifests_own(base: str, url: str, found: str) -> None:
    assert manifest.resolve(base, url) == found


# limits


def one_file(**fields: Any) -> bytes:
    """A good manifest whose one artifact has one file, with fields of both changed."""
    tree = copy.deepcopy(GOOD)
    artifact = tree["artifacts"][0]
    artifact["files"] = artifact["files"][:1]
    artifact["files"][0]["size"] = fields.pop("file_size", artifact["files"][0]["size"])
    artifact["files"][0]["chunks"] = ["0" * 64] * fields.pop("file_chunks", 0)
    artifact["unpacked_size"] = artifact["files"][0]["size"]
    artifact.update(fields)
    return json.dumps(tree).encode()


def many_files(count: int, folders: str = "", files: Sequence[str] = ()) -> bytes:
    tree = copy.deepcopy(GOOD)
    empty = GOOD["artifacts"][0]["files"][3]
    paths = [f"d{n}/{folders}f" if folders else f"f{n}" for n in range(count)]
    tree["artifacts"][0].update(files=[empty | {"path": path} for path in (*paths, *files)])
    tree["artifacts"][0]["unpacked_size"] = 0
    return json.dumps(tree).encode()


def many_artifacts(count: int) -> bytes:
    artifact = json.loads(one_file())["artifacts"][0]
    return json.dumps(
        GOOD | {"artifacts": [artifact | {"name": f"a{n}"} for n in range(count)]}
    ).encode()


LIMITS = {
    "name": (changed("artifacts.0.name", "x" * 255), changed("artifacts.0.name", "x" * 256)),
    "path": (
        changed("artifacts.0.files.0.path", "x" * 1024),
        changed("artifacts.0.files.0.path", "x" * 1025),
    ),
    "version": (
        changed("artifacts.0.platform.glibc", "1" * 32),
        changed("artifacts.0.platform.glibc", "1" * 33),
    ),
    "text": (changed("source.origin", "x" * 1024), changed("source.origin", "x" * 1025)),
    "some text": (changed("source.origin", "x"), changed("source.origin", "")),
    "build": (changed("source.build", 0), changed("source.build", -1)),
    "serial": (changed("serial", 0), changed("serial", -1)),
    "high serial": (changed("serial", 2**53 - 1), changed("serial", 2**53)),
    "urls": (changed("artifacts.0.urls", ["x"]), changed("artifacts.0.urls", [])),
    "small size": (
        one_file(size=1, chunk_size=1, chunks=["0" * 64]),
        one_file(size=0, chunk_size=1, chunks=[]),
    ),
    "chunk size": (
        one_file(chunk_size=1 << 23),
        one_file(chunk_size=(1 << 23) + 1),
    ),
    "small chunk size": (
        one_file(size=300, chunk_size=1, chunks=["0" * 64] * 300),
        one_file(size=2, chunk_size=0, chunks=["0" * 64] * 2),
    ),
    "file size": (one_file(file_size=1 << 40), one_file(file_size=(1 << 40) + 1)),
    "few pieces": (
        one_file(file_size=65537, file_chunks=2),
        one_file(file_size=65537, file_chunks=1),
    ),
    "pieces": (
        one_file(file_size=12, file_chunks=3, file_chunk_size=4),
        one_file(file_size=12, file_chunks=4, file_chunk_size=4),
    ),
    "piece size": (one_file(file_chunk_size=1 << 30), one_file(file_chunk_size=(1 << 30) + 1)),
    "least piece size": (one_file(file_chunk_size=0), one_file(file_chunk_size=-1)),
    "files": (many_files(10_000), many_files(10_001)),
    "folders": (
        many_files(645, "a/" * 29, files=[f"x{n}" for n in range(5)]),
        many_files(645, "a/" * 29, files=[f"x{n}" for n in range(6)]),
    ),
    "parts of a path": (many_files(1, "a/" * 30), many_files(1, "a/" * 31)),
    "file and folder": (many_files(1, "f1/"), many_files(2, "f1/", files=["d0/f1"])),
    "artifacts": (many_artifacts(1000), many_artifacts(1001)),
    "no artifacts": (changed("artifacts", []), changed("artifacts", None)),
    "bytes": (
        archives.manifest(ARTIFACT).ljust(4_194_304),
        archives.manifest(ARTIFACT).ljust(4_194_305),
    ),
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_last_value_that_is_accepted_and_the_first_that_is_not(what: str) -> None:
    accepted, too_far = LIMITS[what]
    assert manifest.parse(accepted).schema_version == 1
    with pytest.raises(IntegrityError):
        manifest.parse(too_far)


@pytest.mark.parametrize(("field", "most"), [("needs", 100), ("provides", 100), ("urls", 100)])
def test_lists_that_are_compared_or_tried_one_by_one_are_bounded(field: str, most: int) -> None:
    tree = copy.deepcopy(GOOD)
    tree["artifacts"][0][field] = ["x"] * (most + 1)
    with pytest.raises(IntegrityError, match=rf"artifacts\[0\]\.{field}: .* <= {most}"):
        manifest.parse(json.dumps(tree).encode())


EMPTY_OBJECTS = """
import resource
from llama_loader import errors, manifest
data = b'{"x":[' + b",".join([b"{}"] * 1_390_000) + b"]}"
assert len(data) < manifest.MAX_MANIFEST_BYTES < len(data) + (1 << 20)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
try:
    manifest.parse(data)
except errors.IntegrityError as error:
    print(error.message)
"""


def test_manifest_of_empty_objects_takes_bounded_memory() -> None:
    """In a process of its own: no memory of other tests is there to be used again."""
    argv = [sys.executable, "-c", EMPTY_OBJECTS]
    told = subprocess.run(argv, cwd=SPACES, capture_output=True, text=True, check=True)
    assert "missing required field" in told.stdout


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (("libllama.so.0", "other"), "."),
        (("libX/libllama.so.0", "libX/other"), "libX"),
        (("a/b/libllama.so.0", "a/b/other"), "a/b"),
        (("libllama.so.0", "x/libllama.so.0", "other"), "."),  # one of them in two folders
        (("x/libllama.so.0", "y/other"), None),
        (("x/libllama.so.0",), None),
        (("x/llama-server",), None),
        (("x/zlibllama.so.0", "x/zother"), None),
        (("x/libllama.so.0", "x/other", "y/libllama.so.0", "y/other"), None),
    ],
)
def test_the_folder_of_the_libraries(paths: tuple[str, ...], found: str | None) -> None:
    entry = {"size": 0, "sha256": "0" * 64, "executable": False}
    files = [{"path": path, **entry} for path in paths]
    data = libraries(files=files, unpacked_size=0, provides=["libllama.so.0", "other"])
    if found is not None:
        assert manifest.parse(data).artifacts[0].library_folder == found
        return
    with pytest.raises(IntegrityError, match="provides: must name files that are all in one"):
        manifest.parse(data)


def loads(data: bytes, max_bytes: int = 1 << 20) -> object:
    return manifest.strict_json(data, what="the text", max_bytes=max_bytes)


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
        (b'{"' + b"k" * 9999 + b'": [0, NaN]}', "JSON_AMBIGUOUS", r"\$\.k{80}\[1\]: NaN"),
        (b"[Infinity]", "JSON_AMBIGUOUS", "Infinity"),
        (b"[-Infinity]", "JSON_AMBIGUOUS", "Infinity"),
        (b"[1e999]", "JSON_AMBIGUOUS", "1e999"),
        (b'["\\ud800"]', "JSON_AMBIGUOUS", "lone surrogate"),
        (b'{"\\udfff": 1}', "JSON_AMBIGUOUS", "lone surrogate"),
        (b"[" * 10_000 + b"]" * 10_000, "JSON_TOO_DEEP", "deep|levels"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "JSON_TOO_DEEP", "deep|levels"),
        (b"[" * 66 + b"]" * 66, "JSON_TOO_DEEP", "64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "JSON_TOO_DEEP", "64 levels"),
        (b"1" * 5000, "JSON_MALFORMED", "is not JSON"),
    ],
)
def test_refused(text: bytes, code: str, match: str) -> None:
    with refused(code, IntegrityError, match) as caught:
        loads(text)
    assert caught.value.message.startswith("the text")
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "text",
    [
        '"\\ud83d\\ude00"',
        '"é"',
        "[1.5, -0, 1e3, true, null]",
        "[" * 65 + "]" * 65,
        '{"a":' * 64 + "1" + "}" * 64,
    ],
)
def test_plain_json_is_read_as_ever(text: str) -> None:
    assert loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("base", "mirror", "allowed"),
    [
        ("https://h/m.json", "file:///etc/passwd", False),
        ("https://h/m.json", "FILE:///etc/passwd", False),
        ("https://h/m.json", "http://127.0.0.1:8080/admin", False),
        ("https://h/m.json", "https://other/a", True),
        ("https://h/m.json", "hf://o/r/a", True),
        ("hf://o/r/m.json", "http://[::1]/a", False),
        ("hf://o/r/m.json", "a", True),
        ("http://127.0.0.1:1/m.json", "file:///a", False),
        ("http://127.0.0.1:1/m.json", "http://127.0.0.1:2/a", True),
        ("file:///d/m.json", "http://127.0.0.1:2/a", True),
        ("file:///d/m.json", "a", True),
    ],
)
def test_manifest_of_elsewhere_names_no_mirror_on_this_machine(
    base: str, mirror: str, allowed: object
) -> None:
    _, one = archives.release()
    elsewhere = msgspec.structs.replace(one, urls=(mirror, "https://h/a"))
    assert len(elsewhere.resolved_urls(base)) == (2 if allowed else 1)
    alone = msgspec.structs.replace(one, urls=(mirror,))
    if allowed:
        assert len(alone.resolved_urls(base)) == 1
        return
    with refused("MIRROR_REFUSED", IntegrityError, "this machine as its only mirror"):
        alone.resolved_urls(base)
