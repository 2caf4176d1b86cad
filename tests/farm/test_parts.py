"""What a source tree is made of: names, versions, licences and digests, read from the tree."""

import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import vendored

from farm import source
from farm.errors import UsageError
from farm.inputs import patches
from farm.tarball import parts
from tests.rigs.refusals import refused
from tests.rigs.tiny_release import TINY


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return vendored.add(Path(shutil.copytree(TINY, tmp_path / "tree")))


def by_path(tree: Path) -> dict[str, parts.Part]:
    return {part.path: part for part in parts.survey(tree, version="0.6.1").parts}


HOSTILE = {
    "scripts/sync_vendor.py": ["\n", "A=", '"https://a":\n'],
    "vendor/hostile/a.h": ["#define VERSION" + "VERSION" * 40_000, "/* ", "#define ", "// \n"],
    "vendor/other/a.h": ["SPDX-License-Identifier:" + " " * 300_000, "version 1." + "1" * 300_000],
    "vendor/third/LICENSE": ["a" + "*" * 300_000, "*/ "],
    "CMakeLists.txt": ["\n", "set(LLAMA_VERSION_MAJOR "],
    "ggml/src/CMakeLists.txt": ["\n", "ggml_add_cpu_backend_variant(" + "a" * 300_000],
}


@pytest.mark.parametrize("variant", [0, 1])
def test_source_s_texts_are_looked_through_at_once(tree: Path, variant: int) -> None:
    """Each took from minutes to days with expressions that begin anew at every character."""
    for name, texts in HOSTILE.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text((texts[variant] * (300_000 // len(texts[variant]) + 1))[:300_000])
    (tree / "vendor/third/a.h").write_text("int a;")
    for number in range(900):
        (tree / f"vendor/x{number}").mkdir()
        (tree / f"vendor/x{number}/x{number}.h").write_text("int a;")
        (tree / f"licenses/LICENSE-x{number}").write_text("")
    began = time.process_time()
    assert {"vendor/hostile", "vendor/other"} <= by_path(tree).keys()
    source.from_folder(tree)
    patches.cpu_variant(tree)
    assert time.process_time() - began < 8


def test_constants_that_name_each_other_make_no_address_without_end(tree: Path) -> None:
    lines = [f'A{n} = "{{A{n + 1}}}{{A{n + 1}}}"' for n in range(64)]
    lines += ['"https://github.com/{A0}/b/raw/c": "vendor/stb/stb_image.h"']
    lines += ["\n" * (1 << 16), '"https://github.com/a/b/": "vendor/nlohmann/json.hpp"']
    (tree / "scripts/sync_vendor.py").write_text("\n".join(lines))
    assert by_path(tree)["vendor/stb"].origin == "https://github.com/{A1}{A1}/b"
    assert by_path(tree)["vendor/nlohmann"].origin is None, "more than such a script has"


@pytest.mark.parametrize(
    ("number", "size", "words"),
    [(1, 1 << 40, "LICENSE-0: larger than"), (5, 8 << 20, "licences have more than 32 MiB")],
)
def test_licence_of_gigabytes_is_refused(tree: Path, number: int, size: int, words: str) -> None:
    for one in range(number):
        with (tree / f"LICENSE-{one}").open("ab") as file:
            file.truncate(size)
    with refused("SOURCE_UNREADABLE", UsageError, words):
        parts.survey(tree)


@pytest.mark.parametrize(
    ("path", "name", "version", "licence"),
    [
        (".", "llama.cpp", "0.6.1", "MIT"),
        ("vendor/cpp-httplib", "cpp-httplib", "0.60.1", "MIT"),
        ("vendor/hash/xxhash", "xxhash", "0.8.3", "BSD-2-Clause"),
        ("vendor/hash/sha1", "sha1", None, "LicenseRef-public-domain"),
        ("vendor/stb", "stb", "2.30", "MIT OR Unlicense"),
        ("vendor/nlohmann", "nlohmann", "3.12.0", "MIT"),
        ("vendor/sheredom", "subprocess.h", vendored.COMMIT, "Unlicense"),
        ("common/base64.hpp", "base64.hpp", None, "Unlicense"),
    ],
)
def test_each_part_is_read_from_where_the_tree_says_it(
    tree: Path, path: str, name: str, version: str | None, licence: str
) -> None:
    part = by_path(tree)[path]
    assert (part.name, part.version, part.licence) == (name, version, licence)


def test_nothing_else_is_a_part(tree: Path) -> None:
    (tree / "vendor/linked").symlink_to("stb")
    (tree / "vendor/stb/inner").symlink_to("../nlohmann")
    (tree / "vendor/plain").mkdir()
    (tree / "vendor/plain/a.h").symlink_to("../nlohmann/json.hpp")
    assert by_path(tree).pop("vendor/plain").licence is None
    shutil.rmtree(tree / "vendor/plain")
    assert len(by_path(tree)) == 8


def test_every_part_has_its_licence_s_text(tree: Path) -> None:
    found = parts.survey(tree)
    for part in found.parts:
        assert part.licence_files, part.path
        for name in part.licence_files:
            assert parts.identify(found.texts[name].decode()), name
    assert "json" in found.texts["licenses-LICENSE-jsonhpp"].decode()


def test_a_text_in_comments_is_given_whole_and_without_its_marks(tree: Path) -> None:
    text = parts.survey(tree).texts["vendor-stb-stb_image.h.txt"].decode()
    assert vendored.MIT.format(author="stb") in text
    assert vendored.UNLICENSE in text
    assert "*/" not in text


def test_a_part_without_a_licence_has_none_and_no_text(tree: Path) -> None:
    (tree / "vendor/cpp-httplib/LICENSE").unlink()
    part = by_path(tree)["vendor/cpp-httplib"]
    assert (part.licence, part.licence_files) == (None, ())


def test_the_digest_is_that_of_what_sha256sum_prints(tree: Path) -> None:
    names = sorted(path.name for path in (tree / "vendor/cpp-httplib").iterdir())
    lines = subprocess.run(
        ["sha256sum", *(f"vendor/cpp-httplib/{name}" for name in names)],
        cwd=tree,
        capture_output=True,
        check=True,
    ).stdout
    assert by_path(tree)["vendor/cpp-httplib"].sha256 == hashlib.sha256(lines).hexdigest()


def test_one_changed_byte_changes_the_part_s_and_the_tree_s_digest_only(tree: Path) -> None:
    before = by_path(tree)
    header = tree / "vendor/nlohmann/json.hpp"
    header.write_text(header.read_text() + " ")
    after = by_path(tree)
    changed = {path for path in before if before[path].sha256 != after[path].sha256}
    assert changed == {".", "vendor/nlohmann"}


def test_a_link_counts_by_where_it_leads(tree: Path) -> None:
    before = by_path(tree)["."].sha256
    (tree / "link").symlink_to("LICENSE")
    first = by_path(tree)["."].sha256
    (tree / "link").unlink()
    (tree / "link").symlink_to("vendor/cpp-httplib/LICENSE")
    assert len({before, first, by_path(tree)["."].sha256}) == 3


def test_git_s_own_files_are_no_part_of_the_source(tree: Path) -> None:
    before = by_path(tree)["."].sha256
    (tree / ".git").mkdir()
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/master")
    assert by_path(tree)["."].sha256 == before


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (vendored.MIT, "MIT"),
        (vendored.UNLICENSE, "Unlicense"),
        ("2010-06-11 : Igor Pavlov : Public domain", "LicenseRef-public-domain"),
        ("Apache License\nVersion 2.0, January 2004", "Apache-2.0"),
        (
            "Redistributions in binary form must reproduce the above\nNeither the name of",
            "BSD-3-Clause",
        ),
        (vendored.MIT.partition("The above")[0], "MIT-0"),
        ("All rights reserved.", None),
        ("", None),
    ],
)
def test_a_text_is_the_licence_whose_words_it_has(text: str, licence: str | None) -> None:
    assert parts.identify(text) == licence
    commented = "".join(f"// {line}\n" for line in text.splitlines())
    assert parts.identify(commented) == licence


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


def read(root: Path) -> parts.Survey:
    done = subprocess.run(parts.cub_command(root), capture_output=True, text=True, check=True)
    return parts.parse_cub(done.stdout.splitlines())


@pytest.mark.parametrize("below", ["include", "include/cccl"])
def test_it_is_read_where_cuda_12_and_13_have_it(tmp_path: Path, below: str) -> None:
    found = read(toolkit(tmp_path, below))
    (part,) = found.parts
    text = found.texts[part.licence_files[0]]
    assert (part.name, part.version, part.licence) == ("CUB", "2.3.2", "BSD-3-Clause")
    assert text.startswith(b"Copyright (c) 2011, Somebody.")
    names = ("cub/block/block_reduce.cuh", "cub/cub.cuh", "cub/version.cuh")
    lines = [
        f"{hashlib.sha256((tmp_path / below / name).read_bytes()).hexdigest()}  {name}\n"
        for name in names
    ]
    assert part.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_toolkit_without_it_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) == parts.Survey()


def test_its_licence_travels_with_the_parts_of_the_source(tmp_path: Path) -> None:
    tree = Path(__file__).parent.parent / "rigs" / "tiny_llama"
    found = parts.survey(tree) + read(toolkit(tmp_path, "include"))
    assert [part.name for part in found.parts] == ["llama.cpp", "CUB"]
    for part in found.parts:
        assert all(found.texts[name] for name in part.licence_files)


def test_headers_without_a_licence_are_a_part_that_verify_refuses(tmp_path: Path) -> None:
    root = toolkit(tmp_path, "include")
    (root / "include" / "cub" / "cub.cuh").write_text("#pragma once\n")
    (part,) = read(root).parts
    assert (part.licence, part.licence_files) == (None, ())


def test_texts_whose_paths_make_one_name_are_both_kept() -> None:
    """Many of them, too, in a time that does not grow with the square of their number."""
    texts = parts._Texts()
    names = [texts.put("vendor-a-b-LICENSE", text) for text in (b"one", b"two", b"one")]
    assert [texts[name] for name in names] == [b"one", b"two", b"one"]
    texts, begun = parts._Texts(), time.monotonic()
    assert len({texts.put("LICENSE", b"%d" % number) for number in range(20_000)}) == 20_000
    assert time.monotonic() - begun < 2
