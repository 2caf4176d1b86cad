"""The quick versions of what benchmarks/ proves in full, each on real programs (docs/faults.md)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import must_or_skip
from verbs import PROJECT

from benchmarks import executed_files
from tests.rigs import installer
from tests.rigs.heard import heard


@pytest.fixture(autouse=True)
def _traceable() -> None:
    if not installer.is_traceable():
        must_or_skip("strace is not installed, or may not trace here")


def proven(program: str, *argv: str) -> dict[str, object]:
    """Run a benchmark; it ends with 0 only where the proof holds."""
    done = heard(
        [sys.executable, f"benchmarks/{program}.py", *argv],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'spaces'}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_killed_at_system_calls_of_every_thread() -> None:
    found = proven("kill_everywhere", "--step", "40")
    assert found["bad"] == 0
    assert int(str(found["killed"])) > 20


@pytest.mark.model
@pytest.mark.docker
def test_the_server_executes_only_what_was_verified(real_manifest: str, real_model: Path) -> None:
    """The whole run for real: fetch, serve, an answer; every executed or executable file known."""
    folder = Path(real_manifest.removeprefix("file://")).parent
    found = proven("executed_files", str(folder), str(real_model))
    files = found["files"]
    assert isinstance(files, dict)
    assert files["manifest"] >= 8
    assert files["system"] >= 3
    assert files["nobody"] == 0
    assert str(found["answer"]).startswith(" Paris")


def test_a_file_that_nobody_listed_is_found(tmp_path: Path) -> None:
    """A real program with a library that an attacker added, by strace as in the proof."""
    runtime, log = tmp_path / "runtime", tmp_path / "log"
    runtime.mkdir()
    log.mkdir()
    program, slipped_in = runtime / "llama-server", tmp_path / "libother.so"
    shutil.copy("/bin/cat", program)
    needed = subprocess.run(["ldd", "/bin/cat"], capture_output=True, text=True, check=True).stdout
    libc = next(line.split()[2] for line in needed.splitlines() if "libc.so.6" in line)
    shutil.copy(Path(libc).with_name("libm.so.6"), slipped_in)
    # as the loader's starter does: another program first, then the server in its place
    argv = ["/bin/sh", "-c", f"LD_PRELOAD={slipped_in} exec {program} /dev/null"]
    traced = ["strace", "-ff", "-y", "-qq", "-s", "4096", "-e", f"trace={executed_files.CALLS}"]
    subprocess.run([*traced, "-o", str(log / "x"), *argv], check=True)
    listed = {str(program): hashlib.sha256(program.read_bytes()).hexdigest()}
    found = executed_files.judge(log, runtime, listed, set())
    assert found["by"]["nobody"] == [str(slipped_in)]
    assert found["by"]["manifest"] == ["llama-server"]
    assert libc in map(str, found["by"]["system"]) or found["files"]["system"] >= 2
    assert "/bin/sh" in found["programs of the loader"]
    vouched_for = executed_files.judge(log, runtime, listed, {str(slipped_in)})
    assert vouched_for["by"]["cuda"] == [str(slipped_in)]
    changed = executed_files.judge(log, runtime, {str(program): "0" * 64}, set())
    assert changed["by"]["nobody"] == [str(slipped_in), "llama-server"]
