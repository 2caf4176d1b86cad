import ast
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama_loader import __version__, gpus, self_test
from llama_loader.__main__ import main
from llama_loader.client import Client
from llama_loader.errors import ServerError
from llama_loader.manifest import Platform, dump
from llama_loader.receipt import RECEIPT
from tests.loader.test_model_file import MMPROJ
from tests.loader.test_selection import RELEASE
from tests.loader.test_server import OTHER_MACHINE
from tests.rigs import archives, fake_nvml
from tests.rigs.heard import heard
from tests.rigs.impostor_archive import Impostor
from tests.rigs.waiting import comes

SPACES = Path(__file__).parent.parent.parent / "spaces"
MODEL = str(self_test.MODEL)
NAME = "llama-server-b1-cpu-cpu-linux-x86_64.tar.gz"


@pytest.fixture
def release(impostor: Impostor, tmp_path: Path) -> Path:
    """A release with one cpu artifact, whose llama-server is the impostor."""
    return make_release(impostor, tmp_path / "release")


def make_release(impostor: Impostor, folder: Path, **artifact: Any) -> Path:
    folder.mkdir()
    if not (impostor.folder / "behaviour.json").exists():
        impostor.behave()
    modes = {"llama-server": 0o755}
    entries = [
        archives.Entry(f"runtime/{one.name}", one.read_bytes(), modes.get(one.name, 0o644))
        for one in sorted(impostor.folder.iterdir())
    ]
    here = {"system": "linux", "machine": os.uname().machine, "glibc": "2.17", "glibcxx": None}
    platform = Platform(**{**here, **artifact})
    packed, described = archives.release(entries, platform=platform)
    (folder / NAME).write_bytes(packed)
    (folder / "manifest.json").write_bytes(archives.manifest(described))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with nothing of this machine's but the PATH."""
    (tmp_path / "tmp").mkdir()
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(SPACES),
    }


def run(home: dict[str, str], *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return heard([sys.executable, "-m", "llama_loader", *argv], env=home, timeout=60, **kwargs)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command in this process, and leaves its signals and hooks as they were."""
    monkeypatch.setattr("llama_loader.fetch.backoff", lambda *_: 0.0)
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def told(*argv: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(os, "environ", dict(home))
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            status = main(argv)
        except SystemExit as ended:
            status = int(str(ended.code))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(argv, status, *capsys.readouterr())

    return told


def manifest_options(release: Path) -> list[str]:
    data = (release / "manifest.json").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return ["--manifest", (release / "manifest.json").as_uri(), "--manifest-sha256", digest]


def refused(done: subprocess.CompletedProcess[str], status: int, code: str) -> str:
    """An error is one line, then perhaps a hint, and nothing else; nothing stands on stdout."""
    assert done.returncode == status, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error[{code}]: "), done.stderr
    assert [line[:6] for line in lines[1:]] in ([], ["hint: "]), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_is_there_at_once_and_loads_nothing() -> None:
    """Contract: < 0.25 s. Of a processor: other tests may run at the same time."""
    command = [sys.executable, "-X", "importtime", "-m", "llama_loader", "--help"]
    environ = {**os.environ, "PYTHONPATH": str(SPACES), "PYTHONDONTWRITEBYTECODE": "1"}
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        after = os.times()
        used = after.children_user + after.children_system
        seconds.append(used - before.children_user - before.children_system)
    assert min(seconds) < 0.25
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "gradio", "requests", "msgspec", "dataclasses", "subprocess"}
    for command_name in ("fetch", "devices", "serve", "doctor", "verify"):
        assert command_name in done.stdout


def test_an_older_python_is_refused_in_one_line(home: dict[str, str]) -> None:
    """Its own parser reads the file up to there: what follows must be syntax of it, too."""
    ast.parse((SPACES / "llama_loader/__main__.py").read_text("utf-8"), feature_version=(3, 8))
    older = "import runpy, sys; sys.version_info = (3, 9, 18)\n"
    older += "runpy.run_module('llama_loader', run_name='__main__')"
    done = heard([sys.executable, "-c", older], env=home)
    assert "needs Python 3.10 or newer" in refused(done, 2, "USAGE")


def test_nothing_of_the_folder_where_it_is_typed_is_imported_or_taken_for_a_cuda_library(
    home: dict[str, str], release: Path, tmp_path: Path
) -> None:
    """Python itself looks there for ``runpy``, and for what that imports, before the loader."""
    tell = "import runpy, pkgutil, sys; print(*sys.modules)"
    before = {*heard([sys.executable, "-c", tell]).stdout.split()}
    brought = {"msgspec", "requests", "minisign", "backports", "huggingface_hub", "sitecustomize"}
    folder = tmp_path / "shared"
    for name in (*sys.stdlib_module_names - before, *brought, "nvidia/x/lib/libcublas.so.12"):
        path = folder / (name if "/" in name else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit('{name} of another user was imported')")
    options = [*manifest_options(release), "--allow-cpu", "--no-test-run", "--model", MODEL]
    done = run(home, "doctor", *options, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(folder) not in done.stdout


def test_fetch_prints_the_folder_alone_or_what_it_did_as_json(
    home: dict[str, str], release: Path
) -> None:
    options = [*manifest_options(release), "--allow-cpu"]
    told = json.loads(run(home, "fetch", *options, "--json").stdout)
    stages = {stage["name"]: stage for stage in told["timeline"]}
    assert list(stages) == ["resolve", "fetch", "unpack", "verify", "test run"]
    assert stages["fetch"]["size"] == (release / NAME).stat().st_size
    assert all(stage["seconds"] >= 0 for stage in stages.values())
    assert told["verified"] is True
    assert told["choice"]["verdicts"][0]["name"] == NAME
    done = run(home, "fetch", *options, "--no-test-run", "--offline")
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_absolute()
    assert str(folder) == told["folder"]
    assert (folder / "llama-server").is_file()
    assert folder.is_relative_to(Path(home["HF_HOME"]) / "llama-loader")


def test_fetch_and_the_doctor_try_what_was_installed(
    command: Command, impostor: Impostor, tmp_path: Path
) -> None:
    impostor.behave(exit=3, say=["E it is broken"])
    options = [*manifest_options(make_release(impostor, tmp_path / "r")), "--allow-cpu"]
    done = command("fetch", *options)
    assert "--no-test-run" in refused(done, 7, "SERVER_ENDED")
    assert "the loader's own tiny model failed" in done.stderr
    assert "status 3 while loading; its last lines: E it is broken" in done.stderr
    assert command("fetch", *options, "--no-test-run").returncode == 0
    page = command("doctor", *options)
    refused(page, 7, "SERVER_ENDED")
    assert "FAIL test run: the test run with the loader's own tiny model failed" in page.stdout
    told = json.loads(command("doctor", *options, "--no-test-run", "--json").stdout)
    assert "test run" not in [check["name"] for check in told["checks"]]


def test_an_archive_by_url_wins_and_says_that_it_is_not_pinned(
    command: Command, release: Path
) -> None:
    options = ["fetch", "--url", (release / NAME).as_uri(), "--manifest", "file:///nowhere"]
    done = command(*options)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((release / NAME).read_bytes()).hexdigest()
    assert digest in done.stderr
    assert done.stderr.startswith("warning[")
    pinned = command(*options, "--sha256", digest)
    assert (pinned.returncode, pinned.stderr) == (0, "")
    refused(command(*options, "--sha256", "0" * 64), 4, "SHA256_MISMATCH")


def test_artifact_of_another_architecture_under_the_right_name_is_refused(
    command: Command, release: Path, impostor: Impostor, tmp_path: Path
) -> None:
    (impostor.folder / "llama-server").write_bytes(OTHER_MACHINE)
    other = make_release(impostor, tmp_path / "other")
    size = (release / NAME).stat().st_size
    (release / NAME).write_bytes((other / NAME).read_bytes().ljust(size, b"\0"))
    refused(command("fetch", *manifest_options(release), "--allow-cpu"), 4, "CHUNK_MISMATCH")
    refused(command("fetch", *manifest_options(other), "--allow-cpu"), 5, "RUNTIME_NOT_EXECUTABLE")


def test_verify_compares_with_the_manifest_that_is_given(
    command: Command, release: Path, impostor: Impostor, tmp_path: Path
) -> None:
    """A file that was changed together with its receipt is found by the manifest alone."""
    options = manifest_options(release)
    folder = Path(command("fetch", *options, "--allow-cpu", "--no-test-run").stdout.strip())
    done = command("verify", str(folder), *options)
    assert done.stdout == f"ok {folder}\ncompared with the manifest's entry {NAME}\n"
    assert "compared with the runtime's own receipt" in command("verify", str(folder)).stdout
    refused(command("verify", f"{folder}/none", *options), 2, "NOT_A_RUNTIME")
    told = json.loads(command("verify", str(folder), *options, "--json").stdout)
    assert told["compared_with"] == f"the manifest's entry {NAME}"
    program = folder / "llama-server"
    before = hashlib.sha256(program.read_bytes()).hexdigest()
    program.chmod(0o755)
    program.write_bytes(program.read_bytes()[:-1] + b" ")
    refused(command("verify", str(folder)), 4, "RUNTIME_DAMAGED")
    after = hashlib.sha256(program.read_bytes()).hexdigest()
    kept = next(place / RECEIPT for place in folder.parents if (place / RECEIPT).exists())
    kept.chmod(0o644)
    kept.write_text(kept.read_text().replace(before, after))
    assert command("verify", str(folder)).returncode == 0
    refused(command("verify", str(folder), *options), 4, "RUNTIME_DAMAGED")
    impostor.behave(list={"text": "other"})
    other = manifest_options(make_release(impostor, tmp_path / "other"))
    refused(command("verify", str(folder), *other), 4, "OTHER_ARTIFACT")


def test_foreign_text_forges_no_line_and_sends_no_code(
    command: Command, impostor: Impostor, tmp_path: Path
) -> None:
    """Of a manifest, of llama-server's log, of names: by each command, as text and as JSON."""
    forged = "\x1b[2J\u2028\nverdict: a model can be served here now\u202e\x9b31m"
    impostor.behave(
        list={"text": "Available devices:\n  CUDA0: L4 \x1b[2J\u202e (9 MiB, 8 MiB free)\n"}
    )
    sound = manifest_options(make_release(impostor, tmp_path / "sound"))
    bad = manifest_options(make_release(impostor, tmp_path / "bad", system=f"linux{forged}"))
    store = ["--store", str(tmp_path / "store\u202e\u200f"), "--allow-cpu"]
    for argv in (
        ["fetch", *sound, "--store", str(tmp_path / f"store{forged}"), "--allow-cpu"],
        ["fetch", *sound, *store, "--no-test-run"],
        ["devices", *sound, *store],
        ["doctor", *sound, *store],
        ["fetch", *bad, *store],
        ["doctor", *bad, *store, "--model", str(tmp_path / f"m{forged}.gguf")],
        ["doctor", *bad, "--suppose", "capability=9.0,driver=580,glibc=2.36,torch=none"],
        ["verify", str(tmp_path / f"none{forged}")],
    ):
        done = command(*argv)
        for line in (done.stdout + done.stderr).split("\n"):
            assert line.isprintable(), (argv[0], line)
        verdicts = [line for line in done.stdout.split("\n") if line.startswith("verdict:")]
        assert len(verdicts) == (argv[0] == "doctor")
        told = command(*argv, "--json")
        assert (told.stdout + told.stderr).replace("\n", "").isprintable()
        assert told.stdout.isascii()


def test_devices_lists_and_says_why(command: Command, impostor: Impostor, tmp_path: Path) -> None:
    listed = "Available devices:\n  CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)\n"
    impostor.behave(list={"text": listed})
    options = [*manifest_options(make_release(impostor, tmp_path / "r")), "--allow-cpu"]
    done = command("devices", *options)
    assert done.stdout == f"{listed}chosen: CUDA0 (the only one: NVIDIA H200)\n"
    told = json.loads(command("devices", *options, "--json").stdout)
    assert told["chosen"] == ["CUDA0"]
    assert told["devices"][0]["free"] == 142629 * 1024**2
    missing = command("devices", *options, "--device", "Vulkan0")
    assert missing.returncode == 5
    assert missing.stdout == listed  # also where none of them can be chosen
    assert "error[INVALID_DEVICE]" in missing.stderr


REFUSALS: dict[tuple[int, str], list[list[str]]] = {
    (2, "USAGE"): [
        *([], ["frobnicate"], ["fetch", "--frob"], ["fetch", "--arc", "90"], ["fetch", "--", "x"]),
        *(["serve"], ["serve", "--model", "a", "--hf", "b", "c"], ["serve", "--hf", "only-one"]),
        *(["verify"], ["verify", ""], ["verify", "--no-test-run", "x"]),
    ],
    (2, "NOT_A_RUNTIME"): [["verify", "/proc"], ["verify", f"/proc/runtimes/{'0' * 64}/llama"]],
    (2, "SETTING_INVALID"): [
        ["fetch", "--arch", "hopper"],
        ["fetch", "--arch", ""],
        ["fetch", "--store", "~nobody-of-that-name/x"],
        ["fetch", "--sha256", "0" * 64],
        ["fetch", "--manifest", "not a url"],
        ["fetch", "--manifest-sha256", "12"],
        ["serve", "--model", "a", "--port", "zero"],
    ],
    (2, "URL_REFUSED"): [
        ["fetch", "--manifest", "https://me:hf_pw@example.org/m.json"],
        ["fetch", "--manifest", "https://hf_pw@example.org/m.json"],
        ["fetch", "--manifest", "http://example.org/manifest.json"],
    ],
    (2, "EXTRA_ARGUMENT"): [
        ["serve", "--model", "a", "--", "--lora", "nope"],
        ["serve", "--model", "a", "--", "--port", "1"],
        ["serve", "--model", "a", "--no-key", "--", "--api-key", "k"],
    ],
    (3, "OFFLINE"): [["fetch", "--manifest", "https://example.org/m.json", "--offline"]],
    (3, "UNREACHABLE"): [
        ["fetch", "--manifest", "file:///nowhere.json"],
        ["fetch", "--manifest", "https://127.0.0.1:9/m.json?sig=hf_pw"],
    ],
}


@pytest.mark.parametrize(
    ("expected", "argv"), [(one, argv) for one, every in REFUSALS.items() for argv in every]
)
def test_refusal_has_its_line_its_status_and_no_secret(
    command: Command, expected: tuple[int, str], argv: list[str]
) -> None:
    assert "hf_pw" not in refused(command(*argv), *expected)


def test_a_store_that_cannot_be_a_folder(command: Command, release: Path) -> None:
    """As docs/store.md says: the error names the place, and nothing is installed elsewhere."""
    for place in ("/dev/null", "/proc/x", "/proc/sys/x/y"):
        options = [*manifest_options(release), "--allow-cpu", "--store", place]
        told = refused(command("fetch", *options), 6, "STORE_FAILED")
        assert "/".join(place.split("/")[:3]) in told
        assert "can there be a folder" in told
        assert "STORE_TEMPORARY" not in told


def test_output_to_a_full_disk_is_one_error_without_a_traceback(
    home: dict[str, str], release: Path
) -> None:
    options = [*manifest_options(release), "--allow-cpu", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llama_loader", "fetch", *options],
            env=home, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 6
    assert "error[SYSTEM]: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("module", ["msgspec", "requests"])
def test_package_that_is_not_installed_is_named_with_the_command_that_installs_it(
    home: dict[str, str], module: str
) -> None:
    lacking = f"import sys; sys.modules[{module!r}] = None; from llama_loader import __main__ as it"
    url = "http://127.0.0.1:9/manifest.json"  # a file needs no HTTP client
    told = heard(
        [sys.executable, "-c", f"{lacking}; sys.exit(it.main())", "fetch", "--manifest", url],
        env=home,
    )
    refused(told, 2, "PACKAGE_MISSING")
    assert f"the Python package {module} is not installed" in told.stderr
    assert f"-m pip install -r {SPACES / 'requirements.txt'}" in told.stderr
    app = f"import runpy; runpy.run_path({str(SPACES / 'app.py')!r}, run_name='__main__')"
    lacking = "import sys; sys.modules['gradio'] = None"
    told = heard([sys.executable, "-c", f"{lacking}; {app}"], env=home)
    refused(told, 2, "PACKAGE_MISSING")
    assert "requirements.txt 'gradio[mcp]' spaces huggingface_hub, best in" in told.stderr


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("servee", "serve"),
        ("fetch --manifst=x", "--manifest"),
        ("fetch --check", ""),
        ("serve --port 0 m.gguf", "--model m.gguf"),
        ("serve --ctx-size=100", ""),
    ],
)
def test_name_near_to_a_mistyped_one_is_offered(command: Command, wrong: str, near: str) -> None:
    hint = refused(command(*wrong.split()), 2, "USAGE")
    assert f"did you mean {near}?" in hint if near else "did you mean" not in hint
    assert ("options of llama-server go after --" in hint) is wrong.startswith("serve ")


@pytest.mark.parametrize("wrong", ["--manifest x fetch", "--offline fetch", "--arch=90"])
def test_an_option_before_the_command_is_told_its_place(command: Command, wrong: str) -> None:
    told = refused(command(*wrong.split()), 2, "USAGE")
    assert f"{re.split('[ =]', wrong)[0]} comes before the command\n" in told
    assert "hint: options come after the command: " in told


def test_the_version_and_the_app_s_help_are_printed_and_nothing_starts(
    home: dict[str, str],
) -> None:
    asked = (["-m", "llama_loader", "--version"], [f"{SPACES / 'app.py'}", "-h"])
    version, app = (heard([sys.executable, *one], env=home) for one in asked)
    assert (version.returncode, version.stdout) == (0, f"llama_loader {__version__}\n")
    assert (app.returncode, app.stdout[:22]) == (0, "python3 app.py: serves")


def test_host_without_a_gpu_is_refused_with_the_option_for_the_cpu(
    command: Command, release: Path, home: dict[str, str]
) -> None:
    if Path("/proc/driver/nvidia/gpus").exists():
        pytest.skip("this machine has an NVIDIA GPU")
    home["ALLOW_CPU"] = "1"
    for argv in (["fetch"], ["devices"], ["serve", "--model", "/m"]):
        done = command(*argv, *manifest_options(release))
        hint = refused(done, 5, "NO_GPU")
        assert "--allow-cpu" in hint
        assert "; set without the prefix YAKULINGO_SPACES_: ALLOW_CPU\n" in hint
    page = command("doctor", *manifest_options(release))
    assert page.returncode == 5
    assert "FAIL gpu: no GPU can be used now: no NVIDIA GPU found" in page.stdout
    assert "hardware is ZeroGPU" in page.stdout


def test_misspelt_variable_is_a_warning_of_every_command(
    command: Command, home: dict[str, str], release: Path
) -> None:
    home["YAKULINGO_SPACES_NCTX"] = "8192"
    options = [*manifest_options(release), "--allow-cpu", "--no-test-run"]
    done = command("fetch", *options)
    assert done.returncode == 0
    assert done.stderr.startswith("warning[SETTING_UNKNOWN]: YAKULINGO_SPACES_NCTX is no setting")
    page = command("doctor", *options)
    assert "note SETTING_UNKNOWN: YAKULINGO_SPACES_NCTX" in page.stdout
    assert "warning" not in page.stderr


@pytest.mark.parametrize("prefix", ["LLAMA_SPACE_", "YAKULINGO_SPACES_"])
def test_warnings_errors_and_the_doctor_name_variables_by_the_prefix_that_is_set(
    prefix: str, command: Command, home: dict[str, str], release: Path
) -> None:
    home[f"{prefix}N_CTX"] = "4096"
    unpinned = manifest_options(release)[:2]
    told = command("fetch", *unpinned, "--arch", "1.0", "--allow-cpu", "--no-test-run").stderr
    told += command("fetch", *unpinned).stderr + command("doctor", *unpinned).stdout
    for name in ("LLAMA_CPP_MANIFEST_SHA256=", "ALLOW_CPU) to have an error", "ALLOW_CPU=1"):
        assert f"{prefix}{name}" in told
    (other,) = {"LLAMA_SPACE_", "YAKULINGO_SPACES_"} - {prefix}
    assert other not in told


class Serving:
    """A ``serve`` in the background."""

    def __init__(self, home: dict[str, str], *argv: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_loader", "serve", *argv],
            env=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def url(self) -> str:
        """Wait for its ``ready`` line, the only one on stdout; returns its address."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready http://127.0.0.1:"):
                return line.split()[1]
        raise AssertionError(self.process.communicate())

    def key(self) -> str:
        """Return the key that it prints before its ``ready`` line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("warning[API_KEY]: "):
                hint = self.process.stderr.readline()
                assert "-- --api-key-file FILE, or require none with --no-key" in hint
                return line.split()[-1]
        raise AssertionError(self.process.communicate())

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture
def serving(home: dict[str, str]) -> Iterator[Any]:
    started: list[Serving] = []

    def start(*argv: str) -> Serving:
        started.append(Serving(home, *argv))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_interrupted(serving: Any, release: Path, number: int) -> None:
    server = serving(*manifest_options(release), "--allow-cpu", "--model", MODEL)
    url = server.url()
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200
    assert server.key()
    assert server.end(number) == (0, "")
    with pytest.raises(OSError, match=r"refused|reset"):
        urllib.request.urlopen(f"{url}/health")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_interrupted_while_it_loads(
    serving: Any, impostor: Impostor, tmp_path: Path, home: dict[str, str], number: int
) -> None:
    impostor.behave(loading=60)
    options = manifest_options(make_release(impostor, tmp_path / "r"))
    server = serving(*options, "--allow-cpu", "--model", MODEL)
    assert comes(lambda: any(Path(home["HF_HOME"]).rglob("seen.json")))
    pid = seen(home)["pid"]
    status, errors = server.end(number)
    assert (status, errors.startswith("error[INTERRUPTED]: ")) == (130, True)
    assert not Path(f"/proc/{pid}").exists()


def test_serve_takes_the_model_of_a_variable_and_an_option_before_it(
    serving: Any, release: Path, home: dict[str, str], command: Command
) -> None:
    options = [*manifest_options(release), "--allow-cpu"]
    told = refused(command("serve", *options), 2, "USAGE")
    assert "YAKULINGO_SPACES_GGUF_PATH" in told
    home["YAKULINGO_SPACES_GGUF_PATH"] = MODEL
    assert serving(*options).url()
    done = command("serve", *options, "--offline", "--hf", "me/model", "m.gguf")
    assert "me/model/m.gguf is not in the local cache" in refused(done, 3, "OFFLINE")


def seen(home: dict[str, str]) -> dict[str, Any]:
    """Return what the server that was started last saw."""
    found: dict[str, Any] = json.loads(next(Path(home["HF_HOME"]).rglob("seen.json")).read_text())
    return found


def asked(url: str, key: str | None) -> int:
    """Return the status of a request with a key."""
    return Client(int(url.rpartition(":")[2]), key).status("/props", 5)


def test_serve_makes_a_key_and_tells_it_to_its_caller_alone(
    serving: Any, release: Path, tmp_path: Path
) -> None:
    one, two = (
        serving(*manifest_options(release), "--allow-cpu", "--model", MODEL) for _ in range(2)
    )
    keys = [one.key(), two.key()]
    urls = [one.url(), two.url()]
    assert keys[0] != keys[1]
    assert [asked(url, key) for url, key in zip(urls, keys, strict=True)] == [200, 200]
    assert [asked(urls[0], key) for key in (None, "another", keys[1])] == [401, 401, 401]
    told = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    told += [
        (process / name).read_bytes()
        for process in processes_of(one.process.pid)
        for name in ("cmdline", "environ")
    ]
    assert len(told) > 10
    assert not [one for one in told for key in keys if key.encode() in one]


def processes_of(pid: int) -> list[Path]:
    """Return a process and its children, as folders of /proc."""
    children = Path(f"/proc/{pid}").glob("task/*/children")
    return [
        Path("/proc", found) for one in children for found in [*one.read_text().split(), f"{pid}"]
    ]


def test_key_of_serve_is_the_same_after_its_server_has_died(
    serving: Any, release: Path, home: dict[str, str]
) -> None:
    server = serving(*manifest_options(release), "--allow-cpu", "--model", MODEL)
    key, url = server.key(), server.url()
    os.kill(seen(home)["pid"], signal.SIGKILL)

    def answers() -> bool:
        with suppress(ServerError):
            return asked(url, key) == 200
        return False

    assert comes(answers, pause=0.05)
    assert asked(url, None) == 401
    _, told = server.end(signal.SIGINT)
    assert "warning[SERVER_RESTARTED]: " in told
    assert "API_KEY" not in told


@pytest.mark.parametrize("arguments", ["", "--no-key", "-- --api-key-file KEY --threads 3"])
def test_serve_as_json_tells_the_key_that_it_made_and_passes_on_what_follows_the_dashes(
    arguments: str, serving: Any, release: Path, home: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("theirs\n")
    home["LLAMA_API_KEY"] = "not read"
    given = [str(tmp_path / "key") if one == "KEY" else one for one in arguments.split()]
    model = os.path.relpath(MODEL)
    options = [*manifest_options(release), "--allow-cpu", "--model", model, "--json"]
    server = serving(*options, *given)
    told = json.loads(server.process.stdout.readline())
    assert server.url() == told["url"]
    is_open = arguments == "--no-key"
    assert [asked(told["url"], key) for key in ("not read", None)] == [200 if is_open else 401] * 2
    assert (told["api_key"] is None) == bool(arguments)
    assert not told["api_key"] or asked(told["url"], told["api_key"]) == 200
    argv = seen(home)["argv"]
    assert argv[argv.index("--model") + 1] == MODEL
    assert (argv[-2:] == ["--threads", "3"]) == arguments.startswith("-- ")
    status, warned = server.end(signal.SIGINT)
    assert (status, warned.count("\n")) == (0, 2 if is_open else 0)
    words = "warning[SERVER_OPEN]: the server requires no key: every user of"
    assert warned.startswith(words) == is_open


@pytest.mark.timeout(60)
def test_serve_refuses_what_is_no_model_as_the_doctor_does(
    command: Command, home: dict[str, str], release: Path, tmp_path: Path
) -> None:
    """test_model.py has all that is none; here, that both look for it."""
    (tmp_path / "page").write_text("<!doctype html>")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(self_test.MODEL.read_bytes())
    (tmp_path / "mmproj").write_bytes(MMPROJ)
    os.mkfifo(tmp_path / "fifo")
    names = {"page": "MODEL_NOT_GGUF", "m-00001-of-00003.gguf": "MODEL_INCOMPLETE"}
    names |= {"mmproj": "MODEL_PROJECTOR", "fifo": "MODEL_MISSING"}
    for name, code in names.items():
        options = [*manifest_options(release), "--allow-cpu", "--model", str(tmp_path / name)]
        told = refused(command("serve", *options), 2, code)
        assert not list(Path(home["HF_HOME"]).rglob("seen.json"))
        page = json.loads(command("doctor", *options, "--no-test-run", "--json").stdout)
        (check,) = (one for one in page["checks"] if one["name"] == "model")
        assert check["code"] == code
        assert check["detail"] in told
        for path in Path(home["HF_HOME"]).rglob("seen.json"):
            path.unlink()


def test_doctor_says_what_another_machine_would_fetch(
    command: Command, tmp_path: Path, home: dict[str, str]
) -> None:
    question = "capability=12.0,driver=580,glibc=2.36,torch=cu128"
    release = tmp_path / "manifest.json"
    release.write_bytes(dump(RELEASE))
    ask = ("doctor", "--manifest", release.as_uri(), "--suppose")
    told = command(*ask, question)
    assert told.returncode == 0, told.stderr
    assert "cu128-sm120" in told.stdout.splitlines()[0]
    assert told.stdout.endswith("verdict: a model can be served on that machine\n")
    known = command(*ask, f"gpu={gpus.ZEROGPU.name}", "--json")
    assert known.returncode == 5  # no libraries were supposed
    assert json.loads(known.stdout)["choice"]["missing"]
    error, hint = known.stderr.splitlines()[-2:]
    assert error.startswith("error[CUDA_LIBRARY_MISSING]: ")
    assert "nvidia-cublas" in hint
    assert not list(Path(home["HF_HOME"]).rglob("runtimes/*"))
    page = command(*ask, "capability=6.0,driver=580")
    assert page.returncode == 5
    assert "cu130-sm90-linux-x86_64.tar.zst: CUDA 13.0 for 9.0: not for 6.0\n" in page.stdout
    assert page.stdout.endswith("verdict: a model cannot be served on that machine\n")
    assert "has nothing for compute capability 6.0 on that machine: none has code" in page.stderr
    assert "(invoke build-cuda --archs '60')" in page.stderr
    other = command(*ask, "capability=12.0,machine=aarch64")
    assert other.stderr.endswith("; its verdicts say why each artifact is passed over\n")
    none = json.loads(command(*ask, "glibc=2.36", "--json").stdout)
    assert (none["ok"], none["code"], none["choice"]) == (False, "NO_GPU", None)
    assert len(none["verdicts"]) == len(RELEASE.artifacts)
    assert command(*ask, "x=1").returncode == 2
    for option in (("--arch", "90"), ("--url", "https://x/a.tar.gz")):  # nothing is left to choose
        over = command(*ask, question, *option)
        assert (over.returncode, option[0] in over.stderr.splitlines()[0]) == (2, True)


def test_error_on_an_ascii_terminal_is_printed_escaped(home: dict[str, str]) -> None:
    home["PYTHONIOENCODING"] = "ascii:strict"
    assert r"\xfc" in refused(run(home, "fetch", "--arch", "ü"), 2, "SETTING_INVALID")


@pytest.mark.parametrize("both", [False, True])
def test_reader_that_goes_away_changes_neither_the_work_nor_the_status(
    both: object, home: dict[str, str], command: Command, release: Path
) -> None:
    """As with ``| true`` and ``2>&1 | true``: the pipe's reading end is closed before the start."""
    options = manifest_options(release)
    for argv in (
        ["--help"],
        ["fetch", "--help"],
        ["fetch", *options, "--allow-cpu", "--no-test-run"],
        ["fetch", "--url", (release / NAME).as_uri(), "--no-test-run"],  # with a warning
        ["fetch", "--manifest", "file:///nowhere.json"],
        ["doctor", *options, "--allow-cpu", "--no-test-run"],
    ):
        ours, theirs = os.pipe()
        os.close(ours)
        done = subprocess.run(
            [sys.executable, "-m", "llama_loader", *argv],
            env=home,
            stdout=theirs,
            stderr=theirs if both else subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(theirs)
        heard = command(*argv)
        assert done.returncode == heard.returncode, argv
        assert both or done.stderr == heard.stderr
    assert any((Path(home["HF_HOME"]) / "llama-loader/runtimes").rglob("llama-server"))


INTERRUPTED = """
import atexit, builtins, os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
where, imported = sys.argv.pop(1), builtins.__import__

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def importing(name, globals=None, locals=None, fromlist=(), level=0):
    if where == name or where in (fromlist or ()):
        builtins.__import__ = imported
        interrupt()
    return imported(name, globals, locals, fromlist, level)

builtins.__import__ = importing
if where == "the end":
    atexit.register(interrupt)
runpy.run_module("llama_loader", run_name="__main__", alter_sys=True)
"""


def interrupted(where: str, home: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", INTERRUPTED, where, *argv]
    return subprocess.run(command, env=home, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "where", ["typing", "argparse", "llama_loader.errors", "loader", "llama_loader.store"]
)
def test_interrupted_early_is_one_line_and_status_130(
    where: str, home: dict[str, str], release: Path
) -> None:
    done = interrupted(where, home, "fetch", *manifest_options(release), "--allow-cpu")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        "error[INTERRUPTED]: interrupted; the next run resumes with what was verified\n"
    )


def test_result_that_was_printed_stands_whatever_interrupts_later(
    home: dict[str, str], release: Path
) -> None:
    options = [*manifest_options(release), "--allow-cpu", "--no-test-run"]
    done = interrupted("the end", home, "fetch", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert (Path(done.stdout.strip()) / "llama-server").is_file()


def test_a_defect_is_one_line_with_its_place() -> None:
    script = (
        "from llama_loader import doctor\n"
        "def examine(*_, **__): raise ZeroDivisionError('x\\ny')\n"
        "doctor.examine = examine\n"
        "from llama_loader.__main__ import main\n"
        "main(['doctor'])\n"
    )
    told = heard([sys.executable, "-c", script], cwd=SPACES)
    assert told.returncode == 1
    lines = told.stderr.splitlines()
    assert (
        lines[0]
        == "error[UNEXPECTED]: an unexpected exception: ZeroDivisionError: x y (<string>:2)"
    )
    assert len(lines) == 2


def test_a_driver_that_hangs_keeps_nobody_from_ending(home: dict[str, str], tmp_path: Path) -> None:
    home["LD_LIBRARY_PATH"] = str(fake_nvml.compiled(tmp_path / "driver"))
    home["FAKE_NVML"] = "sleep"
    began = time.monotonic()
    done = run(home, "serve", "--model", "/m", "--", "--port", "1")
    refused(done, 2, "EXTRA_ARGUMENT")
    assert time.monotonic() - began < 10
