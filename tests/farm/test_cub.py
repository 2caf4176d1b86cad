"""CUB's version, digest and licence, read from a toolkit's headers where the build is."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from farm import pipeline
from farm.tarball import parts

HEADER = """\
/******************************************************************************
 * Copyright (c) 2011, Somebody.  All rights reserved.
 *
 * Redistributions in binary form must reproduce the above copyright
 *       notice. Neither the name of the CORPORATION may be used.
 ******************************************************************************/
#pragma once
"""
VERSION = "#define CUB_VERSION 200302 // major, minor, patch\n"


def toolkit(root: Path, below: str) -> Path:
    folder = root / below / "cub"
    (folder / "block").mkdir(parents=True)
    (folder / "cub.cuh").write_text(HEADER)
    (folder / "version.cuh").write_text(VERSION)
    (folder / "block" / "block_reduce.cuh").write_text("int reduce;\n")
    return root


def read(root: Path) -> tuple[parts.Part, bytes] | None:
    done = subprocess.run(parts.cub_command(root), capture_output=True, text=True, check=True)
    return parts.parse_cub(done.stdout.splitlines())


@pytest.mark.parametrize("below", ["include", "include/cccl"])
def test_it_is_read_where_cuda_12_and_13_have_it(tmp_path: Path, below: str) -> None:
    found = read(toolkit(tmp_path, below))
    assert found is not None
    part, text = found
    assert (part.name, part.version, part.licence) == ("CUB", "2.3.2", "BSD-3-Clause")
    assert text.startswith(b"Copyright (c) 2011, Somebody.")
    names = ("cub/block/block_reduce.cuh", "cub/cub.cuh", "cub/version.cuh")
    lines = [
        f"{hashlib.sha256((tmp_path / below / name).read_bytes()).hexdigest()}  {name}\n"
        for name in names
    ]
    assert part.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_toolkit_without_it_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None


def test_its_licence_travels_with_the_parts_of_the_source(tmp_path: Path) -> None:
    tree = Path(__file__).parent.parent / "rigs" / "tiny_llama"
    found = pipeline._with_cub(parts.survey(tree), read(toolkit(tmp_path, "include")))
    assert [part.name for part in found.parts] == ["llama.cpp", "CUB"]
    for part in found.parts:
        assert all(found.texts[name] for name in part.licence_files)


def test_headers_without_a_licence_are_a_part_that_verify_refuses(tmp_path: Path) -> None:
    root = toolkit(tmp_path, "include")
    (root / "include" / "cub" / "cub.cuh").write_text("#pragma once\n")
    found = read(root)
    assert found is not None
    assert (found[0].licence, found[0].licence_files) == (None, ())
