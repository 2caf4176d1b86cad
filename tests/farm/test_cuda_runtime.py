"""CUDA's libraries as an artifact of their own: out of wheels, into a release, and read again."""

import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cuda_wheels
import jsonschema
import msgspec
import pytest
from backports import zstd
from binaries import library
from cuda_wheels import CUBLAS, CUDART, LIB, LICENCE, SONAMES

from farm import cuda_runtime, release, targets
from farm.errors import FarmError, InspectError, PackError, SourceError, UsageError
from farm.inputs import pins
from farm.terminal import show
from llama_loader import manifest as schema
from tests.rigs import refusals
from tests.rigs.package_index import PackageIndex
from tests.rigs.published import edited

NAME = "cuda-runtime-13.0.2.14-cu130-linux-x86_64.tar.zst"
CU130 = targets.load().line("cu130")
REAL = pins.load()
Wheels = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return cuda_wheels.libraries(tmp_path_factory.mktemp("made"))


@pytest.fixture
def wheels(made: dict[str, bytes]) -> Wheels:
    return cuda_wheels.contents(made)


@pytest.fixture
def tarball(wheels: Wheels, tmp_path: Path) -> Path:
    return packed(wheels, tmp_path, tmp_path / "dist")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    return cuda_wheels.server(folder, folder / "out")


def packed(wheels: Wheels, work: Path, out: Path, form: str = "tar.zst", **line: Any) -> Path:
    work.mkdir(exist_ok=True)
    paths = {package: cuda_wheels.wheel(work, package, one) for package, one in wheels.items()}
    pinned = [(cuda_wheels.pin(package, path), path) for package, path in paths.items()]
    row = msgspec.structs.replace(CU130, **line)
    return cuda_runtime.pack(pinned, row, out, form).path


def read(tarball: Path) -> schema.Artifact:
    return cuda_runtime.read_with_record(tarball)[0]


def unpacked(tarball: Path) -> dict[str, bytes]:
    plain = zstd.decompress(tarball.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        files = {info.name: tar.extractfile(info) for info in tar}
        return {name: stream.read() for name, stream in files.items() if stream}


@dataclasses.dataclass
class Forged:
    """A tarball that is not as the farm makes it."""

    place: Path
    members: dict[str, bytes]

    def write(self, *, tail: bytes = b"", **changes: Any) -> Path:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in self.members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for field, value in changes.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(data))
        self.place.write_bytes(zstd.compress(buffer.getvalue() + tail))
        return self.place


@pytest.fixture
def forged(tarball: Path) -> Forged:
    return Forged(tarball, unpacked(tarball))


def refused(kind: type[FarmError], code: str, action: Callable[[], object]) -> FarmError:
    with refusals.refused(code, kind) as caught:
        action()
    error: FarmError = caught.value
    return error


# Out of the wheels


def test_exactly_the_libraries_unmodified_and_the_licences(
    tarball: Path, made: dict[str, bytes], wheels: Wheels
) -> None:
    assert tarball.name == NAME
    found = unpacked(tarball)
    assert list(found) == [
        "cuda-runtime/CUDA_RUNTIME.json",
        "cuda-runtime/libcublas.so.13",
        "cuda-runtime/libcublasLt.so.13",
        "cuda-runtime/libcudart.so.13",
        f"cuda-runtime/licenses/{CUBLAS}/License.txt",
        f"cuda-runtime/licenses/{CUDART}/License.txt",
    ]
    assert {name: found[f"cuda-runtime/{name}"] for name in SONAMES} == made
    assert found[f"cuda-runtime/licenses/{CUBLAS}/License.txt"] == LICENCE
    record = json.loads(found["cuda-runtime/CUDA_RUNTIME.json"])
    for told in record["wheels"]:
        for one in told["files"]:
            content = wheels[told["package"]][one["path"]]
            assert one["sha256"] == hashlib.sha256(content).hexdigest()
            assert content == found[f"cuda-runtime/{one['name']}"]
    assert record["line"]["name"] == "cu130"


@pytest.mark.parametrize("form", ["tar.zst", "tar.gz"])
def test_the_same_wheels_give_the_same_bytes(wheels: Wheels, tmp_path: Path, form: str) -> None:
    first = packed(wheels, tmp_path / "a", tmp_path / "first", form)
    again = packed(wheels, tmp_path / "b", tmp_path / "again", form)
    assert first.name.endswith(form)
    assert first.read_bytes() == again.read_bytes()
    assert read(first).provides == SONAMES


def test_what_the_manifest_says_of_it(tarball: Path) -> None:
    found = read(tarball)
    assert (found.kind, found.backend) == ("cuda-runtime", "cuda")
    assert found.provides == SONAMES
    assert found.library_folder == "cuda-runtime"
    assert found.needs == ()
    assert found.cuda == schema.Cuda(toolkit="13.0", min_driver="580.65", sass=(), ptx=())
    assert (found.platform.machine, found.platform.glibc) == ("x86_64", "2.2.5")
    assert not any(entry.executable for entry in found.files)


def without(wheels: Wheels, ending: str) -> Wheels:
    return {
        package: {name: data for name, data in members.items() if not name.endswith(ending)}
        for package, members in wheels.items()
    }


def doubled(wheels: Wheels) -> Wheels:
    wheels[CUDART][f"{LIB}/libcublas.so.13"] = b"another"
    return wheels


def bare(wheels: Wheels) -> Wheels:
    return {**wheels, CUDART: without(wheels, "License.txt")[CUDART]}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        *((partial(without, ending=f"/{one}"), "LIBRARY_MISSING", one) for one in SONAMES),
        (doubled, "LIBRARY_MISSING", "libcublas.so.13 is 2 times"),
        (bare, "LICENCE_MISSING", "nvidia_cuda_runtime"),
    ],
)
def test_wheels_that_lack_something_are_named_and_nothing_is_packed(
    wheels: Wheels, tmp_path: Path, change: Callable[[Wheels], Wheels], code: str, named: str
) -> None:
    error = refused(SourceError, code, lambda: packed(change(wheels), tmp_path, tmp_path / "out"))
    assert named in error.message
    assert code != "LIBRARY_MISSING" or "nvidia_cublas-13.0.2.14" in error.message
    assert not (tmp_path / "out").exists()


def test_a_library_under_another_soname(wheels: Wheels, tmp_path: Path) -> None:
    other = library(tmp_path, "x.so", soname="libcudart.so.12").read_bytes()
    wheels[CUDART][f"{LIB}/libcudart.so.13"] = other
    with refusals.refused("SONAME_DIFFERS", InspectError, r"libcudart\.so\.12"):
        packed(wheels, tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_library_for_a_newer_system_than_its_line_promises(
    wheels: Wheels, tmp_path: Path
) -> None:
    with refusals.refused("GLIBC_TOO_NEW", InspectError):
        packed(wheels, tmp_path, tmp_path / "out", glibc="2.1")


# Which wheels


@pytest.fixture
def index(
    index: PackageIndex, wheels: Wheels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PackageIndex:
    work = tmp_path / "wheels"
    work.mkdir()
    pinned = cuda_wheels.publish(index, work, wheels)
    table = pins.Pins(source=REAL.source, models=REAL.models, toolkit=pinned)
    monkeypatch.setattr(cuda_runtime.pins, "load", lambda: table)
    return index


def test_pinned_wheels_are_fetched_once(index: PackageIndex, tmp_path: Path) -> None:
    made = cuda_runtime.make("cu130", tmp_path / "out").path
    assert made.name == NAME
    asked = len(index.asked)
    assert asked == 4
    assert cuda_runtime.make("cu130", tmp_path / "again").path.read_bytes() == made.read_bytes()
    assert len(index.asked) == asked


@pytest.mark.parametrize(("line", "major"), [("cu124", "12.4"), ("cu128", "12.8")])
def test_the_pins_of_older_lines(line: str, major: str) -> None:
    found = REAL.cuda_runtime_of(line)
    assert [pin.package for pin in found] == [f"{CUBLAS}-cu12", f"{CUDART}-cu12"]
    assert all(pin.version.startswith(f"{major}.") for pin in found)
    assert [pin.package for pin in REAL.cuda_runtime_of("cu130")] == [CUBLAS, CUDART]


# In a release


@pytest.fixture
def released(tarball: Path, server: Path) -> Path:
    shutil.copy(server, tarball.parent)
    release.write(tarball.parent)
    return tarball.parent


def test_a_release_lists_it_after_its_servers(released: Path, server: Path) -> None:
    data = (released / "manifest.json").read_bytes()
    tree = json.loads(data)
    assert [one["name"] for one in tree["artifacts"]] == [server.name, NAME]
    assert [one.get("kind") for one in tree["artifacts"]] == [None, "cuda-runtime"]
    assert "provides" not in tree["artifacts"][0]
    for one in tree["artifacts"]:
        assert one["sbom"]["url"] == f"{one['name']}.cdx.json"
    assert tree["source"]["build"] == 11549
    jsonschema.validate(tree, json.loads((released / "manifest.schema.json").read_bytes()))
    assert schema.dump(schema.parse(data)) == data
    assert f"  {NAME}\n" in (released / "SHA256SUMS").read_text("utf-8")
    assert release.verify(released) == (server.name, NAME)


def test_status_shows_what_it_provides(
    released: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show.status(release.load(released))
    shown = " ".join(capsys.readouterr().out.split())
    assert "cuda-runtime-13.0.2.14" in shown
    assert "CUDA 13.0 libraries" in shown
    assert "SASS 90" in shown


def test_libraries_alone_are_no_release(tarball: Path) -> None:
    error = refused(UsageError, "RELEASE_EMPTY", lambda: release.write(tarball.parent))
    assert "llama-server" in error.message


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "cuda-extras"), ("provides", ["libcudart.so.13"]), ("needs", [])]
)
def test_verify_names_a_field_that_is_not_so(released: Path, field: str, value: object) -> None:
    with edited(released) as tree:
        tree["artifacts"][1][field] = ["libfoo.so.1"] if field == "needs" else value
    error = refused(PackError, "RELEASE_MISMATCH", lambda: release.verify(released))
    assert f"{NAME}: {field} is" in error.message


# What is not ours, or not NVIDIA's any more


def test_a_forgery_with_nothing_changed_is_read(forged: Forged) -> None:
    before = read(forged.place)
    assert read(forged.write()).files == before.files


RECORD = "cuda-runtime/CUDA_RUNTIME.json"
Members = dict[str, bytes]


def modified(members: Members) -> None:
    members["cuda-runtime/libcudart.so.13"] += b"\0"


def told_otherwise(members: Members, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(members[RECORD])
    change(record)
    members[RECORD] = json.dumps(record).encode()


def fewer_libraries(members: Members) -> None:
    told_otherwise(members, lambda record: record["wheels"][1]["files"].pop(0))
    del members["cuda-runtime/libcudart.so.13"]


NO_DRIVER: Callable[[dict[str, Any]], object] = lambda record: record["line"].update(  # noqa: E731
    min_driver=None
)
EMPTY = {"package": "", "version": "", "filename": "", "sha256": "", "files": []}
FORGERIES: dict[str, tuple[Callable[[Members], object], str, str]] = {
    "a modified library": (modified, "FILE_MODIFIED", "libcudart.so.13"),
    "a file more": (
        lambda members: members.update({"cuda-runtime/libnvblas.so.13": b"x"}),
        "FILE_MODIFIED",
        "cuda-runtime/libnvblas.so.13",
    ),
    "a file less": (
        lambda members: members.pop(f"cuda-runtime/licenses/{CUDART}/License.txt"),
        "FILE_MODIFIED",
        f"cuda-runtime/licenses/{CUDART}/License.txt",
    ),
    "fewer libraries": (fewer_libraries, "LIBRARY_MISSING", "libcudart.so.13"),
    "no record": (lambda members: members.pop(RECORD), "RECORD_MISSING", ""),
    **{
        f"record {text!r}": (partial(dict.update, **{RECORD: text}), "RECORD_INVALID", "")
        for text in (
            *(b"{}", b"not JSON"),
            b'{"line": {"name": "x", "toolkit": null}, "wheels": []}',
        )
    },
    "a record without cuBLAS": (
        partial(told_otherwise, change=lambda record: record["wheels"].pop(0)),
        "RECORD_INVALID",
        "",
    ),
    "a record of more wheels than a line has": (
        partial(told_otherwise, change=lambda record: record["wheels"].extend([EMPTY] * 100)),
        "RECORD_INVALID",
        "length <= 100",
    ),
    "a wheel of no package": (
        partial(told_otherwise, change=lambda record: record["wheels"].append(EMPTY)),
        "BUILD_RECORD_INVALID",
        "",
    ),
    "a record without a driver": (partial(told_otherwise, change=NO_DRIVER), "RECORD_INVALID", ""),
    "twice": (
        lambda members: members.update({"cuda-runtime/LIBCUDART.so.13": b"x"}),
        "ARCHIVE_UNSOUND",
        "",
    ),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_tarball_is_refused_with_what_is_wrong(forged: Forged, how: str) -> None:
    forge, code, named = FORGERIES[how]
    forge(forged.members)
    kind = InspectError if code == "LIBRARY_MISSING" else PackError
    assert named in refused(kind, code, lambda: release.read(forged.write())).message


def test_a_tarball_under_another_name(tarball: Path) -> None:
    moved = tarball.rename(tarball.with_name(NAME.replace("13.0.2.14", "13.0.3")))
    error = refused(PackError, "TARBALL_RENAMED", lambda: read(moved))
    assert NAME in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": 0o755},
        {"name": "runtime/libcudart.so.13"},
        {"name": "cuda-runtime"},
        {"tail": b"garbage behind the end"},
    ],
)
def test_what_no_release_may_hold(forged: Forged, changes: dict[str, Any]) -> None:
    refused(PackError, "ARCHIVE_UNSOUND", lambda: read(forged.write(**changes)))
