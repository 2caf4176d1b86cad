"""Which CUDA objects are compiled twice: a sample over all, or what is named."""

from __future__ import annotations

import pytest

from farm.errors import BuildError, UsageError
from farm.reproduce.clean_build import _chosen
from farm.terminal import show

NAMES = ("acc.cu.o", "mmq.cu.o", "norm.cu.o", "template-instances/mmq-q4.cu.o", "wkv.cu.o")


@pytest.mark.parametrize(("count", "taken"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, range(5))])
def test_a_sample_has_the_asked_size_and_is_spread_over_all(count: int, taken: list[int]) -> None:
    assert _chosen(NAMES, count) == tuple(NAMES[number] for number in taken)


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(BuildError, match="6 CUDA objects asked for, there are 5"):
        _chosen(NAMES, 6)


def test_names_are_found_in_every_folder() -> None:
    assert _chosen(NAMES, ("wkv", "mmq-q4")) == (NAMES[4], NAMES[3])
    with pytest.raises(BuildError, match=r"called nonsense, more\Z") as failed:
        _chosen(NAMES, ("acc", "nonsense", "more"))
    assert failed.value.code == "OBJECTS_UNKNOWN"


@pytest.mark.parametrize(
    ("value", "parsed"), [(None, None), ("21", 21), ("norm, rope", ("norm", "rope")), ("a", ("a",))]
)
def test_the_option_takes_a_number_or_names(
    value: str | None, parsed: int | tuple[str, ...] | None
) -> None:
    assert show.count_or_names("--objects", value) == parsed


@pytest.mark.parametrize("value", ["0", "-1", "2x", "a;b", "../x"])
def test_anything_else_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="--objects"):
        show.count_or_names("--objects", value)
