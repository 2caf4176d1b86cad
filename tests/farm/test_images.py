"""What an image tells of itself decides its line, or contradicts the one that was named."""

import re
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from farm import targets
from farm.errors import UsageError
from farm.inputs.images import ImageTools, contradictions, line_of_tools, tools_of
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
