from dataclasses import replace
from pathlib import Path

import pytest

from farm import targets
from farm.errors import UsageError
from llama_loader import selection
from llama_loader.gpus import Gpu
from llama_loader.manifest import Manifest
from tests.rigs import releases
from tests.rigs.refusals import refused

TABLE = targets.load()


def test_the_seed_set_is_exactly_what_the_seed_document_says() -> None:
    seed = TABLE.sets["seed"]
    assert seed.archs == "80;86;89;90"
    assert seed.format == "tar.gz"
    assert seed.sass == seed.ptx == {"80", "86", "89", "90"}


@pytest.mark.parametrize("number", [75, 80, 86, 89, 90, 100, 120])
def test_each_architecture_has_a_set_of_its_own_with_no_ptx(number: int) -> None:
    arch_set = TABLE.sets[f"sm{number}"]
    assert [arch.number for arch in arch_set.parsed] == [number]
    assert len(arch_set.sass) == 1
    assert not arch_set.ptx


@pytest.mark.parametrize(
    ("name", "members"),
    [("zerogpu", ["sm120", "sm90"]), ("hopper", ["sm90"]), ("seed", ["seed"]), ("cpu", ["cpu"])],
)
def test_a_name_stands_for_sets(name: str, members: list[str]) -> None:
    assert [arch_set.name for arch_set in TABLE.resolve(name)] == members


@pytest.mark.parametrize(
    ("text", "sass", "ptx", "name", "archive_format"),
    [
        ("80;86;89;90", "80 86 89 90", "80 86 89 90", "seed", "tar.gz"),
        ("90-real", "90", "", "sm90", "tar.zst"),
        ("90", "90", "90", "sm90-ptx", "tar.zst"),
        ("90-virtual", "", "90", "sm90-virtual", "tar.zst"),
        ("90a-real", "90a", "", "sm90a", "tar.zst"),
        ("120a-real", "120a", "", "sm120", "tar.zst"),
        ("75-virtual;90-real", "90", "75", "sm75virtual-90real", "tar.gz"),
        ("120a-real;121f", "120a 121f", "121f", "sm120areal-121f", "tar.gz"),
        (" 80 ; 90 ;", "80 90", "80 90", "sm80-90", "tar.gz"),
    ],
)
def test_archs_are_read_as_cmake_reads_them_and_name_the_set(
    text: str, sass: str, ptx: str, name: str, archive_format: str
) -> None:
    arch_set = TABLE.custom(text)
    assert (arch_set.sass, arch_set.ptx) == (set(sass.split()), set(ptx.split()))
    assert (arch_set.name, arch_set.format) == (name, archive_format)


@pytest.mark.parametrize("text", ["80;foo", "", ";", "9", "80,90", "sm_90", "90-fake", "80;-90"])
def test_malformed_archs_are_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        TABLE.custom(text)
    assert caught.value.exit_status == 2
    assert "80;86;89;90" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "archs"),
    [
        ("cu124", "100"),
        ("cu130", "70"),
        ("cu128", "121"),
        ("cu124", "80;120"),
        ("cu130", "61-real"),
    ],
)
def test_what_nvcc_cannot_build_is_refused_by_name(line: str, archs: str) -> None:
    with pytest.raises(UsageError, match=r"cannot build architecture (100|70|121|120|61)") as told:
        targets.check_buildable(TABLE.line(line), TABLE.custom(archs))
    assert line in str(told.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[lines.x]\nimage = 3\nglibc = '2.35'", "lines"),
        ("[lines.x]\nimage = 'a'\nglibc = 'new'", "lines"),
        ("[lines.x]\nimage='a'\nglibc='2.35'\nglibcxx='3.4'\ntoolkit='12.4.1'", "toolkit"),
        ("[lines.x]\nimage = 'a'\nglibc = '2.35'\nglibcxx = '3.4.30'\nspeed = 1", "speed"),
        ("[cuda.12]\nmin_driver = '525.60'", "cuda"),
        (
            "[lines.x]\nimage = 'a'\nglibc = '2.35'\nglibcxx = '3.4.30'\ntoolkit = '9.1'",
            "cuda.9",
        ),
        (
            (
                "[lines]\nx = {image='a', glibc='2.35', glibcxx='3.4', toolkit='12.4'}\n"
                "[cuda.12]\nmin_driver = '1.2'\noldest = 50\nnewest = [[5, 90]]\nchecked = 9"
            ),
            "cuda.12 whose `newest`",
        ),
        ("x = " + "[" * 3000, "targets.toml"),
        ("[sets.a]\narchs = '121a-rael'", r"^targets\.toml: sets\.a\.archs: '121a-rael'"),
        ("[sets.a]\narchs = '90;121-real'", r"sets\.a\.archs: .*GB10"),
        ("[sets.a]\narchs = '80'\nfmt = 'zip'", r"targets\.toml: sets\.a: .*fmt"),
        ("[sets.a]\narchs = '80'\nformat = 'zip'", "sets.a.format"),
        ("[groups]\ng = ['nowhere']", "nowhere"),
        ("[lines", "targets.toml"),
    ],
)
def test_a_malformed_table_is_refused_naming_the_place(
    tmp_path: Path, text: str, named: str
) -> None:
    file = tmp_path / "targets.toml"
    tables = ("lines", "cuda", "sets", "groups")
    absent = [f"[{name}]" for name in tables if f"[{name}" not in text]
    file.write_text("\n".join([*absent, text]), "utf-8")
    with refused("TARGETS_INVALID", UsageError, named):
        targets.load(file)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("nvidia/cuda:12.4.1-devel-ubuntu22.04", "cu124"),
        ("registry.example:5000/nvidia/cuda:12.8.1-devel-ubuntu22.04", "cu128"),
        ("nvidia/cuda:13.0.2-devel-ubuntu22.04", "cu130"),
        ("nvidia/cuda:12.6.3-devel-ubuntu22.04", "cu126"),
        ("nvidia/cuda:12.9.1-devel-rockylinux9", "cu129"),
        ("nvidia/cuda:13.4.0-devel-ubuntu24.04", "cu134"),
        ("llama-farm-base:bookworm-cu130", None),
        (None, None),
    ],
)
def test_an_image_s_tag_says_its_line(image: str | None, line: str | None) -> None:
    found = TABLE.line_of_image(image)
    assert (found and found.name) == line


@pytest.mark.parametrize(
    ("toolkit", "name", "driver", "oldest", "newest"),
    [
        ("12.0", "cu120", "525.60", 50, 90),
        ("12.6", "cu126", "525.60", 50, 90),
        ("12.9", "cu129", "525.60", 50, 121),
        ("13.1", "cu131", "580.65", 75, 121),
        ("13.4", "cu134", "580.65", 75, 121),
        ("13.12", "cu1312", "580.65", 75, 121),
    ],
)
def test_line_follows_from_the_toolkit_and_has_its_major_s_driver(
    toolkit: str, name: str, driver: str, oldest: int, newest: int
) -> None:
    line = TABLE.line_of_toolkit(toolkit, what="an image")
    assert (line.name, line.toolkit) == (name, toolkit)
    assert (line.min_driver, line.oldest, line.newest) == (driver, oldest, newest)
    assert line.glibc == TABLE.line(targets.DEFAULT_LINE).glibc
    assert TABLE.line(name) == line


@pytest.mark.parametrize("version", ["11.8", "14.0"])
def test_toolkit_of_an_unknown_major_is_refused(version: str) -> None:
    with refused("LINE_OF_IMAGE_UNKNOWN", UsageError):
        TABLE.line_of_toolkit(version, what="the image")
    with pytest.raises(UsageError, match="no line"):
        TABLE.line(f"cu{version.replace('.', '')}")


def test_every_line_s_own_image_is_of_that_line() -> None:
    for line in TABLE.lines.values():
        assert not line.is_cuda or TABLE.line_of_image(line.image) == line


def test_release_holds_zerogpu_and_every_architecture_for_cuda_12_and_13() -> None:
    assert set(TABLE.groups["zerogpu"]) <= set(TABLE.release["cu128"])
    assert set(TABLE.groups["zerogpu"]) <= set(TABLE.release["cu130"])
    single = {name for name in TABLE.sets if name.startswith("sm")}
    assert single == {n for names in TABLE.release.values() for n in names if n in single}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('cu99 = ["sm90"]', "release.cu99"),
        ('cu128 = ["sm91"]', "'sm91'"),
        ('cu124 = ["sm120"]', "120"),
    ],
)
def test_a_release_that_cannot_be_built_is_refused(tmp_path: Path, row: str, named: str) -> None:
    file = tmp_path / "targets.toml"
    text = targets.TARGETS_FILE.read_text("utf-8").partition("[release]")[0]
    file.write_text(f"{text}[release]\n{row}\n", "utf-8")
    with pytest.raises(UsageError, match=named):
        targets.load(file)


GPUS_OF_SPACES_AND_DESKTOPS = {
    "Tesla T4": "75",
    "NVIDIA A10G": "86",
    "NVIDIA A100-SXM4-80GB": "80",
    "NVIDIA L4": "89",
    "NVIDIA L40S": "89",
    "NVIDIA H100 80GB HBM3": "90",
    "NVIDIA H200": "90",
    "NVIDIA B200": "100",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "120",
    "NVIDIA GeForce RTX 3090": "86",
    "NVIDIA GeForce RTX 4090": "89",
    "NVIDIA GeForce RTX 5090": "120",
}
TORCHS = {"cu126": (12, "570.86"), "cu128": (12, "570.86"), "cu130": (13, "580.65"), "none": None}
"""The major version of the CUDA libraries that torch brings, and the oldest driver for all GPUs."""
SYSTEMS = {"Ubuntu 22.04": ("2.35", "3.4.30"), "Debian 12": ("2.36", "3.4.30"),
           "Debian 13": ("2.41", "3.4.33")}  # fmt: skip


def released() -> Manifest:
    """Make a manifest of the real table, as a release of it would have."""
    rows = [(row["line"], row["set"]) for row in TABLE.release_rows()]
    servers = [
        releases.artifact(line, name, " ".join(sorted(TABLE.sets[name].sass)))
        for line, name in rows
        if name in TABLE.sets
    ]
    return releases.manifest(
        *servers, *(releases.runtime(line) for line, name in rows if name == "cuda-runtime")
    )


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("torch", TORCHS)
@pytest.mark.parametrize("gpu", GPUS_OF_SPACES_AND_DESKTOPS)
def test_release_has_machine_code_and_libraries_for_every_gpu(
    gpu: str, torch: str, system: str
) -> None:
    glibc, glibcxx = SYSTEMS[system]
    brought = TORCHS[torch]
    host = replace(
        releases.BARE,
        gpus=(Gpu(gpu, GPUS_OF_SPACES_AND_DESKTOPS[gpu]),),
        gpu_source="nvml",
        driver=brought[1] if brought else "570.86",
        libraries=releases.libraries(brought[0]) if brought else (),
        glibc=glibc,
        glibcxx=glibcxx,
    )
    choice = selection.select(released(), host)
    assert choice.runs_on == "gpu"
    assert choice.native
    assert choice.runtime_libraries is not None if torch == "none" else not choice.missing
