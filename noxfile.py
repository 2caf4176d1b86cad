# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2026.10"]
# ///
"""What CI runs. ``nox -l`` lists the sessions; ``nox`` runs lint, types and all the tests."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "typecheck", "docs", "tests"]
nox.options.error_on_external_run = True

FARM_LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
DOCS_LOCK = "requirements-docs.lock"
CLUSTER_LOCK = "requirements-cluster.lock"
LOADER_LOCK = "requirements-loader.lock"
CI_LOCK = "requirements-ci.lock"
MUTATION_LOCK = "requirements-mutation.lock"
SOURCES = (
    *("farm", "spaces", "examples", "tests", "benchmarks", "docs/conf.py"),
    *("tasks.py", "noxfile.py"),
)
WORKFLOWS = ".github/workflows"
PACKAGES = ("tests/loader", "tests/space", "tests/translator", "tests/farm", "tests/docs")
MODULE_PATH = {
    "PYTHONPATH": ":".join((".", "spaces", *filter(None, (os.environ.get("PYTHONPATH"),)))),
    # Even where it is set for this machine: uv installs no bytecode, and the tests start some
    # hundred interpreters, which would each compile gradio anew (10 s instead of 4).
    "PYTHONDONTWRITEBYTECODE": "",
}
PROCESSES = 1 + (os.cpu_count() or 1)
"""Processes of the fast tests: some wait for a clock, a disk or a program."""

MUTATED = {
    "trust": "trust",
    "manifest": "manifest",
    "receipt": "receipt",
    "unpack": "unpack foreign",
    "disk": "disk receipt store",
    "fetch": "fetch resume",
}
"""The loader's verifying modules, and their test files."""
SLOW = (
    "eight_installers or trickle or slow_consumer or leaves_no_worker or killed_and"
    " or stalls or shaped or slower or one_deadline"
)
"""Tests that wait for seconds, by keyword: they would run again for each mutant that survives."""
MUTATION = """[cosmic-ray]
module-path = "spaces/llama_loader/{0}.py"
test-command = 'python -m pytest -xqp no:cacheprovider --timeout=30 -k "not ({2})" {1}'
timeout = 300.0
excluded-modules = []
distributor.name = "local"
"""


def _install(session: nox.Session, lock: str) -> None:
    session.install("--require-hashes", "-r", lock)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, the import contracts between the packages, and the workflows."""
    _install(session, DEV_LOCK)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("ruff", "check", *SOURCES)
    session.run("lint-imports", env=MODULE_PATH)
    session.run("zizmor", "--offline", "--no-progress", "--persona=pedantic", WORKFLOWS)
    files = sorted(str(path) for path in Path(WORKFLOWS).glob("*.yml"))
    forms = [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("build", "space")]
    for schema, checked in {
        "vendor.github-workflows": files,
        "vendor.github-issue-forms": forms,
        "vendor.dependabot": [".github/dependabot.yml"],
    }.items():
        session.run("check-jsonschema", "--builtin-schema", schema, *checked)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Strict types, for the farm and the loader."""
    _install(session, DEV_LOCK)
    session.run(
        "mypy",
        "farm",
        "spaces/llama_loader",
        "spaces/llama_space",
        "spaces/translator",
        "spaces/app.py",
        "benchmarks",
        "tasks.py",
        "noxfile.py",
    )


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that this machine can run; skipped ones are listed with the reason.

    In two halves: the fast tests on every CPU, and beside them one that builds the CPU release;
    then what uses that release, an engine or a browser, three at a time. With arguments: as pytest.
    """
    _install(session, DEV_LOCK)
    if session.posargs:
        session.run("pytest", *session.posargs, env=MODULE_PATH)
        return
    first = "fast or builds"
    halves = (
        ("-m", first, f"--numprocesses={PROCESSES}", "--dist=worksteal"),
        ("-m", f"not ({first})", "-n3", "--dist=loadfile", "--no-loadscope-reorder"),
    )
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for half in halves:
            try:
                session.run("pytest", *half, env={**MODULE_PATH, "LLAMA_TEST_BUILD": folder})
            except CommandFailed:
                failed.append(half[1])
    if failed:
        session.error(f"tests failed: {', '.join(failed)}")


@nox.session
def unit(session: nox.Session) -> None:
    """The fast tests only: no engine, no model, nothing fetched. Takes paths: ``-- tests/farm``."""
    for one in session.posargs:
        path = one.partition("::")[0]
        if path.startswith("tests/") and not Path(path).exists():
            session.error(f"there is no {path}")
    _install(session, DEV_LOCK)
    named = any(Path(one.partition("::")[0]).exists() for one in session.posargs)
    chosen = session.posargs if named else (*PACKAGES, *session.posargs)
    marks = ("-m", "not docker and not model and not slow", f"--numprocesses={PROCESSES}")
    session.run("pytest", *marks, "--dist=worksteal", *chosen, env=MODULE_PATH)


@nox.session
def mutation(session: nox.Session) -> None:
    """Change verifying code, an operator, number or condition at a time: tests must notice 90 %.

    Lists the mutants that survive. Takes modules, and how many mutants of each to draw:
    ``-- trust unpack 150``. Runs may go side by side, each in a copy of this checkout.
    """
    _install(session, DEV_LOCK)
    _install(session, MUTATION_LOCK)
    most = max((int(one) for one in session.posargs if one.isdigit()), default=10**6)
    low = []
    for name in [Path(one).stem for one in session.posargs if not one.isdigit()] or MUTATED:
        with tempfile.TemporaryDirectory() as folder:  # cosmic-ray changes the module's file
            copy = Path(folder, "copy")
            shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "dist"))
            tests = [f"tests/loader/test_{one}.py" for one in MUTATED.get(name, name).split()]
            (copy / "its.toml").write_text(MUTATION.format(name, " ".join(tests), SLOW))
            with session.chdir(copy):
                session.run("cosmic-ray", "baseline", "its.toml", env=MODULE_PATH)
                session.run("cosmic-ray", "init", "its.toml", "its.db")
                _draw(Path(f"spaces/llama_loader/{name}.py").read_text().splitlines(), most)
                session.run("cosmic-ray", "exec", "its.toml", "its.db", env=MODULE_PATH)
                session.run("cr-report", "--surviving-only", "--show-diff", "its.db")
                count = "SELECT sum(test_outcome = 'KILLED'), count(*) FROM work_results WHERE "
                made = "worker_outcome = 'NORMAL'"  # cosmic-ray 8.7 fails to change some `except`
                noticed, of = sqlite3.connect("its.db").execute(count + made).fetchone()
        session.log(f"{name}: {noticed} of {of} mutants noticed, {100 * noticed / of:.1f} %")
        low += [name] if noticed < 0.9 * of else []
    if low:
        session.error(f"under 90 %: {', '.join(low)}")


def _draw(source: list[str], most: int) -> None:
    """Keep ``most`` mutants, the same each time; none of ``|`` in a type or ``*`` in parameters."""
    with sqlite3.connect("its.db") as found:
        columns = "operator_name, occurrence, start_pos_row, start_pos_col, job_id"
        every = found.execute(f"SELECT {columns} FROM mutation_specs ORDER BY 1, 2").fetchall()  # noqa: S608
        random.Random(1).shuffle(every)  # noqa: S311
        none = re.compile(r"\*,|\| \w+\b(?!\.)")
        kept = [(job,) for *_, row, at, job in every if not none.match(source[row - 1], at)]
        found.execute("DELETE FROM work_items")
        found.executemany("INSERT INTO work_items VALUES (?)", kept[:most])


@nox.session
def docs(session: nox.Session) -> None:
    """The site, into site/: a broken link, or a page without a link to it, is an error."""
    _install(session, DOCS_LOCK)
    options = ("--fail-on-warning", "--keep-going", "--quiet", "--fresh-env")
    session.run("sphinx-build", *options, "docs", "site", *session.posargs, env=MODULE_PATH)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel ``llama-space`` (loader and engine) into dist/, reproducibly."""
    _install(session, FARM_LOCK)
    session.run("python", "-m", "farm.loader", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Source → container → tarball → loader → a verified server's first token. Takes options."""
    _install(session, FARM_LOCK)
    session.run("invoke", "demo", *session.posargs)


@nox.session
def reproducible(session: nox.Session) -> None:
    """Build a set twice from nothing, in two containers, with other numbers of jobs; compare.

    Without options: the whole set cpu. Options are those of ``invoke reproducible``, such as
    ``-- --arch-set sm90 --line cu130`` for a whole CUDA set.
    """
    _install(session, FARM_LOCK)
    session.run("invoke", "reproducible", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU and a CUDA toolkit, network or not: build, test, measure.

    Uses the Python that runs nox, so that it works where nothing can be installed. What was built
    already stays; ``dist/gpu/cold_start.json`` is the result.
    """
    session.run(sys.executable, "benchmarks/on_gpu.py", *session.posargs, env=MODULE_PATH)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Pictures of the Space's page into docs/figures, in Debian's Chromium.

    The variables say which release and model, as for the Space (docs/settings.md).
    """
    _install(session, DEV_LOCK)
    session.run("python", "benchmarks/screenshots.py", *session.posargs, env=MODULE_PATH)


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Rewrite the sources in the project's format; the equal of a pre-commit hook's fixes."""
    _install(session, DEV_LOCK)
    session.run("ruff", "format", *SOURCES)
    session.run("ruff", "check", "--fix", *SOURCES)


@nox.session
def lock(session: nox.Session) -> None:
    """Write the lock files again from pyproject.toml, with hashes and no index's address."""
    _install(session, CI_LOCK)
    common = (
        "--universal",
        "--generate-hashes",
        "--no-emit-index-url",
        "--no-annotate",
        "--custom-compile-command=nox -s lock",
        "--quiet",
    )
    compile_ = ("uv", "pip", "compile", *common, *session.posargs)
    ours = (*compile_, "--python-version=3.11", "pyproject.toml")
    groups = (f"--group={name}" for name in ("cluster", "test", "lint"))
    session.run(*ours, *groups, "-o", DEV_LOCK)
    # the tests' versions, also where gradio keeps them back: one environment takes all three
    session.run(*ours, "-c", DEV_LOCK, "-o", FARM_LOCK)
    session.run(*ours, "--group=cluster", "-c", DEV_LOCK, "-o", CLUSTER_LOCK)
    session.run(*ours, "--group=docs", "-o", DOCS_LOCK)
    for group, file in {"ci": CI_LOCK, "mutation": MUTATION_LOCK}.items():
        alone = ("--python-version=3.11", f"--group={group}", "-c", DEV_LOCK)
        session.run(*compile_, *alone, "-o", file)
    loader = ("--python-version=3.10", "spaces/requirements.txt", "--group=loader-test")
    session.run(*compile_, *loader, "-o", LOADER_LOCK)
