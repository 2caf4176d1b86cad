import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import must_or_skip

from llama_loader import cgroups, host
from llama_loader.settings import load
from tests.rigs.control_group import capped

EVERY = len(os.sched_getaffinity(0))


def files(root: Path, *lines: str) -> Path:
    """Write files of the kernel, each given as ``path=content`` below the groups' mount point."""
    for line in lines:
        name, _, text = line.partition("=")
        path = root / (name.lstrip("/") if name.startswith("/") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([], 64),
        (["cpu.max=max 100000"], 64),
        (["cpu.max=200000 100000"], 2),
        (["cpu.max=250000 100000"], 3),
        (["cpu.max=10000 100000"], 1),
        (["cpu.max=9900000 100000"], 64),
        (["cpu.max=garbage"], 64),
        (["cpu.max=1 0"], 64),
        # version 1, as a container without a namespace of its groups sees it
        (
            [
                "/proc/self/cgroup=4:cpu,cpuacct:/docker/0123\n0::/",
                *("cpu,cpuacct/cpu.cfs_quota_us=400000", "cpu,cpuacct/cpu.cfs_period_us=100000"),
            ],
            4,
        ),
        (["cpu/cpu.cfs_quota_us=-1", "cpu/cpu.cfs_period_us=100000"], 64),
        # the kernel's order of names is not the mount's
        (
            [
                "/proc/self/cgroup=4:cpuacct,cpu:/slurm/7",
                *("cpu/slurm/7/cpu.cfs_quota_us=400000", "cpu/slurm/7/cpu.cfs_period_us=100000"),
            ],
            4,
        ),
        # version 2 beside version 1
        (
            ["/proc/self/cgroup=1:name=systemd:/x\n0::/job", "unified/job/cpu.max=400000 100000"],
            4,
        ),
        # a batch job: the limit is the job's, the process is in a step of it
        (
            [
                "/proc/self/cgroup=0::/system.slice/job_7/step_batch/user",
                *("system.slice/job_7/cpu.max=800000 100000", "system.slice/cpu.max=max 100000"),
            ],
            8,
        ),
    ],
)
def test_a_quota_of_the_group_or_of_one_above_counts(
    tmp_path: Path, told: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    facts = host.detect(load(environ={}), root=files(tmp_path, *told))
    assert facts.cpus == expected
    assert facts.threads == (None if expected == 64 else expected)


def test_the_affinity_counts(tmp_path: Path) -> None:
    asked = "from llama_loader import cgroups; print(cgroups.processors())"
    argv = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", asked]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "1\n"
    assert cgroups.processors(tmp_path) == EVERY


TWO_MB = "/proc/meminfo=MemTotal:   2048 kB"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([], 0),
        ([TWO_MB], 2 << 20),
        ([TWO_MB, "memory.max=max"], 2 << 20),
        ([TWO_MB, "memory.max=4096"], 4096),
        (["memory/memory.limit_in_bytes=8192"], 8192),
        ([TWO_MB, "memory/memory.limit_in_bytes=9223372036854771712"], 2 << 20),
        (["memory.max=²"], 0),
        (["/proc/self/cgroup=0::" + "/a" * 50, "memory.max=4096"], 4096),
        (
            [
                "/proc/self/cgroup=3:memory:/kubepods/pod1/c\n0::/job/step",
                "memory/kubepods/memory.limit_in_bytes=9000",
                "memory/kubepods/pod1/memory.limit_in_bytes=8000",
                *("job/memory.max=8192", "memory.max=max"),
            ],
            8000,
        ),
    ],
)
def test_memory_is_the_least_that_any_group_allows(
    tmp_path: Path, told: list[str], expected: int
) -> None:
    assert host.detect(load(environ={}), root=files(tmp_path, *told)).memory == expected


def test_a_real_group_s_quota() -> None:
    if os.geteuid() != 0:
        pytest.skip("control groups need root")
    asked = "input(); from llama_loader import cgroups as groups; "
    argv = [sys.executable, "-c", asked + "print(groups.processors())"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            with capped(process.pid, 0.5):
                told, _ = process.communicate("\n", timeout=60)
        except OSError as error:
            process.kill()
            must_or_skip(f"this machine makes no control groups: {error}")
    assert (told, process.returncode) == ("1\n", 0)
