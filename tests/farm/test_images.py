"""What an image tells of itself decides its line; recipes of the base images."""

import hashlib
import io
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

import pytest
from docker import DockerClient
from needs import must_or_skip

from farm import targets
from farm.engines.docker.inventory import DockerImages
from farm.errors import EngineError, UsageError
from farm.inputs import images, pins
from farm.inputs.images import ImageFacts, ImageTools, contradictions, line_of_tools, tools_of
from farm.inputs.toolkit import Toolkit
from tests.rigs import archives
from tests.rigs.heard import script
from tests.rigs.refusals import refused

TABLE = targets.load()

TOLD = """\
machine=x86_64
glibc=glibc 2.35
glibcxx=GLIBCXX_3.4.30
gcc=11.4.0
free=1000
root=/usr/local/cuda
nvcc=nvcc: NVIDIA (R) Cuda compiler driver Cuda compilation tools, release 12.9, V12.9.86 Build x
codes=sm_50 sm_90 sm_121
newest_gcc=14
"""


def test_what_an_image_s_programs_print_is_read() -> None:
    found = tools_of("devel:1", TOLD)
    assert found == ImageTools(
        "devel:1", "x86_64", "2.35", "3.4.30", "11.4.0", 14, "12.9",
        PurePosixPath("/usr/local/cuda"), (50, 90, 121), 1_024_000,
    )  # fmt: skip
    assert str(found) == "devel:1 has CUDA 12.9, glibc 2.35, GLIBCXX 3.4.30, g++ 11.4.0"


def test_image_that_tells_little_is_read_as_such() -> None:
    assert tools_of("bare:1", "machine=x86_64\nglibc=\nnvcc=exec format error\n") == ImageTools(
        "bare:1", "x86_64"
    )


@pytest.mark.parametrize("number", ["²", "1" * 5000, "٣", "x"], ids=["up", "long", "other", "x"])
def test_number_that_none_of_its_programs_prints_is_unknown(number: str) -> None:
    told = re.sub("[0-9]+", number, TOLD.partition("\n")[2])
    root = PurePosixPath("/usr/local/cuda")
    expected = ImageTools("devel:1", "x86_64", cuda_root=root)
    assert tools_of("devel:1", f"machine=x86_64\n{told}") == expected


def tools(**values: object) -> ImageTools:
    """What an image like NVIDIA's on Ubuntu 22.04 tells, but for what is given."""
    plain = ImageTools("devel:1", "x86_64", "2.35", "3.4.30", "11.4.0", 13, "12.6")
    return replace(plain, **values)  # type: ignore[arg-type] - its own fields


def test_image_s_nvcc_says_the_line_and_its_architectures() -> None:
    line, notes = line_of_tools(TABLE, tools(cuda="13.1", codes=(75, 90, 130)))
    assert (line.name, line.codes, notes) == ("cu131", (75, 90, 130), ())
    with refused("NVCC_MISSING", UsageError):
        line_of_tools(TABLE, tools(cuda=None))


def test_minor_version_that_the_table_does_not_know_is_told_with_its_rule() -> None:
    line, notes = line_of_tools(TABLE, tools(cuda="13.9"))
    assert (line.min_driver, line.newest) == ("580.65", 121)
    assert notes[0].startswith("note[CUDA_MINOR_UNCHECKED]: CUDA 13.9 is newer")
    assert "580.65" in notes[0]


def test_newer_glibc_of_an_image_without_a_named_line_is_promised_and_told() -> None:
    line, notes = line_of_tools(TABLE, tools(glibc="2.39", glibcxx="3.4.33"))
    assert (line.glibc, line.glibcxx) == ("2.39", "3.4.33")
    codes = [note.partition("]")[0] for note in notes]
    assert codes == ["note[GLIBC_OF_IMAGE", "note[GLIBCXX_OF_IMAGE"]


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"cuda": "12.9"}, "TOOLKIT_NOT_OF_LINE"),
        ({"cuda": None}, "NVCC_MISSING"),
        ({"glibc": "2.39"}, "IMAGE_GLIBC_TOO_NEW"),
        ({"glibcxx": "3.4.33"}, "IMAGE_GLIBCXX_TOO_NEW"),
        ({"gcc": "14.2.0"}, "HOST_COMPILER_TOO_NEW"),
        ({"machine": "aarch64"}, "IMAGE_MACHINE"),
    ],
)
def test_what_contradicts_a_named_line_is_found_in_the_image(
    told: dict[str, object], code: str
) -> None:
    line = TABLE.line("cu126")
    assert [one.code for one in contradictions(line, tools(**told))] == [code]


def test_everything_that_contradicts_a_line_is_found_at_once() -> None:
    bad = tools(cuda="12.9", glibc="2.41", glibcxx="3.4.33", gcc="14.2.0")
    assert len(contradictions(TABLE.line("cu126"), bad)) == 4


@pytest.mark.parametrize("glibc", ["2.31", "2.35", "2.36", "2.37"])
def test_images_whose_glibc_adds_no_need_keep_the_promise(glibc: str) -> None:
    """Debian 12 has 2.36, and its binaries need 2.34."""
    assert not contradictions(TABLE.line("cu126"), tools(glibc=glibc))


FAKE_MMDEBSTRAP = """#!{python}
import os, sys, tarfile
print("I: running apt-get update...")
assert os.environ["SOURCE_DATE_EPOCH"] == "1577836800"
with tarfile.open(sys.argv[-1], "w") as tar:
    for name in sys.argv[1:-1]:
        tar.addfile(tarfile.TarInfo(name))
"""


class Store:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.images: dict[str, ImageFacts] = {}
        self.contexts: list[dict[str, tarfile.TarInfo]] = []
        self.built_on: list[str] = []
        self.imports = 0

    def find(self, tag: str) -> ImageFacts | None:
        return self.images.get(tag)

    def pull(self, reference: str) -> ImageFacts:
        raise EngineError("IMAGE_UNAVAILABLE", reference)

    def import_root(self, tar: IO[bytes], tag: str, labels: Mapping[str, str]) -> ImageFacts:
        self.imports += 1
        return self._keep(tar, tag, labels)

    def build(
        self,
        context: IO[bytes],
        tag: str,
        *,
        buildargs: Mapping[str, str],
        labels: Mapping[str, str],
        log: Callable[[str], None],
    ) -> ImageFacts:
        log("Step 1/3")
        self.built_on.append(buildargs["BASE"])
        return self._keep(context, tag, labels)

    def _keep(self, tar: IO[bytes], tag: str, labels: Mapping[str, str]) -> ImageFacts:
        content = tar.read()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            self.contexts.append({entry.name: entry for entry in archive})
        image = hashlib.sha256(content + tag.encode()).hexdigest()
        self.images[tag] = ImageFacts(f"sha256:{image}", dict(labels), tag)
        return self.images[tag]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host where mmdebstrap is a script that packs its arguments; returns the script."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = FAKE_MMDEBSTRAP.format(python=sys.executable)
    return script(tmp_path / "bin" / "mmdebstrap", text)


def make(store: Store, line: str, *, fresh: bool = False) -> tuple[ImageFacts, list[str]]:
    said: list[str] = []
    made = images.make_base_image(store, line=line, fresh=fresh, log=said.append)
    return made, said


@pytest.mark.usefixtures("host")
def test_the_cpu_image_is_a_bare_root_file_system() -> None:
    store = Store()
    made, said = make(store, "cpu")
    assert made.reference == "llama-farm-base:bookworm"
    assert made.labels["llama-farm"] == "base"
    assert said == ["I: running apt-get update..."]
    assert set(store.contexts[0]) > {"bookworm", "--variant=minbase", "--format=tar"}


@pytest.mark.usefixtures("host")
def test_an_image_of_the_same_inputs_is_used_again_and_one_of_others_is_replaced() -> None:
    store, tag = Store(), images.TAGS["cpu"]
    store.images[tag] = ImageFacts("sha256:other", {images.INPUTS_LABEL: "other"}, tag)
    made, said = make(store, "cpu")
    assert made.id != "sha256:other"
    assert "note[BASE_IMAGE_REPLACED]: the engine's" in said[0]
    assert "not one that this user made" in said[0]
    again, said = make(store, "cpu")
    assert again == made
    hint = EngineError("IMAGE_UNAVAILABLE", reference="a", error="b").hint
    assert " and ".join(", ".join(images.TAGS).rsplit(", ", 1)) in hint
    assert said == ["image llama-farm-base:bookworm: there already, made from the same inputs"]
    make(store, "cpu", fresh=True)
    assert store.imports == 2
    theirs = replace(again, id="sha256:theirs")  # which says that it is of the same inputs
    store.images[tag] = theirs
    assert make(store, "cpu")[0] != theirs


@pytest.mark.usefixtures("host")
def test_cu124_is_its_recipe_on_top_of_the_cpu_image() -> None:
    store = Store()
    made, _ = make(store, "cu124")
    assert made.reference == "llama-farm-base:bookworm-cu124"
    assert store.built_on == [store.images["llama-farm-base:bookworm"].id]
    assert set(store.contexts[-1]) == {"Dockerfile"}
    assert make(store, "cu124")[0] == made
    assert (store.imports, len(store.built_on)) == (1, 1)


@pytest.mark.usefixtures("host")
def test_cu130_takes_the_wheels_toolkit_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cu13"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "nvcc").touch(mode=0o755)
    (root / "lib64").symlink_to("lib")
    asked: list[object] = []

    def unpacked(wheels: tuple[pins.PackagePin, ...]) -> Toolkit:
        asked.append(wheels)
        return Toolkit(root, "13.0")

    monkeypatch.setattr("farm.inputs.toolkit.from_wheels", unpacked)
    store = Store()
    make(store, "cu130")
    context = store.contexts[-1]
    assert {"Dockerfile", "cuda/bin/nvcc", "cuda/lib64"} < set(context)
    assert context["cuda/lib64"].linkname == "lib"
    assert context["cuda/bin/nvcc"].mode & 0o111
    assert asked == [pins.load().toolkit_of("cu130")]


@pytest.mark.parametrize("recipe", ["cu124", "cu130", "builder"])
def test_recipes_name_no_host_and_need_no_buildkit(recipe: str) -> None:
    text = (images.RECIPES / f"{recipe}.Dockerfile").read_text("utf-8")
    assert "ARG BASE\nFROM ${BASE}" in text
    assert "://" not in text
    assert "\nRUN --" not in text
    assert "<<" not in text


def test_without_mmdebstrap_it_says_what_to_install(host: Path) -> None:
    host.unlink()
    with refused("MMDEBSTRAP_MISSING", UsageError, hint="apt-get install mmdebstrap"):
        make(Store(), "cpu")


def test_a_failing_mmdebstrap_shows_its_last_lines(host: Path, tmp_path: Path) -> None:
    lines = "; ".join(f"print('line {n}')" for n in range(30))
    host.write_text(f"#!{sys.executable}\n{lines}\nraise SystemExit(7)\n", "utf-8")
    with pytest.raises(EngineError, match="ended with status 7") as failed:
        make(Store(), "cpu")
    assert "line 29" in failed.value.message
    assert "line 1\n" not in failed.value.message
    assert "debian-archive-keyring" in failed.value.hint
    assert list((tmp_path / "cache" / "llama-server-farm" / "roots").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_packages_make_the_same_root_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("mmdebstrap") is None:
        must_or_skip("mmdebstrap is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digests, names, mounted = set(), set(), set()

    def look(_: str) -> None:
        mounted.add(str(tmp_path) in Path("/proc/mounts").read_text())

    for _ in range(2):
        with images.root_tar(look) as root:
            digests.add(hashlib.file_digest(root, "sha256").hexdigest())  # type: ignore[arg-type]
            root.seek(0)
            with tarfile.open(fileobj=root) as tar:
                names = {entry.name.rstrip("/") for entry in tar}
    assert len(digests) == 1
    assert mounted == {False}, "a program that looks through the cache would keep it busy"
    assert {"./usr/bin/dpkg", "./var/lib/apt/lists"} < names
    assert names.isdisjoint({"./etc/hostname", "./etc/resolv.conf", "./dev/null"})


@pytest.fixture
def engine(client: DockerClient) -> DockerImages:
    """A real engine, when nobody else makes base images with it."""
    return DockerImages(client)


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_a_real_engine_takes_a_root_file_system_and_builds_on_it(engine: DockerImages) -> None:
    if shutil.which("mmdebstrap") is None:
        must_or_skip("mmdebstrap is not installed")
    base = images.make_base_image(engine, line="cpu", log=lambda _: None)
    assert base == images.make_base_image(engine, line="cpu", log=lambda _: None)
    lines: list[str] = []
    recipe = b"ARG BASE\nFROM ${BASE}\nRUN cat /etc/debian_version && echo lost >&2 && false\n"
    context = io.BytesIO(archives.tar([archives.Entry("Dockerfile", recipe)]))
    with pytest.raises(EngineError, match="lost"):
        engine.build(
            context, "farm-test:never", buildargs={"BASE": base.id}, labels={}, log=lines.append
        )
    assert any(line.startswith("12.") for line in lines)
    assert engine.find("farm-test:never") is None
