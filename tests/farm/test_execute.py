"""The executor and the local engine, on a real CMake project that compiles in a second."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest

from farm import durable, pipeline, plan, source, targets
from farm.engines.local import LocalEngine
from farm.errors import BuildError, EngineError, PackError
from farm.execute import BuiltTree, Log, execute
from farm.inputs.packages import cache_folder
from farm.plan import LONGEST_LINE, BuildPlan
from farm.terminal.progress import BuildReport
from tests.rigs.heard import heard, script
from tests.rigs.refusals import refused
from tests.rigs.tiny_release import TINY

TABLE = targets.load()


class Recorder:
    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.counts: list[Any] = []
        self.notes: list[Any] = []

    def __call__(self, what: str, *values: Any) -> None:
        {"step": self.steps, "count": self.counts, "note": self.notes}[what].append(values)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))


def build(tree: Path, logs: Path, **options: Any) -> AbstractContextManager[BuiltTree]:
    asked = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tree))
    options.setdefault("reporter", Recorder())
    return execute(asked, LocalEngine(jobs=2), logs=logs, **options)


def fail(tree: Path, logs: Path, **options: Any) -> None:
    with build(tree, logs, **options):
        pytest.fail("a tree was handed over")


def test_a_log_that_cannot_be_written_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - the log closes it
    monkeypatch.setattr(durable, "new_file", lambda _: full)
    log = tmp_path / "cpu-cpu.log"
    with pytest.raises(PackError) as failed:
        fail(tiny, tmp_path)
    told = f"error[WRITE_FAILED]: {log} cannot be written: No space left on device"
    assert failed.value.render() == told


def test_link_in_the_place_of_a_log_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STATE", tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    (tmp_path / "private").write_text("precious")
    for name in ("x", "base-image-cpu"):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"{name}.log").symlink_to(tmp_path / "private")
    Log(tmp_path / "logs" / "x.log", Recorder()).close()
    with refused("ENGINE_NOT_RUNNING", EngineError), BuildReport() as report:
        pipeline.make_base_image("cpu", None, report)
    assert (tmp_path / "private").read_text() == "precious"


def test_a_build_gives_programs_that_run_and_knows_who_compiled(tiny: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with build(tiny, tmp_path / "logs", reporter=recorder) as built:
        told = heard([built.folder / "llama-server"], check=True)
        assert told.stdout == "version: 0 (unknown) llama.cpp/llama.cpp\n"
        assert (built.folder / "libllama.so").is_symlink()
        assert built.toolchain.engine == "local"
        assert built.toolchain.compiler.startswith("GNU ")
        assert built.seconds > 0
        products = built.folder
    assert recorder.steps == [("configure",), ("compile",)]
    done, total = recorder.counts[-1]
    assert done == total >= 6
    assert not products.exists()
    assert not list(cache_folder("builds").iterdir())
    assert "Linking CXX executable" in (tmp_path / "logs" / "cpu-cpu.log").read_text("utf-8")


def test_a_compile_error_shows_the_file_the_compilers_words_and_the_log(
    tiny: Path, tmp_path: Path
) -> None:
    (tiny / "llama.cpp").write_text("int broken( { return 1; }\n", "utf-8")
    with refused("COMPILE_FAILED", BuildError) as failed:
        fail(tiny, tmp_path / "logs")
    shown = failed.value.render()
    assert "llama.cpp.o" in shown.splitlines()[0]
    assert "error: " in shown
    assert "int broken( {" in shown
    assert f"log: {tmp_path / 'logs' / 'cpu-cpu.log'}" in shown
    assert not list(cache_folder("builds").iterdir())


def test_a_configure_error_is_told_apart(tiny: Path, tmp_path: Path) -> None:
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write('message(FATAL_ERROR "no such backend")\n')
    with refused("CONFIGURE_FAILED", BuildError, "no such backend"):
        fail(tiny, tmp_path / "logs")


def test_source_changes_no_program_of_the_record_and_prints_no_line_without_end(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcc, own = durable.sha256(Path(shutil.which("gcc") or "")), tmp_path / "first"
    own.mkdir()
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'file(WRITE {own}/gcc "#!/bin/sh")\nfile(CHMOD {own}/gcc PERMISSIONS ')
        file.write('OWNER_READ OWNER_EXECUTE)\nstring(REPEAT x 200000 x)\nmessage("${x}")\n')
    with build(tiny, tmp_path) as built:
        assert (own / "gcc").exists()
        assert built.toolchain.programs["gcc"] == gcc
    lines = built.log.read_text("utf-8").splitlines()
    assert max(map(len, lines)) == LONGEST_LINE, "one without end is written in pieces"


def test_count_of_more_steps_than_any_build_has_is_a_line_like_others(tmp_path: Path) -> None:
    recorder = Recorder()
    with closing(Log(tmp_path / "x.log", recorder)) as log:
        log.counts = True
        for count in ("1" * 5000, "²", "3"):
            log.take(f"[{count}/9] x")
    assert recorder.counts == [(3, 9)]


@pytest.mark.parametrize("program", [("yes",), ("sleep", "60")])
def test_answer_of_a_program_has_an_end(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...]
) -> None:
    monkeypatch.setattr(plan, "ANSWER_SECONDS", 1.0)
    asked = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tiny))
    with (
        LocalEngine(jobs=2).open(asked, print) as workspace,
        refused("ANSWER_ENDLESS", EngineError, program[0]),
    ):
        workspace.ask(*program)


def test_flags_of_the_callers_environment_do_not_reach_the_compiler(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-this-is-no-flag")
    with build(tiny, tmp_path / "logs") as built:
        assert (built.folder / "llama-cli").is_file()


@pytest.mark.parametrize("cached", [True, False])
def test_two_folders_give_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, cached: bool
) -> None:
    if not cached:
        monkeypatch.setattr(shutil, "which", _which_without_ccache(shutil.which))
    elsewhere = Path(shutil.copytree(tiny, tmp_path / "some" / "other" / "place"))
    built_bytes = []
    for tree in (tiny, elsewhere):
        with build(tree, tmp_path / "logs") as built:
            built_bytes.append((built.folder / "llama-server").read_bytes())
    assert built_bytes[0] == built_bytes[1]


def _which_without_ccache(which: Callable[..., str | None]) -> Callable[..., str | None]:
    return lambda name, **where: None if name == "ccache" else which(name, **where)


def test_a_build_that_nobody_waits_for_ends_its_silent_compiler(tiny: Path, tmp_path: Path) -> None:
    marker = tmp_path / "compiling"
    slow = script(tmp_path / "slow", f"#!/bin/sh\ntouch {marker}\nexec sleep 120\n")
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(slow ALL COMMAND "{slow}")\n')
        file.write("add_dependencies(llama slow)\n")
    with pytest.raises(BuildError, match="step compile ended"):
        fail(tiny, tmp_path, abandoned=marker.exists)
    assert not list(cache_folder("builds").iterdir())
