"""What an interrupted or repeated build does again, on a real project that compiles in a second."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import small_disk
from rich.console import Console
from tiny_release import TINY
from waiting import comes

from farm import (
    own_space,
    pack,
    pipeline,
    preflight,
    release,
    reproduce,
    run_lock,
    source,
    targets,
)
from farm.durable import folder_digest
from farm.engines import shared_cache
from farm.engines.local import LocalEngine
from farm.errors import BuildError
from farm.inputs import patches
from farm.kept import JournalEntry, KeptTree, digest, times
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.publish import gate, places
from farm.tarball import build_record
from farm.targets import ArchSet
from farm.terminal.progress import BuildReport
from tests.rigs.heard import script
from tests.rigs.refusals import refused

PROJECT = Path(__file__).parent.parent.parent
TABLE = targets.load()
LOCAL = BuildRequest(arch_set="cpu", line="cpu", engine="local", patches="none")
ALREADY = "cpu-cpu: built already, in an earlier run (--fresh builds it again)"


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_this_test(tmp_path, monkeypatch)


def of_this_test(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let state, caches and builds lie in a folder."""
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("CCACHE_DIR", str(folder / "ccache"))
    patch.setattr(pipeline, "STATE", folder / "state")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source, its first build, the state and the caches."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        of_this_test(folder, patch)
        tree = Path(shutil.copytree(TINY, folder / "llama.cpp"))
        assert compiled(build(tree, folder / "out"))
    return folder


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """Return the source of a first build, of which this test has its own copy."""
    shutil.copytree(built_once, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path / "llama.cpp"


def build(tiny: Path, out: Path, *, fresh: bool = False) -> list[str]:
    told = io.StringIO()
    request = replace(LOCAL, source=tiny, out=out, fresh=fresh)
    pipeline.STATE.mkdir(exist_ok=True)
    with BuildReport(Console(file=told, width=200)) as report:
        _build(request, report)
    return told.getvalue().splitlines()


def _build(request: BuildRequest, report: BuildReport) -> None:
    assert request.source is not None
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(request.source))
    line = pipeline.promise_of_this_host(plan.line, report)
    plan = BuildPlan(plan.arch_set, line, plan.source)
    pipeline.build_all([plan], pipeline.choose_engine(request, line, report), request, report)


def compiled(told: list[str]) -> bool:
    return any("cpu-cpu compile" in line for line in told)


def test_what_is_built_and_packed_is_not_built_again(built: Path, tmp_path: Path) -> None:
    told = build(built, tmp_path / "out")
    assert ALREADY in told
    assert not compiled(told)
    assert any(line.startswith("packed already: ") for line in told)


def test_kept_tree_is_packed_into_another_folder_and_where_the_tarball_was_changed(
    built: Path, tmp_path: Path
) -> None:
    (tarball,) = (tmp_path / "out").glob("*.tar.zst")
    whole = tarball.read_bytes()
    tarball.write_bytes(whole[:-1])
    handle, left = tempfile.mkstemp(prefix=f".{tarball.name}.", dir=tarball.parent)
    os.close(handle)  # as a run leaves it that is killed while it packs
    for name in ("out", "elsewhere"):
        assert ALREADY in build(built, tmp_path / name)
        assert (tmp_path / name / tarball.name).read_bytes() == whole
    assert not Path(left).exists()


def test_release_is_made_in_a_folder_that_nobody_else_can_change_and_nowhere_else(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, way = tmp_path / "shared" / "out", tmp_path / "link"
    shutil.copytree(tmp_path / "out", out)
    way.symlink_to(out)
    place = places.parse(str(tmp_path / "place"))
    refusing: tuple[Callable[[Path], object], ...] = (
        partial(build, built),
        lambda folder: release.pack_tree(pipeline.STATE / "trees" / "cpu-cpu", folder, "tar.gz"),
        release.write,
        source.from_folder,
        lambda folder: list(gate.smoke(folder, release.load(folder))),
        lambda folder: gate.run(folder, print, start=False),
        lambda folder: own_space.publish(folder, place),
    )
    for (changed, mode), folder in product(
        ((out, 0o777), (out.parent, 0o777), (out, 0o1777)), (out, way)
    ):
        changed.chmod(mode)
        for refusal in refusing:
            with refused("FOLDER_NOT_OWN", BuildError, str(changed)):
                refusal(folder)
        changed.chmod(0o755)
    out.parent.chmod(0o1777)  # as /tmp
    assert release.write(out).artifacts
    (tree := tmp_path / "tree").mkdir(0o777)
    tree.chmod(0o777)
    with refused("FOLDER_NOT_OWN", BuildError):
        release.pack_tree(tree, tmp_path / "new", "tar.gz")
    make = Path.mkdir
    with monkeypatch.context() as patch:  # another user makes a missing one first
        patch.setattr(Path, "mkdir", lambda path, *_, **__: (make(path), path.chmod(0o777)))
        with refused("FOLDER_NOT_OWN", BuildError):
            refusing[1](tmp_path / "new")
    assert not (tmp_path / "place").exists()
    assert not list(tmp_path.rglob("*.tar.gz"))


@pytest.mark.skipif(shutil.which("ccache") is None, reason="needs ccache")
def test_fresh_builds_it_again_without_the_compiler_cache(built: Path, tmp_path: Path) -> None:
    shutil.rmtree(pipeline.STATE / "trees")
    cache = tmp_path / "ccache" / source.from_folder(built).cache
    assert compiled(build(built, tmp_path / "out"))
    filled = shared_cache.statistics(cache)
    assert filled
    assert filled.misses >= 3
    told = build(built, tmp_path / "out", fresh=True)
    assert ALREADY not in told
    assert compiled(told)
    assert shared_cache.statistics(cache) == filled, "neither read nor written"


def test_added_programs_are_shipped_and_definitions_recorded_and_both_are_another_build(
    tiny: Path, tmp_path: Path
) -> None:
    plain = replace(LOCAL, source=tiny, out=tmp_path / "out")
    more = replace(plain, also=("rpc-server",), define=("GGML_SCHED_MAX_COPIES=1",))
    renamed = tiny / "tools" / "rpc" / "CMakeLists.txt"
    renamed.parent.mkdir(parents=True)
    renamed.write_text("set(TARGET ggml-rpc-server)\n")
    told = io.StringIO()
    with BuildReport(Console(file=told, width=200)) as report:
        for request in (plain, more, more):
            (made,) = preflight.build(request, report)
    assert told.getvalue().count("built already") == 1
    listed = {entry.path: entry for entry in release.load(tmp_path / "out").artifacts[0].files}
    assert listed["runtime/ggml-rpc-server"].executable
    assert "runtime/llama-bench" not in listed
    record = build_record.decode(
        pack.read_inventory(made.tarball.path).build_json, what=made.tarball.path.name
    )
    asked = {"GGML_RPC": "ON", "GGML_RPC_RDMA": "OFF", "GGML_SCHED_MAX_COPIES": "1"}
    assert record.defined == asked
    assert record.targets == ("llama-server", "llama-cli", "ggml-rpc-server")
    assert reproduce.plan_of(record, source.from_folder(tiny), "tar.zst").defined == tuple(
        asked.items()
    )
    release.verify(tmp_path / "out")


def test_a_release_of_few_cpu_variants_is_told_by_verify_and_gate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "cpu_variant", lambda _: "haswell")
    out = tmp_path / "dist"
    request = replace(LOCAL, source=tiny, out=out, this_cpu=True)
    with BuildReport(Console(file=io.StringIO(), width=200)) as report:
        preflight.build(request, report)
        notes: list[str] = []
        release.verify(out, notes.append)
        assert any("note[FEW_CPU_VARIANTS]" in note and "haswell" in note for note in notes)
        checks: list[gate.GateCheck] = []
        gate.run(out, checks.append, start=False)
        assert "note[FEW_CPU_VARIANTS]" in checks[0].detail
        preflight.build(replace(request, this_cpu=False), report)
    notes.clear()
    release.verify(out, notes.append)
    assert not any("FEW_CPU_VARIANTS" in note for note in notes)


def test_a_set_that_another_run_builds_into_the_same_folder_is_refused_and_nothing_built(
    tiny: Path, tmp_path: Path
) -> None:
    request, out = replace(LOCAL, source=tiny, out=tmp_path / "out"), tmp_path / "out"
    with run_lock.held(["cpu-cpu"], [out]), BuildReport(Console(quiet=True)) as report:
        with refused("SET_IS_BEING_BUILT", BuildError, status=1):
            preflight.build(request, report)
        assert not pipeline.STATE.exists() or not list(pipeline.STATE.glob("trees/*"))
    assert not list(out.glob("*.tar.zst"))


def test_another_source_is_another_build(built: Path, tmp_path: Path) -> None:
    with (built / "llama.cpp").open("a", encoding="utf-8") as file:
        file.write("int one_more() { return 1; }\n")
    assert compiled(build(built, tmp_path / "out"))


def test_a_tree_that_somebody_changed_is_not_used(built: Path, tmp_path: Path) -> None:
    (journal,) = (pipeline.STATE / "journal").iterdir()
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(built))
    kept = KeptTree(plan, json.loads(journal.read_bytes())["plan"], pipeline.STATE)
    assert kept.is_whole()
    program = kept.folder / "bin" / "llama-server"
    whole, added = program.read_bytes(), program.with_name("libmore.so")
    program.write_bytes(whole + b"\0")
    assert not kept.is_whole()
    program.unlink()
    assert not kept.is_whole()
    program.write_bytes(whole)
    program.chmod(0o755)
    assert kept.is_whole()
    added.touch()
    assert compiled(build(built, tmp_path / "out"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"plan": 1}', b'{"plan": "\xff"}'])
def test_a_journal_that_cannot_be_read_is_no_journal(
    tiny: Path, tmp_path: Path, content: bytes
) -> None:
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tiny))
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / f"{plan.key}.json").write_bytes(content)
    assert KeptTree(plan, "one", tmp_path).entry() == JournalEntry("one")
    assert times([plan], tmp_path) == {plan.key: None}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_run_after_an_interrupted_one_goes_on(
    tiny: Path, tmp_path: Path, end: signal.Signals
) -> None:
    marker = tmp_path / "compiling"
    slow = script(tmp_path / "slow_step", f"#!/bin/sh\ntouch {marker}\nexec sleep 120\n")
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(slow ALL COMMAND "{slow}")\n')
        file.write("add_dependencies(llama-cli slow)\n")
    program = (
        "import sys; sys.path[:0] = ['.', 'spaces', 'tests/farm', 'tests/rigs']\n"
        "from pathlib import Path\n"
        "import test_kept as t\n"
        f"t.pipeline.STATE = Path({str(pipeline.STATE)!r})\n"
        f"t.build(Path({str(tiny)!r}), Path({str(tmp_path / 'out')!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.PIPE, start_new_session=True
    )
    comes(lambda: marker.exists() or process.poll() is not None, 120)
    process.send_signal(end if marker.exists() else signal.SIGKILL)
    _, told_at_the_end = process.communicate(timeout=60)
    assert marker.exists(), told_at_the_end.decode()
    builds = tmp_path / "cache" / "llama-server-farm" / "builds"
    (left,) = builds.glob("cpu-cpu.*") if end == signal.SIGKILL else [None]
    assert bool(_working_below(builds)) == (end == signal.SIGKILL)
    slow.write_text("#!/bin/sh\n", "utf-8")
    told = build(tiny, tmp_path / "out")
    assert (
        sum(line.startswith("cpu-cpu: resumes: an earlier run did not finish it") for line in told)
        == 1
    )
    swept = [line for line in told if "LEFT_BEHIND" in line]
    assert len(swept) == (left is not None)
    assert all(f"removed {left}, whose maker was killed, and ended " in line for line in swept)
    assert (_working_below(builds), list(builds.iterdir())) == ([], [])
    assert len(list((tmp_path / "out").glob("*.tar.zst"))) == 1


def _working_below(folder: Path) -> list[int]:
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if cwd.readlink().is_relative_to(folder):
                found.append(int(cwd.parent.name))
    return found


def build_two(first: Path, second: Path, out: Path) -> tuple[BuildError, str]:
    """Build two sets of which the first fails; returns the error and what was told."""
    line = pipeline.promise_of_this_host(TABLE.line("cpu"), BuildReport(Console(quiet=True)))
    plans = [
        BuildPlan(ArchSet("first", ""), line, source.from_folder(first)),
        BuildPlan(TABLE.sets["cpu"], line, source.from_folder(second)),
    ]
    told = io.StringIO()
    report = BuildReport(Console(file=told, width=400))
    with pytest.raises(BuildError) as failed:
        pipeline.build_all(plans, LocalEngine(), BuildRequest(out=out), report)
    assert failed.value.code == "SETS_FAILED"
    assert "1 of 2 sets failed (cpu-first)" in failed.value.message
    names = [path.name for path in out.glob("*.tar.zst")]
    assert names == ["llama-server-b0-cpu-cpu-linux-x86_64.tar.zst"]
    return failed.value, told.getvalue()


def test_a_set_that_fails_does_not_stop_the_others(tiny: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (broken / "llama.cpp").write_text("int broken( { return 1; }\n", "utf-8")
    error, _ = build_two(broken, tiny, tmp_path / "out")
    log = pipeline.STATE / "logs" / "cpu-first.log"
    assert error.log == str(log)
    assert "int broken( {" in log.read_text("utf-8")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_disk_that_is_full_while_a_tree_is_kept_fails_that_set_alone(
    tiny: Path, tmp_path: Path
) -> None:
    big = Path(shutil.copytree(tiny, tmp_path / "big"))
    with (big / "llama.cpp").open("a", encoding="utf-8") as file:
        file.write("extern const char much[3 << 20] = {1};\n")
    with small_disk.mounted(pipeline.STATE, "2m"):
        _, told = build_two(big, tiny, tmp_path / "out")
    (said,) = (line for line in told.splitlines() if "error[" in line)
    tree = pipeline.STATE / "trees" / "cpu-first"
    told = f"error[WRITE_FAILED]: {tree} cannot be written: [Errno 28] No space left on device"
    assert said.startswith(told)


def test_the_time_of_another_plan_is_kept_and_nothing_else_of_it(
    tiny: Path, tmp_path: Path
) -> None:
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tiny))
    other = replace(plan, arch_set=TABLE.sets["sm90"])
    KeptTree(plan, "one", tmp_path).write(JournalEntry("one", tree="t", seconds=12.0))
    assert KeptTree(plan, "two", tmp_path).entry() == JournalEntry("two", seconds=12.0)
    assert times([plan, other], tmp_path) == {plan.key: 12.0, other.key: None}


def test_what_decides_the_bytes_decides_the_digest(tiny: Path) -> None:
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tiny))
    also = BuildPlan(plan.arch_set, plan.line, plan.source, (*plan.targets, "llama-bench"))
    moved = BuildPlan(
        plan.arch_set,
        plan.line,
        source.from_folder(Path(shutil.copytree(tiny, tiny.parent / "moved" / tiny.name))),
    )
    defined = replace(plan, defined=(("GGML_SCHED_MAX_COPIES", "1"),))
    digests = {digest(one, "gcc 1") for one in (plan, also, defined)} | {digest(plan, "gcc 2")}
    assert len(digests) == 4
    assert digest(moved, "gcc 1") == digest(plan, "gcc 1")


def test_a_folders_digest_sees_modes_links_and_names(tiny: Path) -> None:
    seen = {folder_digest(tiny)}
    (tiny / "plugin.c").chmod(0o755)
    seen.add(folder_digest(tiny))
    (tiny / "link").symlink_to("plugin.c")
    seen.add(folder_digest(tiny))
    (tiny / "plugin.c").rename(tiny / "plugin2.c")
    seen.add(folder_digest(tiny))
    assert len(seen) == 4
