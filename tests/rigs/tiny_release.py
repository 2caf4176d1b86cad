"""A release of real, small binaries: built by the local engine from the tiny source tree."""

import shutil
from pathlib import Path
from unittest.mock import patch

import msgspec

from farm import release, source, targets
from farm.engines.local import LocalEngine
from farm.execute import execute
from farm.plan import BuildPlan
from farm.tarball import build_record
from farm.tarball.parts import Survey

TINY = Path(__file__).parent / "tiny_llama"


class Silent:
    """A reporter that says nothing."""

    def __call__(self, what: str, *values: object) -> None: ...


class Person(Silent):
    """Sees only the coded lines."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __call__(self, what: str, *values: object) -> None:
        if what == "note":
            self.told.append(str(values[0]))


def tree(folder: Path, llama: Path = TINY, survey: Survey | None = None) -> Path:
    """Build a kept tree, as ``invoke build-cpu`` leaves it; no survey, no parts."""
    table = targets.load()
    plan = BuildPlan(table.sets["cpu"], table.line("cpu"), source.from_folder(llama))
    with (
        patch.dict("os.environ", XDG_CACHE_HOME=str(folder / "cache")),
        execute(plan, LocalEngine(), logs=folder, reporter=Silent()) as built,
    ):
        shutil.copytree(built.folder, folder / "bin", symlinks=True)
        parts = survey.parts if survey else None
        record = build_record.of(plan, built.toolchain, parts=parts)
    (folder / "BUILD.json").write_bytes(build_record.encode(record))
    (folder / "licenses").mkdir()
    texts = survey.texts if survey else {"LICENSE": (llama / "LICENSE").read_bytes()}
    for name, text in texts.items():
        (folder / "licenses" / name).write_bytes(text)
    return folder


def of_build(
    kept: Path, build: int, place: Path, *, name: str | None = None, assumed: bool = False
) -> Path:
    """Pack a kept tree as if it were llama.cpp's build of that number; returns the release.

    Each is packed once, beside the tree; a test gets its own copy.
    """
    made = kept.with_name(f"{kept.name}-packed-{build}-{name}-{assumed}")
    if not made.exists():
        half = made.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        _pack(kept, build, half, name=name, assumed=assumed)
        half.rename(made)
    shutil.copytree(made, place, symlinks=True, dirs_exist_ok=True)
    return place / f"dist-{build}"


def _pack(kept: Path, build: int, place: Path, *, name: str | None, assumed: bool) -> None:
    copy = Path(shutil.copytree(kept, place / f"tree-{build}", symlinks=True))
    record = build_record.decode((copy / "BUILD.json").read_bytes(), what="test")
    renumbered = msgspec.structs.replace(
        record,
        source=msgspec.structs.replace(record.source, build=build, build_assumed=assumed),
    )
    (copy / "BUILD.json").write_bytes(build_record.encode(renumbered))
    out = place / f"dist-{build}"
    release.pack_tree(copy, out, "tar.zst")
    release.write(out, release=name)
