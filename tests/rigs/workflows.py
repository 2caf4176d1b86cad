"""GitHub workflows on this machine: parsed, expressions filled in, jobs run as GitHub runs them.

Only what these workflows use is understood; anything else is an error, not a guess.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import actions
import yaml
from github_runner import TOOLS, Machine

PROJECT = Path(__file__).resolve().parent.parent.parent
FOLDER = PROJECT / ".github" / "workflows"
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
_FROM_JSON = re.compile(r"\$\{\{ fromJSON\(([\w.-]+)\) \}\}")
_COMPARISON = re.compile(r"([\w.-]+) (==|!=) '([^']*)'")
_STATUS = re.compile(r"\b(always|failure|success)\(\)")
_VERB = re.compile(r"\binvoke ([a-z-]+)([^|&;)\n#]*)")
_NEVER_MISSING = ("secrets.", "vars.")
"""GitHub gives an empty text for those that nobody has set."""
Context = Mapping[str, str]
Instead = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Step:
    """One step: where it stands, its command or its action, its own and its job's variables."""

    workflow: str
    job: str
    name: str
    id: str = ""
    run: str = ""
    uses: str = ""
    condition: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    job_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.workflow}/{self.job}/{self.name}"


@dataclass(frozen=True)
class Done:
    """A step that was run: where, how it ended, and what it printed."""

    where: str
    ok: bool
    said: str


def verbs(command: str) -> list[tuple[str, list[str]]]:
    """Return the invoke verbs of a command, each with its long options."""
    return [(verb, re.findall(r"--[a-z0-9-]+", rest)) for verb, rest in _VERB.findall(command)]


def load(name: str) -> dict[str, Any]:
    """Parse a workflow; YAML 1.1 reads its key ``on`` as a truth value."""
    tree: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    tree["on"] = tree.pop(True)
    return tree


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("*.yml"))


def steps(name: str) -> Iterator[Step]:
    """Return the steps of a workflow; a job that calls another workflow has none."""
    tree = load(name)
    assert tree["defaults"] == {"run": {"shell": "bash"}}, name  # the one that ``Machine`` has
    for job, row in tree["jobs"].items():
        for step in row.get("steps", ()):
            yield Step(
                workflow=name.removesuffix(".yml"),
                job=job,
                name=step["name"],
                id=step.get("id", ""),
                run=step.get("run", ""),
                uses=step.get("uses", ""),
                condition=step.get("if", ""),
                given=step.get("with", {}),
                env=step.get("env", {}),
                job_env={**tree.get("env", {}), **row.get("env", {})},
            )


def defaults(name: str) -> dict[str, str]:
    """Return what a person who changes nothing gives to a workflow."""
    inputs = load(name)["on"]["workflow_dispatch"]["inputs"]
    return {key: row["default"] for key, row in inputs.items() if "default" in row}


def _value(name: str, context: Context) -> str:
    return context.get(name, "") if name.startswith(_NEVER_MISSING) else context[name]


def filled(text: object, context: Context) -> str:
    """Fill in ``${{ … }}``; what the context does not have is a KeyError."""
    plain = str(text).lower() if isinstance(text, bool) else str(text)
    return _EXPRESSION.sub(lambda match: _value(match[1], context), plain)


def holds(condition: str, context: Context, *, failed: bool = False) -> bool:
    """Decide an ``if:``; without a function of its own it holds only where nothing has failed."""
    if failed and not _STATUS.search(condition):
        return False
    return not condition or any(
        all(_holds(one.strip(), context, failed=failed) for one in each.split("&&"))
        for each in condition.split("||")
    )


def _holds(text: str, context: Context, *, failed: bool) -> bool:
    if _STATUS.fullmatch(text):
        return {"always()": True, "failure()": failed, "success()": not failed}[text]
    match = _COMPARISON.fullmatch(text)
    if match is None:
        return _value(text, context) not in ("", "false")
    return (_value(match[1], context) == match[3]) == (match[2] == "==")


@dataclass
class GitHub:
    """Runs workflows, one job after the other."""

    place: actions.Place
    start: Callable[[], AbstractContextManager[Machine]]
    context: dict[str, str]  # of all workflows: ``github.…``, ``secrets.…``, ``vars.…``
    environment: dict[str, str] = field(default_factory=dict)  # of every step, too
    instead: dict[str, Instead] = field(default_factory=dict)  # by a step's place
    rows: Callable[[dict[str, str]], bool] = lambda _: True  # those of a matrix that are run
    done: list[Done] = field(default_factory=list)  # the steps, in order
    _outputs: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, **inputs: str) -> bool:
        """Run a workflow; returns whether no job failed."""
        context = self.context | {f"inputs.{key}": value for key, value in inputs.items()}
        results: dict[str, bool | None] = {}
        for job, row in load(name)["jobs"].items():
            needs = row.get("needs", [])
            before = [results[one] for one in ([needs] if isinstance(needs, str) else needs)]
            if not holds(row.get("if", ""), context, failed=not all(before)):
                results[job] = None
            elif "uses" in row:
                given = {key: filled(value, context) for key, value in row["with"].items()}
                results[job] = self.run(row["uses"].rpartition("/")[2], **given)
            else:
                ended = [self._job(name, job, one) for one in self._rows(row, context)]
                results[job] = all(ended)
                for key, value in row.get("outputs", {}).items():
                    context[f"needs.{job}.outputs.{key}"] = filled(value, self._outputs)
        return False not in results.values()

    def failures(self) -> str:
        """Return where a step failed, and what it said."""
        return "\n".join(f"{one.where}: {one.said}" for one in self.done if not one.ok)

    def steps(self, workflow: str) -> dict[str, Done]:
        """Return the steps of a workflow that were run, the last of each name, by job and name."""
        prefix = f"{workflow}/"
        return {
            one.where.removeprefix(prefix): one for one in self.done if one.where.startswith(prefix)
        }

    def _rows(self, row: Mapping[str, Any], context: dict[str, str]) -> list[dict[str, str]]:
        matrix = row.get("strategy", {}).get("matrix")
        if matrix is None:
            return [context]
        match = _FROM_JSON.fullmatch(matrix)
        assert match, matrix
        found = [one for one in json.loads(context[match[1]])["include"] if self.rows(one)]
        return [context | {f"matrix.{key}": one[key] for key in one} for one in found]

    def _job(self, name: str, job: str, context: dict[str, str]) -> bool:
        self._outputs = {}
        failed = False
        with self.start() as machine:
            context = context | {"github.workspace": str(machine.workspace)}
            for one in (one for one in steps(name) if one.job == job):
                if holds(one.condition, context, failed=failed):
                    done = self._step(one, context, machine)
                    self.done.append(done)
                    failed |= not done.ok
                    context |= self._outputs
        return not failed

    def _step(self, one: Step, context: Context, machine: Machine) -> Done:
        if one.uses:
            given = {key: filled(value, context) for key, value in one.given.items()}
            try:
                actions.perform(one.uses, given, self.place, machine)
            except actions.ActionError as error:
                return Done(one.where, ok=False, said=str(error))
            return Done(one.where, ok=True, said="")
        command = one.run
        for old, new in self.instead.get(one.where, ()):
            assert old in command, f"{one.where}: {old!r} is not in its command any more"
            command = command.replace(old, new)
        ended = self._command(one, command, context, machine)
        return Done(one.where, ended.returncode == 0, ended.stdout + ended.stderr)

    def _command(
        self, one: Step, command: str, context: Context, machine: Machine
    ) -> subprocess.CompletedProcess[str]:
        output = machine.home / "github_output"
        output.write_text("")
        output.chmod(0o666)
        environment = {
            "HOME": str(machine.home),
            "PATH": f"{TOOLS}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "CI": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_WORKSPACE": str(machine.workspace),
            "GITHUB_REPOSITORY": context["github.repository"],
            "GITHUB_SHA": context["github.sha"],
            **self.environment,
            **{key: filled(value, context) for key, value in {**one.job_env, **one.env}.items()},
        }
        ended = machine.run(command, environment)
        for line in output.read_text("utf-8").splitlines():
            key, _, value = line.partition("=")
            self._outputs[f"steps.{one.id}.outputs.{key}"] = value
        return ended
